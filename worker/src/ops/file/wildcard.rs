//! Sources with `*`, `?` and `[…]`: which paths beneath a root they stand for.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use kiln_proto::pattern::{glob_match, has_wildcard, text};

use super::root::{PathError, Root, clean, open_subdir, read_names};

/// The paths that `pattern` matches, in byte order of their components. A path without wildcards
/// is its own answer, whether it exists or not. Symlinked directories are entered only in the part
/// before the first wildcard.
pub(crate) fn resolve(root: Root<'_>, pattern: &str) -> Result<Vec<PathBuf>, PathError> {
    let pattern = clean(pattern);
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let Some(first) = parts.iter().position(|part| has_wildcard(part)) else {
        return Ok(vec![pattern.into()]);
    };
    let base: PathBuf = std::iter::once(&"/").chain(&parts[..first]).collect();
    let start = root.open_dir(&base).map_err(|errno| PathError::new("lstat", &base, errno))?;

    let mut level: VecDeque<(OwnedFd, PathBuf)> = VecDeque::from([(start, base)]);
    let mut found = Vec::new();
    for (depth, part) in parts.iter().enumerate().skip(first) {
        let last = depth + 1 == parts.len();
        for _ in 0..level.len() {
            let Some((dir, path)) = level.pop_front() else { break };
            let names = read_names(dir.as_fd()).map_err(|errno| PathError::new("open", &path, errno))?;
            for name in names {
                // A malformed pattern matches nothing.
                if !glob_match(part, &text(name.as_bytes())).unwrap_or(false) {
                    continue;
                }
                let child = path.join(&name);
                if last {
                    found.push(child);
                } else if let Ok(fd) = open_subdir(dir.as_fd(), &name) {
                    level.push_back((fd, child));
                }
            }
        }
    }
    Ok(found)
}
