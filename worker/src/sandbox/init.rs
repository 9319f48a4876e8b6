//! The last steps before a sandboxed program: run in the zygote's child, which has one thread, and new namespaces or
//! those of a sandbox that it joins.
//!
//! Order matters and is explained where it does. A failure is reported on the status socket; success is silent, the
//! socket closes when the program starts.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::{Gid, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::cgroup::Placement;
use super::mounts::{self, Host, MountError};
use super::nofile;
use super::plan::{CapabilityPlan, NetworkPlan, Plan, ProcessPlan, RuntimePlan, SandboxPlan, Task};
use super::runner;
use super::sys::{self, Kernel};
use super::terminal;
use super::wire::{self, FailureKind, Status};

/// Descriptors of one process.
pub(super) struct Streams {
    pub(super) status: OwnedFd,
    /// The first process of the sandbox that is joined.
    pub(super) joined: Option<OwnedFd>,
    /// Input, output, errors.
    pub(super) stdio: [OwnedFd; 3],
}

/// Most stub paths told in one packet, in bytes.
const STUB_BYTES: usize = wire::MAX_PACKET / 4;

/// Longest passwd file read.
const PASSWD_LIMIT: u64 = 10 << 20;

pub(super) struct Failure {
    kind: FailureKind,
    message: String,
}

impl Failure {
    pub(super) fn setup(what: &str, cause: impl std::fmt::Display) -> Self {
        Self { kind: FailureKind::Setup, message: format!("{what}: {cause}") }
    }

    pub(super) fn exec(message: String) -> Self {
        Self { kind: FailureKind::Exec, message }
    }
}

impl From<MountError> for Failure {
    fn from(error: MountError) -> Self {
        let text = error.cause.to_string();
        match text.strip_prefix("unsupported: ") {
            Some(text) => Self { kind: FailureKind::Unsupported, message: text.to_owned() },
            None => Self::setup(&error.what, text),
        }
    }
}

/// Becomes the planned process, or exits.
pub(super) fn run(
    plan: &Plan,
    programs: &[Vec<libc::sock_filter>],
    placement: &Placement,
    streams: Streams,
) -> ! {
    let Streams { status, joined, stdio } = streams;
    let attempt = std::panic::AssertUnwindSafe(|| start(plan, programs, placement, &status, joined, stdio));
    let failure = match std::panic::catch_unwind(attempt) {
        Ok(Ok(code)) => rustix_exit(code),
        Ok(Err(failure)) => failure,
        Err(_) => Failure::setup("sandbox", "internal error"),
    };
    let mut message = failure.message;
    message.truncate(message.floor_char_boundary(STUB_BYTES));
    // Nobody is left to tell when this fails; the exit status says enough.
    let _ = wire::send_json(&status, &Status::Failed { kind: failure.kind, message });
    rustix_exit(255)
}

fn rustix_exit(code: i32) -> ! {
    // SAFETY: ends the process without running exit handlers of the program this is a copy of.
    unsafe { libc::_exit(code) }
}

fn start(
    plan: &Plan,
    programs: &[Vec<libc::sock_filter>],
    placement: &Placement,
    status: &OwnedFd,
    joined: Option<OwnedFd>,
    stdio: [OwnedFd; 3],
) -> Result<i32, Failure> {
    if joined.is_some() {
        // Processes of the sandbox see one that joins them, which knows more than they do until it executes its program.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
            .map_err(|e| Failure::setup("hiding from the sandbox", e))?;
    }
    // The zygote ends with the daemon; should it be killed, its pid namespace ends too. This is the third string.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| Failure::setup("parent death signal", e))?;
    rustix::process::setsid().map_err(|e| Failure::setup("new session", e))?;
    nofile::restore();
    for tasks in &placement.tasks {
        fs::write(tasks, "0")
            .map_err(|e| Failure::setup(&format!("joining cgroup {}", tasks.display()), e))?;
    }
    if plan.cgroup.namespace {
        // Now, so that its root is the group just joined.
        unshare(libc::CLONE_NEWCGROUP).map_err(|e| Failure::setup("cgroup namespace", e))?;
    }
    if let Some(sandbox) = joined {
        join(&sandbox, &plan.task).map_err(|e| Failure::setup("joining the sandbox", e))?;
    }
    rustix::process::umask(Mode::empty());
    match &plan.task {
        Task::Sandbox(sandbox) => {
            let host = Host { nodev: placement.devices_open, cgroups: placement.view.clone() };
            assemble(sandbox, &host, status)?;
            become_program(&sandbox.process, plan.attended, programs, status, stdio)
        }
        Task::Process(process) => become_program(process, plan.attended, programs, status, stdio),
        Task::Runtime(runtime) => {
            assemble_for_runtime(runtime, status)?;
            runner::run(&runtime.command, plan.attended, status, stdio)
        }
        Task::RuntimeExec(command) => {
            rustix::process::umask(Mode::from_raw_mode(0o022));
            runner::run(command, plan.attended, status, stdio)
        }
    }
}

