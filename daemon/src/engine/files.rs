//! Reading single files out of a result's root directory for frontends. Every path is resolved
//! beneath that root by the kernel; symbolic links lead nowhere else. Blocking.

use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_proto::fsutil::Stat;
use kiln_proto::{gomode, pattern};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::BuildError;

/// The largest file that is handed to a frontend in one answer; a message carries at most 16 MiB.
const MAX_FILE: u64 = 15 << 20;

fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::IN_ROOT)
}

fn failed(call: &str, path: impl std::fmt::Display, error: Errno) -> BuildError {
    let text = match error {
        Errno::NOENT => "no such file or directory".to_owned(),
        Errno::NOTDIR => "not a directory".to_owned(),
        Errno::LOOP => "too many levels of symbolic links".to_owned(),
        other => std::io::Error::from(other).to_string(),
    };
    BuildError::build(format!("{call} {path}: {text}"))
}

/// A part of a regular file: from `offset`, `length` bytes (0: to the end).
pub(crate) fn read_file(
    root: BorrowedFd<'_>,
    path: impl AsRef<Path>,
    offset: u64,
    length: u64,
) -> Result<Vec<u8>, BuildError> {
    let (path, shown) = (path.as_ref(), path.as_ref().display());
    // Non-blocking, so that a FIFO in an image holds nobody up.
    let fd =
        open(root, path, OFlags::RDONLY | OFlags::NONBLOCK).map_err(|error| failed("open", &shown, error))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| failed("stat", &shown, error))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(BuildError::build(format!("{shown} is not a regular file")));
    }
    let mut file = std::fs::File::from(fd);
    let io = |error: std::io::Error| BuildError::build(format!("read {shown}: {error}"));
    if offset > 0 {
        file.seek(SeekFrom::Start(offset)).map_err(io)?;
    }
    let wanted = if length == 0 { u64::MAX } else { length };
    let mut data = Vec::new();
    file.take(wanted.min(MAX_FILE + 1)).read_to_end(&mut data).map_err(io)?;
    if data.len() as u64 > MAX_FILE {
        return Err(BuildError::build(format!(
            "{shown} is too large: at most {MAX_FILE} bytes can be read at once"
        )));
    }
    Ok(data)
}

/// The entries of a directory, by name; `include` is one pattern, empty for all.
pub(crate) fn read_dir(root: BorrowedFd<'_>, path: &str, include: &str) -> Result<Vec<Stat>, BuildError> {
    let fd = open(root, Path::new(path), OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(|error| failed("open", path, error))?;
    let matcher = if include.is_empty() {
        None
    } else {
        let matcher = pattern::PatternMatcher::new([include])
            .map_err(|error| BuildError::build(format!("invalid pattern {include}: {error}")))?;
        Some(matcher)
    };
    let dir = Dir::read_from(&fd).map_err(|error| failed("open", path, error))?;
    let mut entries = Vec::new();
    for entry in dir {
        let entry = entry.map_err(|error| failed("read", path, error))?;
        let name = entry.file_name().to_bytes();
        let shown = pattern::text(name);
        if matches!(name, b"." | b"..") || matcher.as_ref().is_some_and(|matcher| !matcher.matches(&shown)) {
            continue;
        }
        let stat = rustix::fs::statat(&fd, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed("lstat", &shown, error))?;
        let linkname = if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            let target = rustix::fs::readlinkat(&fd, entry.file_name(), Vec::new())
                .map_err(|error| failed("readlink", &shown, error))?;
            target.into_bytes()
        } else {
            Vec::new()
        };
        entries.push(describe(name.to_vec(), &stat, linkname));
    }
    entries.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(entries)
}

/// What a path leads to, all links followed.
pub(crate) fn stat_file(root: BorrowedFd<'_>, path: &str) -> Result<Stat, BuildError> {
    let fd = open(root, Path::new(path), OFlags::PATH).map_err(|error| failed("lstat", path, error))?;
    let stat = rustix::fs::fstat(&fd).map_err(|error| failed("lstat", path, error))?;
    // The kernel knows under which name the file was reached in the end.
    let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let resolved = std::fs::read_link(link).ok();
    let name = resolved
        .as_deref()
        .filter(|resolved| *resolved != Path::new("/"))
        .and_then(Path::file_name)
        .or_else(|| Path::new(path).file_name())
        .map_or_else(|| b"/".to_vec(), |name| name.as_bytes().to_vec());
    Ok(describe(name, &stat, Vec::new()))
}

