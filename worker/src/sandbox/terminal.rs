//! Terminals: pairs of a controlling end and one that a process has as its standard streams.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, Uid};
use rustix::pty::OpenptFlags;

/// The multiplexer of the terminals of this mount namespace alone.
const MULTIPLEXER: &str = "/dev/pts/ptmx";

/// A new terminal of the host: its controlling end, and the process's.
pub(super) fn of_host() -> io::Result<(OwnedFd, OwnedFd)> {
    pair(rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?)
}

/// A new terminal of the sandbox that this process is in, for the user `uid`.
pub(super) fn of_sandbox(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    // Whatever else may be mounted there must not hold this process up; what is no terminal fails below.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let controller = rustix::fs::open(MULTIPLEXER, flags, Mode::empty())?;
    // Who gets it reads from it as from any terminal's controlling end.
    rustix::fs::fcntl_setfl(&controller, OFlags::RDWR)?;
    let ends = pair(controller)?;
    rustix::fs::fchown(&ends.1, Some(Uid::from_raw(uid)), None)?;
    Ok(ends)
}

fn pair(controller: OwnedFd) -> io::Result<(OwnedFd, OwnedFd)> {
    rustix::pty::unlockpt(&controller)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let process = rustix::pty::ioctl_tiocgptpeer(&controller, flags)?;
    Ok((controller, process))
}

/// Makes a terminal the controlling one of this process, which leads a session.
pub(super) fn control(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: the descriptor is open; the argument says that no other session's terminal is to be taken away.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The streams of a process whose terminal this is.
pub(super) fn streams(terminal: OwnedFd) -> io::Result<[OwnedFd; 3]> {
    Ok([terminal.try_clone()?, terminal.try_clone()?, terminal])
}