/// Enters the namespaces of a sandbox by its first process. The pid namespace is that of this process already.
fn join(sandbox: &OwnedFd, task: &Task) -> io::Result<()> {
    use rustix::thread::ThreadNameSpaceType as N;
    let wanted = match task {
        // A runtime works beside its container, not in it.
        Task::RuntimeExec(_) => N::MOUNT,
        _ => {
            N::MOUNT
                | N::CONTROL_GROUP
                | N::HOST_NAME_AND_NIS_DOMAIN_NAME
                | N::INTER_PROCESS_COMMUNICATION
                | N::NETWORK
        }
    };
    Ok(rustix::thread::move_into_thread_name_spaces(sandbox.as_fd(), wanted)?)
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: a plain system call; this process has one thread and shares nothing that the flags take away.
    if unsafe { libc::unshare(flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Undoes what the daemon and the runtime library changed: ignored and blocked signals survive an exec. The zygote
/// does it once for all.
pub(super) fn default_signals() {
    // All zeroes is the default disposition and the empty set, in the kernel's own form: the C library hides two
    // signals from its callers, and those may be ignored as well.
    let zero = [0u64; 8];
    let set_bytes = size_of::<u64>();
    let nothing = std::ptr::null_mut::<u64>();
    // SAFETY: the kernel only reads from an array larger than both structures; no handler of this process is needed
    // any more. Numbers that cannot be set are refused.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, zero.as_ptr(), nothing, set_bytes);
        }
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, zero.as_ptr(), nothing, set_bytes);
    }
}

/// Sets the sandbox up around this process.
fn assemble(plan: &SandboxPlan, host: &Host, status: &OwnedFd) -> Result<(), Failure> {
    match &plan.network {
        NetworkPlan::Host => {}
        NetworkPlan::New => loopback_up().map_err(|e| Failure::setup("loopback interface", e))?,
        NetworkPlan::Join(path) => join_network(path)
            .map_err(|e| Failure::setup(&format!("network namespace {}", path.display()), e))?,
    }
    if let Some(score) = plan.process.oom_score_adj {
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|e| Failure::setup("oom_score_adj", e))?;
    }
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes()).map_err(|e| Failure::setup("host name", e))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes()).map_err(|e| Failure::setup("domain name", e))?;
    }
    let stubs = mounts::assemble(&Kernel, plan, host)?;
    report_stubs(status, stubs)
}

fn become_program(
    process: &ProcessPlan,
    attended: bool,
    programs: &[Vec<libc::sock_filter>],
    status: &OwnedFd,
    stdio: [OwnedFd; 3],
) -> Result<i32, Failure> {
    let stdio = if process.terminal { open_terminal(process.uid, status)? } else { stdio };
    // Now, before any path of the image's is looked up: what only closes with the exec could still be used by the look-up
    // of the program, as /proc/self/fd/N, and lead out of the root.
    streams_to_stdio(&stdio).map_err(|e| Failure::setup("standard streams", e))?;
    drop(stdio);
    close_all_but(status).map_err(|e| Failure::setup("closing descriptors", e))?;
    if attended {
        wire::send_json(status, &Status::Ready).map_err(|e| Failure::setup("status", e))?;
    }
    for (resource, soft, hard) in &process.rlimits {
        set_rlimit(*resource, *soft, *hard)
            .map_err(|e| Failure::setup(&format!("resource limit {resource}"), e))?;
    }
    let env = environment(process);
    let arguments: Vec<CString> = c_strings(&process.args)?;
    let environment: Vec<CString> = c_strings(&env)?;

    rustix::process::umask(Mode::from_raw_mode(process.umask));
    // Without no_new_privileges a filter needs CAP_SYS_ADMIN, so it comes before the capabilities go. The few calls
    // from here on are in every usable profile.
    if !process.no_new_privileges {
        install_filters(programs).map_err(|e| Failure::setup("seccomp filter", e))?;
    }
    // A directory may be closed to the user who is to work in it.
    enter_directory(&process.cwd)?;
    set_user(process).map_err(|(what, e)| Failure::setup(what, e))?;
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true).map_err(|e| Failure::setup("no_new_privileges", e))?;
        install_filters(programs).map_err(|e| Failure::setup("seccomp filter", e))?;
    }
    // Changing the user cleared it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|e| Failure::setup("parent death signal", e))?;
    let program = find_program(&process.args[0], &env)?;
    let error = exec(&program, &arguments, &environment);
    Err(Failure::exec(format!("exec {}: {}", program.display(), plain(&error))))
}

