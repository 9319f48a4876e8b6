//! What to run and when: the graph, keys, scheduling, sharing between builds, progress. It owns no
//! container, registry or file system; it sees operations and results through the traits in [`op`].
//!
//! A [`Solver`] is what builds share: the key store, the table of work in flight, the limit on
//! parallel steps. A [`Build`] is one client's request with its own graph, owned by one task.

mod build;
mod error;
pub mod explain;
pub mod export;
pub mod import;
mod keys;
mod limit;
pub mod op;
mod owner;
mod prepare;
mod produced;
pub mod progress;
mod record;
mod solver;
mod work;

pub use build::{Build, BuildOptions, LoadedHandle};
pub use error::SolveError;
pub use solver::{Solver, SolverOptions};
