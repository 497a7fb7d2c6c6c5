//! Parquet files in and out.

mod sink;
mod source;

pub use sink::ParquetSink;
pub use source::ParquetSource;
