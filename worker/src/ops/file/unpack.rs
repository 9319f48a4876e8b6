//! `ADD` of an archive: recognises a tar, compressed or not, and extracts it onto a directory.
//!
//! An archive is a foreign file: each entry is resolved beneath the destination as if that were the
//! root directory, and nothing outside can be named by it. Whiteout names have no meaning here.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;
use tokio_util::sync::CancellationToken;

use super::actions::FileError;
use super::root::{NewDir, Owner, PathError, Root, chmod, chown, clean, lstat, remove_all, split, utimes};

/// Directories that an archive implies without listing them.
const IMPLIED_DIR: NewDir = NewDir { mode: 0o755, owner: None, time: None };

/// Extracts `source` onto `dest` if it is an archive; false if it is anything else.
pub(crate) fn unpack(
    src: Root<'_>,
    source: &str,
    dst: Root<'_>,
    dest: &str,
    owner: Option<Owner>,
    time: Option<Timespec>,
    cancel: &CancellationToken,
) -> Result<bool, FileError> {
    let Ok(place) = src.place(source, true) else { return Ok(false) };
    if place.file_type() != Some(FileType::RegularFile) {
        return Ok(false);
    }
    let opened = place.open(OFlags::RDONLY).map_err(|errno| PathError::new("open", source, errno))?;
    let mut file = File::from(opened);
    if !is_archive(&mut file) {
        return Ok(false);
    }
    let dest = clean(dest);
    let new = NewDir { mode: 0o755, owner, time };
    let (root, _) = dst.ensure_dir(&dest, &new).map_err(|errno| PathError::new("mkdir", &dest, errno))?;
    let text = |err: std::io::Error| FileError::Text(format!("failed to unpack {source}: {err}"));
    file.rewind().map_err(text)?;
    let mut extraction = Extraction { root: Root(root.as_fd()), owner, source, dirs: Vec::new() };
    let mut archive = tar::Archive::new(decompress(file).map_err(text)?);
    for entry in archive.entries().map_err(text)? {
        if cancel.is_cancelled() {
            return Err(FileError::Cancelled);
        }
        extraction.entry(entry.map_err(text)?)?;
    }
    extraction.finish()?;
    Ok(true)
}

fn is_archive(file: &mut File) -> bool {
    let Ok(reader) = decompress(file) else { return false };
    let mut archive = tar::Archive::new(reader);
    let Ok(mut entries) = archive.entries() else { return false };
    matches!(entries.next(), Some(Ok(_)))
}

/// Chooses a decompressor by the first bytes.
fn decompress<'a, R: Read + 'a>(reader: R) -> std::io::Result<Box<dyn Read + 'a>> {
    let mut reader = BufReader::with_capacity(64 << 10, reader);
    let head = std::io::BufRead::fill_buf(&mut reader)?;
    Ok(match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
        [b'B', b'Z', b'h', ..] => Box::new(bzip2::bufread::MultiBzDecoder::new(reader)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(reader))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
        _ => Box::new(reader),
    })
}

struct Extraction<'a> {
    root: Root<'a>,
    owner: Option<Owner>,
    source: &'a str,
    /// Directories and the time each gets when its content is complete.
    dirs: Vec<(OwnedFd, OsString, Timespec)>,
}

