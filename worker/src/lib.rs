//! How a step runs: sources, sandboxes, file operations, layers, exporters.

pub mod export;
mod filework;
mod flat;
pub mod image;
pub mod layer;
mod lenders;
mod linktree;
mod locks;
mod mount;
pub mod ops;
pub mod registry;
pub mod remotecache;
pub mod sandbox;
pub mod view;
mod worker;

pub use worker::{Dns, Worker, WorkerConfig, WorkerError};
