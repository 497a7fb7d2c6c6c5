//! Keeps a decoder that meets damaged bytes from taking the process down.
//!
//! The Parquet library indexes out of bounds on some damaged pages (the fuzzer beside this file finds them), so
//! its panics are caught and become errors like any other. The panic hook still reports where it happened.

use std::any::Any;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The value, or what went wrong as text. After an error, whatever `decode` changed must not be used again.
pub(super) fn catch<T, E: Display>(decode: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(result) => result.map_err(|error| plain(&error.to_string())),
        Err(panic) => Err(format!("damaged data: {}", panic_text(panic.as_ref()))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the decoder gave up")
}

/// The libraries put the name of the format before their texts, once for each layer.
fn plain(text: &str) -> String {
    let mut rest = text;
    for prefix in ["Parquet argument error: ", "Parquet error: ", "External: ", "EOF: "] {
        rest = rest.strip_prefix(prefix).unwrap_or(rest);
    }
    rest.to_owned()
}
