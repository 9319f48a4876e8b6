//! The default runtime spec of a build step: what Docker and BuildKit give a container.
//!
//! Pure: parameters in, `oci_spec` types out. Looks at the host only for the capabilities it holds itself.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder,
    LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxMemoryBuilder, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimit,
    PosixRlimitBuilder, PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder,
    UserBuilder,
};

use super::{SandboxError, seccomp};

/// Host name of a sandbox when nothing else is asked for (BuildKit's).
pub const DEFAULT_HOSTNAME: &str = "buildkitsandbox";

/// `PATH` of a process whose environment has none.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The network a sandbox sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkMode {
    /// The worker's default, which is the host's network while there is no bridge.
    #[default]
    Sandbox,
    /// The host's network.
    Host,
    /// A loopback interface and nothing else.
    None,
}

/// How far a sandbox is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SecurityMode {
    /// Default capabilities, seccomp profile, masked paths, device rules.
    #[default]
    Sandbox,
    /// Every capability the daemon has, all devices, no seccomp, nothing masked.
    Insecure,
}

/// One resource limit, as `--ulimit name=soft:hard`; -1 is unlimited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ulimit {
    /// Lower-case name without `RLIMIT_`, such as `nofile`.
    pub name: String,
    /// The limit in force.
    pub soft: i64,
    /// What the process may raise it to.
    pub hard: i64,
}

/// A host file or directory made visible in the sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Host path.
    pub source: PathBuf,
    /// Absolute path in the sandbox.
    pub dest: PathBuf,
    /// Mount read-only.
    pub readonly: bool,
}

/// A memory-backed directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tmpfs {
    /// Absolute path in the sandbox. A default mount at the same place (`/dev/shm`) is replaced.
    pub dest: PathBuf,
    /// Size limit in bytes; the kernel's default without.
    pub size: Option<u64>,
}

/// cgroup limits; zero or empty means none (the wire form of `pb.LinuxResources`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resources {
    /// Bytes.
    pub memory: i64,
    /// Memory and swap together, in bytes; -1 is unlimited.
    pub memory_swap: i64,
    /// Relative weight, 1024 is the default.
    pub cpu_shares: u64,
    /// Microseconds in each period.
    pub cpu_quota: i64,
    /// Microseconds.
    pub cpu_period: u64,
    /// CPU list such as `0-3,7`.
    pub cpuset_cpus: String,
    /// Memory node list.
    pub cpuset_mems: String,
}

/// What [`build`] makes a spec of.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SpecParams {
    /// Sandbox id, used in the cgroup path.
    pub id: String,
    /// Program and arguments; the program is looked up in `PATH` of `env`.
    pub args: Vec<String>,
    /// `NAME=value` entries; [`DEFAULT_PATH`] is added when `PATH` is missing.
    pub env: Vec<String>,
    /// Working directory; made when missing. Empty is `/`.
    pub cwd: String,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The process has a terminal.
    pub terminal: bool,
    /// Host name; empty is [`DEFAULT_HOSTNAME`].
    pub hostname: String,
    /// Network.
    pub network: NetworkMode,
    /// Confinement.
    pub security: SecurityMode,
    /// Resource limits of the process; without any the daemon's own are inherited.
    pub ulimits: Vec<Ulimit>,
    /// Mount the root read-only.
    pub readonly_root: bool,
    /// Host files and directories (resolv.conf, hosts, secrets, sockets).
    pub binds: Vec<Bind>,
    /// Memory-backed directories.
    pub tmpfs: Vec<Tmpfs>,
    /// Size of `/dev/shm` in bytes; 64 MiB without.
    pub shm_size: Option<u64>,
    /// Parent cgroup asked for by the client.
    pub cgroup_parent: Option<String>,
    /// cgroup limits.
    pub resources: Option<Resources>,
}

/// The capabilities a container has in Docker.
pub const DEFAULT_CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const DEFAULT_SHM_BYTES: u64 = 64 << 20;

/// Loop device nodes an insecure sandbox gets, so that images can be made and mounted in it.
const LOOP_DEVICES: i64 = 7;

