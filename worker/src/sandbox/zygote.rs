//! The zygote: a single-threaded copy of the binary that starts sandboxes for the multi-threaded daemon.
//!
//! Forking a threaded process and then running more than a few calls in the child is not safe; a process that never
//! had a second thread has no such limit, and being small it forks fast. It is the init of a pid namespace, so that
//! the kernel ends every sandbox with it, and it ends when the daemon's socket closes.
//!
//! A further process of a sandbox starts in its pid namespace too, and enters the others itself.
//!
//! Protocol: [`wire`]. It takes orders only from the daemon that started it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mount::MountAttrFlags;
use rustix::process::{PidfdFlags, WaitId, WaitIdOptions};
use rustix::thread::ThreadNameSpaceType;

use super::SandboxError;
use super::cgroup::{Cgroups, Placement};
use super::init::{self, Streams};
use super::nofile;
use super::plan::{Limits, Plan, Task};
use super::runner;
use super::wire::{self, Ask, FailureKind, Hello, START_FDS, Status};
use crate::mount;

/// Name the binary is started under to become the zygote.
const ARGV0: &str = "kiln-zygote";

/// Set for the zygote to the daemon's process id, also so that a program that does not call [`run_if_requested`] cannot start itself for ever.
const MARK: &str = "KILN_ZYGOTE";

/// How long the zygote may take to answer.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long the end of the zygote is waited for.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Pause between attempts to remove a cgroup that is still busy.
const RETRY_PAUSE: Duration = Duration::from_millis(2);

/// Becomes the zygote when the daemon started this process as one; returns otherwise.
///
/// Every binary that opens an executor calls this first thing in `main`, before any thread exists.
pub fn run_if_requested() {
    if std::env::args_os().next().as_deref() == Some(OsStr::new(ARGV0)) && std::env::var_os(MARK).is_some() {
        launch()
    }
}

/// Descriptor the daemon passes its socket as, and where it is kept.
const HANDED: i32 = 0;
const CONTROL: i32 = 3;

fn launch() -> ! {
    // SAFETY: descriptor 0 is ours alone this early; 3 and above hold nothing this process uses.
    let control = unsafe {
        libc::dup2(HANDED, CONTROL);
        libc::fcntl(CONTROL, libc::F_SETFD, libc::FD_CLOEXEC);
        libc::syscall(libc::SYS_close_range, CONTROL as u32 + 1, u32::MAX, 0u32);
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            libc::dup2(null, HANDED);
            libc::close(null);
        }
        OwnedFd::from_raw_fd(CONTROL)
    };
    // Told, not asked for: a daemon that is gone already would be mistaken for whoever adopted us.
    let daemon = std::env::var(MARK).ok().and_then(|pid| pid.parse().ok()).unwrap_or(0);
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir("/");
    let code = match clone(libc::CLONE_NEWPID as u64, None) {
        Ok(Cloned::Child) => serve(control, daemon),
        // The zygote goes on without this parent, which only made its pid namespace.
        Ok(Cloned::Parent(_)) => 0,
        Err(error) => {
            let text = format!("making a pid namespace: {error}");
            let _ = wire::send_json(&control, &Hello::Failed(text));
            1
        }
    };
    std::process::exit(code)
}

/// Wider than the C library's constant of that name can say.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

enum Cloned {
    Child,
    Parent(OwnedFd),
}

/// `clone3` as a fork into new namespaces, with a pidfd for the parent.
fn clone(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    let mut pidfd: i32 = -1;
    // SAFETY: an all-zero clone_args is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | libc::CLONE_PIDFD as u64;
    args.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has a copy of everything, and this process has one thread, so the child may
    // go on as any program would.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, std::ptr::from_mut(&mut args), size_of::<libc::clone_args>())
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        // SAFETY: the kernel stored a new descriptor that nobody else owns.
        _ => Ok(Cloned::Parent(unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// One sandbox that runs, or a further process of one.
struct Running {
    id: String,
    /// Of the sandbox's first process, or of this further one.
    pidfd: OwnedFd,
    status: OwnedFd,
    placement: Placement,
    killed: bool,
    /// It is a further process.
    joined: bool,
    /// The process is a runtime that started the one meant.
    by_runtime: bool,
}

impl Running {
    fn kill(&mut self) {
        self.killed = true;
        self.signal(libc::SIGKILL);
    }

    /// Sends the process a signal. Gone already is fine.
    fn signal(&self, signal: i32) {
        let signal = match signal {
            // With the runner of a sandbox all that it runs ends; that of a further process would leave it behind.
            libc::SIGKILL if self.joined && self.by_runtime => runner::END,
            signal => signal,
        };
        let nothing = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a plain system call; the kernel refuses what is no signal.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), signal, nothing, 0) };
    }
}

