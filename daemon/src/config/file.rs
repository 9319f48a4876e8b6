//! Reads `buildkitd.toml`. Every key that buildkitd knows is either taken, or refused by its full
//! name if it asks for something that Kiln does not do; a key nobody knows is reported and skipped,
//! as buildkitd does.

use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::{Table, Value};

use super::units::{DiskSpace, parse_duration};
use super::{Config, DnsConfig, GcConfig, GcPolicy, NetworkMode, TlsFiles};

/// Why a configuration file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("failed to read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML.
    #[error("{}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        message: String,
    },
    /// A key has a value of the wrong kind.
    #[error("{}: {key}: {message}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Full name of the key.
        key: String,
        /// What is expected.
        message: String,
    },
    /// A key asks for something that is not there.
    #[error("unsupported: {key} in {}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Full name of the key.
        key: String,
    },
}

/// A table whose keys are taken one after the other; what is left was not known.
struct Section<'a> {
    path: &'a Path,
    name: String,
    table: Table,
}

impl<'a> Section<'a> {
    fn key(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    fn wrong<T>(&self, key: &str, message: &str) -> Result<T, ConfigError> {
        Err(ConfigError::Value {
            path: self.path.to_owned(),
            key: self.key(key),
            message: message.to_owned(),
        })
    }

    /// The value, unless absent or empty in the way that Go's zero value is.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.table.remove(key)
    }

    fn section(&mut self, key: &str) -> Result<Option<Section<'a>>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Section { path: self.path, name: self.key(key), table })),
            Some(_) => self.wrong(key, "expected a table"),
        }
    }

    fn string(&mut self, key: &str) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => self.wrong(key, "expected a string"),
        }
    }

    fn boolean(&mut self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Boolean(flag)) => Ok(Some(flag)),
            Some(_) => self.wrong(key, "expected true or false"),
        }
    }

    fn number<T: TryFrom<i64>>(&mut self, key: &str) -> Result<Option<T>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => match T::try_from(number) {
                Ok(number) => Ok(Some(number)),
                Err(_) => self.wrong(key, "number out of range"),
            },
            Some(_) => self.wrong(key, "expected a number"),
        }
    }

    fn strings(&mut self, key: &str) -> Result<Vec<String>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let Value::Array(items) = value else { return self.wrong(key, "expected a list of strings") };
        items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                _ => self.wrong(key, "expected a list of strings"),
            })
            .collect()
    }

    fn space(&mut self, key: &str) -> Result<Option<DiskSpace>, ConfigError> {
        let space = match self.take(key) {
            None => return Ok(None),
            Some(Value::Integer(bytes)) if bytes >= 0 => Some(DiskSpace::Bytes(bytes)),
            Some(Value::String(text)) => DiskSpace::parse(&text),
            Some(_) => None,
        };
        match space {
            Some(space) => Ok(Some(space)),
            None => self.wrong(key, "expected bytes, or a text such as 512MB or 10%"),
        }
    }

    /// A number counts as seconds.
    fn duration(&mut self, key: &str) -> Result<Option<Duration>, ConfigError> {
        let duration = match self.take(key) {
            None => return Ok(None),
            Some(Value::Integer(seconds)) => u64::try_from(seconds).ok().map(Duration::from_secs),
            Some(Value::String(text)) => {
                text.parse().ok().map(Duration::from_secs).or_else(|| parse_duration(&text))
            }
            Some(_) => None,
        };
        match duration {
            Some(duration) => Ok(Some(duration)),
            None => self.wrong(key, "expected seconds, or a text such as 48h"),
        }
    }

    /// Refuses a key that is set to anything but a zero value.
    fn refuse(&mut self, keys: &[&str]) -> Result<(), ConfigError> {
        for key in keys {
            let set = match self.take(key) {
                None => false,
                Some(Value::Boolean(flag)) => flag,
                Some(Value::String(text)) => !text.is_empty(),
                Some(Value::Integer(number)) => number != 0,
                Some(Value::Array(items)) => !items.is_empty(),
                Some(Value::Table(table)) => !table.is_empty(),
                Some(_) => true,
            };
            if set {
                return Err(ConfigError::Unsupported { path: self.path.to_owned(), key: self.key(key) });
            }
        }
        Ok(())
    }

    /// Takes keys that need no action here.
    fn accept(&mut self, keys: &[&str]) {
        for key in keys {
            self.table.remove(*key);
        }
    }

    fn finish(self) {
        for key in self.table.keys() {
            tracing::warn!(file = %self.path.display(), key = self.key(key), "unknown configuration key");
        }
    }
}

