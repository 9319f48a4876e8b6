//! What a client asks for beside the Dockerfile: the frontend attributes, read into types once.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use kiln_proto::{pb, platform};

use crate::gofmt;

/// An attribute that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionsError(String);

/// Which copy of an image a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ResolveMode {
    /// The daemon's choice.
    #[default]
    Default,
    /// What the registry has now.
    Pull,
    /// What is on this machine, if anything.
    Local,
}

impl ResolveMode {
    /// The value of the wire's attributes `image-resolve-mode` and `image.resolvemode`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Pull => "pull",
            Self::Local => "local",
        }
    }
}

/// The attributes that concern the compiler. `cache-imports`, `attest:*` and the like are the daemon's.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// `target`: stage name or index; empty is the last stage.
    pub target: String,
    /// `build-arg:*`.
    pub build_args: BTreeMap<String, String>,
    /// `label:*`.
    pub labels: BTreeMap<String, String>,
    /// `platform`, in normal form; empty means the build platform, or what the base image has.
    pub platforms: Vec<pb::Platform>,
    /// The result is a set of platforms even if it has one member.
    pub multi_platform: bool,
    /// `no-cache`: `None` uses the cache, an empty list ignores it for all stages, else for those named.
    pub no_cache: Option<Vec<String>>,
    /// `image-resolve-mode`.
    pub resolve_mode: ResolveMode,
    /// `force-network-mode`: network of RUN without `--network`.
    pub network: pb::NetMode,
    /// `add-hosts`.
    pub extra_hosts: Vec<pb::HostIp>,
    /// `hostname` of sandboxes; empty is the daemon's default.
    pub hostname: String,
    /// `shm-size` in bytes; 0 is the default.
    pub shm_size: i64,
    /// `ulimit`.
    pub ulimits: Vec<pb::Ulimit>,
    /// `cgroup-parent`.
    pub cgroup_parent: String,
    /// `memory`, `cpushares` and so on, if any is given.
    pub resources: Option<pb::LinuxResources>,
    /// `build-arg:BUILDKIT_CACHE_MOUNT_NS`.
    pub cache_mount_namespace: String,
    /// `build-arg:BUILDKIT_DOCKERFILE_CHECK`, which replaces the file's `# check=`.
    pub check: Option<String>,
    /// `context:NAME` and `context:NAME::PLATFORM`, keyed without the prefix.
    pub named_contexts: BTreeMap<String, String>,
}

