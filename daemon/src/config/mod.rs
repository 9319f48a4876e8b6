//! What the daemon is configured with: the effective [`Config`], its defaults, and (in `file`) how
//! `buildkitd.toml` is read into it, with what flags set over it. Nothing here opens or starts anything.

mod file;
mod section;
mod units;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use kiln_worker::Dns;
pub use kiln_worker::registry::{HostConfig, RegistryConfig};
pub use section::{ConfigError, Setting};
pub use units::DiskSpace;
pub(crate) use units::parse_duration;

/// Everything the daemon needs to start. Build it with [`Config::default`] or [`Config::load`] and
/// then let command line flags overwrite fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Where all persistent data lives.
    pub root: PathBuf,
    /// Addresses to listen on: `unix://PATH`, `tcp://HOST:PORT`, or `fd://` for the first socket that a service
    /// manager hands over.
    pub addresses: Vec<String>,
    /// Owner of unix sockets; the daemon's own user if absent.
    pub socket_uid: Option<u32>,
    /// Group of unix sockets; with it the socket is accessible to that group.
    pub socket_gid: Option<u32>,
    /// Certificates for `tcp://` addresses; plain text without.
    pub tls: Option<TlsFiles>,
    /// Leave after this time without a connection or build; never if absent.
    pub idle_exit: Option<Duration>,
    /// How much is logged.
    pub log_level: LogLevel,
    /// What is to be said about the configuration once there is a log.
    pub warnings: Vec<String>,
    /// Mirrors, plain HTTP, certificates and the like of registries.
    pub registries: RegistryConfig,
    /// How many sandboxed processes may run at once over all builds; 0 is four for each CPU, and
    /// at least 16.
    pub max_parallelism: usize,
    /// Network of steps that ask for the default one.
    pub network: NetworkMode,
    /// An external OCI runtime (`runc`, `crun`, a path); the built-in sandbox if absent.
    pub runtime_binary: Option<String>,
    /// Parent of the sandboxes' cgroups.
    pub cgroup_parent: Option<String>,
    /// Name servers and the like for `/etc/resolv.conf` in sandboxes.
    pub dns: Dns,
    /// Entitlements that builds may be granted: `network.host`, `security.insecure`, `device`.
    pub entitlements: Vec<String>,
    /// Extra labels of the worker record.
    pub labels: BTreeMap<String, String>,
    /// Platforms that the worker reports; found out if empty.
    pub platforms: Vec<String>,
    /// Whether and how the cache is cleaned by itself.
    pub gc: GcConfig,
    /// How much of finished builds is kept.
    pub history: HistoryConfig,
    /// Directory of JSON files whose fields go into provenance.
    pub provenance_env_dir: Option<PathBuf>,
    /// Which frontends clients may ask for.
    pub frontends: FrontendConfig,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: default_root(),
            addresses: vec![format!("unix://{}", default_socket().display())],
            socket_uid: None,
            socket_gid: None,
            tls: None,
            idle_exit: None,
            log_level: LogLevel::Info,
            warnings: Vec::new(),
            registries: RegistryConfig::default(),
            max_parallelism: 0,
            network: NetworkMode::Auto,
            runtime_binary: None,
            cgroup_parent: None,
            dns: Dns::default(),
            entitlements: Vec::new(),
            labels: BTreeMap::new(),
            platforms: Vec::new(),
            gc: GcConfig::default(),
            history: HistoryConfig::default(),
            provenance_env_dir: None,
            frontends: FrontendConfig::default(),
        }
    }
}

impl Config {
    /// Reads a `buildkitd.toml`; what it does not say keeps its default.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, holds a value of the wrong kind, or sets something
    /// that Kiln does not do (`unsupported: …` with the key's name).
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::default().with(&text, path, Vec::new())
    }

    /// This as the defaults of a `buildkitd.toml` with that text, and flags over it; `path` is for error texts.
    ///
    /// # Errors
    /// As [`Config::load`], except for reading.
    pub fn with(self, text: &str, path: &Path, settings: Vec<Setting>) -> Result<Self, ConfigError> {
        file::parse(self, text, path, settings)
    }
}

