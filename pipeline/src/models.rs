//! Models by name: which there are, fetching them, and making engines of them.

pub mod catalogue;
pub mod load;
pub mod pull;
