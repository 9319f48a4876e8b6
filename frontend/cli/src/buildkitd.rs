//! The daemon under the name `buildkitd`: its flags and defaults. A flag becomes the key of `buildkitd.toml` that it
//! stands for, put over what the file says, so what is checked and refused there is so here.

use std::fmt::Write as _;
use std::path::Path;

use kiln_daemon::{Config, ConfigError, Setting};
use toml::{Table, Value};

use crate::error::CliError;
use crate::stdout;

/// Read if it exists and no other is named.
const CONFIG: &str = "/etc/buildkit/buildkitd.toml";
const ROOT: &str = "/var/lib/buildkit";
const ADDRESS: &str = "unix:///run/buildkit/buildkitd.sock";

/// What a flag takes, and how that becomes a configuration value.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bool,
    Text,
    Number,
    List,
    /// `true`, `false`, or `auto`, which leaves it open.
    Tristate,
    /// `KEY=VALUE`, repeated.
    Labels,
    /// A switch that sets the log's level.
    Level(&'static str),
    /// A group's name or number.
    Group,
    /// `RESERVED[,FREE[,MAXIMUM]]` in megabytes.
    Storage,
}

use Kind::{Bool, Group, Labels, Level, List, Number, Storage, Text, Tristate};

/// Key of the flags that only a worker Kiln does not have would read.
const IGNORED: &str = "";
/// Key of the flags that ask for what is not there.
const REFUSED: &str = "-";

/// Name, kind, key, description. Of flags that set the same key the later row wins.
const FLAGS: &[(&str, Kind, &str, &str)] = &[
    ("config", Text, IGNORED, "configuration file (default: /etc/buildkit/buildkitd.toml)"),
    ("root", Text, "root", "state directory (default: /var/lib/buildkit)"),
    ("addr", List, "grpc.address", "address to listen on (default: unix:///run/buildkit/buildkitd.sock)"),
    ("group", Group, "grpc.gid", "group of unix sockets"),
    ("tlscert", Text, "grpc.tls.cert", "certificate for tcp:// addresses"),
    ("tlskey", Text, "grpc.tls.key", "its key"),
    ("tlscacert", Text, "grpc.tls.ca", "authority that clients' certificates must have"),
    ("debug", Level("debug"), "log.level", "log more"),
    ("trace", Level("trace"), "log.level", "log everything"),
    ("log-level", Text, "log.level", "trace, debug, info, warn or error [$BUILDKITD_LOG_LEVEL]"),
    ("log-format", Text, "log.format", "text"),
    ("allow-insecure-entitlement", List, "insecure-entitlements", "what builds may be granted"),
    ("otel-socket-path", Text, "otel.socketPath", "taken, without effect"),
    ("cdi-disabled", Bool, "cdi.disabled", "taken: there are no devices"),
    ("cdi-spec-dir", List, "cdi.specDirs", "taken: there are no devices"),
    ("oci-worker", Tristate, "worker.oci.enabled", "true or auto"),
    ("oci-worker-labels", Labels, "worker.oci.labels", "KEY=VALUE in the worker's record"),
    ("oci-worker-platform", List, "worker.oci.platforms", "platforms in the worker's record"),
    ("oci-worker-net", Text, "worker.oci.networkMode", "auto, host or none"),
    ("oci-worker-snapshotter", Text, "worker.oci.snapshotter", "auto or overlayfs"),
    ("oci-worker-binary", Text, "worker.oci.binary", "runc or crun instead of the built-in sandbox"),
    ("oci-max-parallelism", Number, "worker.oci.max-parallelism", "steps that may run at once"),
    ("oci-worker-gc", Bool, "worker.oci.gc", "garbage collection by itself (default: true)"),
    ("oci-worker-gc-keepstorage", Storage, "worker.oci", "its limits in MB: RESERVED[,FREE[,MAXIMUM]]"),
    ("oci-cni-config-path", Text, "worker.oci.cniConfigPath", "taken: matters for the cni network only"),
    ("oci-cni-binary-dir", Text, "worker.oci.cniBinaryPath", "taken: matters for the cni network only"),
    ("oci-cni-pool-size", Number, "worker.oci.cniPoolSize", "taken: matters for the cni network only"),
    ("rootless", Bool, "worker.oci.rootless", "unsupported"),
    ("oci-worker-rootless", Bool, "worker.oci.rootless", "unsupported"),
    ("oci-worker-no-process-sandbox", Bool, "worker.oci.noProcessSandbox", "unsupported"),
    ("oci-worker-proxy-snapshotter-path", Text, "worker.oci.proxySnapshotterPath", "unsupported"),
    ("oci-worker-apparmor-profile", Text, "worker.oci.apparmor-profile", "unsupported"),
    ("oci-worker-selinux", Bool, "worker.oci.selinux", "unsupported"),
    ("proxy-network", Bool, "proxyNetwork", "unsupported"),
    ("debugaddr", Text, "grpc.debugAddress", "unsupported"),
    ("save-cache-debug", Bool, REFUSED, "unsupported"),
    ("profile-cpu", Text, REFUSED, "unsupported"),
    ("profile-memory", Text, REFUSED, "unsupported"),
    ("profile-memoryrate", Number, REFUSED, "unsupported"),
    ("profile-block", Text, REFUSED, "unsupported"),
    ("profile-mutex", Text, REFUSED, "unsupported"),
    ("profile-trace", Text, REFUSED, "unsupported"),
    ("containerd-worker", Tristate, "worker.containerd.enabled", "false or auto"),
    ("containerd-worker-addr", Text, IGNORED, ""),
    ("containerd-worker-labels", Labels, IGNORED, ""),
    ("containerd-worker-platform", List, IGNORED, ""),
    ("containerd-worker-namespace", Text, IGNORED, ""),
    ("containerd-worker-runtime", Text, IGNORED, ""),
    ("containerd-worker-net", Text, IGNORED, ""),
    ("containerd-cni-config-path", Text, IGNORED, ""),
    ("containerd-cni-binary-dir", Text, IGNORED, ""),
    ("containerd-cni-pool-size", Number, IGNORED, ""),
    ("containerd-worker-snapshotter", Text, IGNORED, ""),
    ("containerd-worker-apparmor-profile", Text, IGNORED, ""),
    ("containerd-worker-selinux", Bool, IGNORED, ""),
    ("containerd-max-parallelism", Number, IGNORED, ""),
    ("containerd-worker-rootless", Bool, IGNORED, ""),
    ("containerd-worker-gc", Bool, IGNORED, ""),
    ("containerd-worker-gc-keepstorage", Storage, IGNORED, ""),
];

