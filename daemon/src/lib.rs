//! The long-running server: BuildKit's gRPC services over one engine (store, solver, worker,
//! sessions), the built-in frontends, build history and configuration. What the parts themselves do
//! is in their crates; `engine` is the only module here that calls them.

mod activation;
mod build;
mod config;
mod daemon;
mod engine;
mod error;
mod explain;
mod frontends;
mod gateway;
mod history;
mod jobs;
mod policy;
mod progress;
mod provenance;
mod server;
mod services;
mod traces;
mod workers;

/// With this among the filters of a disk usage request, records for what the store needs for itself are listed, too.
pub const STORE_RECORDS: &str = "type==kiln.store";

pub use config::{
    Config, ConfigError, DiskSpace, Dns, GcConfig, GcPolicy, HistoryConfig, HostConfig, LogLevel,
    NetworkMode, RegistryConfig, Setting, TlsFiles, default_root, default_socket,
};
pub use daemon::{DaemonError, run, serve};
pub use error::BuildError;
pub use history::build_status;
pub use workers::VERSION;
