//! How a step runs: sources, sandboxes, file operations, layers, exporters.

pub mod export;
pub mod image;
pub mod layer;
pub mod ops;
pub mod registry;
pub mod sandbox;
pub mod view;