struct Server {
    /// Open to the end, also when the daemon is gone or waits for us: its closing says that all is cleaned up.
    control: Option<OwnedFd>,
    /// The daemon gives no more orders.
    ended: bool,
    running: Vec<Running>,
    cgroups: Cgroups,
    /// This process, by which it finds back into its own pid namespace.
    own: OwnedFd,
}

fn serve(control: OwnedFd, daemon: u32) -> ! {
    let _ = rustix::thread::set_name(c"kiln-zygote");
    init::default_signals();
    let cgroups = Cgroups::open(daemon);
    let own = match rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()) {
        Ok(own) => own,
        Err(error) => {
            let _ = wire::send_json(&control, &Hello::Failed(format!("opening itself: {error}")));
            std::process::exit(1)
        }
    };
    // A daemon that is gone already leaves no orders, and ends the loop below at once.
    let _ = wire::send_json(&control, &Hello::Ready);
    let mut server = Server { control: Some(control), ended: false, running: Vec::new(), cgroups, own };
    server.run();
    server.cgroups.close();
    std::process::exit(0)
}

impl Server {
    /// Until the daemon is gone and with it every sandbox.
    fn run(&mut self) {
        while !self.ended || !self.running.is_empty() {
            let pause = self.cgroups.retry().then(|| timespec(RETRY_PAUSE));
            let Ok(ready) = self.wait(pause.as_ref()) else { continue };
            let (control, sandboxes) = ready;
            for event in sandboxes {
                match event {
                    (at, Event::Ended) => self.finish(at),
                    (at, Event::Spoken) => self.hear(at),
                }
            }
            if control {
                self.order();
            }
        }
    }

    /// Whether the daemon says something, and what happened to which sandbox.
    fn wait(&self, timeout: Option<&Timespec>) -> io::Result<(bool, Vec<(usize, Event)>)> {
        let count = self.running.len();
        let mut fds = Vec::with_capacity(1 + 2 * count);
        fds.extend(self.running.iter().map(|sandbox| PollFd::new(&sandbox.pidfd, PollFlags::IN)));
        // A socket that hung up stays ready for ever; once killed, only its sandbox's end is of interest.
        let followed: Vec<usize> = (0..count).filter(|at| !self.running[*at].killed).collect();
        for at in &followed {
            fds.push(PollFd::new(&self.running[*at].status, PollFlags::IN | PollFlags::RDHUP));
        }
        let control = self.control.as_ref().filter(|_| !self.ended);
        fds.extend(control.map(|control| PollFd::new(control, PollFlags::IN)));
        rustix::event::poll(&mut fds, timeout)?;
        let ready = |at: usize| !fds[at].revents().is_empty();
        let mut events: Vec<_> = (0..count).filter(|at| ready(*at)).map(|at| (at, Event::Ended)).collect();
        for (place, at) in followed.into_iter().enumerate() {
            if ready(count + place) && !ready(at) {
                events.push((at, Event::Spoken));
            }
        }
        // Removing from the end keeps the other places valid.
        events.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
        Ok((control.is_some() && ready(fds.len() - 1), events))
    }

    fn hear(&mut self, at: usize) {
        let process = &mut self.running[at];
        match wire::receive(&process.status) {
            Ok(Some((bytes, _))) => {
                if let Ok(Ask::Signal(signal)) = wire::parse(&bytes) {
                    process.signal(signal);
                }
            }
            Ok(None) | Err(_) => process.kill(),
        }
    }

