//! Kiln from outside: the binary, a real registry, and independent tools as judges. Needs root.

mod build;
mod buildkitd;
mod cancel;
mod clients;
mod concurrency;
mod containers;
mod contexts;
mod crash;
mod crowd;
mod early_cutoff;
mod errors;
mod explain;
mod failed_steps;
mod garbage;
mod gateway_client;
mod git;
mod history;
mod http;
mod metadata;
mod outputs;
mod own_image;
mod provenance;
mod remote_cache;
mod solve;
mod source_meta;
mod usage;
