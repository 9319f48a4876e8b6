//! Which endpoints serve a registry's name, and how they are spoken to.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

/// Settings of all registries, by the name that references use (`docker.io`, `host:port`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryConfig {
    /// As in `[registry."NAME"]` of buildkitd.toml.
    pub hosts: BTreeMap<String, HostConfig>,
}

/// One `[registry."NAME"]` table of buildkitd.toml.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostConfig {
    /// Hosts (with an optional path prefix) that are asked before the registry itself, on pulls only.
    pub mirrors: Vec<String>,
    /// Plain HTTP. Not set: only for loopback hosts.
    pub http: Option<bool>,
    /// HTTPS without checking certificates, falling back to plain HTTP.
    pub insecure: Option<bool>,
    /// PEM files with further authorities.
    pub ca: Vec<PathBuf>,
    /// Client certificates.
    pub keypair: Vec<KeyPair>,
    /// Directories with `*.crt` authorities and `*.cert`/`*.key` pairs.
    pub tlsconfigdir: Vec<PathBuf>,
}

/// A client certificate.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct KeyPair {
    /// PEM file with the private key.
    pub key: PathBuf,
    /// PEM file with the certificate chain.
    pub cert: PathBuf,
}

/// One way to reach a repository's registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Endpoint {
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    /// Host with port.
    pub(super) host: String,
    /// Path prefix of a mirror: empty, or `/prefix`.
    pub(super) prefix: String,
    /// Certificates are not checked.
    pub(super) skip_verify: bool,
    /// For mirrors: the registry that is meant (`ns` query parameter).
    pub(super) namespace: Option<String>,
    /// Name of the configuration table that holds for it.
    pub(super) config: String,
}

impl RegistryConfig {
    /// Endpoints for the registry `domain` in the order in which they are tried.
    pub(super) fn endpoints(&self, domain: &str, push: bool, insecure: bool) -> Vec<Endpoint> {
        let mut endpoints = Vec::new();
        if !push {
            for mirror in self.hosts.get(domain).into_iter().flat_map(|host| &host.mirrors) {
                let mirror = mirror.trim_end_matches('/');
                let (host, prefix) = match mirror.split_once('/') {
                    Some((host, prefix)) => (host, format!("/{prefix}")),
                    None => (mirror, String::new()),
                };
                self.push_endpoints(&mut endpoints, host, &prefix, Some(domain), false);
            }
        }
        self.push_endpoints(&mut endpoints, domain, "", None, insecure);
        endpoints
    }

    fn push_endpoints(
        &self,
        endpoints: &mut Vec<Endpoint>,
        domain: &str,
        prefix: &str,
        namespace: Option<&str>,
        insecure: bool,
    ) {
        let config = self.hosts.get(domain);
        let host = if domain == "docker.io" { "registry-1.docker.io" } else { domain };
        let insecure = insecure || config.and_then(|c| c.insecure).unwrap_or(false);
        let http = config.and_then(|c| c.http);
        let mut add = |scheme| {
            endpoints.push(Endpoint {
                scheme,
                host: host.to_string(),
                prefix: prefix.to_string(),
                skip_verify: insecure && scheme == "https",
                namespace: namespace.map(str::to_string),
                config: domain.to_string(),
            });
        };
        match (http, insecure) {
            (Some(true), _) => add("http"),
            (None, false) if is_loopback(host) => add("http"),
            (None, true) if is_loopback(host) => {
                add("http");
                add("https");
            }
            (None, true) => {
                add("https");
                add("http");
            }
            _ => add("https"),
        }
    }

    pub(super) fn host(&self, name: &str) -> Option<&HostConfig> {
        self.hosts.get(name)
    }
}

/// Whether `host[:port]` is this machine itself.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