impl Options {
    /// Reads the attributes of a Solve request. Those that do not concern the compiler are ignored.
    pub fn from_attrs(attrs: &HashMap<String, String>) -> Result<Self, OptionsError> {
        let get = |key: &str| attrs.get(key).map(String::as_str).unwrap_or_default();
        if !get("override-copy-image").is_empty() {
            return Err(err("support for \"override-copy-image\" was removed in BuildKit 0.11"));
        }
        if gofmt::parse_bool(get("build-arg:BUILDKIT_DISABLE_FILEOP")) == Some(true) {
            return Err(err(
                "support for \"BUILDKIT_DISABLE_FILEOP\" build-arg was removed in BuildKit 0.11",
            ));
        }
        let prefixed = |prefix: &str| -> BTreeMap<String, String> {
            attrs.iter().filter_map(|(k, v)| Some((k.strip_prefix(prefix)?.to_string(), v.clone()))).collect()
        };
        let build_args = prefixed("build-arg:");
        let arg = |name: &str| build_args.get(name).filter(|v| !v.is_empty()).cloned();
        let platforms = match get("platform") {
            "" => Vec::new(),
            list => list
                .split(',')
                .map(|p| {
                    platform::parse(p).map_err(|e| err(format!("failed to parse target platform {p}: {e}")))
                })
                .collect::<Result<_, _>>()?,
        };
        let multi = arg("BUILDKIT_MULTI_PLATFORM").unwrap_or_else(|| get("multi-platform").to_string());
        let multi_platform = match multi.as_str() {
            "" => platforms.len() > 1,
            text => gofmt::parse_bool(text)
                .ok_or_else(|| err(format!("invalid boolean value for multi-platform: {text}")))?,
        };
        if !multi_platform && platforms.len() > 1 {
            return Err(err("conflicting config: returning multiple target platforms is not allowed"));
        }
        Ok(Self {
            target: get("target").to_string(),
            labels: prefixed("label:"),
            platforms,
            multi_platform,
            no_cache: attrs.get("no-cache").map(|stages| match stages.as_str() {
                "" => Vec::new(),
                list => list.split(',').map(str::to_string).collect(),
            }),
            resolve_mode: match get("image-resolve-mode") {
                "" | "default" => ResolveMode::Default,
                "pull" => ResolveMode::Pull,
                "local" => ResolveMode::Local,
                other => return Err(err(format!("invalid image-resolve-mode: {other}"))),
            },
            network: match get("force-network-mode") {
                "" | "sandbox" => pb::NetMode::Unset,
                "none" => pb::NetMode::None,
                "host" => pb::NetMode::Host,
                other => return Err(err(format!("invalid netmode {other}"))),
            },
            extra_hosts: hosts(get("add-hosts"))
                .map_err(|e| err(format!("failed to parse additional hosts: {e}")))?,
            hostname: arg("BUILDKIT_SANDBOX_HOSTNAME").unwrap_or_else(|| get("hostname").to_string()),
            shm_size: match get("shm-size") {
                "" => 0,
                text => text.parse().map_err(|e| err(format!("failed to parse shm size: {e}")))?,
            },
            ulimits: ulimits(get("ulimit")).map_err(|e| err(format!("failed to parse ulimit: {e}")))?,
            cgroup_parent: get("cgroup-parent").to_string(),
            resources: resources(attrs)?,
            cache_mount_namespace: arg("BUILDKIT_CACHE_MOUNT_NS").unwrap_or_default(),
            check: arg("BUILDKIT_DOCKERFILE_CHECK"),
            named_contexts: prefixed("context:"),
            build_args,
        })
    }
}

fn err(message: impl Into<String>) -> OptionsError {
    OptionsError(message.into())
}

fn hosts(text: &str) -> Result<Vec<pb::HostIp>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    gofmt::csv_fields(text)?
        .into_iter()
        .map(|field| {
            let lower = field.to_lowercase();
            let (host, ip) =
                lower.split_once('=').ok_or_else(|| format!("invalid key-value pair {field}"))?;
            let ip: IpAddr = ip.parse().map_err(|_| format!("failed to parse IP {ip}"))?;
            Ok(pb::HostIp { host: host.to_string(), ip: ip.to_string() })
        })
        .collect()
}

const ULIMITS: &[&str] = &[
    "as",
    "core",
    "cpu",
    "data",
    "fsize",
    "locks",
    "memlock",
    "msgqueue",
    "nice",
    "nofile",
    "nproc",
    "rss",
    "rtprio",
    "rttime",
    "sigpending",
    "stack",
];

fn ulimits(text: &str) -> Result<Vec<pb::Ulimit>, String> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    gofmt::csv_fields(text)?
        .into_iter()
        .map(|field| {
            let (name, limits) =
                field.split_once('=').ok_or_else(|| format!("invalid ulimit argument: {field}"))?;
            if !ULIMITS.contains(&name) {
                return Err(format!("invalid ulimit type: {name}"));
            }
            let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
            let number = |n: &str| n.parse::<i64>().map_err(|_| format!("invalid ulimit argument: {field}"));
            let (soft, hard) = (number(soft)?, number(hard)?);
            if hard != -1 && (soft == -1 || soft > hard) {
                return Err(format!(
                    "ulimit soft limit must be less than or equal to hard limit: {soft} > {hard}"
                ));
            }
            Ok(pb::Ulimit { name: name.to_string(), soft, hard })
        })
        .collect()
}