/// What the command line asks for.
#[derive(Debug)]
enum Request {
    Help,
    Version,
    /// The values of each flag that was given, by its row.
    Run(Vec<Vec<String>>),
}

/// Runs the daemon until it is stopped.
pub(crate) fn main(args: impl Iterator<Item = std::ffi::OsString>) -> Result<(), CliError> {
    let args: Result<Vec<String>, _> = args.map(std::ffi::OsString::into_string).collect();
    let args = args.map_err(|arg| CliError::usage(format!("{}: not UTF-8", arg.display())))?;
    match parse(&args)? {
        Request::Help => stdout::print(&help()),
        Request::Version => stdout::print(&format!(
            "buildkitd github.com/moby/buildkit {} kiln-{}\n",
            kiln_daemon::VERSION,
            env!("CARGO_PKG_VERSION")
        )),
        Request::Run(_) if !rustix::process::geteuid().is_root() => {
            Err(CliError::usage("unsupported: rootless (the daemon takes root)"))
        }
        Request::Run(given) => Ok(kiln_daemon::run(configure(given, |name| std::env::var(name).ok())?)?),
    }
}

fn help() -> String {
    let mut text = "The daemon, taking buildkitd's flags.\n\nUsage: buildkitd [FLAGS]\n\n".to_owned();
    for (name, _, _, description) in FLAGS.iter().filter(|(_, _, _, description)| !description.is_empty()) {
        let _ = writeln!(text, "  --{name:34} {description}");
    }
    let _ = writeln!(
        text,
        "  --{:34} those of the containerd worker, which there is not, have no effect",
        "containerd-*"
    );
    text + &format!("  --{:34} print this\n  --{:34} print the version\n", "help, -h", "version, -v")
}

/// Reads flags as Go programs write them: one dash or two, the value behind `=` or as the next argument, and none
/// needed for switches.
fn parse(args: &[String]) -> Result<Request, CliError> {
    let mut given = vec![Vec::new(); FLAGS.len()];
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|f| !f.is_empty())
        else {
            return Err(CliError::usage(format!("unexpected argument {arg:?}: buildkitd takes flags only")));
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, None),
        };
        match name {
            "help" | "h" => return Ok(Request::Help),
            "version" | "v" => return Ok(Request::Version),
            _ => {}
        }
        let Some(row) = FLAGS.iter().position(|(known, ..)| *known == name) else {
            return Err(CliError::usage(format!("unknown flag --{name}")));
        };
        let value = match (FLAGS[row].1, value) {
            (Bool | Level(_), None | Some("")) => "true",
            (_, Some(value)) => value,
            (_, None) => match args.next() {
                Some(value) => value,
                None => return Err(CliError::usage(format!("--{name} needs a value"))),
            },
        };
        given[row].push(value.to_owned());
    }
    Ok(Request::Run(given))
}

