//! What to run and when: the graph, keys, scheduling, sharing between builds, progress. It owns no
//! container, registry or file system; it sees operations and results through the traits in [`op`].

pub mod op;
pub mod progress;
