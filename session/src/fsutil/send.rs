//! The sending side of a transfer.

use std::collections::VecDeque;
use std::io::Read;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::StreamExt;
use kiln_proto::fsutil::packet::PacketType;
use kiln_proto::fsutil::{Packet, Stat};
use kiln_proto::gomode;
use rustix::fs::OFlags;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::walk::{Subtree, Tree};
use super::{CHUNK, PacketStream, Progress, TransferError, fsops, path};

/// How many packets may wait for the connection; callers make the outgoing queue this long.
pub const SEND_QUEUE: usize = 256;

/// Files that are sent at the same time.
const PARALLEL: usize = 4;
/// Files that one thread takes on at once, so that many small ones do not cost a hand-over each.
const BATCH: usize = 32;

/// Entries of the listing that go out together: the connection's task would otherwise wake for each few.
const LISTED: usize = 128;

/// What a transfer sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SendSummary {
    /// Entries listed.
    pub entries: u64,
    /// Bytes of file content sent.
    pub bytes: u64,
}

/// How a task of the sender ended.
enum Done {
    /// The listing is out; it had this many entries.
    Listed(u64),
    Sent,
}

/// What a requested id means: the tree and the path below its root; `None` for what has no content to send.
type Files = Arc<Mutex<Vec<Option<(usize, Vec<u8>)>>>>;

struct Outgoing {
    packets: mpsc::Sender<Packet>,
    transferred: AtomicU64,
    content: AtomicU64,
    progress: Option<Progress>,
}

impl Outgoing {
    /// From blocking threads only.
    fn send(&self, packet: Packet) -> Result<(), TransferError> {
        if let Some(progress) = &self.progress {
            let size = prost::Message::encoded_len(&packet) as u64;
            progress(self.transferred.fetch_add(size, Ordering::Relaxed) + size);
        }
        self.packets.blocking_send(packet).map_err(|_| TransferError::Closed)
    }
}

/// Sends `trees` (in the order of their prefixes) over `packets`, and answers the requests in `incoming`, until the
/// receiver has all it wants. On failure the receiver is told why.
///
/// # Errors
/// What failed on either side. Content that vanishes while it is sent is not an error: it arrives empty or short.
pub async fn send(
    mut trees: Vec<Subtree>,
    incoming: PacketStream,
    packets: mpsc::Sender<Packet>,
    progress: Option<Progress>,
) -> Result<SendSummary, TransferError> {
    trees.sort_by(|a, b| path::compare(a.prefix.as_bytes(), b.prefix.as_bytes()));
    let out =
        Arc::new(Outgoing { packets: packets.clone(), transferred: 0.into(), content: 0.into(), progress });
    let result = run(trees, incoming, &out).await;
    let answer = match &result {
        Ok(_) => Packet { r#type: PacketType::PacketFin.into(), ..Default::default() },
        Err(error) => Packet {
            r#type: PacketType::PacketErr.into(),
            data: Bytes::from(error.to_string()),
            ..Default::default()
        },
    };
    // Whoever is gone needs no answer.
    let _ = packets.send(answer).await;
    result
}

async fn run(
    subtrees: Vec<Subtree>,
    mut incoming: PacketStream,
    out: &Arc<Outgoing>,
) -> Result<SendSummary, TransferError> {
    let files: Files = Files::default();
    let trees = tokio::task::spawn_blocking(move || {
        subtrees.into_iter().map(Tree::new).collect::<Result<Vec<_>, _>>()
    });
    let trees: Arc<[Arc<Tree>]> = joined(trees.await)?.into();

    let mut work: JoinSet<Result<Done, TransferError>> = JoinSet::new();
    let mut entries = 0;
    {
        let (trees, files, out) = (trees.clone(), files.clone(), out.clone());
        work.spawn_blocking(move || list(&trees, &files, &out));
    }
    let mut queue: VecDeque<u32> = VecDeque::new();
    let mut listing = true;
    loop {
        while work.len() < PARALLEL + usize::from(listing) && !queue.is_empty() {
            let batch: Vec<_> = queue.drain(..queue.len().min(BATCH)).collect();
            let (trees, files, out) = (trees.clone(), files.clone(), out.clone());
            work.spawn_blocking(move || {
                batch.into_iter().try_for_each(|id| send_file(&trees, &files, id, &out)).map(|()| Done::Sent)
            });
        }
        tokio::select! {
            Some(done) = work.join_next() => match joined(done) {
                Ok(Done::Listed(count)) => {
                    listing = false;
                    entries = count;
                }
                Ok(Done::Sent) => {}
                Err(TransferError::Closed) => return Err(last_words(&mut incoming).await),
                Err(error) => return Err(error),
            },
            packet = incoming.next() => {
                let packet = packet.ok_or(TransferError::Closed)??;
                match packet.r#type() {
                    PacketType::PacketReq => queue.push_back(packet.id),
                    PacketType::PacketFin => break,
                    PacketType::PacketErr => return Err(TransferError::remote(&packet)),
                    other => return Err(TransferError::Protocol(format!("unexpected {}", other.as_str_name()))),
                }
            }
        }
    }
    Ok(SendSummary { entries, bytes: out.content.load(Ordering::Relaxed) })
}