fn resources(attrs: &HashMap<String, String>) -> Result<Option<pb::LinuxResources>, OptionsError> {
    let get = |key: &str| attrs.get(key).filter(|v| !v.is_empty());
    let positive = |key: &str, lowest: i64| -> Result<i64, OptionsError> {
        let Some(text) = get(key) else { return Ok(0) };
        match text.parse::<i64>() {
            Ok(n) if n >= lowest && n != 0 => Ok(n),
            Ok(_) => Err(err(format!("invalid {key} value: {text}: must be > 0"))),
            Err(e) => Err(err(format!("invalid {key} value: {text}: {e}"))),
        }
    };
    let unsigned = |key: &str| positive(key, 1).map(i64::unsigned_abs);
    let resources = pb::LinuxResources {
        memory: positive("memory", 1)?,
        memory_swap: positive("memswap", -1)?,
        cpu_shares: unsigned("cpushares")?,
        cpu_period: unsigned("cpuperiod")?,
        cpu_quota: positive("cpuquota", -1)?,
        cpuset_cpus: get("cpusetcpus").cloned().unwrap_or_default(),
        cpuset_mems: get("cpusetmems").cloned().unwrap_or_default(),
    };
    Ok((resources != pb::LinuxResources::default()).then_some(resources))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(attrs: &[(&str, &str)]) -> Result<Options, String> {
        let attrs = attrs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Options::from_attrs(&attrs).map_err(|e| e.to_string())
    }

    #[test]
    fn attributes_are_read() {
        let o = read(&[
            ("target", "x"),
            ("build-arg:A", "1"),
            ("label:l", "v"),
            ("platform", "linux/amd64,linux/arm64/v8"),
            ("no-cache", "a,b"),
            ("add-hosts", "Foo=1.2.3.4,v6=::1"),
            ("ulimit", "nofile=1024:2048,nproc=5"),
            ("memory", "100"),
            ("cpushares", "3"),
            ("shm-size", "64"),
            ("build-arg:BUILDKIT_SANDBOX_HOSTNAME", "h"),
            ("context:base", "docker-image://alpine"),
            ("unknown", "ignored"),
        ])
        .expect("reads");
        assert_eq!(
            o.platforms.iter().map(platform::format).collect::<Vec<_>>(),
            ["linux/amd64", "linux/arm64"]
        );
        assert!(o.multi_platform);
        assert_eq!(o.no_cache, Some(vec!["a".into(), "b".into()]));
        assert_eq!(o.extra_hosts[0], pb::HostIp { host: "foo".into(), ip: "1.2.3.4".into() });
        assert_eq!((o.ulimits[0].hard, o.ulimits[1].soft), (2048, 5));
        assert_eq!(o.resources.map(|r| (r.memory, r.cpu_shares)), Some((100, 3)));
        assert_eq!((o.hostname.as_str(), o.shm_size), ("h", 64));
        assert_eq!(o.named_contexts.get("base").map(String::as_str), Some("docker-image://alpine"));
        assert_eq!(read(&[("no-cache", "")]).expect("reads").no_cache, Some(vec![]));
    }

    #[test]
    fn mistakes_are_named() {
        for (key, value, want) in [
            ("image-resolve-mode", "x", "invalid image-resolve-mode: x"),
            ("force-network-mode", "x", "invalid netmode x"),
            ("add-hosts", "a", "failed to parse additional hosts: invalid key-value pair a"),
            ("add-hosts", "a=b", "failed to parse additional hosts: failed to parse IP b"),
            ("ulimit", "foo=1", "failed to parse ulimit: invalid ulimit type: foo"),
            ("memory", "-3", "invalid memory value: -3: must be > 0"),
            ("multi-platform", "maybe", "invalid boolean value for multi-platform: maybe"),
        ] {
            assert_eq!(read(&[(key, value)]), Err(want.to_string()));
        }
        assert!(
            read(&[("platform", "linux/*")])
                .is_err_and(|e| e.starts_with("failed to parse target platform linux/*"))
        );
    }
}
