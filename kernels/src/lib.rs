//! Token ids in, token ids out: weights, model families and the ops they are made of.
//!
//! The only crate with `unsafe`. It knows nothing of documents or dataflow; its seam is [`step`].
//! Every op exists in `reference/` as a plain f32 loop and in `cpu/` as the fast path, under one name;
//! `backend` is the list of the ops. Text never comes here: tokenizers live with the operators.

mod backend;
pub mod cache;
mod cpu;
pub mod gguf;
pub mod gpu;
pub mod models;
pub mod peak;
pub mod quant;
mod reference;
pub mod safetensors;
pub mod sample;
mod shared;
pub mod step;
mod team;
