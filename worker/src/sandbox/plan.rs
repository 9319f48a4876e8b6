//! The plan of one sandbox: a checked, flat form of an OCI spec that the zygote's child carries out step by step.
//!
//! Everything that can be refused is refused here, in the daemon, with a text that names it. What an OCI spec can
//! say and a plan cannot is `unsupported`, never ignored.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Capabilities, LinuxDeviceType, LinuxNamespaceType, Mount, PosixRlimitType, Process, Spec,
};
use rustix::mount::MountAttrFlags;
use serde::{Deserialize, Serialize};

use super::{MemoryFile, ProcessRequest, RootSource, SandboxError, SandboxRequest};

/// What the zygote does for one start request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) id: String,
    /// Namespaces of the new process, as clone flags.
    pub(super) namespaces: u64,
    pub(super) cgroup: CgroupPlan,
    /// The running sandbox whose namespaces and cgroups the process joins; it has none of its own then.
    pub(super) joins: Option<String>,
    /// Somebody waits to hear that the process starts.
    pub(super) attended: bool,
    pub(super) task: Task,
}

/// What the child of the zygote becomes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Task {
    /// The sandboxed process itself.
    Sandbox(Box<SandboxPlan>),
    /// An OCI runtime with the root mounted for it.
    Runtime(Box<RuntimePlan>),
    /// One more process of a sandbox.
    Process(Box<ProcessPlan>),
    /// An OCI runtime that starts one more process of a container.
    RuntimeExec(RuntimeCommand),
}

/// Where the processes are accounted and what limits them.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct CgroupPlan {
    /// Absolute path in every hierarchy; without, a place beneath the daemon's own cgroup.
    pub(super) path: Option<PathBuf>,
    /// Only the harmless devices may be opened.
    pub(super) confine_devices: bool,
    /// Give the process a cgroup namespace.
    pub(super) namespace: bool,
    /// The runtime makes cgroups itself; the zygote only removes them at `path` when it was killed.
    pub(super) by_runtime: bool,
    pub(super) limits: Limits,
}

/// cgroup limits, in OCI (cgroup v1) terms.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Limits {
    pub(super) memory: Option<i64>,
    pub(super) memory_swap: Option<i64>,
    pub(super) cpu_shares: Option<u64>,
    pub(super) cpu_quota: Option<i64>,
    pub(super) cpu_period: Option<u64>,
    pub(super) cpus: Option<String>,
    pub(super) mems: Option<String>,
    pub(super) pids: Option<i64>,
}

