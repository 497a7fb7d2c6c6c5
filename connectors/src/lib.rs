//! Where rows come from and where they go: files of Parquet and JSON lines with the manifest, and Kafka topics with
//! the transactions, that make the way between them exactly once.
//!
//! Knows bytes and Arrow batches. What the rows mean, and who runs when, is decided above.
#![forbid(unsafe_code)]

pub mod files;
pub mod jsonl;
pub mod kafka;
pub mod manifest;
pub mod output;
pub mod parquet;
#[cfg(test)]
mod random;
pub mod sink;
pub mod source;
