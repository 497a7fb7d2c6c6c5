//! Keeps a decoder that meets damaged bytes from taking the process down.

/// The value, or what went wrong as text.
pub(super) fn catch<T, E: std::fmt::Display>(decode: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    decode().map_err(|error| plain(error.to_string()))
}

/// The libraries put the name of the format before their texts, once for each layer.
fn plain(text: String) -> String {
    let mut rest = text.as_str();
    for prefix in ["Parquet argument error: ", "Parquet error: ", "External: ", "EOF: "] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest.to_owned()
}