/// The streams of a process with a terminal, whose other end goes to the daemon.
fn open_terminal(uid: u32, status: &OwnedFd) -> Result<[OwnedFd; 3], Failure> {
    let open = || {
        let (controller, process) = terminal::of_sandbox(uid)?;
        terminal::control(&process)?;
        wire::send(status, &serde_json::to_vec(&Status::Terminal)?, &[controller.as_fd()])?;
        terminal::streams(process)
    };
    open().map_err(|e: io::Error| Failure::setup("terminal", e))
}

/// An error without Rust's `(os error n)`.
pub(super) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

fn report_stubs(status: &OwnedFd, stubs: Vec<PathBuf>) -> Result<(), Failure> {
    let mut rest = stubs.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fit = rest.iter().take_while(|p| {
            bytes += p.as_os_str().len() + 4;
            bytes <= STUB_BYTES
        });
        let (now, later) = rest.split_at(fit.count().max(1));
        wire::send_json(status, &Status::Stubs(now.to_vec())).map_err(|e| Failure::setup("status", e))?;
        rest = later;
    }
    Ok(())
}

pub(super) fn streams_to_stdio([stdin, stdout, stderr]: &[OwnedFd; 3]) -> io::Result<()> {
    // The zygote keeps 0, 1 and 2 occupied, so none of these is one of the targets.
    rustix::stdio::dup2_stdin(stdin)?;
    rustix::stdio::dup2_stdout(stdout)?;
    rustix::stdio::dup2_stderr(stderr)?;
    Ok(())
}

/// Closes every descriptor except the standard streams and `kept`. That is a socket, through which no path leads; it
/// closes with the exec.
fn close_all_but(kept: &OwnedFd) -> io::Result<()> {
    let kept = kept.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept + 1, u32::MAX)] {
        if first > last {
            continue;
        }
        // SAFETY: what else is open belongs to callers that this process never returns to.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0u32) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` outlives the call; an unknown resource is refused.
    if unsafe { libc::setrlimit(resource as _, &limit) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType};
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is valid, and both calls read and write only inside it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as libc::c_char;
        request.ifr_name[1] = b'o' as libc::c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        if libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn join_network(path: &Path) -> io::Result<()> {
    let namespace = fs::File::open(path)?;
    let kind = Some(rustix::thread::LinkNameSpaceType::Network);
    Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?)
}

