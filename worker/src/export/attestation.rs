//! Attestations of a result: in-toto statements beside its files, or manifests beside its images.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_cache::{LayerBlob, Ref, SnapshotRef};
use kiln_proto::reference::Reference;
use kiln_proto::{pattern, pb, platform};
use rustix::fs::{FileType, Mode, OFlags, openat};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::ExportError;
use crate::image::{BlobOptions, EMPTY_DIFF_ID, Images};

const STATEMENT: &str = "https://in-toto.io/Statement/v1";
/// Media type of statements.
pub const IN_TOTO: &str = "application/vnd.in-toto+json";
/// Annotation that names what a statement says.
pub const PREDICATE_TYPE: &str = "in-toto.io/predicate-type";

/// A claim about one platform's result.
#[derive(Debug, Clone)]
pub struct Attestation {
    /// URI of what the predicate is.
    pub predicate_type: String,
    /// The claim.
    pub predicate: Value,
    /// Of what it is claimed; empty: of the result itself.
    pub subjects: Vec<Subject>,
    /// Its file's name in exports of files.
    pub file: String,
    /// Left out of what does not ask for it.
    pub inline_only: bool,
    /// What the steps made, where the predicate names it.
    pub steps: Option<Steps>,
}

/// What something is claimed of.
#[derive(Debug, Clone)]
pub enum Subject {
    /// The result: the image under each of its names, or all its files.
    Itself,
    /// Something else.
    Other {
        /// How it is called.
        name: String,
        /// Digests by algorithm.
        digest: Map<String, Value>,
    },
}

/// Results of steps, whose layers are put into a predicate by the exporter: it packs some of them.
#[derive(Debug, Clone)]
pub struct Steps {
    /// JSON pointer to the object that gets the field `layers`.
    pub place: &'static str,
    /// By the step's name and output.
    pub results: BTreeMap<String, Ref>,
}

impl Steps {
    /// Descriptors of the layers of each result all of whose layers have a blob.
    fn layers(&self, images: &Images, options: BlobOptions) -> Result<Map<String, Value>, ExportError> {
        let mut all = Map::new();
        for (name, result) in &self.results {
            let layers = result.iter().flat_map(SnapshotRef::layers);
            let known = layers.map(|layer| Ok(images.known_layer(&layer, options)?));
            let Some(known) = known.collect::<Result<Option<Vec<_>>, ExportError>>()? else { continue };
            let described: Vec<Value> = known
                .iter()
                .filter(|layer| layer.blob.diff_id != EMPTY_DIFF_ID)
                .map(|layer| {
                    let media_type = layer.compression.media_type(!options.docker_types);
                    let LayerBlob { digest, size, .. } = &layer.blob;
                    json!({"mediaType": media_type, "digest": digest, "size": size})
                })
                .collect();
            if !described.is_empty() {
                all.insert(name.clone(), json!([described]));
            }
        }
        Ok(all)
    }
}

impl Attestation {
    /// The in-toto statement that says this; `itself` is what the result is as subjects.
    pub(super) fn statement(
        &self,
        itself: &[Value],
        images: &Images,
        options: BlobOptions,
    ) -> Result<Value, ExportError> {
        let mut predicate = self.predicate.clone();
        if let Some(steps) = &self.steps
            && let Some(place) = predicate.pointer_mut(steps.place).and_then(Value::as_object_mut)
        {
            let layers = steps.layers(images, options)?;
            if !layers.is_empty() {
                place.insert("layers".to_string(), layers.into());
            }
        }
        let mut subjects = Vec::new();
        for subject in &self.subjects {
            match subject {
                Subject::Itself => subjects.extend_from_slice(itself),
                Subject::Other { name, digest } => subjects.push(json!({"name": name, "digest": digest})),
            }
        }
        if self.subjects.is_empty() {
            subjects.extend_from_slice(itself);
        }
        Ok(json!({
            "_type": STATEMENT,
            "predicateType": self.predicate_type,
            "subject": subjects,
            "predicate": predicate,
        }))
    }

