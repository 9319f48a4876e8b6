//! Packing a directory into a deterministic tar: a layer directory in overlay form, or a plain root.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, Stat, openat};

use super::LayerError;
use super::compress::{Compression, Compressor, DigestWriter};
use super::fsutil::{self, lstat};
use super::tar_read::{Kind, Pair};
use super::tar_write::{TarEntry, TarWriter};

/// What goes into the archive, and how.
#[derive(Debug, Clone, Default)]
pub struct PackOptions {
    /// The directory is an overlay upper: whiteouts and opaque marks become `.wh.` entries.
    pub overlay: bool,
    /// Times later than this (seconds since the epoch) become this.
    pub clamp: Option<i64>,
    /// Put before every path, with a trailing slash; empty for none.
    pub prefix: String,
}

/// What was packed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackStats {
    /// `sha256:…` of the blob.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// `sha256:…` of the uncompressed archive.
    pub diff_id: String,
    /// Bytes of the uncompressed archive.
    pub diff_size: u64,
    /// Number of entries; a layer without any changes nothing.
    pub entries: u64,
}

/// Packs the layer directory `dir` as a blob into `out`, digesting both forms on the way.
pub fn pack_layer<W: Write>(
    dir: &Path,
    options: &PackOptions,
    compression: Compression,
    level: Option<i32>,
    out: W,
) -> Result<(W, PackStats), LayerError> {
    let compressor =
        Compressor::new(DigestWriter::new(out), compression, level).map_err(LayerError::Write)?;
    let mut archive = TarWriter::new(io::BufWriter::with_capacity(128 << 10, DigestWriter::new(compressor)));
    let entries = pack_dir(dir, options, &mut archive)?;
    let diff = archive.finish().map_err(LayerError::Write)?;
    let diff = diff.into_inner().map_err(|e| LayerError::Write(e.into_error()))?;
    let (compressor, diff_id, diff_size) = diff.finish();
    let (out, digest, size) = compressor.finish().map_err(LayerError::Write)?.finish();
    Ok((out, PackStats { digest, size, diff_id, diff_size, entries }))
}

struct Frame {
    fd: OwnedFd,
    names: std::vec::IntoIter<OsString>,
    /// Path in the archive, with a trailing slash unless it is empty.
    path: Vec<u8>,
}

/// Adds everything below `dir` to an archive (the root itself is not an entry) and answers how many entries
/// that was. Siblings come in byte order, a directory before its content; sockets are left out.
pub fn pack_dir<W: Write>(
    dir: &Path,
    options: &PackOptions,
    archive: &mut TarWriter<W>,
) -> Result<u64, LayerError> {
    let fd = fsutil::open_root(dir).map_err(|e| LayerError::io("open", dir, e))?;
    let mut packer = Packer { options, archive, links: HashMap::new(), entries: 0 };
    let prefix = options.prefix.as_bytes();
    for (end, _) in prefix.iter().enumerate().filter(|(_, b)| **b == b'/') {
        packer.write(&TarEntry::new(&prefix[..=end], Kind::Dir, 0o755), &mut io::empty())?;
    }
    let names = fsutil::names(&fd).map_err(|e| LayerError::io("read", dir, e))?.into_iter();
    if options.overlay && fsutil::is_opaque(&fd, OsStr::new(".")) {
        packer.opaque(prefix)?;
    }
    let mut stack = vec![Frame { fd, names, path: prefix.to_vec() }];
    while let Some(frame) = stack.last_mut() {
        let Some(name) = frame.names.next() else {
            stack.pop();
            continue;
        };
        if let Some(next) = packer.add(&frame.fd, &frame.path, &name)? {
            stack.push(next);
        }
    }
    Ok(packer.entries)
}

struct Packer<'a, W> {
    options: &'a PackOptions,
    archive: &'a mut TarWriter<W>,
    /// First path of every file that has several.
    links: HashMap<(u64, u64), Vec<u8>>,
    entries: u64,
}

