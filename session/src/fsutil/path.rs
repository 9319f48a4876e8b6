//! Paths on the wire: which are allowed, and the order in which they come. Pure.

use std::cmp::Ordering;

use super::TransferError;

/// Compares paths so that a directory's entries follow it before anything else: `/` sorts below every other byte.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let key = |byte: u8| if byte == b'/' { 0 } else { byte };
    a.bytes().map(key).cmp(b.bytes().map(key))
}

/// Refuses anything that is not a clean relative path.
pub(super) fn check(path: &str) -> Result<(), TransferError> {
    let clean = !path.is_empty()
        && path.len() < 4096
        && !path.contains('\0')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if clean { Ok(()) } else { Err(TransferError::Protocol(format!("invalid path {path:?}"))) }
}

/// Parent (empty for the root) and base name.
pub(super) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

/// `name` within `parent`.
pub(super) fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}/{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_sorts_lowest() {
        let mut paths = ["a-b", "a", "b", "a/b", "a/b/c", "a.b"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, ["a", "a/b", "a/b/c", "a-b", "a.b", "b"]);
    }

    #[test]
    fn unclean_paths_are_refused() {
        for path in ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b"] {
            assert!(check(path).is_err(), "{path:?}");
        }
        for path in ["a", "a/b", "..a", "a/...", "a b"] {
            check(path).unwrap();
        }
    }
}
