//! File operations beneath an open root directory. Every path is resolved with openat2, refusing links and anything
//! outside; names within an open directory are single components.

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags, Timespec, Timestamps, XattrFlags,
};
use rustix::io::Errno;

use super::path;

/// What kind of entry a directory listing shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryType {
    Dir,
    Symlink,
    /// Anything else.
    File,
}

/// Opens `rel` (empty is the root itself) beneath `root`, through no link.
pub(super) fn open(root: BorrowedFd<'_>, rel: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let rel: &[u8] = if rel.is_empty() { b"." } else { rel };
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    loop {
        match fs::openat2(root, rel, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
        {
            // The kernel asks to try again when a rename ran beside the look-up.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Opens the directory `rel` beneath `root` for reading.
pub(super) fn open_dir(root: BorrowedFd<'_>, rel: &[u8]) -> Result<OwnedFd, Errno> {
    open(root, rel, OFlags::RDONLY | OFlags::DIRECTORY)
}

/// The target of the link `rel`; `None` if it is not a link.
pub(super) fn read_link(root: BorrowedFd<'_>, rel: &[u8]) -> Option<Vec<u8>> {
    let (parent, name) = path::split(rel);
    let dir = open(root, parent, OFlags::PATH | OFlags::DIRECTORY).ok()?;
    Some(fs::readlinkat(&dir, name, Vec::new()).ok()?.into_bytes())
}

/// The names in the directory `rel`, sorted by bytes.
pub(super) fn names(root: BorrowedFd<'_>, rel: &[u8]) -> Result<Vec<(Vec<u8>, EntryType)>, Errno> {
    let dir = open_dir(root, rel)?;
    let mut all = Vec::new();
    for (name, kind) in entries(&dir)? {
        let kind = match kind {
            FileType::Unknown => match fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(_) => continue,
            },
            known => known,
        };
        let kind = match kind {
            FileType::Directory => EntryType::Dir,
            FileType::Symlink => EntryType::Symlink,
            _ => EntryType::File,
        };
        all.push((name.into_bytes(), kind));
    }
    all.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(all)
}

/// The names and types in an open directory, in no order, without `.` and `..`.
pub(super) fn entries(dir: &OwnedFd) -> Result<Vec<(CString, FileType)>, Errno> {
    let mut all = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_bytes() != b"." && name.to_bytes() != b".." {
            all.push((name.to_owned(), entry.file_type()));
        }
    }
    Ok(all)
}

/// Which inode it is: the file system's device number, and its own.
pub(super) type Inode = (u32, u32, u64);

/// What is told of an entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    /// Type and permissions.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: i64,
    /// Nanoseconds since the epoch.
    pub(super) mod_time: i64,
    /// Nanoseconds since the epoch at which the inode was made, if the file system remembers.
    pub(super) born: Option<i64>,
    /// Of a device node: its number.
    pub(super) device: (i64, i64),
    /// How many names the inode has.
    pub(super) names: u32,
    pub(super) inode: Inode,
}

impl Found {
    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }
}

/// What lies at `name` in `dir`, if anything.
pub(super) fn lstat(dir: &OwnedFd, name: &[u8]) -> Result<Option<Found>, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = match fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, wanted) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(Some(Found {
        mode: stat.stx_mode.into(),
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        size: i64::try_from(stat.stx_size).unwrap_or(i64::MAX),
        mod_time: nanoseconds(&stat.stx_mtime),
        born: (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| nanoseconds(&stat.stx_btime)),
        device: (stat.stx_rdev_major.into(), stat.stx_rdev_minor.into()),
        names: stat.stx_nlink,
        inode: (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino),
    }))
}

fn nanoseconds(time: &fs::StatxTimestamp) -> i64 {
    i64::try_from(i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)).unwrap_or(i64::MAX)
}

/// Times to set: that modification time, and the access time left alone.
pub(super) fn times(mtime_ns: i64) -> Timestamps {
    let omit = Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT };
    let modified =
        Timespec { tv_sec: mtime_ns.div_euclid(1_000_000_000), tv_nsec: mtime_ns.rem_euclid(1_000_000_000) };
    Timestamps { last_access: omit, last_modification: modified }
}