/// What a tar entry says about the thing it makes.
struct Attributes {
    owner: Owner,
    mode: u32,
    time: Timespec,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

impl Extraction<'_> {
    fn entry<R: Read>(&mut self, mut entry: tar::Entry<'_, R>) -> Result<(), FileError> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let raw = entry.path_bytes().into_owned();
        let Ok(name) = std::str::from_utf8(&raw) else {
            return Err(self.text("unsupported: archive entry whose name is not UTF-8"));
        };
        let path = clean(name);
        let (parent, name) = split(&path);
        if name == "." {
            return Ok(());
        }
        let name = OsStr::new(name);
        let failed = |call: &'static str| {
            let path = path.clone();
            move |errno: Errno| FileError::from(PathError::new(call, &path, errno))
        };
        let attributes = self.attributes(&mut entry)?;
        let (dir, _) = self.root.ensure_dir(parent, &IMPLIED_DIR).map_err(failed("mkdir"))?;
        let there = lstat(dir.as_fd(), name).map_err(failed("lstat"))?;
        let there_dir =
            there.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if there.is_some() && !(there_dir && kind == EntryType::Directory) {
            remove_all(dir.as_fd(), name).map_err(failed("remove"))?;
        }
        let mode = Mode::from_raw_mode(0o600);
        match kind {
            EntryType::Directory => {
                if !there_dir {
                    rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o700)).map_err(failed("mkdir"))?;
                }
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file =
                    File::from(rustix::fs::openat(&dir, name, flags, mode).map_err(failed("open"))?);
                std::io::copy(&mut entry, &mut file).map_err(|err| self.text(&format!("{path}: {err}")))?;
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default();
                rustix::fs::symlinkat(&*target, &dir, name).map_err(failed("symlink"))?;
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().unwrap_or_default();
                let Ok(target) = std::str::from_utf8(&target) else {
                    return Err(self.text("unsupported: hard link to a name that is not UTF-8"));
                };
                let target = self.root.place(target, false).map_err(failed("link"))?;
                rustix::fs::linkat(&target.dir, &target.name, &dir, name, AtFlags::empty())
                    .map_err(failed("link"))?;
                // The first name carries the metadata.
                return Ok(());
            }
            EntryType::Char | EntryType::Block => {
                let kind =
                    if kind == EntryType::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
                let header = entry.header();
                let number = |part: std::io::Result<Option<u32>>| part.ok().flatten().unwrap_or(0);
                let device =
                    rustix::fs::makedev(number(header.device_major()), number(header.device_minor()));
                rustix::fs::mknodat(&dir, name, kind, mode, device).map_err(failed("mknod"))?;
            }
            EntryType::Fifo => {
                rustix::fs::mknodat(&dir, name, FileType::Fifo, mode, 0).map_err(failed("mknod"))?;
            }
            other => return Err(self.text(&format!("unsupported: archive entry type {other:?} of {path}"))),
        }
        apply(dir.as_fd(), name, kind, &attributes).map_err(failed("chmod"))?;
        if kind == EntryType::Directory {
            self.dirs.push((dir, name.to_owned(), attributes.time));
        }
        Ok(())
    }

    /// Header fields, as far as PAX records do not replace them.
    fn attributes<R: Read>(&self, entry: &mut tar::Entry<'_, R>) -> Result<Attributes, FileError> {
        let bad = |err: std::io::Error| self.text(&err.to_string());
        let header = entry.header();
        let mut owner =
            Owner { uid: header.uid().map_err(bad)? as u32, gid: header.gid().map_err(bad)? as u32 };
        let mode = header.mode().map_err(bad)?;
        let mut time = Timespec { tv_sec: header.mtime().map_err(bad)? as i64, tv_nsec: 0 };
        let mut xattrs = Vec::new();
        if let Some(records) = entry.pax_extensions().map_err(bad)? {
            for record in records {
                let record = record.map_err(bad)?;
                let number = || record.value().ok().and_then(|value| value.parse().ok());
                match record.key_bytes() {
                    b"uid" => owner.uid = number().unwrap_or(owner.uid),
                    b"gid" => owner.gid = number().unwrap_or(owner.gid),
                    b"mtime" => time = record.value().ok().and_then(pax_time).unwrap_or(time),
                    key => {
                        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                            let name = std::os::unix::ffi::OsStrExt::from_bytes(name);
                            let name: &OsStr = name;
                            xattrs.push((name.to_owned(), record.value_bytes().to_vec()));
                        }
                    }
                }
            }
        }
        Ok(Attributes { owner: self.owner.unwrap_or(owner), mode, time, xattrs })
    }

    fn finish(&mut self) -> Result<(), FileError> {
        for (dir, name, time) in self.dirs.iter().rev() {
            let set = utimes(dir.as_fd(), name, *time);
            set.map_err(|errno| PathError::new("utimes", &name.to_string_lossy(), errno))?;
        }
        Ok(())
    }

    fn text(&self, message: &str) -> FileError {
        FileError::Text(format!("failed to unpack {}: {message}", self.source))
    }
}

fn apply(dir: BorrowedFd<'_>, name: &OsStr, kind: EntryType, attributes: &Attributes) -> Result<(), Errno> {
    chown(dir, name, attributes.owner)?;
    if matches!(
        kind,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse | EntryType::Directory
    ) {
        let fd = super::root::open_child(dir, name, OFlags::RDONLY)?;
        for (key, value) in &attributes.xattrs {
            // A file system that lacks a namespace or label loses it, as with any `tar -x`.
            let _ = rustix::fs::fsetxattr(&fd, key, value, XattrFlags::empty());
        }
    }
    if kind != EntryType::Symlink {
        chmod(dir, name, attributes.mode)?;
    }
    utimes(dir, name, attributes.time)
}

/// `seconds[.fraction]` since the epoch.
fn pax_time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let (tv_sec, tv_nsec): (i64, i64) = (seconds.parse().ok()?, digits.parse().ok()?);
    match text.starts_with('-') && tv_nsec > 0 {
        true => Some(Timespec { tv_sec: tv_sec - 1, tv_nsec: 1_000_000_000 - tv_nsec }),
        false => Some(Timespec { tv_sec, tv_nsec }),
    }
}
