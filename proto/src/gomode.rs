//! File modes as they travel in fsutil's `Stat.mode`: Go's `os.FileMode` bits, which differ from `st_mode`
//! in everything but the nine permission bits. Pure arithmetic; nothing here looks at a file.

/// Directory.
pub const DIR: u32 = 0x8000_0000;
/// Symbolic link.
pub const SYMLINK: u32 = 0x0800_0000;
/// Device; a block device unless [`CHAR_DEVICE`] is set too.
pub const DEVICE: u32 = 0x0400_0000;
/// Named pipe.
pub const NAMED_PIPE: u32 = 0x0200_0000;
/// Socket. Senders clear it: sockets travel as empty regular files.
pub const SOCKET: u32 = 0x0100_0000;
/// Set-user-id.
pub const SETUID: u32 = 0x0080_0000;
/// Set-group-id.
pub const SETGID: u32 = 0x0040_0000;
/// Character device, together with [`DEVICE`].
pub const CHAR_DEVICE: u32 = 0x0020_0000;
/// Sticky bit.
pub const STICKY: u32 = 0x0010_0000;
/// Something that is none of the others.
pub const IRREGULAR: u32 = 0x0008_0000;
/// The bits that tell the type; all zero for a regular file.
pub const TYPE_MASK: u32 = 0x8f28_0000;
/// The permission bits.
pub const PERM_MASK: u32 = 0o777;

const S_IFMT: u32 = 0o170_000;
const S_IFSOCK: u32 = 0o140_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFREG: u32 = 0o100_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFIFO: u32 = 0o010_000;
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;
const S_ISVTX: u32 = 0o1000;

/// Go's mode for a POSIX `st_mode`. An unknown type becomes [`IRREGULAR`].
pub fn from_posix(st_mode: u32) -> u32 {
    let kind = match st_mode & S_IFMT {
        S_IFREG => 0,
        S_IFDIR => DIR,
        S_IFLNK => SYMLINK,
        S_IFBLK => DEVICE,
        S_IFCHR => DEVICE | CHAR_DEVICE,
        S_IFIFO => NAMED_PIPE,
        S_IFSOCK => SOCKET,
        _ => IRREGULAR,
    };
    let flag = |posix: u32, go: u32| if st_mode & posix != 0 { go } else { 0 };
    kind | flag(S_ISUID, SETUID) | flag(S_ISGID, SETGID) | flag(S_ISVTX, STICKY) | (st_mode & PERM_MASK)
}

/// The POSIX `st_mode` (type and twelve mode bits) of a Go mode; `None` if the type bits name no POSIX type.
pub fn to_posix(mode: u32) -> Option<u32> {
    let kind = match mode & TYPE_MASK {
        0 => S_IFREG,
        DIR => S_IFDIR,
        SYMLINK => S_IFLNK,
        DEVICE => S_IFBLK,
        kind if kind == DEVICE | CHAR_DEVICE => S_IFCHR,
        NAMED_PIPE => S_IFIFO,
        SOCKET => S_IFSOCK,
        _ => return None,
    };
    Some(kind | permissions(mode))
}

/// The twelve POSIX mode bits (permissions, setuid, setgid, sticky) of a Go mode, without its type.
pub fn permissions(mode: u32) -> u32 {
    let flag = |go: u32, posix: u32| if mode & go != 0 { posix } else { 0 };
    flag(SETUID, S_ISUID) | flag(SETGID, S_ISGID) | flag(STICKY, S_ISVTX) | (mode & PERM_MASK)
}

/// Whether the mode is a regular file's.
pub fn is_regular(mode: u32) -> bool {
    mode & TYPE_MASK == 0
}

/// Whether the mode is a directory's.
pub fn is_dir(mode: u32) -> bool {
    mode & TYPE_MASK == DIR
}

/// Whether the mode is a symbolic link's.
pub fn is_symlink(mode: u32) -> bool {
    mode & TYPE_MASK == SYMLINK
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn modes_of_the_wire() {
        assert_eq!(from_posix(S_IFDIR | 0o755), 2_147_484_141);
        assert_eq!(from_posix(S_IFLNK | 0o777), 134_218_239);
        assert_eq!(from_posix(S_IFREG | 0o644), 420);
        assert_eq!(from_posix(S_IFBLK | 0o600), DEVICE | 0o600);
        assert_eq!(to_posix(DEVICE | CHAR_DEVICE | 0o600), Some(S_IFCHR | 0o600));
        assert_eq!(to_posix(IRREGULAR), None);
        assert_eq!(to_posix(CHAR_DEVICE), None);
        assert_eq!(to_posix(DIR | SYMLINK), None);
    }

    proptest! {
        #[test]
        fn posix_survives_a_round_trip(
            kind in proptest::sample::select(vec![S_IFREG, S_IFDIR, S_IFLNK, S_IFBLK, S_IFCHR, S_IFIFO, S_IFSOCK]),
            bits in 0u32..0o10000,
        ) {
            prop_assert_eq!(to_posix(from_posix(kind | bits)), Some(kind | bits));
        }
    }
}
