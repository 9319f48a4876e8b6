//! Sources with `*`, `?` and `[…]`: which paths beneath a root they stand for.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};

use kiln_proto::pattern::{glob_match, has_wildcard};

use super::root::{PathError, Root, clean, open_subdir, read_names};

/// The paths that `pattern` matches, in byte order of their components. A path without wildcards
/// is its own answer, whether it exists or not. Symlinked directories are entered only in the part
/// before the first wildcard.
pub(crate) fn resolve(root: Root<'_>, pattern: &str) -> Result<Vec<String>, PathError> {
    let pattern = clean(pattern);
    let parts: Vec<&str> = pattern.split('/').filter(|part| !part.is_empty()).collect();
    let Some(first) = parts.iter().position(|part| has_wildcard(part)) else {
        return Ok(vec![pattern]);
    };
    let base: String = parts[..first].iter().flat_map(|part| ["/", part]).collect();
    let start = root.open_dir(if base.is_empty() { "/" } else { &base });
    let start = start.map_err(|errno| PathError::new("lstat", &base, errno))?;

    let mut level: VecDeque<(OwnedFd, String)> = VecDeque::from([(start, base)]);
    let mut found = Vec::new();
    for (depth, part) in parts.iter().enumerate().skip(first) {
        let last = depth + 1 == parts.len();
        for _ in 0..level.len() {
            let Some((dir, path)) = level.pop_front() else { break };
            let names = read_names(dir.as_fd()).map_err(|errno| PathError::new("open", &path, errno))?;
            for name in names {
                // Names that are no text can't have been meant by a pattern that is.
                let Some(text) = name.to_str() else { continue };
                // A malformed pattern matches nothing.
                if !glob_match(part, text).unwrap_or(false) {
                    continue;
                }
                let child = format!("{path}/{text}");
                if last {
                    found.push(child);
                } else if let Ok(fd) = open_subdir(dir.as_fd(), OsStr::new(text)) {
                    level.push_back((fd, child));
                }
            }
        }
    }
    Ok(found)
}
