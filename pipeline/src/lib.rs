//! From a definition to a running dataflow: [`spec`] (as written) → [`plan`] (checked) → [`render`].
//!
//! Also the command line and what the user sees. No CUDA and no Kafka client are named here: those are
//! behind the seams of `tidemill-kernels` and `tidemill-connectors`.
#![forbid(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod clock;
pub mod cores;
pub mod explain;
pub mod models;
pub mod observe;
pub mod plan;
pub mod progress;
pub mod render;
pub mod run;
pub mod spec;
pub mod state;
pub mod summary;
pub mod top;
pub mod topics;