/// Makes the spec of one step.
pub fn build(params: &SpecParams) -> Result<Spec, SandboxError> {
    let insecure = params.security == SecurityMode::Insecure;
    let cwd = if params.cwd.is_empty() { "/" } else { params.cwd.as_str() };
    if !Path::new(cwd).is_absolute() {
        return Err(SandboxError::Invalid(format!("working directory {cwd:?} is not absolute")));
    }
    let spec = SpecBuilder::default()
        .version("1.0.2")
        .root(oci(RootBuilder::default().path("rootfs").readonly(params.readonly_root).build())?)
        .hostname(if params.hostname.is_empty() { DEFAULT_HOSTNAME } else { params.hostname.as_str() })
        .mounts(mounts(params)?)
        .process(process(params, cwd)?)
        .linux(linux(params, insecure)?)
        .build();
    oci(spec)
}

fn oci<T>(result: Result<T, oci_spec::OciSpecError>) -> Result<T, SandboxError> {
    result.map_err(|e| SandboxError::Invalid(e.to_string()))
}

fn process(params: &SpecParams, cwd: &str) -> Result<Process, SandboxError> {
    if params.args.is_empty() {
        return Err(SandboxError::Invalid("no program to run".into()));
    }
    let mut env = params.env.clone();
    if !env.iter().any(|e| e.starts_with("PATH=")) {
        env.push(format!("PATH={DEFAULT_PATH}"));
    }
    let held: Capabilities = match params.security {
        SecurityMode::Sandbox => DEFAULT_CAPABILITIES.into_iter().collect(),
        SecurityMode::Insecure => held_capabilities()?,
    };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(held.clone())
        .permitted(held.clone())
        .effective(held)
        .inheritable(Capabilities::new())
        .ambient(Capabilities::new())
        .build();
    let user =
        UserBuilder::default().uid(params.uid).gid(params.gid).additional_gids(params.groups.clone()).build();
    let mut process = oci(ProcessBuilder::default()
        .terminal(params.terminal)
        .user(oci(user)?)
        .args(params.args.clone())
        .env(env)
        .cwd(cwd)
        .capabilities(oci(capabilities)?)
        .no_new_privileges(false)
        .build())?;
    let limits = params.ulimits.iter().map(rlimit).collect::<Result<Vec<_>, _>>()?;
    process.set_rlimits((!limits.is_empty()).then_some(limits));
    Ok(process)
}

/// What the daemon may pass on: asking for more would fail at the capset call.
fn held_capabilities() -> Result<Capabilities, SandboxError> {
    let held = caps::read(None, caps::CapSet::Permitted)
        .map_err(|e| SandboxError::Setup(format!("reading the daemon's capabilities: {e}")))?;
    Ok(held
        .into_iter()
        .filter_map(|c| c.to_string().trim_start_matches("CAP_").parse::<Capability>().ok())
        .collect())
}

fn rlimit(limit: &Ulimit) -> Result<PosixRlimit, SandboxError> {
    use PosixRlimitType as T;
    let typ = match limit.name.to_ascii_lowercase().as_str() {
        "as" => T::RlimitAs,
        "core" => T::RlimitCore,
        "cpu" => T::RlimitCpu,
        "data" => T::RlimitData,
        "fsize" => T::RlimitFsize,
        "locks" => T::RlimitLocks,
        "memlock" => T::RlimitMemlock,
        "msgqueue" => T::RlimitMsgqueue,
        "nice" => T::RlimitNice,
        "nofile" => T::RlimitNofile,
        "nproc" => T::RlimitNproc,
        "rss" => T::RlimitRss,
        "rtprio" => T::RlimitRtprio,
        "rttime" => T::RlimitRttime,
        "sigpending" => T::RlimitSigpending,
        "stack" => T::RlimitStack,
        other => return Err(SandboxError::Invalid(format!("unknown ulimit {other:?}"))),
    };
    // The wire form is signed: -1 and u64::MAX are both RLIM_INFINITY.
    oci(PosixRlimitBuilder::default().typ(typ).soft(limit.soft as u64).hard(limit.hard as u64).build())
}

