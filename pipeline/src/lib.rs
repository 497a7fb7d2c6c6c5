//! From a definition to a running dataflow.
#![forbid(unsafe_code)]
