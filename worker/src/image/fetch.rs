//! Filling lazy layers: download and unpacking in one pass, verified, once for all who wait.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use kiln_cache::{BlobRef, BlobWriter, LayerBlob, LazyLayer, Ref, SnapshotRef, Staged, StoreError};
use kiln_proto::reference::Reference;
use kiln_solver::progress::{StatusHandle, VertexProgress};
use tokio::sync::mpsc;

use super::error::blocking;
use super::{Access, ImageError, Images};
use crate::layer::{Decompressor, DigestWriter, LayerError, Unpacked, settle, unpack};
use crate::registry::BlobStream;

type Work = BoxFuture<'static, Result<(), ImageError>>;
type Flight = Shared<Work>;
type WeakFlight = WeakShared<Work>;

/// Pieces on their way from the network to the unpacking thread.
const PIPE: usize = 32;
/// Progress is reported at most this often.
const REPORT: Duration = Duration::from_millis(100);

impl Images {
    /// Makes all layers of a snapshot have their files. Layers unpack side by side; whoever asks for a layer that
    /// is already under way waits for that. Dropping the last future that waits cancels the work.
    pub async fn materialize(self: &Arc<Self>, target: &Ref, access: &Access) -> Result<(), ImageError> {
        let Some(target) = target else { return Ok(()) };
        if target.is_materialized() {
            return Ok(());
        }
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.fill(target, access).await {
                // Somebody else's credentials or connection failed: ours may do.
                Err((ImageError::Registry(error), true)) if attempts < 3 => {
                    tracing::debug!(%error, "a shared download failed");
                }
                other => return other.map_err(|(error, _)| error),
            }
        }
    }

    /// The error comes with whether somebody else's work failed.
    async fn fill(self: &Arc<Self>, target: &SnapshotRef, access: &Access) -> Result<(), (ImageError, bool)> {
        let mut flights: HashMap<String, (Flight, bool)> = HashMap::new();
        for layer in missing(target) {
            let below =
                layer.parent().and_then(|parent| flights.get(parent.id()).map(|(flight, _)| flight.clone()));
            let flight = self.flight(&layer, below, access);
            flights.insert(layer.id().to_string(), flight);
        }
        let waits =
            flights.into_values().map(|(flight, joined)| flight.map(move |r| r.map_err(|e| (e, joined))));
        futures::future::try_join_all(waits).await?;
        Ok(())
    }

    /// The work that fills a layer, and whether it was under way already.
    fn flight(
        self: &Arc<Self>,
        layer: &SnapshotRef,
        below: Option<Flight>,
        access: &Access,
    ) -> (Flight, bool) {
        let id = layer.id();
        // Dropping the last handle to work runs its destructors, which take the same lock: this one
        // is declared before the guard, and so dropped after it.
        let known;
        let mut table = self.flights.lock();
        known = table.by_layer.get(id).and_then(|(_, weak)| weak.upgrade());
        if let Some(flight) = &known
            && flight.peek().is_none()
        {
            return (flight.clone(), true);
        }
        table.count += 1;
        let landed = Landed { images: self.clone(), layer: id.to_string(), number: table.count };
        let work = fill_layer(self.clone(), layer.clone(), below, access.clone());
        let flight = async move {
            let _landed = landed;
            work.await
        }
        .boxed()
        .shared();
        if let Some(weak) = flight.downgrade() {
            let number = table.count;
            table.by_layer.insert(id.to_string(), (number, weak));
        }
        (flight, false)
    }

    /// A layer's blob as a local file: from the store, else downloaded. Nothing is unpacked.
    pub(super) async fn fetch_blob(
        self: &Arc<Self>,
        blob: &LayerBlob,
        sources: &[String],
        access: &Access,
    ) -> Result<BlobRef, ImageError> {
        if let Some(found) = self.blobs.get(&blob.digest)? {
            return Ok(found);
        }
        let _permit = self.permit().await?;
        let mut last = None;
        for source in sources {
            let mut writer = self.blobs.writer()?;
            let (sender, receiver) = mpsc::channel(PIPE);
            let expected = blob.clone();
            let store = blocking(move || {
                let mut pipe = PipeReader::new(receiver);
                io::copy(&mut pipe, &mut writer).map_err(|e| unpack_error(&expected, LayerError::Read(e)))?;
                commit(writer, &expected)
            });
            match transfer(self, source, blob, access, sender, store).await {
                Ok(stored) => {
                    self.note_source(&blob.digest, source);
                    return Ok(stored);
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| no_source(blob)))
    }

    /// Remembers that a repository has a blob, so that a push to the same registry can mount it.
    pub(crate) fn note_source(&self, digest: &str, repository: &str) {
        let Ok(reference) = Reference::parse(repository) else { return };
        let label = super::blob::source_label(reference.registry_host());
        let known = self.blobs.info(digest).ok().flatten().and_then(|info| info.labels.get(&label).cloned());
        let mut paths: Vec<&str> =
            known.as_deref().unwrap_or_default().split(',').filter(|p| !p.is_empty()).collect();
        if paths.contains(&reference.path()) {
            return;
        }
        paths.push(reference.path());
        if let Err(error) = self.blobs.set_label(digest, &label, &paths.join(",")) {
            tracing::debug!(%error, digest, "can't note where a blob is");
        }
    }

    pub(super) async fn permit(&self) -> Result<tokio::sync::OwnedSemaphorePermit, ImageError> {
        self.transfers.clone().acquire_owned().await.map_err(|e| ImageError::Internal(e.to_string()))
    }
}

