//! `buildkitd.toml` as people write it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_daemon::{Config, ConfigError, DiskSpace, LogLevel, NetworkMode, Setting};

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::default().with(text, Path::new("buildkitd.toml"), Vec::new())
}

#[test]
fn a_whole_file() {
    let config = parse(
        r#"
        debug = true
        root = "/data"
        insecure-entitlements = ["network.host"]
        [log]
          format = "text"
        [grpc]
          address = ["unix:///run/x.sock", "tcp://0.0.0.0:1234"]
          gid = 1000
          [grpc.tls]
            cert = "/c.pem"
            key = "/k.pem"
            ca = "/ca.pem"
        [history]
          maxAge = 3600
          maxEntries = 7
        [worker.oci]
          enabled = true
          platforms = ["linux/amd64", "linux/arm64"]
          snapshotter = "overlayfs"
          max-parallelism = 4
          networkMode = "host"
          binary = "runc"
          cniBinaryPath = "/opt/cni/bin"
          gc = true
          reservedSpace = "10%"
          maxUsedSpace = 1000
          [worker.oci.labels]
            "a.b" = "c"
          [[worker.oci.gcpolicy]]
            filters = ["type==source.local"]
            keepDuration = "48h"
            keepBytes = "512MB"
          [[worker.oci.gcpolicy]]
            all = true
        [worker.containerd]
          enabled = false
        [registry."docker.io"]
          mirrors = ["mirror.example:5000", "other.example"]
        [registry."mirror.example:5000"]
          http = true
          insecure = true
          ca = ["/ca.pem"]
          [[registry."mirror.example:5000".keypair]]
            key = "/key.pem"
            cert = "/cert.pem"
        [dns]
          nameservers = ["1.1.1.1"]
          searchDomains = ["example.com"]
        "#,
    )
    .expect("a valid file");
    assert_eq!(config.root, PathBuf::from("/data"));
    assert_eq!(config.addresses, ["unix:///run/x.sock", "tcp://0.0.0.0:1234"]);
    assert_eq!((config.socket_gid, config.socket_uid), (Some(1000), None));
    assert_eq!(config.tls.as_ref().and_then(|tls| tls.client_ca.clone()), Some("/ca.pem".into()));
    assert_eq!(config.entitlements, ["network.host"]);
    assert_eq!((config.history.max_age, config.history.max_entries), (Duration::from_secs(3600), 7));
    assert_eq!((config.max_parallelism, config.network), (4, NetworkMode::Host));
    assert_eq!(config.runtime_binary.as_deref(), Some("runc"));
    assert_eq!(config.labels["a.b"], "c");
    assert_eq!(config.gc.reserved, Some(DiskSpace::Percent(10)));
    assert_eq!(config.gc.policies.len(), 2);
    assert_eq!(config.gc.policies[0].keep_duration, Duration::from_secs(48 * 3600));
    assert_eq!(config.gc.policies[0].reserved, Some(DiskSpace::Bytes(512 << 20)));
    assert!(config.gc.policies[1].all);
    assert_eq!(config.registries.hosts["docker.io"].mirrors, ["mirror.example:5000", "other.example"]);
    let mirror = &config.registries.hosts["mirror.example:5000"];
    assert_eq!((mirror.http, mirror.insecure, mirror.keypair.len()), (Some(true), Some(true), 1));
    assert_eq!(config.dns.search, ["example.com"]);
}

#[test]
fn a_configuration_beside_which_buildkitd_runs_its_own_tests() {
    let config = parse(
        r#"
        provenanceEnvDir = "/p"
        insecure-entitlements = ["security.insecure"]
        [otel]
          socketPath = "/run/otel.sock"
        [cdi]
          specDirs = ["/c"]
        [worker.oci]
          networkMode = "host"
          cniConfigPath = "/cni.json"
          max-parallelism = 1
        [worker.containerd]
          networkMode = "cni"
          cniConfigPath = "/cni.json"
          max-parallelism = 3
        "#,
    )
    .expect("a valid file");
    assert_eq!((config.max_parallelism, config.network), (1, NetworkMode::Host));
    assert_eq!(config.warnings, [""; 0]);
}