/// The configuration of flags, environment, file and defaults, in this order.
fn configure(given: Vec<Vec<String>>, env: impl Fn(&str) -> Option<String>) -> Result<Config, CliError> {
    let mut path = CONFIG.to_owned();
    let mut settings = Vec::new();
    for (&(name, kind, key, _), values) in FLAGS.iter().zip(given) {
        let (flag, values) = match name {
            "log-level" if values.is_empty() => {
                let level = env("BUILDKITD_LOG_LEVEL").filter(|level| !level.is_empty());
                ("BUILDKITD_LOG_LEVEL".to_owned(), Vec::from_iter(level))
            }
            _ => (format!("--{name}"), values),
        };
        let Some(last) = values.last() else { continue };
        if name == "config" {
            path.clone_from(last);
            continue;
        }
        let made =
            make(key, kind, &flag, &values).map_err(|why| CliError::usage(format!("{flag}: {why}")))?;
        match key {
            IGNORED => {}
            REFUSED if last.is_empty() || matches!(made[0].value, Some(Value::Boolean(false))) => {}
            REFUSED => return Err(CliError::usage(format!("unsupported: {flag}"))),
            _ => settings.extend(made),
        }
    }
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        other => other.map_err(|source| ConfigError::Read { path: path.clone().into(), source })?,
    };
    let defaults = Config { root: ROOT.into(), addresses: vec![ADDRESS.to_owned()], ..Config::default() };
    let mut config = defaults.with(&text, Path::new(&path), settings)?;
    config.root =
        std::path::absolute(&config.root).map_err(|error| CliError::file("find", &config.root, error))?;
    if env("BUILDKITD_DEBUGADDR").is_some_and(|address| !address.is_empty()) {
        config.warnings.push("BUILDKITD_DEBUGADDR has no effect: there is no debug address".to_owned());
    }
    Ok(config)
}

/// The values of one flag as settings.
fn make(key: &'static str, kind: Kind, flag: &str, values: &[String]) -> Result<Vec<Setting>, String> {
    let last = values.last().map(String::as_str).unwrap_or_default();
    let value = match kind {
        Bool => Some(boolean(last)?.into()),
        Text => Some(last.into()),
        Number => Some(last.parse::<i64>().map_err(|error| error.to_string())?.into()),
        List => Some(values.to_vec().into()),
        Tristate if last == "auto" => None,
        Tristate => Some(boolean(last)?.into()),
        Level(level) => match boolean(last)? {
            true => Some(level.into()),
            false => return Ok(Vec::new()),
        },
        Labels => {
            let pairs = values.iter().map(|pair| match pair.split_once('=') {
                Some((key, value)) => Ok((key.to_owned(), value.into())),
                None => Err(format!("{pair:?} is not KEY=VALUE")),
            });
            Some(pairs.collect::<Result<Table, _>>()?.into())
        }
        Group if last.is_empty() => return Ok(Vec::new()),
        Group => Some(i64::from(group(last)?).into()),
        Storage => return storage(flag, last),
    };
    Ok(vec![Setting { key, flag: flag.to_owned(), value }])
}

fn boolean(text: &str) -> Result<bool, String> {
    kiln_dockerfile::parse_bool(text).ok_or_else(|| format!("{text:?} is neither true nor false"))
}

fn group(name: &str) -> Result<u32, String> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let groups = std::fs::read_to_string("/etc/group").map_err(|error| format!("/etc/group: {error}"))?;
    let ids = groups.lines().filter_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    });
    ids.into_iter().next().ok_or_else(|| format!("no group {name:?}"))
}