/// Work under way, by layer. Held weakly: those who wait keep it going.
#[derive(Default)]
pub(super) struct Flights(Mutex<Table>);

#[derive(Default)]
struct Table {
    by_layer: HashMap<String, (u64, WeakFlight)>,
    count: u64,
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes finished or cancelled work off the table.
struct Landed {
    images: Arc<Images>,
    layer: String,
    number: u64,
}

impl Drop for Landed {
    fn drop(&mut self) {
        let mut table = self.images.flights.lock();
        if table.by_layer.get(&self.layer).is_some_and(|(number, _)| *number == self.number) {
            table.by_layer.remove(&self.layer);
        }
    }
}

/// Layers of a snapshot without files, and those below them, which they are fitted onto; parents come first.
fn missing(target: &SnapshotRef) -> Vec<SnapshotRef> {
    let mut seen = HashSet::new();
    let mut out = Vec::new();
    for layer in target.layers() {
        let mut chain = Vec::new();
        let mut next = Some(layer);
        while let Some(layer) = next.filter(|layer| !layer.is_filled() && seen.insert(layer.id().to_string()))
        {
            next = layer.parent();
            chain.push(layer);
        }
        out.extend(chain.into_iter().rev());
    }
    out
}

async fn fill_layer(
    images: Arc<Images>,
    layer: SnapshotRef,
    below: Option<Flight>,
    access: Access,
) -> Result<(), ImageError> {
    let lazy =
        layer.lazy()?.ok_or_else(|| ImageError::Internal(format!("layer {} has no files", layer.id())))?;
    let (staged, unpacked) = {
        let _permit = images.permit().await?;
        obtain(&images, &layer, &lazy, &access).await?
    };
    if let Some(below) = below {
        below.await?;
    }
    blocking(move || {
        // Only now are the layers below sure to be there.
        let lowers: Vec<PathBuf> = match layer.parent() {
            Some(parent) => parent.layers().iter().rev().map(SnapshotRef::dir).collect(),
            None => Vec::new(),
        };
        settle(staged.fs(), unpacked, &lowers).map_err(|e| unpack_error(&lazy.blob, e))?;
        images.snapshots.fill(&layer, staged)?;
        if let Some(compression) = crate::layer::media_compression(&lazy.blob.media_type) {
            layer.set_blob(compression.as_str(), &lazy.blob)?;
        }
        Ok(())
    })
    .await
}

/// Unpacks a layer into a staged directory, from the stored blob or straight from the network.
async fn obtain(
    images: &Arc<Images>,
    layer: &SnapshotRef,
    lazy: &LazyLayer,
    access: &Access,
) -> Result<(Staged, Unpacked), ImageError> {
    let blob = lazy.blob.clone();
    if let Some(stored) = images.blobs.get(&blob.digest)? {
        let (images, layer) = (images.clone(), layer.clone());
        let status = extracting(access.progress.as_ref(), &blob);
        return blocking(move || {
            let staged = images.snapshots.stage(layer.parent().as_ref())?;
            let (_, unpacked) = extract(stored.open()?, &staged, &blob)?;
            drop(stored);
            status.into_iter().for_each(StatusHandle::done);
            Ok((staged, unpacked))
        })
        .await;
    }
    let mut last = None;
    for source in &lazy.sources {
        let (sender, receiver) = mpsc::channel(PIPE);
        let (images_, layer, blob_) = (images.clone(), layer.clone(), blob.clone());
        let progress = access.progress.clone();
        let work = blocking(move || {
            let staged = images_.snapshots.stage(layer.parent().as_ref())?;
            let mut pipe = PipeReader::new(receiver);
            if !pipe.wait() {
                return Err(unpack_error(&blob_, LayerError::Read(cancelled())));
            }
            let status = extracting(progress.as_ref(), &blob_);
            let tee = Tee { reader: pipe, writer: images_.blobs.writer()? };
            let (tee, unpacked) = extract(tee, &staged, &blob_)?;
            commit(tee.writer, &blob_)?;
            status.into_iter().for_each(StatusHandle::done);
            Ok((staged, unpacked))
        });
        match transfer(images, source, &blob, access, sender, work).await {
            Ok(done) => {
                images.note_source(&blob.digest, source);
                return Ok(done);
            }
            // Another source may have the right bytes: only failures to get them are worth another try.
            Err(error @ (ImageError::Registry(_) | ImageError::Mismatch { .. })) => last = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(last.unwrap_or_else(|| no_source(&blob)))
}

fn no_source(blob: &LayerBlob) -> ImageError {
    ImageError::Internal(format!("layer {} is not here and no registry is known to have it", blob.digest))
}

/// Downloads into `sender` while `work` consumes the other end. The download's failure is the one that
/// counts: the consumer then only sees a broken pipe.
async fn transfer<T>(
    images: &Arc<Images>,
    source: &str,
    blob: &LayerBlob,
    access: &Access,
    sender: mpsc::Sender<Piece>,
    work: impl Future<Output = Result<T, ImageError>>,
) -> Result<T, ImageError> {
    let reference = Reference::parse(source).map_err(|e| ImageError::image(source, e.to_string()))?;
    let repository = images.registry.repository(&reference, access.credentials.clone());
    let stream = repository.blob(&blob.digest, blob.size);
    let status = access.progress.as_ref().map(|p| p.status(&blob.digest, "downloading", blob.size as i64));
    let (download, work) = tokio::join!(download(stream, sender, status), work);
    download?;
    work
}

async fn download(
    mut stream: BlobStream,
    sender: mpsc::Sender<Piece>,
    mut status: Option<StatusHandle>,
) -> Result<(), ImageError> {
    let mut reported = Instant::now();
    while let Some(chunk) = stream.chunk().await? {
        if sender.send(Piece::Data(chunk)).await.is_err() {
            // The consumer gave up; it says why.
            return Ok(());
        }
        if let Some(status) = &mut status
            && reported.elapsed() >= REPORT
        {
            status.update(stream.position() as i64);
            reported = Instant::now();
        }
    }
    let _ = sender.send(Piece::End).await;
    if let Some(status) = status {
        status.done();
    }
    Ok(())
}

fn extracting(progress: Option<&VertexProgress>, blob: &LayerBlob) -> Option<StatusHandle> {
    progress.map(|p| p.status(&format!("extracting {}", blob.digest), "extract", 0))
}

/// Unpacks a blob and checks its diff id; gives back the reader, read to its end.
fn extract<R: Read>(reader: R, staged: &Staged, blob: &LayerBlob) -> Result<(R, Unpacked), ImageError> {
    let failed = |e: LayerError| unpack_error(blob, e);
    let checked = DigestWriter::new(reader);
    let mut archive = DigestWriter::new(Decompressor::new(checked).map_err(|e| failed(LayerError::Read(e)))?);
    let result = unpack(&mut archive, staged.fs());
    let (decompressor, diff_id, _) = archive.finish();
    let mut checked = decompressor.into_inner();
    let drained = io::copy(&mut checked, &mut io::sink());
    let (reader, digest, size) = checked.finish();
    match (&result, drained) {
        // Out of disk or the like: nothing to do with the content.
        (Err(LayerError::Io { .. } | LayerError::Write(_)), _) => {}
        (Err(LayerError::Read(error)), _) if error.raw_os_error().is_some() => {}
        (Ok(_), Err(error)) => return Err(failed(LayerError::Read(error))),
        // Damaged content shows as all kinds of errors; what matters is that it is not what was asked for.
        (_, Ok(_)) if digest != blob.digest => {
            return Err(mismatch(blob, "content", &blob.digest, &digest));
        }
        (_, Ok(_)) if size != blob.size => {
            return Err(mismatch(blob, "size", &blob.size.to_string(), &size.to_string()));
        }
        _ => {}
    }
    let unpacked = result.map_err(failed)?;
    if diff_id != blob.diff_id {
        return Err(mismatch(blob, "diff id", &blob.diff_id, &diff_id));
    }
    Ok((reader, unpacked))
}

fn mismatch(blob: &LayerBlob, what: &'static str, expected: &str, actual: &str) -> ImageError {
    ImageError::Mismatch {
        digest: blob.digest.clone(),
        what,
        expected: expected.into(),
        actual: actual.into(),
    }
}

fn unpack_error(blob: &LayerBlob, error: LayerError) -> ImageError {
    ImageError::Layer { action: "unpack", digest: blob.digest.clone(), source: Arc::new(error) }
}

fn commit(writer: BlobWriter, blob: &LayerBlob) -> Result<BlobRef, ImageError> {
    writer.commit(Some(&blob.digest), Some(blob.size)).map_err(|error| match error {
        StoreError::DigestMismatch { expected, actual } => mismatch(blob, "content", &expected, &actual),
        StoreError::SizeMismatch { expected, actual, .. } => {
            mismatch(blob, "size", &expected.to_string(), &actual.to_string())
        }
        other => other.into(),
    })
}

enum Piece {
    Data(Bytes),
    End,
}

/// The blocking end of a download.
struct PipeReader {
    receiver: mpsc::Receiver<Piece>,
    current: Bytes,
    ended: bool,
}

fn cancelled() -> io::Error {
    io::Error::other("the download ended early")
}

impl PipeReader {
    fn new(receiver: mpsc::Receiver<Piece>) -> Self {
        Self { receiver, current: Bytes::new(), ended: false }
    }

    /// Waits for the first piece; false if there will be none.
    fn wait(&mut self) -> bool {
        self.more().is_ok()
    }

    fn more(&mut self) -> io::Result<()> {
        while self.current.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Piece::Data(data)) => self.current = data,
                Some(Piece::End) => self.ended = true,
                // Without the end mark this is a cut, not an end.
                None => return Err(cancelled()),
            }
        }
        Ok(())
    }
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.more()?;
        let n = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..n]);
        Ok(n)
    }
}

/// Stores what it reads.
struct Tee<R> {
    reader: R,
    writer: BlobWriter,
}

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        self.writer.write_all(&buffer[..n])?;
        Ok(n)
    }
}
