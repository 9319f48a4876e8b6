//! The service manager that started the daemon, by systemd's protocol: the sockets that it hands over, and being told
//! that the daemon is ready or stops.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use rustix::io::FdFlags;

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;

/// What a service manager gave to this process; nothing by default.
#[derive(Default)]
pub(crate) struct ServiceManager {
    sockets: VecDeque<OwnedFd>,
    notify: Option<OsString>,
}

impl ServiceManager {
    /// Takes it from the environment, where programs that this one starts must not find it. To be called once, before
    /// there are threads.
    pub(crate) fn from_environment() -> Self {
        let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
        let count = match number("LISTEN_PID") == Some(std::process::id()) {
            true => number("LISTEN_FDS").and_then(|count| RawFd::try_from(count).ok()).unwrap_or(0),
            false => 0,
        };
        let notify = std::env::var_os("NOTIFY_SOCKET").filter(|path| !path.is_empty());
        for name in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "NOTIFY_SOCKET"] {
            // SAFETY: no other thread reads the environment.
            unsafe { std::env::remove_var(name) };
        }
        let sockets = (FIRST..FIRST.saturating_add(count)).map_while(|number| {
            // SAFETY: only looked at; closed descriptors give an error.
            let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC).ok()?;
            // SAFETY: open, and by the protocol this process's alone.
            Some(unsafe { OwnedFd::from_raw_fd(number) })
        });
        Self { sockets: sockets.collect(), notify }
    }

    /// The next socket that was handed over.
    pub(crate) fn socket(&mut self) -> Option<OwnedFd> {
        self.sockets.pop_front()
    }

    /// Says how the daemon stands, if anyone wants to know.
    pub(crate) fn notify(&self, state: &str) {
        let Some(path) = &self.notify else { return };
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(path),
        };
        let sent =
            address.and_then(|address| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address));
        if let Err(error) = sent {
            tracing::warn!(state, %error, "the service manager cannot be told");
        }
    }
}
