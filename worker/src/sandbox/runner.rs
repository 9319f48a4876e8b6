//! Runs an OCI runtime and stays between it and the zygote: passes signals on to the process that the runtime started,
//! and says when there is one.
//!
//! The first of these in a sandbox is the init of a pid namespace, which ignores signals that it does not ask for.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, WaitOptions};
use rustix::termios::{tcgetwinsize, tcsetwinsize};

use super::init::{Failure, plain, streams_to_stdio};
use super::plan::RuntimeCommand;
use super::terminal;
use super::wire::{self, Status};

/// Stands for the end of the process that the runtime started: the runner itself has to see to it. The C library
/// keeps this one to itself, so nobody asks for it by name.
pub(super) const END: i32 = 32;

/// How often it is looked whether the process has been started, in nanoseconds.
const LOOK: libc::c_long = 2_000_000;

/// Every signal.
const ALL: u64 = u64::MAX;

/// Runs the runtime to its end; its exit status.
pub(super) fn run(
    command: &RuntimeCommand,
    attended: bool,
    status: &OwnedFd,
    stdio: [OwnedFd; 3],
) -> Result<i32, Failure> {
    mask_signals(ALL).map_err(|e| Failure::setup("blocking signals", e))?;
    if command.terminal {
        terminal::control(&stdio[0]).map_err(|e| Failure::setup("terminal", e))?;
    }
    streams_to_stdio(&stdio).map_err(|e| Failure::setup("standard streams", e))?;
    drop(stdio);
    let mut runtime = Command::new(OsStr::new(&command.args[0]));
    runtime.args(&command.args[1..]);
    // SAFETY: between fork and exec only a plain system call is made.
    unsafe { runtime.pre_exec(|| mask_signals(0)) };
    let child =
        runtime.spawn().map_err(|e| Failure::exec(format!("exec {}: {}", command.args[0], plain(&e))))?;
    let runtime = Pid::from_child(&child);
    // The runtime has its own copies; ours would keep the pipes open after it.
    for fd in 0..3 {
        if let Ok(null) = fs::File::options().read(true).write(true).open("/dev/null") {
            // SAFETY: replaces standard descriptors that nothing in this process uses any more.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
    let mut announced = !attended;
    loop {
        match next_signal((!announced).then_some(LOOK)) {
            Some(libc::SIGCHLD) => {
                if let Some(code) = reap(runtime).map_err(|e| Failure::setup("waiting for the runtime", e))? {
                    return Ok(code);
                }
            }
            Some(END) => match started(command) {
                Some(process) => send(process, libc::SIGKILL),
                None => send(runtime, libc::SIGKILL),
            },
            Some(signal) => {
                if signal == libc::SIGWINCH && command.terminal {
                    // A size is no reason to end; the next change tries again.
                    let _ = resize(runtime);
                }
                if let Some(process) = started(command) {
                    send(process, signal);
                }
            }
            None => {}
        }
        if !announced && started(command).is_some() {
            announced = true;
            wire::send_json(status, &Status::Ready).map_err(|e| Failure::setup("status", e))?;
        }
    }
}

/// The process that the runtime started, once it has.
fn started(command: &RuntimeCommand) -> Option<Pid> {
    let text = fs::read_to_string(&command.pid_file).ok()?;
    Pid::from_raw(text.trim().parse().ok()?)
}

fn send(to: Pid, signal: i32) {
    // SAFETY: a plain system call. A process that is gone, or a number that is no signal, is refused.
    unsafe { libc::syscall(libc::SYS_kill, to.as_raw_nonzero().get(), signal) };
}

/// Gives the terminal that the runtime made the size of the one that it was given: some do so at the start alone.
fn resize(runtime: Pid) -> io::Result<()> {
    let process = rustix::process::pidfd_open(runtime, PidfdFlags::empty())?;
    let take = |fd| rustix::process::pidfd_getfd(&process, fd, PidfdGetfdFlags::empty());
    let size = tcgetwinsize(take(0)?)?;
    for entry in fs::read_dir(format!("/proc/{}/fd", runtime.as_raw_nonzero()))? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let Some(number) = number
            && fs::read_link(entry.path())?.ends_with("ptmx")
        {
            tcsetwinsize(take(number)?, size)?;
        }
    }
    Ok(())
}

/// Takes the exit status of every child that ended; the runtime's, if it is among them.
fn reap(runtime: Pid) -> io::Result<Option<i32>> {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == runtime => {
                let signal = status.terminating_signal().unwrap_or(0);
                return Ok(Some(status.exit_status().unwrap_or(128 + signal)));
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(None),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Blocks these signals and no others, in the kernel's own form: the C library's would leave out [`END`].
fn mask_signals(set: u64) -> io::Result<()> {
    let nothing = std::ptr::null_mut::<u64>();
    // SAFETY: the kernel reads one set of the size given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            std::ptr::from_ref(&set),
            nothing,
            size_of::<u64>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Waits for a signal, at most so many nanoseconds.
fn next_signal(limit: Option<libc::c_long>) -> Option<i32> {
    let limit = limit.map(|tv_nsec| libc::timespec { tv_sec: 0, tv_nsec });
    let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: set and time outlive the call, and nothing more is asked for about the signal.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            std::ptr::from_ref(&ALL),
            std::ptr::null_mut::<libc::siginfo_t>(),
            limit,
            size_of::<u64>(),
        )
    };
    i32::try_from(signal).ok().filter(|signal| *signal > 0)
}