/// A path that names `name` in `dir`, for the calls that take no directory.
pub(super) fn proc_path(dir: &OwnedFd, name: &[u8]) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(OsStr::from_bytes(name));
    path
}

/// Removes whatever `name` in `dir` is, with all below it.
pub(super) fn remove_all(dir: &OwnedFd, name: &CStr) -> io::Result<()> {
    match fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => std::fs::remove_dir_all(proc_path(dir, name.to_bytes())),
        Err(error) => Err(error.into()),
    }
}

/// The most that the kernel gives of an attribute's value, or of the list of their names.
const XATTR_MAX: usize = 64 << 10;

/// The extended attributes of `name` in `dir`. A file system without any has none.
pub(super) fn xattrs(dir: &OwnedFd, name: &[u8]) -> Result<Vec<(String, Vec<u8>)>, Errno> {
    let mut list = [0u8; 512];
    let list = match list_xattrs(dir, name, &mut list) {
        Ok(0) => return Ok(Vec::new()),
        Ok(size) => list[..size].to_vec(),
        Err(Errno::RANGE) => grown(|buffer| list_xattrs(dir, name, buffer))?,
        Err(Errno::NOTSUP | Errno::NOENT | Errno::ACCESS | Errno::PERM) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let path = proc_path(dir, name);
    let mut all = Vec::new();
    for key in list.split(|b| *b == 0).filter(|k| !k.is_empty()) {
        let Ok(key) = std::str::from_utf8(key) else { continue };
        match grown(|buffer| fs::lgetxattr(&path, key, buffer)) {
            Ok(value) => all.push((key.to_owned(), value)),
            Err(Errno::NODATA | Errno::NOTSUP) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Its number, the same on all 64-bit architectures (the kernel's include/uapi/asm-generic/unistd.h).
const SYS_LISTXATTRAT: libc::c_long = 465;

/// Whether listxattrat is worth trying: not on kernels before 6.13, and not where a filter of system calls refuses it.
static LISTXATTRAT: AtomicBool = AtomicBool::new(true);

/// The names of the attributes of `name` in `dir`, each ended by a zero byte; how many bytes that is. There is one such
/// call for each file of a context, and the detour over /proc takes several times as long as the call itself.
fn list_xattrs(dir: &OwnedFd, name: &[u8], buffer: &mut [u8]) -> Result<usize, Errno> {
    if LISTXATTRAT.load(Ordering::Relaxed) {
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        // SAFETY: the name ends with a zero byte, the kernel writes to the buffer alone, and both outlive the call.
        let size = unsafe {
            libc::syscall(
                SYS_LISTXATTRAT,
                dir.as_raw_fd(),
                name.as_ptr(),
                libc::AT_SYMLINK_NOFOLLOW,
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        };
        if let Ok(size) = usize::try_from(size) {
            return Ok(size);
        }
        match Errno::from_io_error(&io::Error::last_os_error()) {
            Some(Errno::NOSYS | Errno::PERM) => LISTXATTRAT.store(false, Ordering::Relaxed),
            error => return Err(error.unwrap_or(Errno::IO)),
        }
    }
    fs::llistxattr(proc_path(dir, name), buffer)
}

/// What `read` puts into a buffer that is large enough.
fn grown(mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0u8; 512];
    loop {
        match read(&mut buffer) {
            Ok(size) => {
                buffer.truncate(size);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if buffer.len() < XATTR_MAX => buffer.resize(XATTR_MAX, 0),
            Err(error) => return Err(error),
        }
    }
}

/// Sets one extended attribute on `name` in `dir`, not through a link.
pub(super) fn set_xattr(dir: &OwnedFd, name: &[u8], key: &str, value: &[u8]) -> Result<(), Errno> {
    fs::lsetxattr(proc_path(dir, name), key, value, XattrFlags::empty())
}
