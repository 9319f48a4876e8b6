//! Content by sha256 digest: layer blobs, manifests, configs. A blob gets its name only after its
//! digest and length were checked, by a rename; it is never changed after.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::codec;
use crate::error::{Result, StoreError};
use crate::fsx;
use crate::kv::{Batch, Cf};
use crate::store::Shared;

/// Access to blobs. Cheap to clone.
#[derive(Clone)]
pub struct Blobs {
    shared: Arc<Shared>,
}

/// What is known of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobInfo {
    /// `sha256:…`.
    pub digest: String,
    /// Its length in bytes.
    pub size: u64,
    /// When it was stored.
    pub created: SystemTime,
    /// Notes about it, such as the repositories that are known to have it.
    pub labels: BTreeMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Record {
    #[prost(uint64, tag = "1")]
    pub(crate) size: u64,
    #[prost(int64, tag = "2")]
    pub(crate) created: i64,
    #[prost(uint64, tag = "3")]
    pub(crate) epoch: u64,
    #[prost(btree_map = "string, string", tag = "4")]
    pub(crate) labels: BTreeMap<String, String>,
}

/// A stored blob; it is not removed while a handle exists.
#[derive(Clone)]
pub struct BlobRef {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    shared: Arc<Shared>,
    digest: String,
    size: u64,
}

impl Blobs {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Starts to store content.
    pub fn writer(&self) -> Result<BlobWriter> {
        self.shared.check_open()?;
        let path = self.shared.staging().join(fsx::random_id());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(|e| StoreError::io("create", &path, e))?;
        Ok(BlobWriter {
            shared: Arc::clone(&self.shared),
            path,
            file,
            hash: Sha256::new(),
            size: 0,
            kept: false,
        })
    }

    /// Stores content that is in memory.
    pub fn put(&self, bytes: &[u8]) -> Result<BlobRef> {
        let mut writer = self.writer()?;
        writer.write_all(bytes).map_err(|e| StoreError::io("write", &writer.path, e))?;
        writer.commit(None, None)
    }

    /// A handle to a blob, if it is stored.
    pub fn get(&self, digest: &str) -> Result<Option<BlobRef>> {
        let path = blob_path(&self.shared, digest)?;
        let _guard = self.shared.dependent()?;
        let Some(record) = load(&self.shared, digest)? else { return Ok(None) };
        match std::fs::metadata(&path) {
            Ok(found) if found.len() == record.size => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("read", &path, error)),
        }
        Ok(Some(adopt(&self.shared, digest, record.size)))
    }

    /// True if the blob is stored. It may be removed right after, unless a handle is held.
    pub fn exists(&self, digest: &str) -> Result<bool> {
        Ok(self.get(digest)?.is_some())
    }

    /// What is known of a blob.
    pub fn info(&self, digest: &str) -> Result<Option<BlobInfo>> {
        Ok(load(&self.shared, digest)?.map(|record| BlobInfo {
            digest: digest.to_owned(),
            size: record.size,
            created: codec::time(record.created),
            labels: record.labels,
        }))
    }

    /// The digests of all blobs, in byte order.
    pub fn digests(&self) -> Result<Vec<String>> {
        let mut digests = Vec::new();
        self.shared.kv.scan(Cf::Blobs, b"", &mut |digest, _| {
            digests.push(String::from_utf8_lossy(digest).into_owned());
            Ok(true)
        })?;
        Ok(digests)
    }

    /// Sets a label of a blob; an empty value removes it.
    pub fn set_label(&self, digest: &str, name: &str, value: &str) -> Result<()> {
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        let mut record = load(&self.shared, digest)?
            .ok_or_else(|| StoreError::NotFound { what: "blob", id: digest.to_owned() })?;
        match value.is_empty() {
            true => record.labels.remove(name),
            false => record.labels.insert(name.to_owned(), value.to_owned()),
        };
        save(&self.shared, digest, &record)
    }

    /// Removes a blob that nobody holds; says whether it was removed. Snapshots that have it as a
    /// form of their layer keep its description.
    pub fn delete(&self, digest: &str) -> Result<bool> {
        let path = blob_path(&self.shared, digest)?;
        let _guard = self.shared.exclusive();
        self.shared.check_open()?;
        if self.shared.blobs.is_held(digest) || load(&self.shared, digest)?.is_none() {
            return Ok(false);
        }
        let mut batch = Batch::new();
        erase(&mut batch, digest);
        self.shared.kv.write(batch)?;
        self.shared.discard(&path);
        Ok(true)
    }
}

