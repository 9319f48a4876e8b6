//! The receiving side of a transfer: carries packets between the connection and the blocking thread that applies them.

use std::path::Path;

use bytes::Bytes;
use futures::StreamExt;
use kiln_proto::fsutil::Packet;
use kiln_proto::fsutil::packet::PacketType;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;

use super::receiver::{ReceiveOptions, Received, Receiver};
use super::{PacketStream, TransferError};

/// Packets that are handed to the thread which applies them at once, so that many small ones do not wake it each.
const BATCH: usize = 64;
/// Batches that may wait for that thread; more packets wait in the connection.
const QUEUE: usize = 4;

type Batch = Vec<Result<Packet, tonic::Status>>;

/// Receives a transfer into the directory `dest`, which must exist. Requests go out on `packets`, which must not be
/// bounded: a receiver that waits to send while its peer does the same would wait for ever.
///
/// # Errors
/// What failed on either side. What was already received stays, and is not asked for again by the next transfer.
pub async fn receive(
    dest: &Path,
    options: ReceiveOptions,
    incoming: PacketStream,
    packets: mpsc::UnboundedSender<Packet>,
) -> Result<Received, TransferError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(dest, flags, Mode::empty())
        .map_err(|error| TransferError::io("open", dest.display().to_string(), error))?;
    let progress = options.progress.clone();
    let (sender, receiver) = mpsc::channel(QUEUE);
    let worker = tokio::task::spawn_blocking(move || apply(root, options, receiver, &packets));
    let mut transferred = 0;
    let mut batches = incoming.ready_chunks(BATCH);
    while let Some(batch) = batches.next().await {
        if let Some(progress) = &progress {
            transferred +=
                batch.iter().flatten().map(|packet| prost::Message::encoded_len(packet) as u64).sum::<u64>();
            progress(transferred);
        }
        let failed = batch.iter().any(Result::is_err);
        // The worker only stops listening when it is done or has failed; its result says which.
        if sender.send(batch).await.is_err() || failed {
            break;
        }
    }
    drop(sender);
    worker
        .await
        .unwrap_or_else(|error| Err(TransferError::Protocol(format!("receiving task failed: {error}"))))
}

fn apply(
    root: std::os::fd::OwnedFd,
    mut options: ReceiveOptions,
    mut packets: mpsc::Receiver<Batch>,
    out: &mpsc::UnboundedSender<Packet>,
) -> Result<Received, TransferError> {
    let guard = options.guard.take();
    let result = run(Receiver::new(root, options), &mut packets, out);
    if let Err(error) = &result {
        let text = Bytes::from(error.to_string());
        // Whoever is gone needs no reason.
        let _ = out.send(Packet { r#type: PacketType::PacketErr.into(), data: text, ..Default::default() });
    }
    drop(guard);
    result
}

fn run(
    mut receiver: Receiver,
    packets: &mut mpsc::Receiver<Batch>,
    out: &mpsc::UnboundedSender<Packet>,
) -> Result<Received, TransferError> {
    let mut batch = Batch::new().into_iter();
    let mut next = || {
        loop {
            match batch.next() {
                Some(packet) => return packet.map_err(TransferError::from),
                None => batch = packets.blocking_recv().ok_or(TransferError::Closed)?.into_iter(),
            }
        }
    };
    let reply = |kind: PacketType, id| {
        let packet = Packet { r#type: kind.into(), id, ..Default::default() };
        out.send(packet).map_err(|_| TransferError::Closed)
    };
    loop {
        let packet = next()?;
        match packet.r#type() {
            PacketType::PacketStat => match packet.stat {
                Some(stat) => {
                    if let Some(id) = receiver.entry(stat)? {
                        reply(PacketType::PacketReq, id)?;
                    }
                }
                None => receiver.end_of_listing()?,
            },
            PacketType::PacketData => receiver.data(packet.id, &packet.data)?,
            PacketType::PacketErr => {
                return Err(TransferError::remote(&packet));
            }
            other => return Err(TransferError::Protocol(format!("unexpected {}", other.as_str_name()))),
        }
        if receiver.is_complete() {
            break;
        }
    }
    let received = receiver.finish()?;
    reply(PacketType::PacketFin, 0)?;
    loop {
        let packet = next()?;
        match packet.r#type() {
            PacketType::PacketFin => return Ok(received),
            PacketType::PacketErr => {
                return Err(TransferError::remote(&packet));
            }
            // A peer that answers a request twice; the content is there already.
            PacketType::PacketData if packet.data.is_empty() => {}
            other => return Err(TransferError::Protocol(format!("unexpected {}", other.as_str_name()))),
        }
    }
}