fn mounts(params: &SpecParams) -> Result<Vec<Mount>, SandboxError> {
    let insecure = params.security == SecurityMode::Insecure;
    let shm = format!("size={}", params.shm_size.unwrap_or(DEFAULT_SHM_BYTES));
    let access = if insecure { "rw" } else { "ro" };
    let mut list = vec![
        mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])?,
        mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"])?,
        mount(
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        )?,
        mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm])?,
        mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"])?,
        mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", access])?,
        mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", access])?,
    ];
    for bind in &params.binds {
        let access = if bind.readonly { "ro" } else { "rw" };
        let source = bind
            .source
            .to_str()
            .ok_or_else(|| SandboxError::Invalid(format!("bind source {:?} is not UTF-8", bind.source)))?;
        list.push(mount(&bind.dest, "bind", source, &["rbind", access])?);
    }
    for tmpfs in &params.tmpfs {
        let size = tmpfs.size.map(|s| format!("size={s}"));
        let mut options = vec!["nosuid"];
        options.extend(size.as_deref());
        list.push(mount(&tmpfs.dest, "tmpfs", "tmpfs", &options)?);
    }
    // A later mount at the same place replaces an earlier one instead of hiding it.
    let mut seen = HashSet::new();
    let mut kept: Vec<Mount> =
        list.into_iter().rev().filter(|m| seen.insert(m.destination().clone())).collect();
    kept.reverse();
    Ok(kept)
}

fn mount(dest: impl AsRef<Path>, typ: &str, source: &str, options: &[&str]) -> Result<Mount, SandboxError> {
    let dest = dest.as_ref();
    if !dest.is_absolute() {
        return Err(SandboxError::Invalid(format!("mount point {dest:?} is not absolute")));
    }
    oci(MountBuilder::default()
        .destination(dest)
        .typ(typ)
        .source(source)
        .options(options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>())
        .build())
}

fn linux(params: &SpecParams, insecure: bool) -> Result<Linux, SandboxError> {
    use LinuxNamespaceType as N;
    let mut namespaces = vec![N::Pid, N::Ipc, N::Uts, N::Mount, N::Cgroup];
    if params.network == NetworkMode::None {
        namespaces.push(N::Network);
    }
    let namespaces = namespaces
        .into_iter()
        .map(|n| oci(LinuxNamespaceBuilder::default().typ(n).build()))
        .collect::<Result<Vec<LinuxNamespace>, _>>()?;

    let mut resources = LinuxResourcesBuilder::default()
        .devices(vec![oci(LinuxDeviceCgroupBuilder::default().allow(insecure).access("rwm").build())?]);
    if let Some(asked) = &params.resources {
        let mut memory = LinuxMemoryBuilder::default();
        if asked.memory != 0 {
            memory = memory.limit(asked.memory);
        }
        if asked.memory_swap != 0 {
            memory = memory.swap(asked.memory_swap);
        }
        if asked.memory != 0 || asked.memory_swap != 0 {
            resources = resources.memory(oci(memory.build())?);
        }
        let mut cpu = LinuxCpuBuilder::default();
        let mut any = false;
        if asked.cpu_shares != 0 {
            (cpu, any) = (cpu.shares(asked.cpu_shares), true);
        }
        if asked.cpu_quota != 0 {
            (cpu, any) = (cpu.quota(asked.cpu_quota), true);
        }
        if asked.cpu_period != 0 {
            (cpu, any) = (cpu.period(asked.cpu_period), true);
        }
        if !asked.cpuset_cpus.is_empty() {
            (cpu, any) = (cpu.cpus(asked.cpuset_cpus.clone()), true);
        }
        if !asked.cpuset_mems.is_empty() {
            (cpu, any) = (cpu.mems(asked.cpuset_mems.clone()), true);
        }
        if any {
            resources = resources.cpu(oci(cpu.build())?);
        }
    }

    let mut linux = LinuxBuilder::default()
        .namespaces(namespaces)
        .resources(oci(resources.build())?)
        .masked_paths(vec![])
        .readonly_paths(vec![]);
    if let Some(parent) = &params.cgroup_parent {
        linux = linux.cgroups_path(cgroup_path(parent, &params.id)?);
    }
    if insecure {
        linux = linux.devices(loop_devices()?);
    } else {
        linux = linux
            .masked_paths(MASKED_PATHS.map(str::to_owned).to_vec())
            .readonly_paths(READONLY_PATHS.map(str::to_owned).to_vec())
            .seccomp(seccomp::default_profile(&DEFAULT_CAPABILITIES)?);
    }
    oci(linux.build())
}

