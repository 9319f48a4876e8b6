//! Reads `buildkitd.toml`. Every key that buildkitd knows is either taken, or refused by its full
//! name if it asks for something that Kiln does not do; a key nobody knows is reported and skipped,
//! as buildkitd does.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::section::{ConfigError, Origin, Section, Setting};
use super::{Config, Dns, GcConfig, GcPolicy, LogLevel, NetworkMode, TlsFiles};

/// What builds may be granted. A step that needs a device is refused all the same.
const ENTITLEMENTS: &[&str] = &["network.host", "security.insecure", "device"];

pub(super) fn parse(
    mut config: Config,
    text: &str,
    path: &Path,
    settings: Vec<Setting>,
) -> Result<Config, ConfigError> {
    let mut table: Table = toml::from_str(text)
        .map_err(|error| ConfigError::Syntax { path: path.to_owned(), message: error.to_string() })?;
    let origin = Origin::new(path, &mut table, settings)?;
    let mut top = Section { origin: &origin, name: String::new(), table };
    for (key, level) in [("debug", LogLevel::Debug), ("trace", LogLevel::Trace)] {
        if top.boolean(key)? == Some(true) {
            config.log_level = level;
        }
    }
    if let Some(root) = top.string("root")?.filter(|root| !root.is_empty()) {
        config.root = root.into();
    }
    config.entitlements = top.strings("insecure-entitlements")?;
    if let Some(other) = config.entitlements.iter().find(|name| !ENTITLEMENTS.contains(&name.as_str())) {
        return top.unsupported("insecure-entitlements", Some(other));
    }
    top.refuse(&["proxyNetwork", "cache"])?;
    // Steps get no socket for traces, and no devices.
    top.accept(&["otel", "cdi"]);
    config.provenance_env_dir = top.string("provenanceEnvDir")?.map(Into::into);

    if let Some(log) = top.section("log")? {
        read_log(log, &mut config)?;
    }
    if let Some(grpc) = top.section("grpc")? {
        read_grpc(grpc, &mut config)?;
    }
    if let Some(mut worker) = top.section("worker")? {
        if let Some(oci) = worker.section("oci")? {
            read_oci(oci, &mut config)?;
        }
        if let Some(mut containerd) = worker.section("containerd")? {
            // What else it says is of no matter then.
            containerd.refuse(&["enabled"])?;
        }
        worker.finish(&mut config.warnings);
    }
    if let Some(registries) = top.section("registry")? {
        for (name, value) in registries.table.clone() {
            match value.try_into() {
                Ok(host) => drop(config.registries.hosts.insert(name, host)),
                Err(error) => return registries.wrong(&name, error.message()),
            }
        }
    }
    if let Some(mut dns) = top.section("dns")? {
        let nameservers = dns.strings("nameservers")?;
        if nameservers.iter().any(|server| server.parse::<std::net::IpAddr>().is_err()) {
            return dns.wrong("nameservers", "expected IP addresses");
        }
        config.dns =
            Dns { nameservers, options: dns.strings("options")?, search: dns.strings("searchDomains")? };
        dns.finish(&mut config.warnings);
    }
    if let Some(mut history) = top.section("history")? {
        if let Some(age) = history.duration("maxAge")? {
            config.history.max_age = age;
        }
        if let Some(entries) = history.number("maxEntries")? {
            config.history.max_entries = entries;
        }
        history.finish(&mut config.warnings);
    }
    if let Some(mut frontend) = top.section("frontend")? {
        if let Some(mut section) = frontend.section("dockerfile.v0")? {
            config.frontends.dockerfile = section.boolean("enabled")?.unwrap_or(true);
            section.finish(&mut config.warnings);
        }
        if let Some(mut section) = frontend.section("gateway.v0")? {
            config.frontends.gateway = section.boolean("enabled")?.unwrap_or(true);
            config.frontends.allowed_repositories = section.strings("allowedRepositories")?;
            section.finish(&mut config.warnings);
        }
        frontend.finish(&mut config.warnings);
    }
    if let Some(mut system) = top.section("system")? {
        // Platforms are looked for once, at the start.
        system.accept(&["platformsCacheMaxAge"]);
        system.refuse(&["maxRegistryConcurrency"])?;
        system.finish(&mut config.warnings);
    }
    top.finish(&mut config.warnings);
    Ok(config)
}