    fn finish(&mut self, at: usize) {
        let sandbox = self.running.swap_remove(at);
        let ended = rustix::io::retry_on_intr(|| {
            rustix::process::waitid(WaitId::PidFd(sandbox.pidfd.as_fd()), WaitIdOptions::EXITED)
        });
        let code = match ended {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code as u32,
                (None, signal) => 128 + signal.unwrap_or(0) as u32,
            },
            _ => 255,
        };
        let oom_killed = Cgroups::oom_killed(&sandbox.placement);
        self.cgroups.release(sandbox.placement);
        // The daemon may have stopped listening.
        let _ = wire::send_json(&sandbox.status, &Status::Exited { code, oom_killed });
    }

    fn order(&mut self) {
        let Some(control) = &self.control else { return };
        match wire::receive(control) {
            Ok(Some((_, fds))) => self.start(fds),
            Ok(None) | Err(_) => {
                self.ended = true;
                self.running.iter_mut().for_each(Running::kill);
            }
        }
    }

    fn start(&mut self, fds: Vec<OwnedFd>) {
        let Ok([plan, status, stdin, stdout, stderr]) = <[OwnedFd; START_FDS]>::try_from(fds) else { return };
        let _ = wire::send_json(&status, &Status::Started);
        if let Err((kind, message)) = self.try_start(&plan, &status, [stdin, stdout, stderr]) {
            let _ = wire::send_json(&status, &Status::Failed { kind, message });
            let _ = wire::send_json(&status, &Status::Exited { code: 255, oom_killed: false });
        }
    }

    fn try_start(&mut self, file: &OwnedFd, status: &OwnedFd, stdio: [OwnedFd; 3]) -> Result<(), Refusal> {
        let (json, programs) =
            wire::read_plan_file(file).map_err(|e| setup(format!("reading the plan: {e}")))?;
        let plan: Plan = wire::parse(&json).map_err(|e| setup(format!("reading the plan: {e}")))?;
        let programs = unpack(&programs).ok_or_else(|| setup("malformed seccomp programs"))?;
        let ours = status.try_clone().map_err(setup)?;
        let streams =
            |joined| -> io::Result<Streams> { Ok(Streams { status: status.try_clone()?, joined, stdio }) };
        let (cloned, placement) = match &plan.joins {
            Some(sandbox) => {
                let sandbox = self.running.iter().find(|other| other.id == *sandbox && !other.joined);
                let sandbox = sandbox.ok_or_else(|| (FailureKind::Gone, String::new()))?;
                let (cloned, first) = self.clone_into(sandbox)?;
                if let Cloned::Child = cloned {
                    let placement = sandbox.placement.for_another();
                    self.forget();
                    let Ok(streams) = streams(Some(first)) else { std::process::exit(255) };
                    init::run(&plan, &programs, &placement, streams)
                }
                (cloned, Placement::default())
            }
            None => {
                let (cloned, mut placement) = self.clone_sandbox(&plan)?;
                if let Cloned::Child = cloned {
                    self.forget();
                    placement.into = None;
                    let Ok(streams) = streams(None) else { std::process::exit(255) };
                    init::run(&plan, &programs, &placement, streams)
                }
                (cloned, placement)
            }
        };
        if let Cloned::Parent(pidfd) = cloned {
            self.running.push(Running {
                id: plan.id,
                pidfd,
                status: ours,
                placement,
                killed: false,
                joined: plan.joins.is_some(),
                by_runtime: matches!(plan.task, Task::Runtime(_) | Task::RuntimeExec(_)),
            });
        }
        Ok(())
    }

    /// In a child: held copies would keep other sandboxes' sockets, and the daemon's, from closing.
    fn forget(&mut self) {
        self.control = None;
        self.running.clear();
    }

    /// Clones the first process of a sandbox into its place.
    fn clone_sandbox(&mut self, plan: &Plan) -> Result<(Cloned, Placement), Refusal> {
        let mut placement = self.cgroups.place(&plan.id, &plan.cgroup).map_err(setup)?;
        let mut cloned = clone(plan.namespaces, placement.into.as_ref().map(AsFd::as_fd));
        let optional = plan.cgroup.path.is_none() && plan.cgroup.limits == Limits::default();
        if cloned.is_err() && placement.into.is_some() && optional {
            // Some containers forbid joining even groups that could be made.
            placement.into = None;
            placement.devices_open = plan.cgroup.confine_devices && !self.cgroups.confines_all();
            cloned = clone(plan.namespaces, None);
        }
        match cloned {
            Ok(cloned) => Ok((cloned, placement)),
            Err(error) => {
                self.cgroups.release(placement);
                Err(setup(format!("starting a process: {error}")))
            }
        }
    }

    /// Clones a process into the pid namespace and the version 2 group of a sandbox; beside it the sandbox's first
    /// process.
    fn clone_into(&self, sandbox: &Running) -> Result<(Cloned, OwnedFd), Refusal> {
        let enter = |process: &OwnedFd| {
            rustix::thread::move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::PROCESS_ID)
        };
        let gone = || (FailureKind::Gone, String::new());
        let first = sandbox.pidfd.try_clone().map_err(setup)?;
        // This says where children go, not where this process is.
        enter(&first).map_err(|_| gone())?;
        let cloned = clone(0, sandbox.placement.into.as_ref().map(AsFd::as_fd));
        if !matches!(cloned, Ok(Cloned::Child)) && enter(&self.own).is_err() {
            // Every other sandbox would start in this one.
            std::process::abort();
        }
        match cloned {
            Ok(cloned) => Ok((cloned, first)),
            // So the kernel says that the first process of the namespace has ended.
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => Err(gone()),
            Err(error) => Err(setup(format!("starting a process: {error}"))),
        }
    }
}

