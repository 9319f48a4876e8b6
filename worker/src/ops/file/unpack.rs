//! `ADD` of an archive: recognises a tar, compressed or not, and extracts it onto a directory.
//!
//! An archive is a foreign file: each entry is resolved beneath the destination as if that were the
//! root directory, and nothing outside can be named by it. Whiteout names have no meaning here.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, XattrFlags};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use super::actions::FileError;
use super::root::{
    NewDir, Owner, PathError, Root, chmod, chown, clean, clean_path, lstat, remove_all, split, utimes,
};
use crate::layer::{CopyError, Entry, Kind, LayerError, TarReader, is_archive, is_overlay_xattr};

/// Directories that an archive implies without listing them.
const IMPLIED_DIR: NewDir = NewDir { mode: 0o755, owner: None, time: None };

/// Extracts `source` onto `dest` if it is an archive; false if it is anything else.
pub(crate) fn unpack(
    src: Root<'_>,
    source: &Path,
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
    if !decompress(&mut file).is_ok_and(is_archive) {
        return Ok(false);
    }
    let dest = clean(dest);
    let new = NewDir { mode: 0o755, owner, time };
    let (root, _) = dst.ensure_dir(&dest, &new).map_err(|errno| PathError::new("mkdir", &dest, errno))?;
    let mut extraction = Extraction { root: Root(root.as_fd()), owner, source, dirs: BTreeMap::new() };
    let reader = file.rewind().and_then(|()| decompress(file)).map_err(|err| extraction.text(err))?;
    let mut archive = TarReader::new(reader);
    while let Some(entry) = archive.next_entry().map_err(|err| extraction.broken(err))? {
        if cancel.is_cancelled() {
            return Err(FileError::Cancelled);
        }
        extraction.entry(&mut archive, &entry)?;
    }
    extraction.finish()?;
    Ok(true)
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
    source: &'a Path,
    /// Directories by path: which one the archive meant, and the time it gets when its content is complete.
    dirs: BTreeMap<PathBuf, (Identity, Timespec)>,
}

/// Device and inode.
type Identity = (u64, u64);

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

