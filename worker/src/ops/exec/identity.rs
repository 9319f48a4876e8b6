//! Who a step runs as. The user files are usually plain files in one layer, so they are looked for in the layers
//! themselves; only where links or merges of directories get in the way is a view mounted.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_cache::Ref;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::layer::fsutil::is_whiteout;
use crate::ops::file::root::Root;
use crate::ops::users::{self, ProcessUser};
use crate::view::View;
use crate::worker::Layers;

const PASSWD: &str = "etc/passwd";
const GROUP: &str = "etc/group";

/// Resolves the user of a step in the step's root. Blocking.
pub(crate) fn resolve(layers: &Layers, root: &Ref, user: &str) -> Result<ProcessUser, String> {
    let chain = layers.chain(root).map_err(|err| err.to_string())?;
    let mut dirs = Vec::with_capacity(chain.len());
    for layer in chain.iter().rev() {
        let dir = layer.dir();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        dirs.push(
            rustix::fs::open(&dir, flags, Mode::empty())
                .map_err(|err| format!("{}: {err}", dir.display()))?,
        );
    }
    let found = match (peek(&dirs, PASSWD), peek(&dirs, GROUP)) {
        (Peek::Unsure, _) | (_, Peek::Unsure) => None,
        (passwd, group) => Some((passwd.read()?, group.read()?)),
    };
    let (passwd, group) = match found {
        Some(found) => found,
        None => {
            let view = layers.view(root).map_err(|err| err.to_string())?;
            return resolve_in(&view, user);
        }
    };
    // An image may have no user files at all; root needs none.
    users::process_user(&passwd, &group, user)
}

/// Resolves a user in a root that is mounted. Blocking.
pub(super) fn resolve_in(view: &View, user: &str) -> Result<ProcessUser, String> {
    let read = |path: &str| users::read(Root(view.fd()), path).map_err(|err| err.to_string());
    users::process_user(&read(PASSWD)?, &read(GROUP)?, user)
}

enum Peek {
    /// Opened with `O_PATH` only: in a layer's own directory a device would be opened.
    Found(OwnedFd),
    Absent,
    Unsure,
}

impl Peek {
    fn read(self) -> Result<String, String> {
        match self {
            Self::Found(fd) => users::read_found(fd.as_fd()).map_err(|err| err.to_string()),
            Self::Absent | Self::Unsure => Ok(String::new()),
        }
    }
}

/// Looks for a file one directory deep in layers, topmost first.
fn peek(layers: &[OwnedFd], path: &str) -> Peek {
    let (dir, _) = path.split_once('/').unwrap_or((path, ""));
    for layer in layers {
        match open(layer.as_fd(), path, OFlags::PATH) {
            Ok(fd) => {
                return match rustix::fs::fstat(&fd) {
                    Ok(stat) if is_whiteout(&stat) => Peek::Absent,
                    Ok(_) => Peek::Found(fd),
                    Err(_) => Peek::Unsure,
                };
            }
            Err(Errno::NOENT) => {}
            Err(_) => return Peek::Unsure,
        }
        match open(layer.as_fd(), dir, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(fd) if crate::flat::is_opaque(fd.as_fd()) => return Peek::Absent,
            Ok(_) | Err(Errno::NOENT) => {}
            Err(_) => return Peek::Unsure,
        }
    }
    Peek::Absent
}

fn open(layer: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(layer, OsStr::new(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}