/// Why a process was not started.
type Refusal = (FailureKind, String);

fn setup(cause: impl std::fmt::Display) -> Refusal {
    (FailureKind::Setup, cause.to_string())
}

enum Event {
    /// The process ended.
    Ended,
    /// Its follower says something, or left.
    Spoken,
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as _, tv_nsec: duration.subsec_nanos() as _ }
}

/// Seccomp programs as bytes: each a count of instructions, then the instructions in the kernel's layout.
pub(super) fn pack(programs: &[seccompiler::BpfProgram]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for program in programs {
        bytes.extend((program.len() as u32).to_le_bytes());
        for i in program {
            bytes.extend(i.code.to_le_bytes());
            bytes.extend([i.jt, i.jf]);
            bytes.extend(i.k.to_le_bytes());
        }
    }
    bytes
}

fn unpack(mut bytes: &[u8]) -> Option<Vec<Vec<libc::sock_filter>>> {
    let mut programs = Vec::new();
    while !bytes.is_empty() {
        let (count, rest) = bytes.split_first_chunk::<4>()?;
        let length = (u32::from_le_bytes(*count) as usize).checked_mul(8)?;
        let (body, rest) = rest.split_at_checked(length)?;
        let instruction = |i: &[u8]| libc::sock_filter {
            code: u16::from_le_bytes([i[0], i[1]]),
            jt: i[2],
            jf: i[3],
            k: u32::from_le_bytes([i[4], i[5], i[6], i[7]]),
        };
        programs.push(body.chunks_exact(8).map(instruction).collect());
        bytes = rest;
    }
    Some(programs)
}

/// A sandbox to start.
#[derive(Debug)]
pub(super) struct Order {
    plan: Vec<u8>,
    programs: Arc<Vec<u8>>,
    stdio: [OwnedFd; 3],
}

impl Order {
    /// `programs` are packed seccomp programs; `stdio` is standard input, output and error.
    pub(super) fn new(
        plan: &Plan,
        programs: Arc<Vec<u8>>,
        stdio: [OwnedFd; 3],
    ) -> Result<Self, SandboxError> {
        let id = &plan.id;
        let plan =
            serde_json::to_vec(plan).map_err(|e| SandboxError::Invalid(format!("sandbox {id}: {e}")))?;
        Ok(Self { plan, programs, stdio })
    }
}