/// A sandbox set up by us.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct SandboxPlan {
    pub(super) root: RootSource,
    pub(super) readonly_root: bool,
    /// In the order they are applied: parents before children.
    pub(super) mounts: Vec<MountPlan>,
    pub(super) devices: Vec<DevicePlan>,
    pub(super) masked: Vec<PathBuf>,
    pub(super) readonly: Vec<PathBuf>,
    pub(super) sysctl: Vec<(String, String)>,
    pub(super) hostname: Option<String>,
    pub(super) domainname: Option<String>,
    pub(super) network: NetworkPlan,
    pub(super) process: ProcessPlan,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum NetworkPlan {
    /// Keep the network of the daemon.
    Host,
    /// A new namespace with its loopback up.
    New,
    /// Join the namespace at this path.
    Join(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MountPlan {
    pub(super) dest: PathBuf,
    pub(super) source: MountSource,
    /// `MOUNT_ATTR_*` bits.
    pub(super) attrs: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MountSource {
    /// A new file system of a type, with its options.
    New { fstype: String, options: Vec<(String, Option<String>)> },
    /// A host path.
    Bind { path: PathBuf, recursive: bool },
    /// A stack of layers, or a path in it.
    Layers { source: RootSource, selector: Option<PathBuf> },
    /// A file in memory.
    File(MemoryFile),
    /// The process's own view of the cgroup file systems.
    Cgroup,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DevicePlan {
    /// Absolute path in the sandbox.
    pub(super) path: PathBuf,
    /// `c`, `b` or `p`.
    pub(super) kind: char,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ProcessPlan {
    pub(super) args: Vec<String>,
    pub(super) env: Vec<String>,
    pub(super) cwd: PathBuf,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
    pub(super) umask: u32,
    /// Resource number of the C library, soft, hard.
    pub(super) rlimits: Vec<(u32, u64, u64)>,
    pub(super) capabilities: CapabilityPlan,
    pub(super) no_new_privileges: bool,
    pub(super) oom_score_adj: Option<i32>,
    /// Its standard streams are a new terminal of the sandbox.
    pub(super) terminal: bool,
}

/// Capability sets as bit masks; bit n is capability n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CapabilityPlan {
    pub(super) bounding: u64,
    pub(super) permitted: u64,
    pub(super) effective: u64,
    pub(super) inheritable: u64,
    pub(super) ambient: u64,
}

/// A runtime to start.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RuntimeCommand {
    /// Program and arguments.
    pub(super) args: Vec<String>,
    /// Where it writes the id of the process that it started.
    pub(super) pid_file: PathBuf,
    /// Its standard streams are a terminal.
    pub(super) terminal: bool,
}

/// A root prepared for an OCI runtime, which the daemon has given a bundle.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RuntimePlan {
    pub(super) command: RuntimeCommand,
    /// Where the root is mounted (in a private mount namespace).
    pub(super) rootfs: PathBuf,
    pub(super) root: RootSource,
    /// Further layer stacks: where they are mounted for the runtime to bind.
    pub(super) layered: Vec<(PathBuf, RootSource, Option<PathBuf>)>,
    /// Files in memory, mounted likewise.
    pub(super) files: Vec<(PathBuf, MemoryFile)>,
    /// Mount points in the root, made here so that they can be reported: path, and the host file or directory that
    /// tells which of the two it must be.
    pub(super) targets: Vec<(PathBuf, Option<PathBuf>)>,
    /// Working directory and its owner, made when missing.
    pub(super) cwd: (PathBuf, u32, u32),
    /// The runtime cannot work with a cgroup v2 tree beside v1 ones; hide it.
    pub(super) hide_unified: bool,
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, SandboxError> {
    Err(SandboxError::Unsupported(what.into()))
}

fn invalid<T>(what: impl Into<String>) -> Result<T, SandboxError> {
    Err(SandboxError::Invalid(what.into()))
}

/// Checks what both executors require of a request.
pub(super) fn check(request: &SandboxRequest) -> Result<(), SandboxError> {
    check_id(&request.id)?;
    let sources = std::iter::once(&request.rootfs).chain(request.layered_mounts.iter().map(|m| &m.source));
    for source in sources {
        if let RootSource::Overlay { lowers, upper, work } = source {
            if upper.is_some() != work.is_some() {
                return invalid("an overlay needs both an upper and a work directory, or neither");
            }
            if upper.is_none() && lowers.is_empty() {
                return invalid("an overlay without any directory");
            }
        }
    }
    let layered = request.layered_mounts.iter().map(|mount| &mount.dest);
    for dest in layered.chain(request.memory_files.iter().map(|file| &file.dest)) {
        if !dest.is_absolute() || depth(dest) == 0 {
            return invalid(format!("mount point {dest:?}"));
        }
    }
    Ok(())
}

/// Ids become names of files and cgroups.
pub(super) fn check_id(id: &str) -> Result<(), SandboxError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    if id.is_empty() || id.len() > 128 || !id.chars().all(fine) || id.starts_with('.') {
        return invalid(format!("sandbox id {id:?}"));
    }
    Ok(())
}

/// Number of path components below the root.
pub(super) fn depth(path: &Path) -> usize {
    path.components().filter(|c| matches!(c, std::path::Component::Normal(_))).count()
}

/// Turns a request into a plan for the lean executor.
pub(super) fn sandbox(request: &SandboxRequest) -> Result<Plan, SandboxError> {
    check(request)?;
    let spec = &request.spec;
    if spec.hooks().as_ref().is_some_and(|h| *h != Default::default()) {
        return unsupported("OCI hooks");
    }
    let Some(process) = spec.process() else { return invalid("no process in the spec") };
    let Some(linux) = spec.linux() else { return invalid("no linux section in the spec") };
    for (present, what) in [
        (linux.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()), "user namespace mappings"),
        (linux.gid_mappings().as_ref().is_some_and(|m| !m.is_empty()), "user namespace mappings"),
        (linux.intel_rdt().is_some(), "intel RDT"),
        (linux.personality().is_some(), "personality"),
        (linux.memory_policy().is_some(), "memory policy"),
        (linux.mount_label().is_some(), "SELinux mount label"),
        (linux.time_offsets().as_ref().is_some_and(|t| !t.is_empty()), "time namespace"),
        (linux.net_devices().as_ref().is_some_and(|n| !n.is_empty()), "network devices"),
    ] {
        if present {
            return unsupported(what);
        }
    }
    let (namespaces, network, cgroup_namespace) = namespaces(spec)?;
    let (limits, confine_devices) = limits(spec)?;
    let mut masked = Vec::new();
    masked.extend(linux.masked_paths().iter().flatten().map(PathBuf::from));
    let mut sysctl: Vec<_> = linux.sysctl().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    sysctl.sort();
    let plan = SandboxPlan {
        root: request.rootfs.clone(),
        readonly_root: spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false),
        mounts: mounts(spec.mounts().as_deref().unwrap_or_default(), request)?,
        devices: devices(linux.devices().as_deref().unwrap_or_default())?,
        masked,
        readonly: linux.readonly_paths().iter().flatten().map(PathBuf::from).collect(),
        sysctl,
        hostname: spec.hostname().clone().filter(|h| !h.is_empty()),
        domainname: spec.domainname().clone().filter(|h| !h.is_empty()),
        network,
        process: process_plan(process)?,
    };
    Ok(Plan {
        id: request.id.clone(),
        namespaces,
        cgroup: CgroupPlan {
            path: linux.cgroups_path().clone(),
            confine_devices,
            namespace: cgroup_namespace,
            by_runtime: false,
            limits,
        },
        joins: None,
        attended: request.attendance.is_some(),
        task: Task::Sandbox(Box::new(plan)),
    })
}

