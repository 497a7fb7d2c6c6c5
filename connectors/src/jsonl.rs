//! JSON lines in and out: one JSON object a line.

mod infer;
mod lines;
mod shape;
mod sink;
mod source;

pub use lines::MAX_LINE_BYTES;
pub use sink::JsonlSink;
pub use source::{JsonlSource, STDIN_SAMPLE_BYTES, STDIN_SAMPLE_ROWS};