/// The daemon's end.
#[derive(Debug)]
pub(super) struct Zygote {
    control: OwnedFd,
}

impl Zygote {
    /// Starts the zygote and waits until it is ready.
    pub(super) fn spawn() -> Result<Self, SandboxError> {
        if std::env::var_os(MARK).is_some() {
            return Err(SandboxError::Helper(format!("{MARK} is set, but main did not become the helper")));
        }
        let (ours, theirs) =
            wire::pair(false).map_err(|e| SandboxError::io("socket for the sandbox helper", e))?;
        let program = program().map_err(|e| SandboxError::io("binary of the sandbox helper", e))?;
        let mut child = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
            .arg0(ARGV0)
            .env(MARK, std::process::id().to_string())
            .envs(nofile::original().map(|soft| (nofile::VARIABLE, soft.to_string())))
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| SandboxError::io("starting the sandbox helper", e))?;
        let hello = Self::hello(&ours);
        if hello.is_err() {
            let _ = child.kill();
        }
        // It ends as soon as the zygote is forked off.
        let _ = child.wait();
        hello.map(|()| Self { control: ours })
    }

    fn hello(control: &OwnedFd) -> Result<(), SandboxError> {
        if !readable(control, START_LIMIT) {
            let text = "no answer; does the program call zygote::run_if_requested first?";
            return Err(SandboxError::Helper(text.into()));
        }
        match wire::receive(control).map_err(|e| SandboxError::io("answer of the sandbox helper", e))? {
            None => Err(SandboxError::Helper("ended at once".into())),
            Some((bytes, _)) => match wire::parse(&bytes) {
                Ok(Hello::Ready) => Ok(()),
                Ok(Hello::Failed(text)) => Err(SandboxError::Helper(text)),
                Err(e) => Err(SandboxError::io("answer of the sandbox helper", e)),
            },
        }
    }

    /// Starts a sandbox; its answers come on the returned socket, which does not block. Closing or shutting that
    /// down kills the sandbox. An error means that the zygote is gone; so does an end before [`Status::Started`].
    pub(super) fn start(&self, order: &Order) -> io::Result<OwnedFd> {
        let file = wire::plan_file(&order.plan, &order.programs)?;
        let (ours, theirs) = wire::pair(false)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let [stdin, stdout, stderr] = order.stdio.each_ref().map(AsFd::as_fd);
        wire::send(&self.control, b"start", &[file.as_fd(), theirs.as_fd(), stdin, stdout, stderr])?;
        Ok(ours)
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // Its end closes the socket: then all sandboxes are gone and their cgroups removed.
        let _ = rustix::net::shutdown(&self.control, rustix::net::Shutdown::Write);
        let until = Instant::now() + END_LIMIT;
        while readable(&self.control, until.saturating_duration_since(Instant::now())) {
            if !matches!(wire::receive(&self.control), Ok(Some(_))) {
                break;
            }
        }
    }
}

/// This binary by a read-only mount: until an image's program takes over, a sandbox reaches it as `/proc/self/exe`, and
/// must not change what the host has.
fn program() -> io::Result<OwnedFd> {
    let attrs = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let program = mount::clone_tree(Path::new("/proc/self/exe"), false)?;
    mount::set_attrs(program.as_fd(), attrs, false)?;
    Ok(program)
}

fn readable(fd: &OwnedFd, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    loop {
        let left = timespec(until.saturating_duration_since(Instant::now()));
        match rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return matches!(other, Ok(1..)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_survive_the_trip() {
        let i = |code, k| seccompiler::sock_filter { code, jt: 1, jf: 2, k };
        let programs = vec![vec![i(6, 7), i(0x15, 0xffff_0000)], vec![i(5, 1)]];
        let back = unpack(&pack(&programs)).unwrap();
        assert_eq!(back.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
        assert_eq!((back[0][1].code, back[0][1].jt, back[0][1].jf, back[0][1].k), (0x15, 1, 2, 0xffff_0000));
        assert!(unpack(&[1, 0, 0, 0, 9]).is_none());
        assert!(unpack(&[255, 255, 255, 255]).is_none());
    }
}