/// Turns a further process of a sandbox into a plan for the lean executor.
pub(super) fn process(request: &ProcessRequest) -> Result<Plan, SandboxError> {
    check_id(&request.id)?;
    let Some(process) = request.spec.process() else { return invalid("no process in the spec") };
    Ok(Plan {
        id: request.id.clone(),
        namespaces: 0,
        cgroup: CgroupPlan::default(),
        joins: Some(request.sandbox.clone()),
        attended: request.attendance.is_some(),
        task: Task::Process(Box::new(process_plan(process)?)),
    })
}

fn namespaces(spec: &Spec) -> Result<(u64, NetworkPlan, bool), SandboxError> {
    let mut flags = 0;
    let mut network = NetworkPlan::Host;
    let mut cgroup = false;
    let list = spec.linux().as_ref().and_then(|l| l.namespaces().as_deref()).unwrap_or_default();
    for namespace in list {
        use LinuxNamespaceType as N;
        match (namespace.typ(), namespace.path()) {
            (N::Network, Some(path)) => network = NetworkPlan::Join(path.clone()),
            (typ, Some(path)) => {
                return unsupported(format!("joining a {typ:?} namespace ({})", path.display()));
            }
            (N::Mount, None) => flags |= libc::CLONE_NEWNS as u64,
            (N::Pid, None) => flags |= libc::CLONE_NEWPID as u64,
            (N::Ipc, None) => flags |= libc::CLONE_NEWIPC as u64,
            (N::Uts, None) => flags |= libc::CLONE_NEWUTS as u64,
            (N::Network, None) => {
                network = NetworkPlan::New;
                flags |= libc::CLONE_NEWNET as u64;
            }
            (N::Cgroup, None) => cgroup = true,
            (N::User, None) => return unsupported("user namespace"),
            (N::Time, None) => return unsupported("time namespace"),
        }
    }
    for (flag, name) in [(libc::CLONE_NEWNS, "mount"), (libc::CLONE_NEWPID, "pid")] {
        if flags & flag as u64 == 0 {
            return unsupported(format!("a sandbox without its own {name} namespace"));
        }
    }
    Ok((flags, network, cgroup))
}