/// Why the other end takes no more: what it said before it went, if it did.
async fn last_words(incoming: &mut PacketStream) -> TransferError {
    while let Some(packet) = incoming.next().await {
        match packet {
            Err(status) => return status.into(),
            Ok(packet) if packet.r#type() == PacketType::PacketErr => return TransferError::remote(&packet),
            Ok(_) => {}
        }
    }
    TransferError::Closed
}

fn joined<T>(result: Result<Result<T, TransferError>, tokio::task::JoinError>) -> Result<T, TransferError> {
    result.unwrap_or_else(|error| Err(TransferError::Protocol(format!("transfer task failed: {error}"))))
}

/// Streams the listing.
fn list(trees: &[Arc<Tree>], files: &Files, out: &Outgoing) -> Result<Done, TransferError> {
    let mut entries = 0;
    let mut ready = Vec::with_capacity(LISTED);
    for (number, tree) in trees.iter().enumerate() {
        let mut emit = |stat: Stat, below: &[u8]| {
            let wanted = gomode::is_regular(stat.mode) && stat.linkname.is_empty();
            let file = wanted.then(|| (number, below.to_owned()));
            files.lock().unwrap_or_else(PoisonError::into_inner).push(file);
            entries += 1;
            ready.push(Packet {
                r#type: PacketType::PacketStat.into(),
                stat: Some(stat),
                ..Default::default()
            });
            if ready.len() < LISTED {
                Ok(())
            } else {
                ready.drain(..).try_for_each(|packet| out.send(packet))
            }
        };
        if let Some(stat) = tree.prefix_stat()? {
            emit(stat, b"")?;
        }
        tree.walk(&mut emit)?;
    }
    ready.push(Packet { r#type: PacketType::PacketStat.into(), ..Default::default() });
    ready.into_iter().try_for_each(|packet| out.send(packet))?;
    Ok(Done::Listed(entries))
}

fn send_file(trees: &[Arc<Tree>], files: &Files, id: u32, out: &Outgoing) -> Result<(), TransferError> {
    let wanted = {
        let mut files = files.lock().unwrap_or_else(PoisonError::into_inner);
        files.get_mut(id as usize).and_then(Option::take)
    };
    let Some((number, below)) = wanted else {
        return Err(TransferError::Protocol(format!("invalid file id {id}")));
    };
    let tree = &trees[number];
    // Without NONBLOCK a file that turned into a named pipe would hang the transfer.
    match fsops::open(tree.root.as_fd(), &below, OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(fd) => {
            let mut file = std::fs::File::from(fd);
            loop {
                let mut chunk = vec![0u8; CHUNK];
                let count = file
                    .read(&mut chunk)
                    .map_err(|error| TransferError::io("read", path::join(&tree.prefix, &below), error))?;
                if count == 0 {
                    break;
                }
                chunk.truncate(count);
                out.content.fetch_add(count as u64, Ordering::Relaxed);
                out.send(Packet {
                    r#type: PacketType::PacketData.into(),
                    id,
                    data: Bytes::from(chunk),
                    ..Default::default()
                })?;
            }
        }
        // Gone, or no longer a file (a socket cannot be opened): it has no content.
        Err(
            rustix::io::Errno::NOENT
            | rustix::io::Errno::NXIO
            | rustix::io::Errno::LOOP
            | rustix::io::Errno::NOTDIR,
        ) => {}
        Err(error) => return Err(TransferError::io("open", path::join(&tree.prefix, &below), error)),
    }
    out.send(Packet { r#type: PacketType::PacketData.into(), id, ..Default::default() })
}
