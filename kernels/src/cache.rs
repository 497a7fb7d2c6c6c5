//! The folder for what Tidemill can make or fetch again: models, packed weights, compiled kernels. `build.rs` and the
//! scripts look for it in the same way.

use std::path::PathBuf;

/// None where the environment names no folder.
pub fn user_cache() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    var("TIDEMILL_CACHE")
        .or_else(|| var("XDG_CACHE_HOME").map(|folder| folder.join("tidemill")))
        .or_else(|| var("HOME").map(|folder| folder.join(".cache/tidemill")))
}