#[test]
fn flags_go_over_the_file_and_are_named_in_errors() {
    let over = |text: &str, settings: &[(&'static str, Option<toml::Value>)]| {
        let settings = settings
            .iter()
            .map(|(key, value)| Setting { key, flag: "--flag".into(), value: value.clone() })
            .collect();
        Config::default().with(text, Path::new("buildkitd.toml"), settings)
    };
    let file = "debug = true\n[worker.oci]\nrootless = true\ngc = true\nreservedSpace = 5\n\
                [worker.oci.labels]\na = \"1\"\nb = \"1\"\n";
    let labels = toml::Table::from_iter([("b".to_owned(), "2".into()), ("c".to_owned(), "2".into())]);
    let config = over(
        file,
        &[
            ("worker.oci.rootless", Some(false.into())),
            ("worker.oci.gc", Some(false.into())),
            ("worker.oci.reservedSpace", None),
            ("worker.oci.labels", Some(labels.into())),
            ("log.level", Some("warn".into())),
        ],
    )
    .expect("flags that mend the file");
    assert!(!config.gc.enabled);
    assert_eq!((config.gc.reserved, config.log_level), (None, LogLevel::Warn));
    let labels: Vec<_> = config.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    assert_eq!(labels, [("a", "1"), ("b", "2"), ("c", "2")]);
    for (key, value, message) in [
        ("worker.oci.snapshotter", toml::Value::from("native"), "unsupported: --flag=native"),
        ("worker.containerd.enabled", true.into(), "unsupported: --flag"),
        ("worker.oci.max-parallelism", (-1).into(), "--flag: number out of range"),
    ] {
        assert_eq!(over("", &[(key, Some(value))]).expect_err(key).to_string(), message);
    }
}

#[test]
fn nothing_said_is_the_default() {
    assert_eq!(parse("").expect("an empty file"), Config::default());
    // Zero values do not matter, and unknown keys no more than a line in the log.
    let text = "proxyNetwork = false\nfuture = 1\n[worker.oci]\nrootless = false\nselinux = false\n";
    let warnings = vec!["buildkitd.toml: unknown key future is ignored".to_owned()];
    assert_eq!(parse(text).expect("zero values"), Config { warnings, ..Config::default() });
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let cases = [
        ("[worker.containerd]\nenabled = true", "unsupported: worker.containerd.enabled in buildkitd.toml"),
        ("[worker.oci]\nrootless = true", "unsupported: worker.oci.rootless in buildkitd.toml"),
        (
            "[worker.oci]\nsnapshotter = \"stargz\"",
            "unsupported: worker.oci.snapshotter = stargz in buildkitd.toml",
        ),
        (
            "[worker.oci]\nnetworkMode = \"cni\"",
            "unsupported: worker.oci.networkMode = cni in buildkitd.toml",
        ),
        (
            "insecure-entitlements = [\"device\", \"gpu\"]",
            "unsupported: insecure-entitlements = gpu in buildkitd.toml",
        ),
        ("[log]\nformat = \"json\"", "unsupported: log.format = json in buildkitd.toml"),
        (
            "[registry.x]\nhttp = 1",
            "buildkitd.toml: registry.x: invalid type: integer `1`, expected a boolean",
        ),
        (
            "[worker.oci]\nmax-parallelism = -1",
            "buildkitd.toml: worker.oci.max-parallelism: number out of range",
        ),
        (
            "[worker.oci]\nreservedSpace = \"x\"",
            "buildkitd.toml: worker.oci.reservedSpace: expected bytes, or a text such as 512MB or 10%",
        ),
        (
            "[grpc.tls]\ncert = \"/c\"",
            "buildkitd.toml: grpc.tls.cert: certificate and key must be given together",
        ),
        ("[dns]\nnameservers = [\"one\"]", "buildkitd.toml: dns.nameservers: expected IP addresses"),
        ("[log]\nlevel = \"loud\"", "buildkitd.toml: log.level: expected trace, debug, info, warn or error"),
    ];
    for (text, message) in cases {
        assert_eq!(parse(text).expect_err(text).to_string(), message);
    }
    let syntax = parse("a = \n").expect_err("not TOML").to_string();
    assert!(syntax.starts_with("buildkitd.toml: TOML parse error at line 1"), "{syntax}");
    let missing = Config::load(Path::new("/nonexistent/kilnd.toml")).expect_err("no file").to_string();
    assert!(missing.starts_with("failed to read /nonexistent/kilnd.toml: "), "{missing}");
}