/// `<parent>/buildkit/<id>`, as BuildKit names it.
fn cgroup_path(parent: &str, id: &str) -> Result<PathBuf, SandboxError> {
    if parent.ends_with(':') || parent.contains(".slice:") {
        return Err(SandboxError::Unsupported(format!("systemd cgroup parent {parent:?}")));
    }
    if Path::new(parent).components().any(|c| c == std::path::Component::ParentDir) {
        return Err(SandboxError::Invalid(format!("cgroup parent {parent:?} leads upwards")));
    }
    Ok(Path::new("/").join(parent.trim_start_matches('/')).join("buildkit").join(id))
}

fn loop_devices() -> Result<Vec<oci_spec::runtime::LinuxDevice>, SandboxError> {
    let control = ("/dev/loop-control".to_owned(), LinuxDeviceType::C, 10, 237);
    let loops = (0..LOOP_DEVICES).map(|n| (format!("/dev/loop{n}"), LinuxDeviceType::B, 7, n));
    std::iter::once(control)
        .chain(loops)
        .map(|(path, typ, major, minor)| {
            oci(LinuxDeviceBuilder::default()
                .path(path)
                .typ(typ)
                .major(major)
                .minor(minor)
                .file_mode(0o660u32)
                .build())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> SpecParams {
        SpecParams { id: "x".into(), args: vec!["true".into()], ..SpecParams::default() }
    }

    fn dests(spec: &Spec) -> Vec<&Path> {
        spec.mounts().iter().flatten().map(|m| m.destination().as_path()).collect()
    }

    #[test]
    fn defaults_are_those_of_a_container() {
        let spec = build(&params()).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.env().as_deref().unwrap(), [format!("PATH={DEFAULT_PATH}")]);
        assert_eq!((process.cwd().as_path(), process.no_new_privileges()), (Path::new("/"), Some(false)));
        let caps = process.capabilities().as_ref().unwrap();
        assert_eq!(caps.bounding().as_ref().unwrap().len(), DEFAULT_CAPABILITIES.len());
        assert!(caps.ambient().as_ref().unwrap().is_empty() && process.rlimits().is_none());
        assert_eq!(spec.hostname().as_deref(), Some(DEFAULT_HOSTNAME));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some() && linux.cgroups_path().is_none());
        let network = linux.namespaces().iter().flatten().any(|n| n.typ() == LinuxNamespaceType::Network);
        assert!(!network);
        let wanted = ["/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"];
        assert_eq!(dests(&spec), wanted.map(Path::new));
    }

    #[test]
    fn insecure_hides_and_forbids_nothing() {
        let spec = build(&SpecParams { security: SecurityMode::Insecure, ..params() }).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_none() && linux.masked_paths().as_ref().unwrap().is_empty());
        assert!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
        let held = caps::read(None, caps::CapSet::Permitted).unwrap().len();
        let caps = spec.process().as_ref().unwrap().capabilities().clone().unwrap();
        assert_eq!(caps.permitted().as_ref().unwrap().len(), held);
    }

    #[test]
    fn a_later_mount_replaces_a_default_one() {
        let tmpfs = Tmpfs { dest: "/dev/shm".into(), size: Some(1) };
        let spec = build(&SpecParams { tmpfs: vec![tmpfs], ..params() }).unwrap();
        let shm: Vec<_> =
            spec.mounts().iter().flatten().filter(|m| m.destination() == Path::new("/dev/shm")).collect();
        assert_eq!(shm.len(), 1);
        assert!(shm[0].options().as_ref().unwrap().contains(&"size=1".to_owned()));
    }

    #[test]
    fn cgroup_parents() {
        assert_eq!(cgroup_path("a/b", "id").unwrap(), Path::new("/a/b/buildkit/id"));
        assert_eq!(cgroup_path("/a", "id").unwrap(), Path::new("/a/buildkit/id"));
        assert!(matches!(cgroup_path("x.slice:", "id"), Err(SandboxError::Unsupported(_))));
        assert!(matches!(cgroup_path("/../..", "id"), Err(SandboxError::Invalid(_))));
    }

    #[test]
    fn nonsense_is_refused() {
        let cases = [
            SpecParams { args: vec![], ..params() },
            SpecParams { cwd: "relative".into(), ..params() },
            SpecParams { ulimits: vec![Ulimit { name: "speed".into(), soft: 1, hard: 1 }], ..params() },
            SpecParams { tmpfs: vec![Tmpfs { dest: "tmp".into(), size: None }], ..params() },
        ];
        for case in cases {
            assert!(matches!(build(&case), Err(SandboxError::Invalid(_))), "{case:?}");
        }
    }
}