fn read_log(mut log: Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    match log.string("format")?.as_deref() {
        None | Some("" | "text") => {}
        Some(format) => return log.unsupported("format", Some(format)),
    }
    if let Some(level) = log.string("level")?.filter(|level| !level.is_empty()) {
        config.log_level = match level.to_ascii_lowercase().as_str() {
            "trace" => LogLevel::Trace,
            "debug" => LogLevel::Debug,
            "info" => LogLevel::Info,
            "warn" | "warning" => LogLevel::Warn,
            "error" | "fatal" | "panic" => LogLevel::Error,
            _ => return log.wrong("level", "expected trace, debug, info, warn or error"),
        };
    }
    log.finish(&mut config.warnings);
    Ok(())
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
            (Some(_), None) => return tls.wrong("cert", "certificate and key must be given together"),
            (None, Some(_)) => return tls.wrong("key", "certificate and key must be given together"),
        };
        tls.finish(&mut config.warnings);
    }
    grpc.finish(&mut config.warnings);
    Ok(())
}

fn read_oci(mut oci: Section<'_>, config: &mut Config) -> Result<(), ConfigError> {
    if oci.boolean("enabled")? == Some(false) {
        return oci.unsupported("enabled", Some("false"));
    }
    if let Some(labels) = oci.section("labels")? {
        for (name, value) in &labels.table {
            let Value::String(value) = value else { return labels.wrong(name, "expected a string") };
            config.labels.insert(name.clone(), value.clone());
        }
    }
    config.platforms = oci.strings("platforms")?;
    if let Some(other) = config.platforms.iter().find(|text| kiln_proto::platform::parse(text).is_err()) {
        return oci.wrong("platforms", &format!("{other:?} is not a platform"));
    }
    match oci.string("snapshotter")?.as_deref() {
        None | Some("" | "auto" | "overlayfs") => {}
        Some(snapshotter) => return oci.unsupported("snapshotter", Some(snapshotter)),
    }
    oci.refuse(&[
        "rootless",
        "noProcessSandbox",
        "userRemapUnsupported",
        "proxySnapshotterPath",
        "stargzSnapshotter",
        "apparmor-profile",
        "selinux",
    ])?;
    // They matter only in the network modes that are refused, and BuildKit's defaults are often written out.
    oci.accept(&["cniConfigPath", "cniBinaryPath", "cniPoolSize", "bridgeName", "bridgeSubnet"]);
    config.network = match oci.string("networkMode")?.as_deref() {
        None | Some("" | "auto") => NetworkMode::Auto,
        Some("host") => NetworkMode::Host,
        Some("none") => NetworkMode::None,
        Some(mode) => return oci.unsupported("networkMode", Some(mode)),
    };
    config.runtime_binary = oci.string("binary")?.filter(|binary| !binary.is_empty());
    config.cgroup_parent = oci.string("defaultCgroupParent")?.filter(|parent| !parent.is_empty());
    config.max_parallelism = oci.number("max-parallelism")?.unwrap_or(0);
    read_gc(&mut oci, &mut config.gc, &mut config.warnings)?;
    oci.finish(&mut config.warnings);
    Ok(())
}

fn read_gc(oci: &mut Section<'_>, gc: &mut GcConfig, warnings: &mut Vec<String>) -> Result<(), ConfigError> {
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
        let mut section = Section { origin: oci.origin, name, table };
        let keep = section.space("keepBytes")?;
        gc.policies.push(GcPolicy {
            all: section.boolean("all")?.unwrap_or(false),
            filters: section.strings("filters")?,
            keep_duration: section.duration("keepDuration")?.unwrap_or_default(),
            reserved: section.space("reservedSpace")?.or(keep),
            max_used: section.space("maxUsedSpace")?,
            min_free: section.space("minFreeSpace")?,
        });
        section.finish(warnings);
    }
    Ok(())
}