fn limits(spec: &Spec) -> Result<(Limits, bool), SandboxError> {
    let mut limits = Limits::default();
    let Some(resources) = spec.linux().as_ref().and_then(|l| l.resources().as_ref()) else {
        return Ok((limits, true));
    };
    for (present, what) in [
        (resources.block_io().is_some(), "block I/O limits"),
        (resources.hugepage_limits().as_ref().is_some_and(|h| !h.is_empty()), "huge page limits"),
        (resources.network().is_some(), "network class limits"),
        (resources.rdma().as_ref().is_some_and(|r| !r.is_empty()), "RDMA limits"),
        (resources.unified().as_ref().is_some_and(|u| !u.is_empty()), "unified cgroup keys"),
    ] {
        if present {
            return unsupported(what);
        }
    }
    if let Some(memory) = resources.memory() {
        limits.memory = memory.limit();
        limits.memory_swap = memory.swap();
        let other = [memory.reservation(), memory.kernel(), memory.kernel_tcp()];
        if other.iter().any(Option::is_some) || memory.swappiness().is_some() {
            return unsupported("memory limits other than limit and swap");
        }
    }
    if let Some(cpu) = resources.cpu() {
        limits.cpu_shares = cpu.shares();
        limits.cpu_quota = cpu.quota();
        limits.cpu_period = cpu.period();
        limits.cpus = cpu.cpus().clone().filter(|c| !c.is_empty());
        limits.mems = cpu.mems().clone().filter(|c| !c.is_empty());
        if cpu.realtime_period().is_some() || cpu.realtime_runtime().is_some() || cpu.burst().is_some() {
            return unsupported("realtime and burst CPU limits");
        }
    }
    limits.pids = resources.pids().as_ref().map(oci_spec::runtime::LinuxPids::limit);
    let mut confine = true;
    for rule in resources.devices().iter().flatten() {
        let all = rule.major().is_none() && rule.minor().is_none();
        let every_access = rule.access().as_deref().is_none_or(|a| a.is_empty() || a.len() == 3);
        let every_type = matches!(rule.typ(), None | Some(LinuxDeviceType::A));
        if !(all && every_access && every_type) {
            return unsupported("device rules other than all or nothing");
        }
        confine = !rule.allow();
    }
    Ok((limits, confine))
}