pub(super) fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
    let table: Table = toml::from_str(text)
        .map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })?;
    let mut top = Section { path, name: String::new(), table };
    let debug = top.boolean("debug")?.unwrap_or(false) | top.boolean("trace")?.unwrap_or(false);
    let mut config = Config { debug, ..Config::default() };

    if let Some(root) = top.string("root")? {
        config.root = root.into();
    }
    config.entitlements = top.strings("insecure-entitlements")?;
    if let Some(other) =
        config.entitlements.iter().find(|name| !matches!(name.as_str(), "network.host" | "security.insecure"))
    {
        return Err(ConfigError::Unsupported {
            path: path.to_owned(),
            key: format!("insecure-entitlements {other}"),
        });
    }
    top.refuse(&["proxyNetwork", "otel", "cache"])?;
    top.accept(&["provenanceEnvDir", "cdi"]);

    if let Some(mut log) = top.section("log")? {
        match log.string("format")?.as_deref() {
            None | Some("" | "text") => {}
            Some(format) => {
                return Err(ConfigError::Unsupported {
                    path: path.to_owned(),
                    key: format!("log.format = {format}"),
                });
            }
        }
        if let Some(level) = log.string("level")? {
            match level.as_str() {
                "debug" | "trace" => config.debug = true,
                "" | "info" => {}
                other => {
                    return Err(ConfigError::Unsupported {
                        path: path.to_owned(),
                        key: format!("log.level = {other}"),
                    });
                }
            }
        }
        log.finish();
    }
    if let Some(grpc) = top.section("grpc")? {
        read_grpc(grpc, &mut config)?;
    }
    if let Some(mut worker) = top.section("worker")? {
        if let Some(oci) = worker.section("oci")? {
            read_oci(oci, &mut config)?;
        }
        if let Some(mut containerd) = worker.section("containerd")? {
            containerd.refuse(&["enabled"])?;
        }
        worker.finish();
    }
    if let Some(registries) = top.section("registry")? {
        for (name, value) in registries.table {
            let host = value.try_into().map_err(|error: toml::de::Error| ConfigError::Value {
                path: path.to_owned(),
                key: format!("registry.{name}"),
                message: error.message().to_owned(),
            })?;
            config.registries.hosts.insert(name, host);
        }
    }
    if let Some(mut dns) = top.section("dns")? {
        config.dns = Some(DnsConfig {
            nameservers: dns.strings("nameservers")?,
            options: dns.strings("options")?,
            search: dns.strings("searchDomains")?,
        });
        dns.finish();
    }
    if let Some(mut history) = top.section("history")? {
        if let Some(age) = history.duration("maxAge")? {
            config.history.max_age = age;
        }
        if let Some(entries) = history.number("maxEntries")? {
            config.history.max_entries = entries;
        }
        history.finish();
    }
    if let Some(mut frontend) = top.section("frontend")? {
        for name in ["dockerfile.v0", "gateway.v0"] {
            if let Some(mut section) = frontend.section(name)? {
                if section.boolean("enabled")? == Some(false) {
                    return Err(ConfigError::Unsupported {
                        path: path.to_owned(),
                        key: format!("frontend.{name}.enabled = false"),
                    });
                }
                section.refuse(&["allowedRepositories"])?;
                section.finish();
            }
        }
        frontend.finish();
    }
    if let Some(mut system) = top.section("system")? {
        system.accept(&["platformsCacheMaxAge"]);
        system.refuse(&["maxRegistryConcurrency"])?;
        system.finish();
    }
    top.finish();
    Ok(config)
}