impl<W: Write> Packer<'_, W> {
    fn write(&mut self, entry: &TarEntry<'_>, content: &mut dyn Read) -> Result<(), LayerError> {
        self.entries += 1;
        self.archive.entry(entry, content).map_err(LayerError::Write)
    }

    fn opaque(&mut self, dir: &[u8]) -> Result<(), LayerError> {
        let path = [dir, b".wh..wh..opq"].concat();
        self.write(&TarEntry::new(&path, Kind::Regular, 0o600), &mut io::empty())
    }

    /// Adds one entry; a directory's content is answered as the next frame.
    fn add(&mut self, dir: &OwnedFd, parent: &[u8], name: &OsStr) -> Result<Option<Frame>, LayerError> {
        let mut path = [parent, name.as_bytes()].concat();
        let shown = Path::new(OsStr::from_bytes(&path)).to_path_buf();
        let failed = |action: &'static str| {
            let shown = shown.clone();
            move |e: io::Error| LayerError::io(action, &shown, e)
        };
        let Some(stat) = lstat(dir, name).map_err(|e| failed("stat")(e.into()))? else {
            return Err(LayerError::io("stat", &shown, rustix::io::Errno::NOENT));
        };
        if self.options.overlay && fsutil::is_whiteout(&stat) {
            let path = [parent, b".wh.", name.as_bytes()].concat();
            self.write(&TarEntry::new(&path, Kind::Regular, 0o600), &mut io::empty())?;
            return Ok(None);
        }
        let file_type = fsutil::file_type(&stat);
        let kind = match file_type {
            FileType::RegularFile => Kind::Regular,
            FileType::Directory => Kind::Dir,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::Char,
            FileType::BlockDevice => Kind::Block,
            FileType::Fifo => Kind::Fifo,
            // A socket means nothing without the process that listens on it.
            _ => return Ok(None),
        };
        if self.options.overlay && name.as_bytes().starts_with(b".wh.") {
            return Err(LayerError::Archive(format!(
                "{}: a file of this name cannot be stored in a layer",
                shown.display()
            )));
        }
        let (mtime, mtime_nanos) = self.time(&stat);
        if kind != Kind::Dir && stat.st_nlink > 1 {
            let id = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&id) {
                let first = first.clone();
                let mut entry = TarEntry::new(&path, Kind::HardLink, stat.st_mode);
                (entry.link, entry.uid, entry.gid) = (&first, stat.st_uid, stat.st_gid);
                (entry.mtime, entry.mtime_nanos) = (mtime, mtime_nanos);
                self.write(&entry, &mut io::empty())?;
                return Ok(None);
            }
            self.links.insert(id, path.clone());
        }
        let xattrs = self.xattrs(dir, name, &shown)?;
        let link = if kind == Kind::Symlink {
            let target = fsutil::read_link(dir, name).map_err(|e| failed("read")(e.into()))?;
            target.into_os_string().into_encoded_bytes()
        } else {
            Vec::new()
        };
        if kind == Kind::Dir {
            path.push(b'/');
        }
        let entry = TarEntry {
            path: &path,
            kind,
            link: &link,
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime,
            mtime_nanos,
            size: if kind == Kind::Regular { stat.st_size as u64 } else { 0 },
            device: (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)),
            xattrs: &xattrs,
        };
        let open =
            |flags: OFlags| openat(dir, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        if kind == Kind::Regular && entry.size > 0 {
            let mut file = File::from(open(OFlags::RDONLY).map_err(|e| failed("open")(e.into()))?);
            self.write(&entry, &mut file)?;
            return Ok(None);
        }
        self.write(&entry, &mut io::empty())?;
        if kind != Kind::Dir {
            return Ok(None);
        }
        let fd = open(OFlags::RDONLY | OFlags::DIRECTORY).map_err(|e| failed("open")(e.into()))?;
        if self.options.overlay && fsutil::is_opaque(dir, name) {
            self.opaque(&path)?;
        }
        let names = fsutil::names(&fd).map_err(failed("read"))?.into_iter();
        Ok(Some(Frame { fd, names, path }))
    }

    fn time(&self, stat: &Stat) -> (i64, u32) {
        match self.options.clamp {
            Some(latest) if stat.st_mtime >= latest => (latest, 0),
            // Other builders' layers tell whole seconds; a fraction costs two blocks for each entry.
            _ if self.options.overlay => (stat.st_mtime, 0),
            _ => (stat.st_mtime, stat.st_mtime_nsec as u32),
        }
    }

    /// The xattrs that belong to the image: file capabilities and `user.*`.
    fn xattrs(&self, dir: &OwnedFd, name: &OsStr, shown: &Path) -> Result<Vec<Pair>, LayerError> {
        let mut all = fsutil::xattrs(dir, name).map_err(|e| LayerError::io("read xattrs of", shown, e))?;
        let moved = |key: &[u8]| {
            matches!(
                key,
                b"trusted.overlay.redirect"
                    | b"trusted.overlay.metacopy"
                    | b"user.overlay.redirect"
                    | b"user.overlay.metacopy"
            )
        };
        if self.options.overlay && all.iter().any(|(key, _)| moved(key)) {
            return Err(LayerError::Archive(format!(
                "{}: unsupported: overlay redirects or metadata-only copies",
                shown.display()
            )));
        }
        all.retain(|(key, _)| {
            key == b"security.capability" || (key.starts_with(b"user.") && !fsutil::is_overlay_xattr(key))
        });
        Ok(all)
    }
}