fn mounts(plain: &[Mount], request: &SandboxRequest) -> Result<Vec<MountPlan>, SandboxError> {
    let mut list = Vec::new();
    for mount in plain {
        list.push(plain_mount(mount)?);
    }
    for mount in &request.layered_mounts {
        let attrs = if mount.readonly { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
        list.push(MountPlan {
            dest: mount.dest.clone(),
            source: MountSource::Layers { source: mount.source.clone(), selector: mount.selector.clone() },
            attrs: attrs.bits(),
        });
    }
    list.extend(request.memory_files.iter().map(|file| MountPlan {
        dest: file.dest.clone(),
        source: MountSource::File(file.clone()),
        attrs: 0,
    }));
    // Stable: of two mounts at one depth the spec's order holds.
    list.sort_by_key(|m| depth(&m.dest));
    Ok(list)
}

fn plain_mount(mount: &Mount) -> Result<MountPlan, SandboxError> {
    use MountAttrFlags as A;
    let dest = mount.destination().clone();
    if !dest.is_absolute() || depth(&dest) == 0 {
        return invalid(format!("mount point {dest:?}"));
    }
    let mut attrs = A::empty();
    let mut data: Vec<(String, Option<String>)> = Vec::new();
    let mut bind = None;
    for option in mount.options().iter().flatten() {
        match option.as_str() {
            "ro" => attrs |= A::MOUNT_ATTR_RDONLY,
            "rw" => attrs &= !A::MOUNT_ATTR_RDONLY,
            "nosuid" => attrs |= A::MOUNT_ATTR_NOSUID,
            "suid" => attrs &= !A::MOUNT_ATTR_NOSUID,
            "nodev" => attrs |= A::MOUNT_ATTR_NODEV,
            "dev" => attrs &= !A::MOUNT_ATTR_NODEV,
            "noexec" => attrs |= A::MOUNT_ATTR_NOEXEC,
            "exec" => attrs &= !A::MOUNT_ATTR_NOEXEC,
            "noatime" => attrs |= A::MOUNT_ATTR_NOATIME,
            "strictatime" => attrs |= A::MOUNT_ATTR_STRICTATIME,
            "nodiratime" => attrs |= A::MOUNT_ATTR_NODIRATIME,
            "nosymfollow" => attrs |= A::MOUNT_ATTR_NOSYMFOLLOW,
            // Access times relative to changes are what a new mount has.
            "relatime" | "defaults" | "async" | "atime" | "diratime" => {}
            "bind" => bind = Some(bind.unwrap_or(false)),
            "rbind" => bind = Some(true),
            // Nothing propagates out of a private namespace, which is the strictest of these.
            "private" | "rprivate" | "slave" | "rslave" => {}
            "shared" | "rshared" | "unbindable" | "runbindable" => {
                return unsupported(format!("mount propagation {option:?} of {}", dest.display()));
            }
            other => match other.split_once('=') {
                Some((key, value)) => data.push((key.to_owned(), Some(value.to_owned()))),
                None => data.push((other.to_owned(), None)),
            },
        }
    }
    let source = match (mount.typ().as_deref(), bind) {
        (_, Some(recursive)) => {
            MountSource::Bind { path: mount.source().clone().unwrap_or_default(), recursive }
        }
        (Some("bind"), None) => {
            MountSource::Bind { path: mount.source().clone().unwrap_or_default(), recursive: false }
        }
        (Some("cgroup" | "cgroup2"), None) => MountSource::Cgroup,
        (Some(fstype @ ("proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue")), None) => {
            MountSource::New { fstype: fstype.to_owned(), options: data }
        }
        (other, None) => {
            return unsupported(format!("mount type {:?} at {}", other.unwrap_or_default(), dest.display()));
        }
    };
    Ok(MountPlan { dest, source, attrs: attrs.bits() })
}

fn devices(list: &[oci_spec::runtime::LinuxDevice]) -> Result<Vec<DevicePlan>, SandboxError> {
    list.iter()
        .map(|d| {
            let kind = match d.typ() {
                LinuxDeviceType::C | LinuxDeviceType::U => 'c',
                LinuxDeviceType::B => 'b',
                LinuxDeviceType::P => 'p',
                LinuxDeviceType::A => return invalid(format!("device type of {}", d.path().display())),
            };
            let number =
                |n: i64| u32::try_from(n).or_else(|_| invalid(format!("device {}", d.path().display())));
            Ok(DevicePlan {
                path: d.path().clone(),
                kind,
                major: number(d.major())?,
                minor: number(d.minor())?,
                mode: d.file_mode().unwrap_or(0o666),
                uid: d.uid().unwrap_or(0),
                gid: d.gid().unwrap_or(0),
            })
        })
        .collect()
}

fn process_plan(process: &Process) -> Result<ProcessPlan, SandboxError> {
    let args = process.args().clone().unwrap_or_default();
    if args.is_empty() {
        return invalid("no program to run");
    }
    for (present, what) in [
        (process.apparmor_profile().as_ref().is_some_and(|p| !p.is_empty()), "AppArmor profile"),
        (process.selinux_label().as_ref().is_some_and(|l| !l.is_empty()), "SELinux label"),
        (process.scheduler().is_some(), "scheduler settings"),
        (process.io_priority().is_some(), "I/O priority"),
        (process.exec_cpu_affinity().is_some(), "CPU affinity"),
    ] {
        if present {
            return unsupported(what);
        }
    }
    let env = process.env().clone().unwrap_or_default();
    for text in args.iter().chain(&env) {
        if text.contains('\0') {
            return invalid("an argument or environment variable contains a zero byte");
        }
    }
    let user = process.user();
    let capabilities = match process.capabilities() {
        None => CapabilityPlan::default(),
        Some(c) => CapabilityPlan {
            bounding: mask(c.bounding())?,
            permitted: mask(c.permitted())?,
            effective: mask(c.effective())?,
            inheritable: mask(c.inheritable())?,
            ambient: mask(c.ambient())?,
        },
    };
    Ok(ProcessPlan {
        args,
        env,
        cwd: process.cwd().clone(),
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        umask: user.umask().unwrap_or(0o022),
        rlimits: process
            .rlimits()
            .iter()
            .flatten()
            .map(|l| (resource(l.typ()), l.soft(), l.hard()))
            .collect(),
        capabilities,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        oom_score_adj: process.oom_score_adj(),
        terminal: process.terminal().unwrap_or(false),
    })
}

fn mask(set: &Option<Capabilities>) -> Result<u64, SandboxError> {
    let mut bits = 0;
    for capability in set.iter().flatten() {
        let name = capability.to_string();
        let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
        let known: caps::Capability =
            name.parse().map_err(|_| SandboxError::Unsupported(format!("capability {name}")))?;
        bits |= known.bitmask();
    }
    Ok(bits)
}

fn resource(limit: PosixRlimitType) -> u32 {
    use PosixRlimitType as T;
    match limit {
        T::RlimitCpu => libc::RLIMIT_CPU,
        T::RlimitFsize => libc::RLIMIT_FSIZE,
        T::RlimitData => libc::RLIMIT_DATA,
        T::RlimitStack => libc::RLIMIT_STACK,
        T::RlimitCore => libc::RLIMIT_CORE,
        T::RlimitRss => libc::RLIMIT_RSS,
        T::RlimitNproc => libc::RLIMIT_NPROC,
        T::RlimitNofile => libc::RLIMIT_NOFILE,
        T::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        T::RlimitAs => libc::RLIMIT_AS,
        T::RlimitLocks => libc::RLIMIT_LOCKS,
        T::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        T::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        T::RlimitNice => libc::RLIMIT_NICE,
        T::RlimitRtprio => libc::RLIMIT_RTPRIO,
        T::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
