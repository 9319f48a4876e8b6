//! The solver through its public border, on fake operations: results are small file trees in
//! memory, operations are recipes that a test looks up by name.

mod cache;
mod errors;
mod large;
mod model;
mod progress;
mod reference;
mod schedule;
mod sharing;
mod simulation;
mod world;
