//! The body of an answer as the only file of a snapshot, written as it comes.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use bytes::Bytes;
use flate2::write::MultiGzDecoder;
use futures::TryStreamExt;
use futures::stream::BoxStream;
use kiln_cache::{Ref, SnapshotMeta, Staged};
use kiln_solver::progress::StatusHandle;
use reqwest::Response;
use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid};
use sha2::{Digest, Sha256};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

use crate::registry::http::next_chunk;
use crate::worker::Worker;

/// Progress is told at most this often.
const INTERVAL: Duration = Duration::from_millis(100);

/// How the file looks.
pub(super) struct Attributes {
    pub(super) name: String,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) modified: u64,
}

/// A file that is written but not yet in the store.
pub(super) struct Saved {
    staged: Staged,
    file: File,
    /// `sha256:…` of what is in it.
    pub(super) digest: String,
}

/// Where the content comes from.
pub(super) enum Body {
    /// A server.
    Answer(Response),
    /// The client.
    Upload(BoxStream<'static, Result<Bytes, String>>),
}

impl Body {
    async fn next(&mut self) -> Result<Option<Bytes>, String> {
        match self {
            Self::Answer(response) => next_chunk(response).await,
            Self::Upload(stream) => stream.try_next().await,
        }
    }
}

/// Writes the body, decompressed if the server compressed it for the way.
pub(super) async fn receive(
    worker: &Worker,
    mut body: Body,
    name: &str,
    mut status: StatusHandle,
) -> Result<Saved, String> {
    let staging = worker.layers().clone();
    let staged = worker.on_files(move || staging.snapshots().stage(None)).await;
    let staged = staged.map_err(|err| err.to_string())?.map_err(|err| err.to_string())?;
    let path = staged.fs().join(name);
    let written = |err: io::Error| format!("write {name}: {err}");
    let mut file = File::options().write(true).create_new(true).open(&path).await.map_err(written)?;
    let mut decoder = Decoder::of(&body);
    let mut hash = Sha256::new();
    let (mut received, mut reported) = (0, Instant::now());
    while let Some(chunk) = body.next().await? {
        received += chunk.len();
        let bytes = decoder.decode(chunk).map_err(|err| format!("decompress: {err}"))?;
        hash.update(&bytes);
        file.write_all(&bytes).await.map_err(written)?;
        if reported.elapsed() >= INTERVAL {
            status.update(i64::try_from(received).unwrap_or(i64::MAX));
            reported = Instant::now();
        }
    }
    let rest = decoder.finish().map_err(|err| format!("decompress: {err}"))?;
    hash.update(&rest);
    file.write_all(&rest).await.map_err(written)?;
    file.flush().await.map_err(written)?;
    status.update(i64::try_from(received).unwrap_or(i64::MAX));
    status.done();
    Ok(Saved { staged, file, digest: format!("sha256:{}", hex::encode(hash.finalize())) })
}

/// Gives the file its attributes and puts it into the store.
pub(super) async fn commit(
    worker: &Worker,
    saved: Saved,
    attributes: Attributes,
    description: String,
) -> Result<Ref, String> {
    let layers = worker.layers().clone();
    let Saved { staged, file, .. } = saved;
    let file = file.into_std().await;
    let done = worker.on_files(move || {
        attributes.set(&file).map_err(|err| format!("{}: {err}", attributes.name))?;
        drop(file);
        let made = layers.snapshots().commit(staged, SnapshotMeta::new(description));
        made.map(Some).map_err(|err| err.to_string())
    });
    done.await.map_err(|err| err.to_string())?
}

impl Attributes {
    fn set(&self, file: &std::fs::File) -> io::Result<()> {
        rustix::fs::fchown(file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        // After the owner, whose change takes bits away.
        rustix::fs::fchmod(file, Mode::from_raw_mode(self.mode))?;
        let time = Timespec { tv_sec: i64::try_from(self.modified).unwrap_or(i64::MAX), tv_nsec: 0 };
        Ok(rustix::fs::futimens(file, &Timestamps { last_access: time, last_modification: time })?)
    }
}

/// Undoes a compression that is the connection's, not the file's.
enum Decoder {
    Plain,
    Gzip(Box<MultiGzDecoder<Vec<u8>>>),
}

impl Decoder {
    fn of(body: &Body) -> Self {
        let Body::Answer(response) = body else { return Self::Plain };
        let encoding = response.headers().get(reqwest::header::CONTENT_ENCODING);
        match encoding.is_some_and(|encoding| encoding.as_bytes().eq_ignore_ascii_case(b"gzip")) {
            true => Self::Gzip(Box::new(MultiGzDecoder::new(Vec::new()))),
            false => Self::Plain,
        }
    }

    fn decode(&mut self, chunk: Bytes) -> io::Result<Bytes> {
        match self {
            Self::Plain => Ok(chunk),
            Self::Gzip(decoder) => {
                decoder.write_all(&chunk)?;
                Ok(std::mem::take(decoder.get_mut()).into())
            }
        }
    }

    fn finish(self) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(Vec::new()),
            Self::Gzip(decoder) => decoder.finish(),
        }
    }
}