fn read_grpc(mut grpc: Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    let addresses = grpc.strings("address")?;
    if !addresses.is_empty() {
        config.addresses = addresses;
    }
    config.socket_uid = grpc.number("uid")?;
    config.socket_gid = grpc.number("gid")?;
    grpc.refuse(&["debugAddress", "securityDescriptor"])?;
    if let Some(mut tls) = grpc.section("tls")? {
        let (cert, key, ca) = (tls.string("cert")?, tls.string("key")?, tls.string("ca")?);
        config.tls = match (cert.filter(|s| !s.is_empty()), key.filter(|s| !s.is_empty())) {
            (Some(cert), Some(key)) => Some(TlsFiles {
                cert: cert.into(),
                key: key.into(),
                client_ca: ca.filter(|s| !s.is_empty()).map(PathBuf::from),
            }),
            (None, None) => None,
            _ => return tls.wrong("cert", "cert and key must be given together"),
        };
        tls.finish();
    }
    grpc.finish();
    Ok(())
}

fn read_oci(mut oci: Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    if oci.boolean("enabled")? == Some(false) {
        return Err(ConfigError::Unsupported {
            path: oci.path.to_owned(),
            key: "worker.oci.enabled = false".to_owned(),
        });
    }
    if let Some(labels) = oci.section("labels")? {
        for (name, value) in &labels.table {
            let Value::String(value) = value else { return labels.wrong(name, "expected a string") };
            config.labels.insert(name.clone(), value.clone());
        }
    }
    config.platforms = oci.strings("platforms")?;
    match oci.string("snapshotter")?.as_deref() {
        None | Some("" | "auto" | "overlayfs") => {}
        Some(_) => {
            return Err(ConfigError::Unsupported { path: oci.path.to_owned(), key: oci.key("snapshotter") });
        }
    }
    oci.refuse(&[
        "rootless",
        "noProcessSandbox",
        "userRemapUnsupported",
        "proxySnapshotterPath",
        "stargzSnapshotter",
        "apparmor-profile",
        "selinux",
        "cniPoolSize",
    ])?;
    // BuildKit's defaults for CNI and bridge are often written out; they matter only in those modes.
    oci.accept(&["cniConfigPath", "cniBinaryPath", "bridgeName", "bridgeSubnet"]);
    config.network = match oci.string("networkMode")?.as_deref() {
        None | Some("" | "auto") => NetworkMode::Auto,
        Some("host") => NetworkMode::Host,
        Some("none") => NetworkMode::None,
        Some(mode) => {
            return Err(ConfigError::Unsupported {
                path: oci.path.to_owned(),
                key: format!("{} = {mode}", oci.key("networkMode")),
            });
        }
    };
    config.runtime_binary = oci.string("binary")?.filter(|binary| !binary.is_empty());
    config.cgroup_parent = oci.string("defaultCgroupParent")?.filter(|parent| !parent.is_empty());
    config.max_parallelism = oci.number("max-parallelism")?.unwrap_or(0);
    read_gc(&mut oci, &mut config.gc)?;
    oci.finish();
    Ok(())
}

fn read_gc(oci: &mut Section<'_>, gc: &mut GcConfig) -> Result<(), ConfigError> {
    gc.enabled = oci.boolean("gc")?.unwrap_or(true);
    let keep = oci.space("gckeepstorage")?;
    gc.reserved = oci.space("reservedSpace")?.or(keep);
    gc.max_used = oci.space("maxUsedSpace")?;
    gc.min_free = oci.space("minFreeSpace")?;
    let policies = match oci.take("gcpolicy") {
        None => Vec::new(),
        Some(Value::Array(policies)) => policies,
        Some(_) => return oci.wrong("gcpolicy", "expected a list of tables"),
    };
    for (index, policy) in policies.into_iter().enumerate() {
        let name = format!("{}[{index}]", oci.key("gcpolicy"));
        let Value::Table(table) = policy else { return oci.wrong("gcpolicy", "expected a list of tables") };
        let mut section = Section { path: oci.path, name, table };
        let keep = section.space("keepBytes")?;
        gc.policies.push(GcPolicy {
            all: section.boolean("all")?.unwrap_or(false),
            filters: section.strings("filters")?,
            keep_duration: section.duration("keepDuration")?.unwrap_or_default(),
            reserved: section.space("reservedSpace")?.or(keep),
            max_used: section.space("maxUsedSpace")?,
            min_free: section.space("minFreeSpace")?,
        });
        section.finish();
    }
    Ok(())
}