fn describe(path: Vec<u8>, stat: &rustix::fs::Stat, linkname: Vec<u8>) -> Stat {
    let device =
        matches!(FileType::from_raw_mode(stat.st_mode), FileType::CharacterDevice | FileType::BlockDevice);
    let size = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => stat.st_size,
        FileType::Symlink => i64::try_from(linkname.len()).unwrap_or_default(),
        _ => 0,
    };
    Stat {
        path,
        mode: gomode::from_posix(stat.st_mode),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size,
        mod_time: stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec as i64),
        linkname,
        devmajor: if device { i64::from(rustix::fs::major(stat.st_rdev)) } else { 0 },
        devminor: if device { i64::from(rustix::fs::minor(stat.st_rdev)) } else { 0 },
        xattrs: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(dir.path().join("bin")).expect("mkdir");
        std::fs::write(dir.path().join("bin/busybox"), b"0123456789").expect("write");
        std::os::unix::fs::symlink("busybox", dir.path().join("bin/sh")).expect("symlink");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("outside")).expect("symlink");
        std::os::unix::fs::symlink("../../../../../../bin/busybox", dir.path().join("up")).expect("symlink");
        let fd = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).expect("open");
        (dir, fd)
    }

    #[test]
    fn files_and_ranges() {
        let (_dir, root) = root();
        assert_eq!(read_file(root.as_fd(), "/bin/sh", 0, 0).expect("through a link"), b"0123456789");
        assert_eq!(read_file(root.as_fd(), "bin/busybox", 3, 4).expect("range"), b"3456");
        assert_eq!(read_file(root.as_fd(), "up", 9, 0).expect(".. stops at the root"), b"9");
        let texts = [
            ("/nope", "open /nope: no such file or directory"),
            ("/bin", "/bin is not a regular file"),
            ("outside", "open outside: no such file or directory"),
        ];
        for (path, text) in texts {
            assert_eq!(read_file(root.as_fd(), path, 0, 0).expect_err(path).message, text);
        }
    }

    #[test]
    fn directories() {
        let (_dir, root) = root();
        let names = |include: &str| -> Vec<Vec<u8>> {
            let entries = read_dir(root.as_fd(), "/bin", include).expect("read");
            entries.into_iter().map(|entry| entry.path).collect()
        };
        assert_eq!(names(""), [&b"busybox"[..], b"sh"]);
        assert_eq!(names("b*"), [b"busybox"]);
        let error = read_dir(root.as_fd(), "/nope", "").expect_err("missing");
        assert_eq!(error.message, "open /nope: no such file or directory");
        let link = &read_dir(root.as_fd(), "bin", "s*").expect("read")[0];
        assert_eq!(link.linkname, b"busybox");
    }

    #[test]
    fn names_need_not_be_text() {
        use std::ffi::OsStr;
        let (dir, root) = root();
        let file = dir.path().join(OsStr::from_bytes(b"caf\xe9"));
        std::fs::write(&file, b"x").expect("write");
        std::os::unix::fs::symlink(
            OsStr::from_bytes(b"caf\xe9"),
            dir.path().join(OsStr::from_bytes(b"l\xff")),
        )
        .expect("symlink");
        let found = |include: &str| -> Vec<(Vec<u8>, Vec<u8>)> {
            let entries = read_dir(root.as_fd(), "/", include).expect("read");
            entries.into_iter().map(|entry| (entry.path, entry.linkname)).collect()
        };
        assert_eq!(found("caf?"), [(b"caf\xe9".to_vec(), Vec::new())]);
        assert_eq!(found("l*"), [(b"l\xff".to_vec(), b"caf\xe9".to_vec())]);
        assert_eq!(read_file(root.as_fd(), OsStr::from_bytes(b"l\xff"), 0, 0).expect("read"), b"x");
        std::os::unix::fs::symlink(OsStr::from_bytes(b"caf\xe9"), dir.path().join("text")).expect("symlink");
        assert_eq!(stat_file(root.as_fd(), "/text").expect("stat").path, b"caf\xe9");
    }

    #[test]
    fn stat_follows_links() {
        let (_dir, root) = root();
        let stat = stat_file(root.as_fd(), "/bin/sh").expect("stat");
        assert_eq!((stat.path.as_slice(), stat.size), (&b"busybox"[..], 10));
        let error = stat_file(root.as_fd(), "/nope").expect_err("missing");
        assert_eq!(error.message, "lstat /nope: no such file or directory");
    }
}
