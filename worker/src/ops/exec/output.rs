//! What a step prints: from pipes into its progress, up to a limit.

use std::os::fd::OwnedFd;

use kiln_solver::progress::VertexProgress;
use rustix::pipe::PipeFlags;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

/// More output of one stream than this is not kept.
const LIMIT: usize = 2 << 20;
const CLIPPED: &[u8] = b"[output clipped, log limit 2MiB reached]\n";

/// Wire numbers of the streams.
pub(crate) const STDOUT: i64 = 1;
pub(crate) const STDERR: i64 = 2;

/// A pipe: what a task reads, and what the process writes.
pub(crate) fn pipe() -> std::io::Result<(Receiver, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Receiver::from_owned_fd(reader)?, writer))
}

/// Reports everything that comes until all writers are gone.
pub(crate) async fn pump(mut reader: Receiver, stream: i64, progress: VertexProgress) {
    let mut buffer = vec![0u8; 16 << 10];
    let mut left = LIMIT;
    loop {
        // A broken pipe end is the end of the output.
        let count = reader.read(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            return;
        }
        if left == 0 {
            continue;
        }
        let kept = count.min(left);
        progress.log(stream, &buffer[..kept]);
        left -= kept;
        if left == 0 {
            progress.log(stream, CLIPPED);
        }
    }
}
