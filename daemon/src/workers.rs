//! What the daemon says about itself: version, worker record, platforms.

use std::collections::HashMap;

use kiln_proto::{pb, platform, types};

use crate::config::{Config, NetworkMode};
use crate::engine::Engine;

/// The version of BuildKit's API that is spoken, marked as Kiln's.
pub const VERSION: &str = "v0.31.0+kiln";

/// The version of the Dockerfile language that is built in, marked as Kiln's.
pub(crate) const DOCKERFILE_VERSION: &str = "1.26.0+kiln";

/// Prefix of the labels that clients read.
const LABEL: &str = "org.mobyproject.buildkit.worker";

/// As `Info` and the worker record give it.
pub(crate) fn version() -> types::BuildkitVersion {
    types::BuildkitVersion {
        package: "github.com/moby/buildkit".into(),
        version: VERSION.into(),
        revision: String::new(),
        dockerfile_version: DOCKERFILE_VERSION.into(),
    }
}

/// The record of the one worker.
pub(crate) fn record(config: &Config, engine: &Engine) -> types::WorkerRecord {
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let network = match config.network {
        NetworkMode::Auto | NetworkMode::Host => "host",
        NetworkMode::None => "none",
    };
    let mut labels = HashMap::from([
        (format!("{LABEL}.executor"), "oci".to_owned()),
        (format!("{LABEL}.snapshotter"), "overlayfs".to_owned()),
        (format!("{LABEL}.hostname"), hostname),
        (format!("{LABEL}.network"), network.to_owned()),
        (format!("{LABEL}.oci.process-mode"), "sandbox".to_owned()),
        (format!("{LABEL}.selinux.enabled"), "false".to_owned()),
    ]);
    labels.extend(config.labels.clone());
    types::WorkerRecord {
        id: engine.worker_id().to_owned(),
        labels,
        platforms: platforms(config),
        gc_policy: engine.gc_policy(),
        buildkit_version: Some(version()),
        cdi_devices: Vec::new(),
    }
}

/// The configured platforms, or the machine's own with what its kernel can run beside it.
fn platforms(config: &Config) -> Vec<pb::Platform> {
    let configured: Vec<pb::Platform> =
        config.platforms.iter().filter_map(|text| platform::parse(text).ok()).collect();
    if !configured.is_empty() {
        return configured;
    }
    let host = platform::normalized(&platform::host());
    let mut platforms = vec![host.clone()];
    let other = |architecture: &str, variant: &str| pb::Platform {
        architecture: architecture.into(),
        os: host.os.clone(),
        variant: variant.into(),
        ..pb::Platform::default()
    };
    if host.architecture == "amd64" {
        platforms.extend(amd64_variants().iter().map(|variant| other("amd64", variant)));
        platforms.push(other("386", ""));
    }
    for platform in emulated().iter().filter_map(|text| platform::parse(text).ok()) {
        if !platforms.iter().any(|known| platform::same(known, &platform)) {
            platforms.push(platform);
        }
    }
    platforms
}

/// Levels of the x86-64 psABI that this processor has, above the first.
fn amd64_variants() -> Vec<&'static str> {
    let mut variants = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let v2 = has!("cmpxchg16b")
            && has!("popcnt")
            && has!("sse3")
            && has!("sse4.1")
            && has!("sse4.2")
            && has!("ssse3");
        let v3 = v2
            && has!("avx")
            && has!("avx2")
            && has!("bmi1")
            && has!("bmi2")
            && has!("f16c")
            && has!("fma")
            && has!("lzcnt")
            && has!("movbe");
        let v4 = v3
            && has!("avx512f")
            && has!("avx512bw")
            && has!("avx512cd")
            && has!("avx512dq")
            && has!("avx512vl");
        variants.extend(
            [(v2, "v2"), (v3, "v3"), (v4, "v4")].into_iter().filter(|(has, _)| *has).map(|(_, name)| name),
        );
    }
    variants
}

/// Platforms whose programs the kernel hands to an emulator that it opened beforehand (flag F), so
/// that they run in any root.
fn emulated() -> Vec<String> {
    const NAMES: &[(&str, &str)] = &[
        ("qemu-aarch64", "linux/arm64"),
        ("qemu-arm", "linux/arm/v7"),
        ("qemu-riscv64", "linux/riscv64"),
        ("qemu-ppc64le", "linux/ppc64le"),
        ("qemu-s390x", "linux/s390x"),
        ("qemu-x86_64", "linux/amd64"),
        ("qemu-i386", "linux/386"),
        ("qemu-mips64", "linux/mips64"),
        ("qemu-mips64el", "linux/mips64le"),
        ("qemu-loongarch64", "linux/loong64"),
    ];
    NAMES
        .iter()
        .filter(|(name, _)| {
            std::fs::read_to_string(format!("/proc/sys/fs/binfmt_misc/{name}")).is_ok_and(|text| {
                let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
                text.starts_with("enabled") && flags.is_some_and(|flags| flags.contains('F'))
            })
        })
        .map(|(_, platform)| (*platform).to_owned())
        .collect()
}
