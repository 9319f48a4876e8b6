//! The file actions that make or remove one thing: mkdir, mkfile, symlink, rm.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use kiln_proto::pb;
use rustix::fs::{Gid, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use super::root::{NewDir, Owner, PathError, Root, chown, clean, remove_all, reopen_file, split, utimes};
use super::wildcard;

/// Why a file action failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FileError {
    /// A call on a path failed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Anything else.
    #[error("{0}")]
    Text(String),
    /// The build was cancelled.
    #[error("context canceled")]
    Cancelled,
}

impl From<String> for FileError {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// The wire's timestamp: nanoseconds since the epoch, -1 for none.
pub(crate) fn timestamp(nanos: i64) -> Option<Timespec> {
    (nanos != -1).then(|| Timespec {
        tv_sec: nanos.div_euclid(1_000_000_000),
        tv_nsec: nanos.rem_euclid(1_000_000_000),
    })
}

pub(crate) fn mkdir(
    root: Root<'_>,
    action: &pb::FileActionMkDir,
    owner: Option<Owner>,
) -> Result<(), FileError> {
    let failed = |errno| PathError::new("mkdir", clean(&action.path), errno);
    let new = NewDir {
        mode: action.mode as u32 & 0o777,
        owner: Some(owner.unwrap_or(Owner { uid: 0, gid: 0 })),
        time: timestamp(action.timestamp),
    };
    if action.make_parents {
        let (_, made) = root.ensure_dir(&action.path, &new).map_err(failed)?;
        made.restore_times(new.time).map_err(failed)?;
        return Ok(());
    }
    let place = root.place(&action.path, true).map_err(failed)?;
    if place.stat.is_some() {
        return Ok(());
    }
    Ok(new.make(place.dir.as_fd(), &place.name).map_err(failed)?)
}

pub(crate) fn mkfile(
    root: Root<'_>,
    action: &pb::FileActionMkFile,
    owner: Option<Owner>,
) -> Result<(), FileError> {
    let path = clean(&action.path);
    let failed = |errno| PathError::new("open", &path, errno);
    let mode = action.mode as u32 & 0o777;
    let (fd, new) = match root.open(&path, OFlags::PATH, 0) {
        Ok(found) => {
            let opened = reopen_file(found.as_fd(), OFlags::WRONLY | OFlags::TRUNC).map_err(failed)?;
            (opened.ok_or_else(|| FileError::Text(format!("mkfile {path}: not a regular file")))?, false)
        }
        Err(Errno::NOENT) => (root.open(&path, OFlags::WRONLY | OFlags::CREATE, mode).map_err(failed)?, true),
        Err(errno) => return Err(failed(errno).into()),
    };
    let mut file = std::fs::File::from(fd);
    let io =
        |err: std::io::Error| PathError::new("write", &path, Errno::from_io_error(&err).unwrap_or(Errno::IO));
    file.write_all(&action.data).map_err(io)?;
    let owner = owner.unwrap_or(Owner { uid: 0, gid: 0 });
    rustix::fs::fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
        .map_err(failed)?;
    if new {
        // Not at creation alone: the process's umask must not show.
        file.set_permissions(std::fs::Permissions::from_mode(mode)).map_err(io)?;
    }
    if let Some(time) = timestamp(action.timestamp) {
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::futimens(&file, &times).map_err(failed)?;
    }
    Ok(())
}

pub(crate) fn symlink(
    root: Root<'_>,
    action: &pb::FileActionSymlink,
    owner: Option<Owner>,
) -> Result<(), FileError> {
    let failed = |errno| PathError::new("symlink", clean(&action.newpath), errno);
    let place = root.place(&action.newpath, true).map_err(failed)?;
    let dir = place.dir.as_fd();
    rustix::fs::symlinkat(action.oldpath.as_str(), dir, &place.name).map_err(failed)?;
    chown(dir, &place.name, owner.unwrap_or(Owner { uid: 0, gid: 0 })).map_err(failed)?;
    if let Some(time) = timestamp(action.timestamp) {
        utimes(dir, &place.name, time).map_err(failed)?;
    }
    Ok(())
}

pub(crate) fn rm(root: Root<'_>, action: &pb::FileActionRm) -> Result<(), FileError> {
    let paths = match action.allow_wildcard {
        true => wildcard::resolve(root, &action.path)?,
        false => vec![clean(&action.path).into()],
    };
    for path in paths {
        if split(&path).1 == "." {
            return Err(FileError::Text("rm: the root directory can't be removed".into()));
        }
        let place = match root.place(&path, false) {
            Ok(place) => place,
            Err(Errno::NOENT) if action.allow_not_found => continue,
            Err(errno) => return Err(PathError::new("lstat", &path, errno).into()),
        };
        if place.stat.is_none() {
            if action.allow_not_found {
                continue;
            }
            return Err(PathError::new("lstat", &path, Errno::NOENT).into());
        }
        remove_all(place.dir.as_fd(), &place.name)
            .map_err(|errno| PathError::new("unlinkat", &path, errno))?;
    }
    Ok(())
}
