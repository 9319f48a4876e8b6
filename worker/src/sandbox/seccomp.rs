//! Seccomp: the default profile of a container as OCI data, and its compilation to BPF.
//!
//! The profile is Docker's: what a container may call, which of it depends on a capability, and `clone` without
//! namespace flags. `seccompiler` turns rules about arguments into BPF; this module puts a search tree over call
//! numbers in front and joins the programs of a 64-bit kernel's native and 32-bit ABI, as one process may use both.

use std::collections::{BTreeMap, BTreeSet};

use oci_spec::runtime::{
    Arch, Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator, LinuxSyscall,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::SandboxError;
use super::syscalls::{self, Abi};

/// Calls every container may make.
#[rustfmt::skip]
const ALWAYS: &[&str] = &[
    "_llseek", "_newselect", "accept", "accept4", "access", "adjtimex", "alarm", "bind", "brk", "cachestat", "capget",
    "capset", "chdir", "chmod", "chown", "chown32", "clock_adjtime", "clock_adjtime64", "clock_getres",
    "clock_getres_time64", "clock_gettime", "clock_gettime64", "clock_nanosleep", "clock_nanosleep_time64", "close",
    "close_range", "connect", "copy_file_range", "creat", "dup", "dup2", "dup3", "epoll_create", "epoll_create1",
    "epoll_ctl", "epoll_ctl_old", "epoll_pwait", "epoll_pwait2", "epoll_wait", "epoll_wait_old", "eventfd",
    "eventfd2", "execve", "execveat", "exit", "exit_group", "faccessat", "faccessat2", "fadvise64", "fadvise64_64",
    "fallocate", "fanotify_mark", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchown32", "fchownat",
    "fcntl", "fcntl64", "fdatasync", "fgetxattr", "flistxattr", "flock", "fork", "fremovexattr", "fsetxattr", "fstat",
    "fstat64", "fstatat64", "fstatfs", "fstatfs64", "fsync", "ftruncate", "ftruncate64", "futex", "futex_requeue",
    "futex_time64", "futex_wait", "futex_waitv", "futex_wake", "futimesat", "get_robust_list", "get_thread_area",
    "getcpu", "getcwd", "getdents", "getdents64", "getegid", "getegid32", "geteuid", "geteuid32", "getgid",
    "getgid32", "getgroups", "getgroups32", "getitimer", "getpeername", "getpgid", "getpgrp", "getpid", "getppid",
    "getpriority", "getrandom", "getresgid", "getresgid32", "getresuid", "getresuid32", "getrlimit", "getrusage",
    "getsid", "getsockname", "getsockopt", "gettid", "gettimeofday", "getuid", "getuid32", "getxattr", "getxattrat",
    "inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "io_cancel", "io_destroy",
    "io_getevents", "io_pgetevents", "io_pgetevents_time64", "io_setup", "io_submit", "ioctl", "ioprio_get",
    "ioprio_set", "ipc", "kill", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "lchown",
    "lchown32", "lgetxattr", "link", "linkat", "listen", "listmount", "listxattr", "listxattrat", "llistxattr",
    "lremovexattr", "lseek", "lsetxattr", "lstat", "lstat64", "madvise", "map_shadow_stack", "membarrier",
    "memfd_create", "memfd_secret", "mincore", "mkdir", "mkdirat", "mknod", "mknodat", "mlock", "mlock2", "mlockall",
    "mmap", "mmap2", "mprotect", "mq_getsetattr", "mq_notify", "mq_open", "mq_timedreceive", "mq_timedreceive_time64",
    "mq_timedsend", "mq_timedsend_time64", "mq_unlink", "mremap", "mseal", "msgctl", "msgget", "msgrcv", "msgsnd",
    "msync", "munlock", "munlockall", "munmap", "name_to_handle_at", "nanosleep", "newfstatat", "open", "openat",
    "openat2", "pause", "pidfd_open", "pidfd_send_signal", "pipe", "pipe2", "pkey_alloc", "pkey_free",
    "pkey_mprotect", "poll", "ppoll", "ppoll_time64", "prctl", "pread64", "preadv", "preadv2", "prlimit64",
    "process_mrelease", "process_vm_readv", "process_vm_writev", "pselect6", "pselect6_time64", "ptrace", "pwrite64",
    "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat", "readv", "recv", "recvfrom", "recvmmsg",
    "recvmmsg_time64", "recvmsg", "remap_file_pages", "removexattr", "removexattrat", "rename", "renameat",
    "renameat2", "restart_syscall", "riscv_hwprobe", "rmdir", "rseq", "rt_sigaction", "rt_sigpending",
    "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend", "rt_sigtimedwait", "rt_sigtimedwait_time64",
    "rt_tgsigqueueinfo", "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
    "sched_getparam", "sched_getscheduler", "sched_rr_get_interval", "sched_rr_get_interval_time64",
    "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp", "select",
    "semctl", "semget", "semop", "semtimedop", "semtimedop_time64", "send", "sendfile", "sendfile64", "sendmmsg",
    "sendmsg", "sendto", "set_robust_list", "set_thread_area", "set_tid_address", "setfsgid", "setfsgid32",
    "setfsuid", "setfsuid32", "setgid", "setgid32", "setgroups", "setgroups32", "setitimer", "setpgid", "setpriority",
    "setregid", "setregid32", "setresgid", "setresgid32", "setresuid", "setresuid32", "setreuid", "setreuid32",
    "setrlimit", "setsid", "setsockopt", "setuid", "setuid32", "setxattr", "setxattrat", "shmat", "shmctl", "shmdt",
    "shmget", "shutdown", "sigaltstack", "signalfd", "signalfd4", "sigprocmask", "sigreturn", "socketcall",
    "socketpair", "splice", "stat", "stat64", "statfs", "statfs64", "statmount", "statx", "symlink", "symlinkat",
    "sync", "sync_file_range", "syncfs", "sysinfo", "tee", "tgkill", "time", "timer_create", "timer_delete",
    "timer_getoverrun", "timer_gettime", "timer_gettime64", "timer_settime", "timer_settime64", "timerfd_create",
    "timerfd_gettime", "timerfd_gettime64", "timerfd_settime", "timerfd_settime64", "times", "tkill", "truncate",
    "truncate64", "ugetrlimit", "umask", "uname", "unlink", "unlinkat", "uretprobe", "utime", "utimensat",
    "utimensat_time64", "utimes", "vfork", "vmsplice", "wait4", "waitid", "waitpid", "write", "writev",
];

/// Calls that come with a capability.
const WITH_CAPABILITY: &[(Capability, &[&str])] = &[
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (
        Capability::SysAdmin,
        &[
            "bpf",
            "clone",
            "clone3",
            "fanotify_init",
            "fsconfig",
            "fsmount",
            "fsopen",
            "fspick",
            "lookup_dcookie",
            "lsm_get_self_attr",
            "lsm_list_modules",
            "lsm_set_self_attr",
            "mount",
            "mount_setattr",
            "move_mount",
            "open_tree",
            "perf_event_open",
            "quotactl",
            "quotactl_fd",
            "setdomainname",
            "sethostname",
            "setns",
            "syslog",
            "umount",
            "umount2",
            "unshare",
        ],
    ),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (Capability::SysModule, &["delete_module", "finit_module", "init_module"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysPtrace, &["kcmp", "pidfd_getfd", "process_madvise"]),
    (Capability::SysRawio, &["ioperm", "iopl"]),
    (Capability::SysTime, &["clock_settime", "clock_settime64", "settimeofday", "stime"]),
    (Capability::SysTtyConfig, &["vhangup"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::Syslog, &["syslog"]),
    (Capability::Bpf, &["bpf"]),
    (Capability::Perfmon, &["perf_event_open"]),
];

/// The namespace flags of `clone`: a process without CAP_SYS_ADMIN may set none of them.
const CLONE_NAMESPACE_FLAGS: u64 = 0x7e02_0000;

/// `personality` values in use: Linux, Linux 32-bit, both without address randomisation, and the query.
const PERSONALITIES: [u64; 5] = [0, 8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// `AF_VSOCK` reaches the hypervisor and is no part of the network namespace; 38 is `AF_ALG`.
const AF_ALG: u64 = 38;
const AF_VSOCK: u64 = 40;

/// Docker's default profile for a process with these capabilities.
pub fn default_profile(capabilities: &[Capability]) -> Result<LinuxSeccomp, SandboxError> {
    use LinuxSeccompAction::{ScmpActAllow as Allow, ScmpActErrno as Errno};
    use LinuxSeccompOperator as Op;

    let mut always: Vec<&str> = ALWAYS.to_vec();
    if cfg!(target_arch = "x86_64") {
        always.extend(["arch_prctl", "modify_ldt"]);
    }
    let mut rules = vec![rule(&always, Allow, None, None)];
    for family in [(AF_ALG, Op::ScmpCmpLt), (AF_ALG + 1, Op::ScmpCmpEq), (AF_VSOCK, Op::ScmpCmpGt)] {
        rules.push(rule(&["socket"], Allow, None, Some(arg(0, family.0, None, family.1)?)));
    }
    for value in PERSONALITIES {
        rules.push(rule(&["personality"], Allow, None, Some(arg(0, value, None, Op::ScmpCmpEq)?)));
    }
    for (capability, names) in WITH_CAPABILITY {
        if capabilities.contains(capability) {
            rules.push(rule(names, Allow, None, None));
        }
    }
    if !capabilities.contains(&Capability::SysAdmin) {
        let no_namespaces = arg(0, CLONE_NAMESPACE_FLAGS, Some(0), Op::ScmpCmpMaskedEq)?;
        rules.push(rule(&["clone"], Allow, None, Some(no_namespaces)));
        // The flags of clone3 are behind a pointer. "No such call" makes C libraries use clone instead.
        rules.push(rule(&["clone3"], Errno, Some(libc::ENOSYS as u32), None));
    }
    let mut profile = LinuxSeccomp::default();
    profile.set_default_action(Errno);
    profile.set_default_errno_ret(Some(libc::EPERM as u32));
    profile.set_architectures(Some(if cfg!(target_arch = "x86_64") {
        vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32]
    } else if cfg!(target_arch = "aarch64") {
        vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm]
    } else {
        vec![Arch::ScmpArchNative]
    }));
    profile.set_syscalls(Some(rules));
    Ok(profile)
}

fn rule(
    names: &[&str],
    action: LinuxSeccompAction,
    errno: Option<u32>,
    arg: Option<LinuxSeccompArg>,
) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(names.iter().map(|n| (*n).to_owned()).collect());
    rule.set_action(action);
    rule.set_errno_ret(errno);
    rule.set_args(arg.map(|a| vec![a]));
    rule
}

fn arg(
    index: usize,
    value: u64,
    value_two: Option<u64>,
    op: LinuxSeccompOperator,
) -> Result<LinuxSeccompArg, SandboxError> {
    let mut arg = LinuxSeccompArgBuilder::default().index(index).value(value).op(op);
    if let Some(second) = value_two {
        arg = arg.value_two(second);
    }
    arg.build().map_err(|e| SandboxError::Invalid(e.to_string()))
}

/// Most instructions the kernel takes in one program.
const MAX_INSTRUCTIONS: usize = 4096;

/// Length of the architecture check `seccompiler` puts in front of a program.
const ARCH_CHECK: usize = 3;

const AUDIT_ARCH_I386: u32 = 0x4000_0003;

/// Compiles a profile into the programs to install, in order.
///
/// One program can only answer "match" and "no match", so each further action of the profile is a program of its
/// own; the kernel takes the strictest answer, and of equals the one installed last.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<BpfProgram>, SandboxError> {
    if profile.listener_path().is_some() {
        return Err(SandboxError::Unsupported("seccomp listener".into()));
    }
    if profile.flags().as_ref().is_some_and(|f| !f.is_empty()) {
        return Err(SandboxError::Unsupported("seccomp filter flags".into()));
    }
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let none = Vec::new();
    let rules = profile.syscalls().as_ref().unwrap_or(&none);
    let with_compat = cfg!(target_arch = "x86_64")
        && profile.architectures().as_ref().is_some_and(|a| a.contains(&Arch::ScmpArchX86));

    let mut by_action: Vec<(SeccompAction, Vec<&LinuxSyscall>)> = Vec::new();
    let mut main: Vec<&LinuxSyscall> = Vec::new();
    for rule in rules {
        let wanted = action(rule.action(), rule.errno_ret())?;
        // What a milder action than the default names has to pass the main program.
        if !matches!(wanted, SeccompAction::Errno(_) | SeccompAction::Trap)
            && !matches!(wanted, SeccompAction::KillThread | SeccompAction::KillProcess)
        {
            main.push(rule);
        }
        if wanted == SeccompAction::Allow || wanted == default {
            continue;
        }
        match by_action.iter_mut().find(|(a, _)| *a == wanted) {
            Some((_, list)) => list.push(rule),
            None => by_action.push((wanted, vec![rule])),
        }
    }
    let mut programs = Vec::new();
    if default != SeccompAction::Allow {
        programs.push(program(&main, default, SeccompAction::Allow, with_compat)?);
    }
    for (action, rules) in by_action {
        programs.push(program(&rules, SeccompAction::Allow, action, with_compat)?);
    }
    Ok(programs)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<SeccompAction, SandboxError> {
    use LinuxSeccompAction as A;
    Ok(match action {
        A::ScmpActAllow => SeccompAction::Allow,
        A::ScmpActErrno => SeccompAction::Errno(errno.unwrap_or(libc::EPERM as u32)),
        A::ScmpActKill | A::ScmpActKillThread => SeccompAction::KillThread,
        A::ScmpActKillProcess => SeccompAction::KillProcess,
        A::ScmpActTrap => SeccompAction::Trap,
        A::ScmpActLog => SeccompAction::Log,
        A::ScmpActTrace => SeccompAction::Trace(errno.unwrap_or(libc::EPERM as u32)),
        A::ScmpActNotify => return Err(SandboxError::Unsupported("seccomp notification".into())),
    })
}

/// One program over the native and, where wanted, the 32-bit ABI. Other architectures are killed.
fn program(
    rules: &[&LinuxSyscall],
    mismatch: SeccompAction,
    matched: SeccompAction,
    with_compat: bool,
) -> Result<BpfProgram, SandboxError> {
    let native_abi = if cfg!(target_arch = "x86_64") { Abi::X86_64 } else { Abi::Generic };
    let (mut joined, body) = single(rules, native_abi, &mismatch, &matched)?;
    if with_compat {
        let (check, compat) = single(rules, Abi::I386, &mismatch, &matched)?;
        // ld arch; native? over the jump : over the body. The second check sees the same accumulator.
        joined.pop();
        joined.push(jump(body.len()));
        joined.extend(body);
        joined.push(sock_filter { code: JUMP_EQUAL, jt: 1, jf: 0, k: AUDIT_ARCH_I386 });
        joined.extend(check.into_iter().skip(ARCH_CHECK - 1));
        joined.extend(compat);
    } else {
        joined.extend(body);
    }
    if joined.len() > MAX_INSTRUCTIONS {
        return Err(SandboxError::Invalid(format!(
            "seccomp profile compiles to {} instructions",
            joined.len()
        )));
    }
    Ok(joined)
}

/// The architecture check and the body for one ABI.
///
/// Calls that are decided by their number alone go through a search tree in front of what `seccompiler` makes of the
/// others. As a chain of comparisons they would cost every sandbox 3 ms: the kernel walks the program once for each
/// call number when it is installed.
fn single(
    rules: &[&LinuxSyscall],
    abi: Abi,
    mismatch: &SeccompAction,
    matched: &SeccompAction,
) -> Result<(BpfProgram, BpfProgram), SandboxError> {
    let compiled = |e: seccompiler::BackendError| SandboxError::Invalid(format!("seccomp profile: {e}"));
    let mut by_argument: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut by_number = BTreeSet::new();
    for rule in rules {
        let args = rule.args().as_deref().unwrap_or_default();
        for name in rule.names() {
            // A name this ABI does not have cannot be called, so there is nothing to allow or refuse.
            let Some(number) = syscalls::number(abi, name) else { continue };
            if args.is_empty() {
                by_number.insert(number as u32);
            } else {
                let conditions = args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
                by_argument.entry(number).or_default().push(SeccompRule::new(conditions).map_err(compiled)?);
            }
        }
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(compiled)?;
    let filter =
        SeccompFilter::new(by_argument, mismatch.clone(), matched.clone(), arch).map_err(compiled)?;
    let mut check = BpfProgram::try_from(filter).map_err(compiled)?;
    let rest = check.split_off(ARCH_CHECK);
    let mut body = search_tree(&by_number, u32::from(matched.clone()));
    body.extend(rest);
    Ok((check, body))
}

/// Answers `verdict` for the numbers of the set and goes on behind its end for others.
fn search_tree(numbers: &BTreeSet<u32>, verdict: u32) -> BpfProgram {
    // Where membership changes, in ascending order; below the first one nothing is a member.
    let mut edges: Vec<u32> = Vec::new();
    for number in numbers {
        match edges.last_mut() {
            Some(end) if *end == *number => *end += 1,
            _ => edges.extend([*number, number + 1]),
        }
    }
    let mut tree = subtree(&edges, false, verdict);
    let length = tree.len();
    for (at, instruction) in tree.iter_mut().enumerate() {
        if instruction.code == JUMP && instruction.k == u32::MAX {
            instruction.k = (length - at - 1) as u32;
        }
    }
    let load_number =
        sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: 0 };
    tree.insert(0, load_number);
    tree
}

/// Decides between the regions that `edges` separate, the lowest of which is a member or not. Jumps to the end have
/// the distance still open. As deep as the logarithm of the number of edges.
fn subtree(edges: &[u32], member: bool, verdict: u32) -> BpfProgram {
    if edges.is_empty() {
        let answer = sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: verdict };
        return vec![if member { answer } else { jump(u32::MAX as usize) }];
    }
    let middle = edges.len() / 2;
    let below = subtree(&edges[..middle], member, verdict);
    let above = subtree(&edges[middle + 1..], member ^ middle.is_multiple_of(2), verdict);
    let at_least = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    let mut code = match u8::try_from(below.len()) {
        Ok(distance) => vec![sock_filter { code: at_least, jt: distance, jf: 0, k: edges[middle] }],
        Err(_) => {
            vec![sock_filter { code: at_least, jt: 0, jf: 1, k: edges[middle] }, jump(below.len())]
        }
    };
    code.extend(below);
    code.extend(above);
    code
}