/// Content on its way into the store; hashed as it passes. Dropping it without
/// [`BlobWriter::commit`] forgets it.
pub struct BlobWriter {
    shared: Arc<Shared>,
    path: PathBuf,
    file: File,
    hash: Sha256,
    size: u64,
    kept: bool,
}

impl BlobWriter {
    /// Bytes written so far: where a broken transfer goes on.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Checks what was promised, and stores the blob.
    pub fn commit(mut self, expected_digest: Option<&str>, expected_size: Option<u64>) -> Result<BlobRef> {
        let digest = format!("sha256:{}", hex::encode(std::mem::take(&mut self.hash).finalize()));
        if let Some(expected) = expected_size
            && expected != self.size
        {
            let digest = expected_digest.unwrap_or(&digest).to_owned();
            return Err(StoreError::SizeMismatch { digest, expected, actual: self.size });
        }
        if let Some(expected) = expected_digest
            && expected != digest
        {
            return Err(StoreError::DigestMismatch { expected: expected.to_owned(), actual: digest });
        }
        let target = blob_path(&self.shared, &digest)?;
        let _guard = self.shared.dependent()?;
        fsx::rename(&self.path, &target)?;
        self.kept = true;
        let previous = load(&self.shared, &digest)?;
        let record = Record {
            size: self.size,
            created: codec::nanos(SystemTime::now()),
            epoch: self.shared.epochs.stamp(),
            labels: previous.map(|record| record.labels).unwrap_or_default(),
        };
        save(&self.shared, &digest, &record)?;
        Ok(adopt(&self.shared, &digest, self.size))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::debug!(path = %self.path.display(), %error, "can't remove an unfinished blob");
        }
    }
}

impl BlobRef {
    /// `sha256:…`.
    pub fn digest(&self) -> &str {
        &self.inner.digest
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.inner.size
    }

    /// The file that has the content.
    pub fn path(&self) -> PathBuf {
        file_path(&self.inner.shared.root, &self.inner.digest)
    }

    /// Opens it for reading.
    pub fn open(&self) -> Result<File> {
        let path = self.path();
        File::open(&path).map_err(|e| StoreError::io("open", &path, e))
    }

    /// Reads a blob of at most `limit` bytes into memory and checks it once more.
    pub fn read(&self, limit: u64) -> Result<Vec<u8>> {
        if self.size() > limit {
            return Err(StoreError::Invalid(format!(
                "blob {} has {} bytes, more than the {limit} allowed here",
                self.digest(),
                self.size()
            )));
        }
        let path = self.path();
        let bytes = std::fs::read(&path).map_err(|e| StoreError::io("read", &path, e))?;
        let actual = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        match actual == self.digest() {
            true => Ok(bytes),
            false => Err(StoreError::DigestMismatch { expected: self.digest().to_owned(), actual }),
        }
    }
}

impl std::fmt::Debug for BlobRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("BlobRef").field(&self.inner.digest).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.usage.touch(&self.digest);
        self.shared.blobs.release(&self.digest);
    }
}

fn adopt(shared: &Arc<Shared>, digest: &str, size: u64) -> BlobRef {
    let made = Inner { shared: Arc::clone(shared), digest: digest.to_owned(), size };
    BlobRef { inner: shared.blobs.adopt(digest, Arc::new(made)) }
}

pub(crate) fn load(shared: &Shared, digest: &str) -> Result<Option<Record>> {
    let found = shared.kv.get(Cf::Blobs, digest.as_bytes())?;
    found.map(|bytes| codec::decode("blob", digest.as_bytes(), &bytes)).transpose()
}

fn save(shared: &Shared, digest: &str, record: &Record) -> Result<()> {
    let mut batch = Batch::new();
    batch.put(Cf::Blobs, digest.as_bytes(), codec::encode(record));
    shared.commit(batch)
}

pub(crate) fn erase(batch: &mut Batch, digest: &str) {
    batch.delete(Cf::Blobs, digest.as_bytes());
    batch.delete(Cf::Values, crate::usage::usage_key(digest));
}

/// Where a blob is; the digest must have been checked.
pub(crate) fn file_path(root: &Path, digest: &str) -> PathBuf {
    root.join("content/sha256").join(digest.trim_start_matches("sha256:"))
}

fn blob_path(shared: &Shared, digest: &str) -> Result<PathBuf> {
    let valid = digest
        .strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    match valid {
        true => Ok(file_path(&shared.root, digest)),
        false => Err(StoreError::InvalidDigest(digest.to_owned())),
    }
}