fn install_filters(programs: &[Vec<libc::sock_filter>]) -> io::Result<()> {
    for program in programs {
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        // SAFETY: the kernel copies `filter.len` instructions from a vector of that length and changes nothing.
        let result = unsafe {
            libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, std::ptr::from_ref(&filter))
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Changes user and groups and keeps exactly the planned capabilities.
fn set_user(process: &ProcessPlan) -> Result<(), (&'static str, io::Error)> {
    let caps = &process.capabilities;
    let io = |what: &'static str| move |e: rustix::io::Errno| (what, io::Error::from(e));
    drop_bounding(caps).map_err(io("bounding capabilities"))?;
    // Leaving uid 0 would clear the permitted set before it can be reduced to what is wanted.
    rustix::thread::set_keep_capabilities(true).map_err(io("keeping capabilities"))?;
    let groups: Vec<Gid> = process.groups.iter().map(|g| Gid::from_raw(*g)).collect();
    rustix::thread::set_thread_groups(&groups).map_err(io("supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(io("group id"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(io("user id"))?;
    rustix::thread::set_keep_capabilities(false).map_err(io("keeping capabilities"))?;
    let set = CapabilitySet::from_bits_retain;
    let sets = CapabilitySets {
        effective: set(caps.effective),
        permitted: set(caps.permitted),
        inheritable: set(caps.inheritable),
    };
    rustix::thread::set_capabilities(None, sets).map_err(io("capabilities"))?;
    rustix::thread::clear_ambient_capability_set().map_err(io("ambient capabilities"))?;
    for bit in (0..64).filter(|b| caps.ambient >> b & 1 == 1) {
        rustix::thread::configure_capability_in_ambient_set(set(1 << bit), true)
            .map_err(io("ambient capabilities"))?;
    }
    Ok(())
}

fn drop_bounding(caps: &CapabilityPlan) -> Result<(), rustix::io::Errno> {
    for bit in 0..64u32 {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match rustix::thread::capability_is_in_bounding_set(capability) {
            Ok(true) if caps.bounding >> bit & 1 == 0 => {
                rustix::thread::remove_capability_from_bounding_set(capability)?;
            }
            Ok(_) => {}
            // Past the last one this kernel has.
            Err(rustix::io::Errno::INVAL) => break,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn enter_directory(cwd: &Path) -> Result<(), Failure> {
    let fail = |e: io::Error| Failure::setup(&format!("working directory {}", cwd.display()), plain(&e));
    rustix::process::chdir(cwd).map_err(|e| fail(e.into()))?;
    // A link through /proc could lead to a directory outside the root.
    let now = rustix::process::getcwd(Vec::new()).map_err(|e| fail(e.into()))?;
    if !now.to_bytes().starts_with(b"/") {
        return Err(fail(io::Error::other("outside the root")));
    }
    Ok(())
}

/// The planned environment, with `HOME` from the user's passwd entry when it is missing.
fn environment(process: &ProcessPlan) -> Vec<String> {
    let mut env = process.env.clone();
    if !env.iter().any(|e| e.starts_with("HOME=")) {
        let home = home(process.uid).unwrap_or_else(|| "/".to_owned());
        env.push(format!("HOME={home}"));
    }
    env
}

fn home(uid: u32) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open("/etc/passwd", flags, Mode::empty()).ok()?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd).ok()?.st_mode);
    if kind != FileType::RegularFile {
        return None;
    }
    let bytes = sys::read_limited(fd, PASSWD_LIMIT).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let entry = text.lines().find(|l| l.split(':').nth(2).and_then(|u| u.parse().ok()) == Some(uid))?;
    entry.split(':').nth(5).filter(|h| !h.is_empty()).map(str::to_owned)
}

fn c_strings(list: &[String]) -> Result<Vec<CString>, Failure> {
    list.iter()
        .map(|s| {
            CString::new(s.as_str()).map_err(|_| Failure::exec("an argument contains a zero byte".into()))
        })
        .collect()
}

/// Looks a program up in `PATH`, the way a shell does.
fn find_program(name: &str, env: &[String]) -> Result<PathBuf, Failure> {
    if name.contains('/') {
        return Ok(PathBuf::from(name));
    }
    let path = env.iter().rev().find_map(|e| e.strip_prefix("PATH=")).unwrap_or_default();
    let mut refused = false;
    for dir in path.split(':') {
        let candidate = if dir.is_empty() { Path::new(".").join(name) } else { Path::new(dir).join(name) };
        let file = fs::metadata(&candidate).is_ok_and(|m| m.is_file());
        match rustix::fs::access(&candidate, rustix::fs::Access::EXEC_OK) {
            Ok(()) if file => return Ok(candidate),
            Err(rustix::io::Errno::ACCESS) => refused = true,
            _ => {}
        }
    }
    let why = if refused { "permission denied" } else { "executable file not found in $PATH" };
    Err(Failure::exec(format!("exec: {name:?}: {why}")))
}

fn exec(program: &Path, args: &[CString], env: &[CString]) -> io::Error {
    let pointers = |list: &[CString]| {
        list.iter().map(|s| s.as_ptr()).chain(std::iter::once(std::ptr::null())).collect::<Vec<_>>()
    };
    let (args, env) = (pointers(args), pointers(env));
    let Ok(program) = CString::new(program.as_os_str().as_bytes()) else {
        return io::ErrorKind::InvalidInput.into();
    };
    // SAFETY: both arrays end with a null pointer and point to C strings that live until the call.
    unsafe { libc::execve(program.as_ptr(), args.as_ptr(), env.as_ptr()) };
    io::Error::last_os_error()
}

/// Mounts the root where the bundle expects it.
fn assemble_for_runtime(plan: &RuntimePlan, status: &OwnedFd) -> Result<(), Failure> {
    let stubs = mounts::assemble_for_runtime(&Kernel, plan)?;
    report_stubs(status, stubs)?;
    // The runtime looks processes up in /proc, which has to be that of this pid namespace.
    let proc = rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("proc", "/proc", "proc", proc, None).map_err(|e| Failure::setup("/proc", e))?;
    if plan.hide_unified {
        // Not there is as good as hidden.
        let _ = rustix::mount::unmount("/sys/fs/cgroup/unified", rustix::mount::UnmountFlags::DETACH);
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(())
}