const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;

fn jump(over: usize) -> sock_filter {
    sock_filter { code: JUMP, jt: 0, jf: 0, k: over as u32 }
}

fn condition(arg: &LinuxSeccompArg) -> Result<SeccompCondition, SandboxError> {
    use LinuxSeccompOperator as Op;
    let (op, value) = match arg.op() {
        Op::ScmpCmpNe => (SeccompCmpOp::Ne, arg.value()),
        Op::ScmpCmpLt => (SeccompCmpOp::Lt, arg.value()),
        Op::ScmpCmpLe => (SeccompCmpOp::Le, arg.value()),
        Op::ScmpCmpEq => (SeccompCmpOp::Eq, arg.value()),
        Op::ScmpCmpGe => (SeccompCmpOp::Ge, arg.value()),
        Op::ScmpCmpGt => (SeccompCmpOp::Gt, arg.value()),
        Op::ScmpCmpMaskedEq => (SeccompCmpOp::MaskedEq(arg.value()), arg.value_two().unwrap_or(0)),
    };
    let index = u8::try_from(arg.index())
        .map_err(|_| SandboxError::Invalid(format!("seccomp argument index {}", arg.index())))?;
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, op, value)
        .map_err(|e| SandboxError::Invalid(format!("seccomp condition: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARCH_NATIVE: u32 = if cfg!(target_arch = "x86_64") {
        0xc000_003e
    } else if cfg!(target_arch = "aarch64") {
        0xc000_00b7
    } else {
        0xc000_00f3
    };

    /// Runs a program as the kernel would, for the instructions that seccomp programs are made of.
    fn verdict(program: &[sock_filter], arch: u32, nr: i64, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend((nr as u32).to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        args.iter().for_each(|a| data.extend(a.to_le_bytes()));
        let (mut pc, mut a) = (0usize, 0u32);
        loop {
            let i = &program[pc];
            pc += 1;
            let skip = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
            match i.code {
                0x20 => a = u32::from_le_bytes(data[i.k as usize..i.k as usize + 4].try_into().unwrap()),
                0x06 => return i.k,
                0x05 => pc += i.k as usize,
                0x15 => pc += skip(a == i.k),
                0x25 => pc += skip(a > i.k),
                0x35 => pc += skip(a >= i.k),
                0x54 => a &= i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    /// The answer of all programs together: the strictest, of equals the last.
    fn answer(programs: &[BpfProgram], arch: u32, abi: Abi, name: &str, args: [u64; 6]) -> u32 {
        let nr = syscalls::number(abi, name).unwrap();
        let mut best = 0x7fff_0000u32;
        for p in programs {
            let v = verdict(p, arch, nr, args);
            if (v & 0xffff_0000) as i32 <= (best & 0xffff_0000) as i32 {
                best = v;
            }
        }
        best
    }

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0001;
    const ENOSYS: u32 = 0x0005_0026;

    fn native() -> Abi {
        if cfg!(target_arch = "x86_64") { Abi::X86_64 } else { Abi::Generic }
    }

    #[test]
    fn default_profile_answers_like_dockers() {
        let programs = compile(&default_profile(&super::super::spec::DEFAULT_CAPABILITIES).unwrap()).unwrap();
        let ask = |name, args| answer(&programs, ARCH_NATIVE, native(), name, args);
        for name in ["read", "execve", "chroot", "ptrace", "landlock_create_ruleset"] {
            assert_eq!(ask(name, [0; 6]), ALLOW, "{name}");
        }
        for name in
            ["mount", "unshare", "setns", "bpf", "reboot", "init_module", "syslog", "open_by_handle_at"]
        {
            assert_eq!(ask(name, [0; 6]), EPERM, "{name}");
        }
        assert_eq!(ask("clone", [0x0120_0011, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(ask("clone", [0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
        assert_eq!(ask("clone3", [0; 6]), ENOSYS);
        assert_eq!(ask("socket", [2, 1, 0, 0, 0, 0]), ALLOW);
        assert_eq!(ask("socket", [AF_VSOCK, 1, 0, 0, 0, 0]), EPERM);
        assert_eq!(ask("socket", [AF_ALG, 1, 0, 0, 0, 0]), EPERM);
        assert_eq!(ask("personality", [0xffff_ffff, 0, 0, 0, 0, 0]), ALLOW);
        assert_eq!(ask("personality", [4, 0, 0, 0, 0, 0]), EPERM);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn default_profile_covers_32_bit_programs_and_kills_foreign_ones() {
        let programs = compile(&default_profile(&super::super::spec::DEFAULT_CAPABILITIES).unwrap()).unwrap();
        let ask = |name, args| answer(&programs, AUDIT_ARCH_I386, Abi::I386, name, args);
        assert_eq!(ask("socketcall", [0; 6]), ALLOW);
        assert_eq!(ask("mount", [0; 6]), EPERM);
        assert_eq!(ask("clone3", [0; 6]), ENOSYS);
        assert_eq!(ask("clone", [0x1000_0000, 0, 0, 0, 0, 0]), EPERM);
        assert_eq!(answer(&programs, 0xc000_00b7, native(), "read", [0; 6]), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn the_search_tree_is_exact() {
        use proptest::prelude::*;
        proptest!(ProptestConfig::with_cases(48), |(numbers in proptest::collection::btree_set(0u32..2000, 0..700))| {
            let mut program = search_tree(&numbers, 7);
            program.push(sock_filter { code: 0x06, jt: 0, jf: 0, k: 9 });
            for nr in 0..2005u32 {
                let wanted = if numbers.contains(&nr) { 7 } else { 9 };
                prop_assert_eq!(verdict(&program, 0, nr.into(), [0; 6]), wanted);
            }
        });
    }

    #[test]
    fn the_default_profile_stays_small() {
        let programs = compile(&default_profile(&super::super::spec::DEFAULT_CAPABILITIES).unwrap()).unwrap();
        let instructions: usize = programs.iter().map(Vec::len).sum();
        assert!(instructions < 1000, "{instructions} instructions");
    }

    #[test]
    fn a_capability_brings_its_calls() {
        let programs = compile(&default_profile(&[Capability::SysAdmin]).unwrap()).unwrap();
        for name in ["mount", "clone3", "setns"] {
            assert_eq!(answer(&programs, ARCH_NATIVE, native(), name, [u64::MAX; 6]), ALLOW, "{name}");
        }
        assert_eq!(answer(&programs, ARCH_NATIVE, native(), "chroot", [0; 6]), EPERM);
    }

    #[test]
    fn what_cannot_be_compiled_is_refused() {
        let mut profile = default_profile(&[]).unwrap();
        profile.set_listener_path(Some("/run/x".into()));
        assert!(matches!(compile(&profile), Err(SandboxError::Unsupported(_))));
        let mut profile = default_profile(&[]).unwrap();
        profile.set_syscalls(Some(vec![rule(
            &["read"],
            LinuxSeccompAction::ScmpActAllow,
            None,
            Some(arg(9, 0, None, LinuxSeccompOperator::ScmpCmpEq).unwrap()),
        )]));
        assert!(matches!(compile(&profile), Err(SandboxError::Invalid(_))));
    }
}