impl Extraction<'_> {
    fn entry<R: Read>(&mut self, archive: &mut TarReader<R>, entry: &Entry) -> Result<(), FileError> {
        let path = clean_path(Path::new(OsStr::from_bytes(&entry.path)));
        let (parent, name) = split(&path);
        if name == "." {
            return Ok(());
        }
        let failed = |call: &'static str| {
            let path = path.clone();
            move |errno: Errno| FileError::from(PathError::new(call, &path, errno))
        };
        let (dir, _) = self.root.ensure_dir(parent, &IMPLIED_DIR).map_err(failed("mkdir"))?;
        let there = lstat(dir.as_fd(), name).map_err(failed("lstat"))?;
        let there_dir =
            there.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory);
        if there.is_some() && !(there_dir && entry.kind == Kind::Dir) {
            remove_all(dir.as_fd(), name).map_err(failed("remove"))?;
        }
        let mode = Mode::from_raw_mode(0o600);
        match entry.kind {
            Kind::Dir if there_dir => {}
            Kind::Dir => {
                rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o700)).map_err(failed("mkdir"))?;
            }
            Kind::Regular => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = File::from(rustix::fs::openat(&dir, name, flags, mode).map_err(failed("open"))?);
                archive.copy_to(&file).map_err(|err| match err {
                    CopyError::Read(err) => self.broken(err),
                    CopyError::Write(err) => self.text(format!("{}: {err}", path.display())),
                })?;
            }
            Kind::Symlink => {
                rustix::fs::symlinkat(OsStr::from_bytes(&entry.link), &dir, name)
                    .map_err(failed("symlink"))?;
            }
            Kind::HardLink => {
                let target = OsStr::from_bytes(&entry.link);
                let target = self.root.place(target, false).map_err(failed("link"))?;
                rustix::fs::linkat(&target.dir, &target.name, &dir, name, AtFlags::empty())
                    .map_err(failed("link"))?;
                // The first name carries the metadata.
                return Ok(());
            }
            Kind::Char | Kind::Block | Kind::Fifo => {
                let kind = match entry.kind {
                    Kind::Char => FileType::CharacterDevice,
                    Kind::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = rustix::fs::makedev(entry.device.0, entry.device.1);
                rustix::fs::mknodat(&dir, name, kind, mode, device).map_err(failed("mknod"))?;
            }
        }
        let time = Timespec { tv_sec: entry.mtime, tv_nsec: entry.mtime_nanos.into() };
        self.apply(dir.as_fd(), name, entry, time).map_err(failed("chmod"))?;
        if entry.kind == Kind::Dir
            && let Some(stat) = lstat(dir.as_fd(), name).map_err(failed("lstat"))?
        {
            self.dirs.insert(path, (identity(&stat), time));
        }
        Ok(())
    }

    /// What the entry says about the thing that was made of it.
    fn apply(&self, dir: BorrowedFd<'_>, name: &OsStr, entry: &Entry, time: Timespec) -> Result<(), Errno> {
        chown(dir, name, self.owner.unwrap_or(Owner { uid: entry.uid, gid: entry.gid }))?;
        if matches!(entry.kind, Kind::Regular | Kind::Dir) {
            let fd = super::root::open_child(dir, name, OFlags::RDONLY)?;
            for (key, value) in entry.xattrs.iter().filter(|(key, _)| !is_overlay_xattr(key)) {
                // A file system that lacks a namespace or label loses it, as with any `tar -x`.
                let _ = rustix::fs::fsetxattr(&fd, OsStr::from_bytes(key), value, XattrFlags::empty());
            }
        }
        if entry.kind != Kind::Symlink {
            chmod(dir, name, entry.mode)?;
        }
        utimes(dir, name, time)
    }

    fn finish(&mut self) -> Result<(), FileError> {
        for (path, (made, time)) in &self.dirs {
            match self.root.place(path, false) {
                Ok(place) if place.stat.is_some_and(|stat| identity(&stat) == *made) => {
                    utimes(place.dir.as_fd(), &place.name, *time)
                        .map_err(|errno| PathError::new("utimes", path, errno))?;
                }
                // A later entry took its place, or that of a directory on the way.
                Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(errno) => return Err(PathError::new("utimes", path, errno).into()),
            }
        }
        Ok(())
    }

    fn broken(&self, error: LayerError) -> FileError {
        match error {
            LayerError::Archive(text) => self.text(text),
            LayerError::Read(err) => self.text(err),
            other => self.text(other),
        }
    }

    fn text(&self, message: impl std::fmt::Display) -> FileError {
        FileError::Text(format!("failed to unpack {}: {message}", self.source.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    struct Member<'a> {
        path: &'a [u8],
        kind: tar::EntryType,
        link: &'a [u8],
        data: &'a [u8],
        mtime: u64,
    }

    impl<'a> Member<'a> {
        fn new(path: &'a (impl AsRef<[u8]> + ?Sized), kind: tar::EntryType) -> Self {
            Self { path: path.as_ref(), kind, link: b"", data: b"", mtime: 1000 }
        }

        fn file(path: &'a (impl AsRef<[u8]> + ?Sized), data: &'a [u8]) -> Self {
            Self { data, ..Self::new(path, tar::EntryType::Regular) }
        }
    }

    fn owner() -> Option<Owner> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Some(Owner { uid, gid })
    }

    fn archive(members: &[Member<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for member in members {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(member.kind);
            header.set_mode(0o755);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(member.mtime);
            header.set_size(member.data.len() as u64);
            let old = header.as_old_mut();
            old.name[..member.path.len()].copy_from_slice(member.path);
            old.linkname[..member.link.len()].copy_from_slice(member.link);
            header.set_cksum();
            builder.append(&header, member.data).expect("append");
        }
        builder.into_inner().expect("archive")
    }

    /// Puts right what a change to a header made wrong.
    fn correct(block: &mut [u8]) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    fn add(bytes: &[u8], dst: &Path) -> Result<bool, FileError> {
        let src = TempDir::new().expect("temp");
        std::fs::write(src.path().join("a"), bytes).expect("write");
        let open = |path: &Path| rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty());
        let (src, dst) = (open(src.path()).expect("src"), open(dst).expect("dst"));
        let cancel = CancellationToken::new();
        unpack(Root(src.as_fd()), Path::new("/a"), Root(dst.as_fd()), "/", owner(), None, &cancel)
    }

    #[test]
    fn pax_records_are_read_by_their_length() {
        let inner = archive(&[Member::file("smuggled", b"x")]);
        // A reader that splits at newlines loses the size, and takes the data for headers.
        let mut pax = b"30 SCHILY.xattr.user.a=\n\n9 b=\n".to_vec();
        assert_eq!(pax.len(), 30);
        pax.extend_from_slice(format!("13 size={}\n", inner.len()).as_bytes());
        assert_eq!(pax.len(), 43);
        let mut bytes = archive(&[
            Member { data: &pax, ..Member::new("pax", tar::EntryType::XHeader) },
            Member::file("outer", &inner),
            Member::file("last", b"l"),
        ]);
        bytes[1024 + 124..1024 + 135].copy_from_slice(b"00000000000");
        correct(&mut bytes[1024..1536]);
        let dst = TempDir::new().expect("temp");
        assert!(add(&bytes, dst.path()).expect("unpack"));
        assert_eq!(std::fs::read(dst.path().join("outer")).expect("outer"), inner);
        assert_eq!(std::fs::read(dst.path().join("last")).expect("last"), b"l");
        assert!(!dst.path().join("smuggled").exists());
    }

    #[test]
    fn sparse_files_of_every_form_keep_their_holes() {
        let dir = TempDir::new().expect("temp");
        let script = "dd if=/dev/zero of=s bs=1 count=0 seek=4M; printf middle | dd of=s bs=1 seek=2M conv=notrunc; printf end | dd of=s bs=1 seek=4000000 conv=notrunc";
        let made = Command::new("sh").arg("-ec").arg(script).current_dir(dir.path()).output().expect("sh");
        assert!(made.status.success(), "{made:?}");
        let content = std::fs::read(dir.path().join("s")).expect("read");
        let forms: [&[&str]; 4] = [
            &["--format=gnu"],
            &["--format=posix", "--sparse-version=0.0"],
            &["--format=posix", "--sparse-version=0.1"],
            &["--format=posix", "--sparse-version=1.0"],
        ];
        for form in forms {
            let mut tar = Command::new("tar");
            let tar = tar.args(form).args(["--sparse", "-cf", "-", "s"]).current_dir(dir.path());
            let bytes = tar.output().expect("tar").stdout;
            assert!(bytes.len() < 1 << 20, "{form:?}: sparse");
            let dst = TempDir::new().expect("temp");
            assert!(add(&bytes, dst.path()).expect("unpack"));
            let out = dst.path().join("s");
            assert!(std::fs::read(&out).expect("read") == content, "{form:?}");
            assert!(out.metadata().expect("stat").blocks() < 2048, "{form:?}: holes");
        }
    }

    #[test]
    fn a_time_goes_to_the_directory_that_was_meant() {
        use tar::EntryType::{Directory, Symlink};
        let bytes = archive(&[
            Member { mtime: 1, ..Member::new("a/", Directory) },
            Member { mtime: 2, ..Member::new("a/b/", Directory) },
            Member::file("a/b/f", b"f"),
            Member { mtime: 3, ..Member::new("c/", Directory) },
            Member { mtime: 4, ..Member::new("c/d/", Directory) },
            Member { mtime: 5, ..Member::new("l/", Directory) },
            Member { mtime: 6, ..Member::new("l/d/", Directory) },
            Member { link: b"c", ..Member::new("l", Symlink) },
            Member::file("c/d/f", b"f"),
        ]);
        let dst = TempDir::new().expect("temp");
        assert!(add(&bytes, dst.path()).expect("unpack"));
        let time = |path: &str| dst.path().join(path).metadata().expect(path).mtime();
        assert_eq!(["a", "a/b", "c", "c/d"].map(time), [1, 2, 3, 4]);
    }

    #[test]
    fn names_need_not_be_text() {
        use tar::EntryType::{Directory, Link, Symlink};
        let bytes = archive(&[
            Member { mtime: 7, ..Member::new(b"d\xfe/", Directory) },
            Member::file(b"d\xfe/\xff", b"f"),
            Member { link: b"d\xfe/\xff", ..Member::new(b"hard\xe9", Link) },
            Member { link: b"t\xff", ..Member::new("link", Symlink) },
        ]);
        let dst = TempDir::new().expect("temp");
        assert!(add(&bytes, dst.path()).expect("unpack"));
        let at = |name: &'static [u8]| dst.path().join(OsStr::from_bytes(name));
        let inode = |name| at(name).metadata().expect("stat").ino();
        assert_eq!(inode(b"d\xfe/\xff"), inode(b"hard\xe9"));
        assert_eq!(at(b"d\xfe").metadata().expect("stat").mtime(), 7);
        assert_eq!(at(b"link").read_link().expect("link"), Path::new(OsStr::from_bytes(b"t\xff")));
    }

    #[test]
    fn many_directories_need_few_descriptors() {
        const CHILD: &str = "KILN_TEST_FEW_DESCRIPTORS";
        if std::env::var_os(CHILD).is_none() {
            let name = "ops::file::unpack::tests::many_directories_need_few_descriptors";
            let mut child = Command::new("sh");
            child
                .args(["-c", "ulimit -n 64 && exec \"$0\" \"$@\""])
                .arg(std::env::current_exe().expect("exe"));
            let output = child.args(["--exact", name]).env(CHILD, "1").output().expect("child");
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("1 passed"), "{text}");
            return;
        }
        let names: Vec<String> = (0..200).map(|n| format!("d{n}/")).collect();
        let members: Vec<_> = names.iter().map(|n| Member::new(n, tar::EntryType::Directory)).collect();
        let dst = TempDir::new().expect("temp");
        assert!(add(&archive(&members), dst.path()).expect("unpack"));
        assert_eq!(std::fs::read_dir(dst.path()).expect("list").count(), 200);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

        #[test]
        fn damage_never_escapes_or_panics(
            changes in proptest::collection::vec((0usize..4096, any::<u8>()), 0..8),
            squeeze: bool,
        ) {
            use tar::EntryType::{Directory, Link, Symlink, XHeader};
            let mut bytes = archive(&[
                Member { data: b"21 GNU.sparse.size=9\n", ..Member::new("pax", XHeader) },
                Member::file("f", b"data"),
                Member::new("d/", Directory),
                Member { link: b"../..", ..Member::new("d/l", Symlink) },
                Member { link: b"f", ..Member::new("d/l/h", Link) },
            ]);
            for (at, value) in changes {
                bytes[at] = value;
                let block = at / 512 * 512;
                // Damage behind a checksum that is wrong would never be looked at.
                if block != 512 && block != 1536 {
                    correct(&mut bytes[block..block + 512]);
                }
            }
            if squeeze {
                bytes = zstd::encode_all(&bytes[..], 1).expect("zstd");
            }
            let world = TempDir::new().expect("temp");
            let dst = world.path().join("dst");
            std::fs::create_dir(&dst).expect("mkdir");
            let _ = add(&bytes, &dst);
            prop_assert_eq!(std::fs::read_dir(world.path()).expect("list").count(), 1);
        }

        #[test]
        fn any_bytes_are_a_file_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..3000), magic in 0usize..5) {
            let magics: [&[u8]; 5] = [b"", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"];
            let dst = TempDir::new().expect("temp");
            let _ = add(&[magics[magic], &bytes].concat(), dst.path());
        }
    }
}
