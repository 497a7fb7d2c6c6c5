//! Models by name: which there are, fetching them, and making engines of them.

pub mod catalogue;
pub mod digest;
pub mod folder;
pub mod gpu;
pub mod hub;
pub mod load;
pub mod pull;
pub mod show;