    /// Its file's name in a directory that it shares with those of other platforms.
    pub(super) fn file_of(&self, platform: &str) -> String {
        let platform = platform.replace('/', "_");
        match self.file.split_once('.') {
            Some((stem, rest)) => format!("{stem}.{platform}.{rest}"),
            None => format!("{}.{platform}", self.file),
        }
    }
}

/// An image as a package URL.
pub fn package_url(reference: &Reference, platform: Option<&pb::Platform>) -> String {
    // Of what names may hold, only the colon before a port has another meaning there.
    let mut url = format!("pkg:docker/{}", reference.familiar_name().replace(':', "%3A"));
    let tag = reference.tag().or(reference.digest().is_none().then_some("latest"));
    url.extend(tag.into_iter().flat_map(|tag| ["@", tag]));
    let mut qualifiers = Vec::new();
    qualifiers.extend(reference.digest().map(|digest| format!("digest={digest}")));
    let platform = platform.map(|platform| platform::format(&platform::normalized(platform)));
    qualifiers.extend(platform.map(|platform| format!("platform={}", platform.replace('/', "%2F"))));
    if !qualifiers.is_empty() {
        url = format!("{url}?{}", qualifiers.join("&"));
    }
    url
}

/// A subject of a statement.
pub(super) fn subject(name: &str, digest: &str) -> Value {
    let (algorithm, hex) = digest.split_once(':').unwrap_or(("sha256", digest));
    json!({"name": name, "digest": {algorithm: hex}})
}

/// All regular files below `root` as subjects, in the order of their paths. Blocking.
pub(super) fn file_subjects(root: BorrowedFd<'_>) -> io::Result<Vec<Value>> {
    let mut subjects = Vec::new();
    walk(root, &mut |path, kind, entry| {
        if kind != FileType::RegularFile {
            return Ok(());
        }
        let mut file = std::fs::File::from(entry(OFlags::RDONLY)?);
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => hasher.update(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        subjects.push(subject(&pattern::text(path), &format!("sha256:{}", hex::encode(hasher.finalize()))));
        Ok(())
    })?;
    Ok(subjects)
}

/// Hears of an entry by its path and type; the function opens it.
pub(super) type Visit<'a> =
    dyn FnMut(&[u8], FileType, &dyn Fn(OFlags) -> io::Result<OwnedFd>) -> io::Result<()> + 'a;

/// Visits everything below `root`, in the order of paths. Blocking.
pub(super) fn walk(root: BorrowedFd<'_>, visit: &mut Visit<'_>) -> io::Result<()> {
    let top = openat(root, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut stack = vec![Frame::open(top, Vec::new())?];
    while let Some(frame) = stack.last_mut() {
        let Some((name, kind)) = frame.entries.next() else {
            stack.pop();
            continue;
        };
        let path = [&frame.prefix, name.to_bytes()].concat();
        let open = |flags: OFlags| {
            Ok(openat(&frame.fd, &*name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?)
        };
        visit(&path, kind, &open)?;
        if kind == FileType::Directory {
            let fd = open(OFlags::RDONLY | OFlags::DIRECTORY)?;
            stack.push(Frame::open(fd, [&path, &b"/"[..]].concat())?);
        }
    }
    Ok(())
}

struct Frame {
    fd: OwnedFd,
    prefix: Vec<u8>,
    entries: std::vec::IntoIter<(std::ffi::CString, FileType)>,
}

impl Frame {
    fn open(fd: OwnedFd, prefix: Vec<u8>) -> io::Result<Self> {
        let mut entries = Vec::new();
        for entry in rustix::fs::Dir::read_from(fd.as_fd())? {
            let entry = entry?;
            let name = entry.file_name().to_owned();
            if name.to_bytes() == b"." || name.to_bytes() == b".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(&fd, &*name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                known => known,
            };
            entries.push((name, kind));
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Self { fd, prefix, entries: entries.into_iter() })
    }
}
