//! `kiln shutdown`: asks the daemon behind the socket to stop, and waits until it has.

use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, Signal};

use crate::args;
use crate::connect::{Connection, Start, connect};
use crate::error::CliError;

/// Stops the daemon. It is an error if none answers.
pub(crate) fn main(flags: &args::Connection) -> Result<(), CliError> {
    let Connection::Unix(stream) = connect(flags, Start::Never)? else {
        return Err(CliError::usage("unsupported: stopping a daemon over tcp"));
    };
    let failed = |error: rustix::io::Errno| CliError::file("stop", "the daemon", error.into());
    let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(failed)?;
    // The descriptor names this very process, however fast its number is used again.
    let process = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).map_err(failed)?;
    drop(stream);
    rustix::process::pidfd_send_signal(&process, Signal::TERM).map_err(failed)?;
    let mut ended = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    loop {
        match poll(&mut ended, None) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map(drop).map_err(failed),
        }
    }
}