/// All three limits, since those that are not named are none; zero is none, too.
fn storage(flag: &str, text: &str) -> Result<Vec<Setting>, String> {
    let mut amounts = text.splitn(3, ',').filter(|_| !text.is_empty()).map(|amount| {
        let megabytes = amount.parse::<i64>().ok().filter(|amount| *amount >= 0);
        megabytes
            .and_then(|amount| amount.checked_mul(1_000_000))
            .ok_or_else(|| format!("{amount:?} is no number of megabytes"))
    });
    let mut settings = Vec::new();
    for key in ["worker.oci.reservedSpace", "worker.oci.minFreeSpace", "worker.oci.maxUsedSpace"] {
        let value = amounts.next().transpose()?.filter(|bytes| *bytes > 0).map(Value::from);
        settings.push(Setting { key, flag: flag.to_owned(), value });
    }
    settings.push(Setting { key: "worker.oci.gckeepstorage", flag: flag.to_owned(), value: None });
    Ok(settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_daemon::{DiskSpace, LogLevel};

    fn configured(args: &[&str]) -> Result<Config, String> {
        let args: Vec<String> =
            ["--config=/nonexistent"].iter().chain(args).map(|arg| (*arg).to_owned()).collect();
        match parse(&args).map_err(|error| error.to_string())? {
            Request::Run(given) => configure(given, |_| None).map_err(|error| error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_buildkitds() {
        let config = configured(&[]).unwrap();
        assert_eq!(config.root, Path::new("/var/lib/buildkit"));
        assert_eq!(config.addresses, ["unix:///run/buildkit/buildkitd.sock"]);
        assert!(config.gc.enabled);
    }

    #[test]
    fn flags_are_written_as_in_go() {
        let config = configured(&[
            "-oci-worker=true",
            "--containerd-worker=false",
            "--oci-worker-gc=false",
            "--oci-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
            "-oci-worker-labels",
            "a=b,c=d",
            "--root",
            "/elsewhere",
            "--addr=unix:///one",
            "--addr",
            "tcp://127.0.0.1:1",
            "--debug",
            "--trace=f",
            "--group=0",
            "--allow-insecure-entitlement",
            "network.host",
            "--oci-max-parallelism=3",
            "--cdi-disabled=1",
            "--oci-worker-rootless=false",
        ])
        .unwrap();
        assert!(!config.gc.enabled);
        assert_eq!(config.labels["a"], "b,c=d");
        assert_eq!(config.labels["org.mobyproject.buildkit.worker.sandbox"], "true");
        assert_eq!(config.addresses, ["unix:///one", "tcp://127.0.0.1:1"]);
        assert_eq!((config.root.to_str(), config.log_level), (Some("/elsewhere"), LogLevel::Debug));
        assert_eq!((config.socket_gid, config.max_parallelism), (Some(0), 3));
        assert_eq!(config.entitlements, ["network.host"]);
        assert_eq!(configured(&["--group", "root"]).unwrap().socket_gid, Some(0));
        assert_eq!(configured(&["--debug", "--log-level=error"]).unwrap().log_level, LogLevel::Error);
    }

    #[test]
    fn kept_storage_counts_megabytes() {
        let gc = configured(&["--oci-worker-gc-keepstorage", "1,0,3"]).unwrap().gc;
        let limits = (gc.reserved, gc.min_free, gc.max_used);
        assert_eq!(limits, (Some(DiskSpace::Bytes(1_000_000)), None, Some(DiskSpace::Bytes(3_000_000))));
        assert!(configured(&["--oci-worker-gc-keepstorage=1GB"]).is_err());
    }

    #[test]
    fn what_is_not_there_is_refused_by_name() {
        for (flag, message) in [
            ("--containerd-worker=true", "unsupported: --containerd-worker"),
            ("--oci-worker=false", "unsupported: --oci-worker=false"),
            ("--rootless", "unsupported: --rootless"),
            ("--oci-worker-rootless", "unsupported: --oci-worker-rootless"),
            ("--oci-worker-no-process-sandbox", "unsupported: --oci-worker-no-process-sandbox"),
            ("--oci-worker-snapshotter=native", "unsupported: --oci-worker-snapshotter=native"),
            ("--oci-worker-net=cni", "unsupported: --oci-worker-net=cni"),
            ("--oci-worker-selinux", "unsupported: --oci-worker-selinux"),
            ("--proxy-network", "unsupported: --proxy-network"),
            ("--debugaddr=:6060", "unsupported: --debugaddr"),
            ("--save-cache-debug", "unsupported: --save-cache-debug"),
            ("--profile-cpu=x", "unsupported: --profile-cpu"),
            ("--log-format=json", "unsupported: --log-format=json"),
            ("--allow-insecure-entitlement=gpu", "unsupported: --allow-insecure-entitlement=gpu"),
            ("--no-such-flag", "unknown flag --no-such-flag"),
            ("--tlscert=/x", "--tlscert: certificate and key must be given together"),
            ("--oci-worker-gc=maybe", "--oci-worker-gc: \"maybe\" is neither true nor false"),
            ("--oci-worker-labels=x", "--oci-worker-labels: \"x\" is not KEY=VALUE"),
            ("--root", "--root needs a value"),
            ("extra", "unexpected argument \"extra\": buildkitd takes flags only"),
        ] {
            assert_eq!(configured(&[flag]).expect_err(flag), message);
        }
        for flag in [
            "--containerd-worker=auto",
            "--oci-worker=auto",
            "--save-cache-debug=false",
            "--profile-cpu=",
            "--containerd-worker-net=cni",
        ] {
            configured(&[flag]).expect(flag);
        }
    }
}
