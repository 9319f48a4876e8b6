//! What a step prints: from pipes into its progress.

use std::os::fd::OwnedFd;

use kiln_solver::progress::VertexProgress;
use rustix::pipe::PipeFlags;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

/// Wire numbers of the streams.
pub(crate) const STDOUT: i64 = 1;
pub(crate) const STDERR: i64 = 2;

/// A pipe: what a task reads, and what the process writes.
pub(crate) fn pipe() -> std::io::Result<(Receiver, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Receiver::from_owned_fd(reader)?, writer))
}

/// Reports everything that comes until all writers are gone. How much of it is shown is for others to say.
pub(crate) async fn pump(mut reader: Receiver, stream: i64, progress: VertexProgress) {
    let mut buffer = vec![0u8; 16 << 10];
    loop {
        // A broken pipe end is the end of the output.
        match reader.read(&mut buffer).await.unwrap_or(0) {
            0 => return,
            count => progress.log(stream, &buffer[..count]),
        }
    }
}
