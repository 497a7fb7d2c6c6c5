//! Bytes, files and Arrow batches.
#![forbid(unsafe_code)]
