//! Messages between daemon and zygote: packets on seqpacket sockets, descriptors beside them.
//!
//! A start request carries its plan in a memory file, because arguments and environment may be larger than any
//! packet; answers about one process come on a socket of its own, and what is asked of it while it runs goes there.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest packet either side sends; longer texts are cut before.
pub(super) const MAX_PACKET: usize = 64 * 1024;

/// Descriptors that travel with a start request, in this order: plan, status socket, stdin, stdout, stderr.
pub(super) const START_FDS: usize = 5;

/// Answers on a sandbox's status socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Status {
    /// The order was taken; always the first answer.
    Started,
    /// Mount points that had to be made, some of them; sent before the program starts.
    Stubs(Vec<PathBuf>),
    /// The process has a terminal, whose controlling end comes along.
    Terminal,
    /// The sandbox is set up; told to those who attend, before the program starts.
    Ready,
    /// The program was not started.
    Failed { kind: FailureKind, message: String },
    /// All processes are gone.
    Exited { code: u32, oom_killed: bool },
}

/// What the daemon asks of a running process.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// Send it a signal.
    Signal(i32),
}

/// Which kind of error a failed start is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FailureKind {
    Setup,
    Exec,
    Unsupported,
    Gone,
}

/// What the zygote says once, when it is ready.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Hello {
    Ready,
    Failed(String),
}

/// A connected pair, closed on exec.
pub(super) fn pair(nonblocking: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    let mut flags = SocketFlags::CLOEXEC;
    if nonblocking {
        flags |= SocketFlags::NONBLOCK;
    }
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// Sends one packet with descriptors.
pub(super) fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(START_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors for one message"));
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one packet; `None` at the end of the stream.
pub(super) fn receive(socket: impl AsFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut bytes = vec![0u8; MAX_PACKET];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(START_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(list) = message {
            fds.extend(list);
        }
    }
    if got.bytes == 0 && fds.is_empty() {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    Ok(Some((bytes, fds)))
}

/// Sends a small message as JSON.
pub(super) fn send_json(socket: impl AsFd, message: &impl Serialize) -> io::Result<()> {
    send(socket, &serde_json::to_vec(message)?, &[])
}

/// Parses what [`send_json`] sent.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(io::Error::other)
}

/// Puts a plan into a sealed memory file: length of the JSON, the JSON, then the seccomp programs.
pub(super) fn plan_file(json: &[u8], programs: &[u8]) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create("kiln-plan", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut all = Vec::with_capacity(8 + json.len() + programs.len());
    all.extend((json.len() as u64).to_le_bytes());
    all.extend(json);
    all.extend(programs);
    let mut done = 0;
    while done < all.len() {
        done += rustix::io::retry_on_intr(|| rustix::io::pwrite(&file, &all[done..], done as u64))?;
    }
    rustix::fs::fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(file)
}

/// Reads what [`plan_file`] wrote: the JSON and the programs.
pub(super) fn read_plan_file(file: impl AsFd) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let size = rustix::fs::fstat(&file)?.st_size as usize;
    let mut all = vec![0u8; size];
    let mut done = 0;
    while done < size {
        match rustix::io::retry_on_intr(|| rustix::io::pread(&file, &mut all[done..], done as u64))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    let bad = || io::Error::other("malformed plan");
    let head: [u8; 8] = all.get(..8).and_then(|b| b.try_into().ok()).ok_or_else(bad)?;
    let end =
        usize::try_from(u64::from_le_bytes(head)).ok().and_then(|n| n.checked_add(8)).ok_or_else(bad)?;
    if end > all.len() {
        return Err(bad());
    }
    let programs = all.split_off(end);
    all.drain(..8);
    Ok((all, programs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn packets_carry_descriptors_and_end() {
        let (a, b) = pair(false).unwrap();
        let (mut read, write) = std::io::pipe().unwrap();
        send(&a, b"x", &[write.as_fd()]).unwrap();
        drop(write);
        let (bytes, mut fds) = receive(&b).unwrap().unwrap();
        assert_eq!((bytes.as_slice(), fds.len()), (b"x".as_slice(), 1));
        std::fs::File::from(fds.pop().unwrap()).write_all(b"through").unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
        drop(a);
        assert!(receive(&b).unwrap().is_none());
    }

    #[test]
    fn plan_files_round_trip_and_reject_nonsense() {
        let file = plan_file(b"{}", &[1, 2, 3]).unwrap();
        assert_eq!(read_plan_file(&file).unwrap(), (b"{}".to_vec(), vec![1, 2, 3]));
        assert!(rustix::io::pwrite(&file, b"x", 0).is_err());
        let short = rustix::fs::memfd_create("t", MemfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&short, &u64::MAX.to_le_bytes()).unwrap();
        assert!(read_plan_file(&short).is_err());
    }
}
