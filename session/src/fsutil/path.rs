//! Paths on the wire: which are allowed, and the order in which they come. Pure. A path is bytes, as file systems have it.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use super::TransferError;

/// Compares paths so that a directory's entries follow it before anything else: `/` sorts below every other byte.
pub(super) fn compare(a: &[u8], b: &[u8]) -> Ordering {
    let key = |byte: &u8| if *byte == b'/' { 0 } else { *byte };
    a.iter().map(key).cmp(b.iter().map(key))
}

/// Refuses anything that is not a clean relative path.
pub(super) fn check(path: &[u8]) -> Result<(), TransferError> {
    let clean = !path.is_empty()
        && path.len() < 4096
        && !path.contains(&0)
        && path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."));
    if clean { Ok(()) } else { Err(TransferError::Protocol(format!("invalid path {:?}", quoted(path)))) }
}

/// Parent (empty for the root) and base name.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// `name` within `parent`.
pub(super) fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// For messages: its debug form is quoted.
pub(super) fn quoted(path: &[u8]) -> &OsStr {
    OsStr::from_bytes(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_sorts_lowest() {
        let mut paths: [&[u8]; 7] = [b"a-b", b"a\xff", b"a", b"b", b"a/b", b"a/b/c", b"a.b"];
        paths.sort_by(|a, b| compare(a, b));
        assert_eq!(paths, [&b"a"[..], b"a/b", b"a/b/c", b"a-b", b"a.b", b"a\xff", b"b"]);
    }

    #[test]
    fn unclean_paths_are_refused() {
        for path in ["", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\0b"] {
            assert!(check(path.as_bytes()).is_err(), "{path:?}");
        }
        for path in [&b"a"[..], b"a/b", b"..a", b"a/...", b"a b", b"\xff/\xfe"] {
            check(path).unwrap();
        }
    }

    #[test]
    fn a_path_has_a_parent_and_a_name() {
        for (path, parts) in [("a", ("", "a")), ("a/b", ("a", "b")), ("a/b/c", ("a/b", "c"))] {
            let parts = (parts.0.as_bytes(), parts.1.as_bytes());
            assert_eq!(split(path.as_bytes()), parts);
            assert_eq!(join(parts.0, parts.1), path.as_bytes());
        }
    }
}
