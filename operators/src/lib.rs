//! Timely operators that turn documents into answers: render and tokenize, recall, group, infer.
//!
//! Each operator is a thin shell over a plain core that is tested without a dataflow. Models appear only as
//! `dyn Model`; sources, sinks and file formats do not appear at all.
#![forbid(unsafe_code)]

pub mod batch;
pub mod chat;
pub mod counters;
pub mod document;
pub mod group;
pub mod in_flight;
pub mod infer;
pub mod journal;
pub mod recall;
pub mod template;
pub mod tenants;
pub mod tokenize;
pub mod tokenizer;

/// The time of the dataflow: one source batch.
pub type Epoch = u64;