/// How much is logged: this and what is worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// What failed.
    Error,
    /// What looks wrong.
    Warn,
    /// What happens.
    Info,
    /// Why.
    Debug,
    /// Everything.
    Trace,
}

/// PEM files of the listening side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain.
    pub cert: PathBuf,
    /// Private key.
    pub key: PathBuf,
    /// Clients must show a certificate signed by this.
    pub client_ca: Option<PathBuf>,
}

/// Network of steps that do not ask for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkMode {
    /// The host's, as buildkitd does where no CNI is set up.
    #[default]
    Auto,
    /// The host's.
    Host,
    /// Loopback only.
    None,
}

/// Garbage collection of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcConfig {
    /// Runs by itself, after the start and after builds.
    pub enabled: bool,
    /// Rules, applied in order; the default list if empty.
    pub policies: Vec<GcPolicy>,
    /// Keep at least this much, for the default list. Of the three, those that are not set are no limit, unless
    /// none is: then the disk's size gives them.
    pub reserved: Option<DiskSpace>,
    /// Never use more, for the default list.
    pub max_used: Option<DiskSpace>,
    /// Leave this much free on the disk, for the default list.
    pub min_free: Option<DiskSpace>,
}

impl Default for GcConfig {
    fn default() -> Self {
        Self { enabled: true, policies: Vec::new(), reserved: None, max_used: None, min_free: None }
    }
}

/// One rule of garbage collection.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GcPolicy {
    /// Internal and frontend records too.
    pub all: bool,
    /// Records that match any of these.
    pub filters: Vec<String>,
    /// Records used within this time are kept.
    pub keep_duration: Duration,
    /// Keep at least this much.
    pub reserved: Option<DiskSpace>,
    /// Never use more.
    pub max_used: Option<DiskSpace>,
    /// Leave this much free on the disk.
    pub min_free: Option<DiskSpace>,
}

/// Which frontends clients may ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendConfig {
    /// The built-in one for Dockerfiles.
    pub dockerfile: bool,
    /// Those that are images.
    pub gateway: bool,
    /// Names of such images, without tag and digest; empty allows all.
    pub allowed_repositories: Vec<String>,
}

impl Default for FrontendConfig {
    fn default() -> Self {
        Self { dockerfile: true, gateway: true, allowed_repositories: Vec::new() }
    }
}

/// Records of finished builds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HistoryConfig {
    /// Unpinned records are dropped after this time.
    pub max_age: Duration,
    /// At most this many unpinned records are kept.
    pub max_entries: usize,
}

impl Default for HistoryConfig {
    fn default() -> Self {
        Self { max_age: Duration::from_secs(48 * 3600), max_entries: 50 }
    }
}

/// `$KILN_ROOT` if set; `/var/lib/kiln` for root, else `$XDG_DATA_HOME/kiln` (or `~/.local/share/kiln`).
pub fn default_root() -> PathBuf {
    if let Some(root) = std::env::var_os("KILN_ROOT").filter(|root| !root.is_empty()) {
        return PathBuf::from(root);
    }
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/var/lib/kiln");
    }
    std::env::var_os("XDG_DATA_HOME")
        .filter(|dir| !dir.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".local/share")))
        .unwrap_or_else(|| PathBuf::from("/var/tmp"))
        .join("kiln")
}

/// `/run/kiln` for root, else `$XDG_RUNTIME_DIR/kiln`: for sockets and short-lived files.
pub(crate) fn runtime_dir() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/kiln");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => Path::new(&dir).join("kiln"),
        None => default_root(),
    }
}

/// `kilnd.sock` in `/run/kiln` for root, else in `$XDG_RUNTIME_DIR/kiln`.
pub fn default_socket() -> PathBuf {
    runtime_dir().join("kilnd.sock")
}
