//! The actions on real directories: what BuildKit's documents promise, and what hostile paths must not do.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kiln_proto::pb;
use rustix::fs::{Mode, OFlags};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::actions::{self, FileError};
use super::root::{Owner, Root};
use super::{copy, wildcard};

struct Dirs {
    src: TempDir,
    dst: TempDir,
}

fn dirs() -> Dirs {
    Dirs { src: TempDir::new().expect("temp"), dst: TempDir::new().expect("temp") }
}

fn with<T>(path: &Path, act: impl FnOnce(Root<'_>) -> T) -> T {
    let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("open root");
    act(Root(fd.as_fd()))
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root to set owners");
    }
    root
}

fn write(root: &Path, path: &str, text: &str) -> PathBuf {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().expect("parent")).expect("mkdir");
    std::fs::write(&path, text).expect("write");
    path
}

fn read(root: &Path, path: &str) -> String {
    std::fs::read_to_string(root.join(path)).unwrap_or_else(|err| panic!("{path}: {err}"))
}

/// As the Dockerfile frontend sends a COPY.
fn action(src: &str, dest: &str) -> pb::FileActionCopy {
    pb::FileActionCopy {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        timestamp: -1,
        follow_symlink: true,
        dir_copy_contents: true,
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..Default::default()
    }
}

impl Dirs {
    fn copy(&self, action: &pb::FileActionCopy) -> Result<(), FileError> {
        self.copy_as(action, None)
    }

    fn copy_as(&self, action: &pb::FileActionCopy, owner: Option<Owner>) -> Result<(), FileError> {
        with(self.src.path(), |src| {
            with(self.dst.path(), |dst| {
                copy::copy(src, dst, action, owner, copy::Origin::default(), &CancellationToken::new())
            })
        })
    }

    fn src(&self) -> &Path {
        self.src.path()
    }

    fn dst(&self) -> &Path {
        self.dst.path()
    }
}

#[test]
fn a_file_goes_to_a_name_or_into_a_directory() {
    let dirs = dirs();
    write(dirs.src(), "a.txt", "A");
    dirs.copy(&action("/a.txt", "/new/name")).expect("to a name");
    assert_eq!(read(dirs.dst(), "new/name"), "A");
    dirs.copy(&action("/a.txt", "/other/")).expect("into a new directory");
    assert_eq!(read(dirs.dst(), "other/a.txt"), "A");
    dirs.copy(&action("/a.txt", "/new")).expect("into an existing directory");
    assert_eq!(read(dirs.dst(), "new/a.txt"), "A");
    dirs.copy(&action("a.txt", "/")).expect("into the root");
    assert_eq!(read(dirs.dst(), "a.txt"), "A");
}

#[test]
fn a_directory_is_copied_by_content_or_as_itself() {
    let dirs = dirs();
    write(dirs.src(), "d/e/f", "F");
    dirs.copy(&action("/d", "/x")).expect("content");
    assert_eq!(read(dirs.dst(), "x/e/f"), "F");
    let whole = pb::FileActionCopy { dir_copy_contents: false, ..action("/d", "/x") };
    dirs.copy(&whole).expect("into existing");
    assert_eq!(read(dirs.dst(), "x/d/e/f"), "F");
    let whole = pb::FileActionCopy { dir_copy_contents: false, ..action("/d", "/y") };
    dirs.copy(&whole).expect("as a new name");
    assert_eq!(read(dirs.dst(), "y/e/f"), "F");
}

#[test]
fn metadata_comes_along() {
    let dirs = dirs();
    let file = write(dirs.src(), "d/f", "F");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o4751)).expect("chmod");
    std::fs::set_permissions(dirs.src().join("d"), std::fs::Permissions::from_mode(0o700)).expect("chmod");
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    std::fs::File::open(&file).and_then(|file| file.set_modified(time)).expect("mtime");
    symlink("../nowhere", dirs.src().join("d/l")).expect("symlink");
    std::fs::hard_link(&file, dirs.src().join("d/same")).expect("link");
    dirs.copy(&action("/", "/out")).expect("copy");
    let copied = dirs.dst().join("out/d/f").metadata().expect("copied");
    assert_eq!(copied.mode() & 0o7777, 0o4751);
    assert_eq!(copied.modified().expect("mtime"), time);
    assert_eq!(copied.nlink(), 2);
    assert_eq!(copied.ino(), dirs.dst().join("out/d/same").metadata().expect("same").ino());
    assert_eq!(dirs.dst().join("out/d").metadata().expect("dir").mode() & 0o7777, 0o700);
    assert_eq!(std::fs::read_link(dirs.dst().join("out/d/l")).expect("link"), Path::new("../nowhere"));
}

#[test]
fn owner_mode_and_time_can_be_set() {
    if !is_root() {
        return;
    }
    let dirs = dirs();
    write(dirs.src(), "d/f", "F");
    let action = pb::FileActionCopy { mode: 0o750, timestamp: 5_000_000_001, ..action("/d", "/p/q") };
    dirs.copy_as(&action, Some(Owner { uid: 12, gid: 34 })).expect("copy");
    for (path, mode) in [("p", 0o750), ("p/q", 0o750), ("p/q/f", 0o750)] {
        let stat = dirs.dst().join(path).metadata().expect(path);
        assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (12, 34, mode), "{path}");
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (5, 1), "{path}");
    }
    let symbolic = pb::FileActionCopy { mode_str: "u=rwX,go=".into(), ..self::action("/d", "/s") };
    dirs.copy(&symbolic).expect("symbolic");
    assert_eq!(dirs.dst().join("s/f").metadata().expect("f").mode() & 0o7777, 0o600);
}

#[test]
fn an_existing_top_directory_keeps_its_metadata() {
    let dirs = dirs();
    write(dirs.src(), "d/sub/f", "F");
    std::fs::set_permissions(dirs.src().join("d"), std::fs::Permissions::from_mode(0o700)).expect("chmod");
    std::fs::set_permissions(dirs.src().join("d/sub"), std::fs::Permissions::from_mode(0o700))
        .expect("chmod");
    write(dirs.dst(), "t/sub/old", "O");
    std::fs::set_permissions(dirs.dst().join("t"), std::fs::Permissions::from_mode(0o711)).expect("chmod");
    dirs.copy(&action("/d", "/t")).expect("copy");
    let mode = |path: &str| dirs.dst().join(path).metadata().expect("stat").mode() & 0o7777;
    assert_eq!((mode("t"), mode("t/sub")), (0o711, 0o700));
    assert_eq!(read(dirs.dst(), "t/sub/old"), "O");
}

#[test]
fn patterns_choose_and_make_only_needed_parents() {
    let dirs = dirs();
    for path in ["a/x.go", "a/y.txt", "b/c/z.go", "b/skip/w.go", "empty/n.txt"] {
        write(dirs.src(), path, path);
    }
    let include = pb::FileActionCopy {
        include_patterns: vec!["**/*.go".into()],
        exclude_patterns: vec!["b/skip".into()],
        ..action("/", "/out")
    };
    dirs.copy(&include).expect("copy");
    assert_eq!(read(dirs.dst(), "out/a/x.go"), "a/x.go");
    assert_eq!(read(dirs.dst(), "out/b/c/z.go"), "b/c/z.go");
    for path in ["out/a/y.txt", "out/b/skip", "out/empty"] {
        assert!(!dirs.dst().join(path).exists(), "{path}");
    }
    let except =
        pb::FileActionCopy { exclude_patterns: vec!["b".into(), "!b/c/z.go".into()], ..action("/", "/ex") };
    dirs.copy(&except).expect("copy");
    assert_eq!(read(dirs.dst(), "ex/b/c/z.go"), "b/c/z.go");
    assert!(!dirs.dst().join("ex/b/skip").exists());
    let required = |path: &str| pb::FileActionCopy { required_paths: vec![path.into()], ..include.clone() };
    assert!(dirs.copy(&required("/nope.go")).unwrap_err().to_string().contains("nope.go"));
    assert!(dirs.copy(&required("/b/skip/w.go")).unwrap_err().to_string().contains("w.go"));
    for path in ["/a/x.go", "/b/c", "b/c/z.go"] {
        dirs.copy(&required(path)).expect(path);
    }
    let below = pb::FileActionCopy { src: "/b".into(), ..required("/b/c/z.go") };
    dirs.copy(&below).expect("what is required is named from the root");
}

#[test]
fn wildcards_expand_in_order_or_say_that_nothing_matches() {
    let dirs = dirs();
    for path in ["d/b.txt", "d/a.txt", "d/c.md", "e/a.txt"] {
        write(dirs.src(), path, path);
    }
    let found = with(dirs.src(), |root| wildcard::resolve(root, "/*/[ab].txt")).expect("resolve");
    assert_eq!(found, ["/d/a.txt", "/d/b.txt", "/e/a.txt"].map(PathBuf::from));
    dirs.copy(&action("/d/*.txt", "/out/")).expect("copy");
    assert!(dirs.dst().join("out/a.txt").exists() && !dirs.dst().join("out/c.md").exists());
    dirs.copy(&action("/d/*.none", "/none/")).expect("empty is allowed");
    let strict = pb::FileActionCopy { allow_empty_wildcard: false, ..action("/d/*.none", "/none/") };
    assert_eq!(dirs.copy(&strict).unwrap_err().to_string(), "/d/*.none not found");
}

#[test]
fn errors_are_worded_as_clients_expect() {
    let dirs = dirs();
    write(dirs.src(), "f", "F");
    assert_eq!(
        dirs.copy(&action("/zzz", "/x")).unwrap_err().to_string(),
        "lstat /zzz: no such file or directory"
    );
    let strict = pb::FileActionCopy { create_dest_path: false, ..action("/f", "/no/such/f") };
    assert!(dirs.copy(&strict).unwrap_err().to_string().starts_with("failed to stat /no/such/f: "));
    write(dirs.dst(), "file", "x");
    write(dirs.dst(), "dir/inner", "x");
    write(dirs.src(), "d/file/inner", "x");
    write(dirs.src(), "e/dir", "x");
    assert!(
        dirs.copy(&action("/d", "/")).unwrap_err().to_string().contains("cannot copy to non-directory: ")
    );
    assert!(dirs.copy(&action("/e", "/")).unwrap_err().to_string().contains("cannot replace to directory "));
    let replace =
        |src: &str| pb::FileActionCopy { always_replace_existing_dest_paths: true, ..action(src, "/") };
    dirs.copy(&replace("/d")).expect("directory over file");
    dirs.copy(&replace("/e")).expect("file over directory");
    assert!(dirs.dst().join("file").is_dir() && dirs.dst().join("dir").is_file());
}

#[test]
fn symlinks_cannot_lead_out() {
    let outside = TempDir::new().expect("temp");
    write(outside.path(), "secret", "S");
    let dirs = dirs();
    symlink(outside.path(), dirs.src().join("leak")).expect("symlink");
    symlink(outside.path().join("secret"), dirs.src().join("file")).expect("symlink");
    assert!(dirs.copy(&action("/leak/secret", "/x")).is_err());
    assert!(dirs.copy(&action("/file", "/x")).is_err());
    symlink(outside.path(), dirs.dst().join("out")).expect("symlink");
    symlink("../../../../../../../../escape", dirs.dst().join("up")).expect("symlink");
    write(dirs.src(), "f", "F");
    dirs.copy(&action("/f", "/out/f")).expect("stays inside");
    dirs.copy(&action("/f", "/up/f")).expect("stays inside");
    assert!(!outside.path().join("f").exists());
    let inside = dirs.dst().join(outside.path().strip_prefix("/").expect("absolute"));
    assert_eq!(read(&inside, "f"), "F");
    assert_eq!(read(dirs.dst(), "escape/f"), "F");
    dirs.copy(&action("../../f", "/../../g")).expect("dots end at the root");
    assert_eq!(read(dirs.dst(), "g"), "F");
}

#[test]
fn mkdir_makes_what_is_missing_and_leaves_what_is_there() {
    let dirs = dirs();
    let mkdir = |path: &str, make_parents, mode| {
        let action =
            pb::FileActionMkDir { path: path.into(), mode, make_parents, timestamp: -1, owner: None };
        with(dirs.dst(), |root| actions::mkdir(root, &action, None))
    };
    assert_eq!(
        mkdir("/a/b/c", false, 0o755).unwrap_err().to_string(),
        "mkdir /a/b/c: no such file or directory"
    );
    mkdir("/a/b/c", true, 0o777).expect("parents");
    assert_eq!(dirs.dst().join("a/b").metadata().expect("b").mode() & 0o7777, 0o777);
    mkdir("/a/b", false, 0o700).expect("existing");
    assert_eq!(dirs.dst().join("a/b").metadata().expect("b").mode() & 0o7777, 0o777);
    symlink("gone/deep", dirs.dst().join("l")).expect("symlink");
    mkdir("/l/x", true, 0o755).expect("through a dangling link");
    assert!(dirs.dst().join("gone/deep/x").is_dir());
    write(dirs.dst(), "file", "x");
    assert_eq!(mkdir("/file/x", true, 0o755).unwrap_err().to_string(), "mkdir /file/x: not a directory");
    symlink("loop2", dirs.dst().join("loop1")).expect("symlink");
    symlink("loop1", dirs.dst().join("loop2")).expect("symlink");
    assert!(mkdir("/loop1/x", true, 0o755).is_err());
}

#[test]
fn mkfile_overwrites_content_and_keeps_the_mode() {
    let dirs = dirs();
    let mkfile = |path: &str, data: &[u8], mode| {
        let action =
            pb::FileActionMkFile { path: path.into(), mode, data: data.into(), owner: None, timestamp: 7 };
        with(dirs.dst(), |root| actions::mkfile(root, &action, None))
    };
    mkfile("/f", b"long content", 0o666).expect("new");
    assert_eq!(dirs.dst().join("f").metadata().expect("f").mode() & 0o7777, 0o666);
    mkfile("/f", b"short", 0o600).expect("again");
    assert_eq!(read(dirs.dst(), "f"), "short");
    let stat = dirs.dst().join("f").metadata().expect("f");
    assert_eq!((stat.mode() & 0o7777, stat.mtime(), stat.mtime_nsec()), (0o666, 0, 7));
    assert_eq!(mkfile("/no/f", b"", 0o600).unwrap_err().to_string(), "open /no/f: no such file or directory");
    symlink("/target", dirs.dst().join("l")).expect("symlink");
    mkfile("/l", b"T", 0o640).expect("through a dangling link");
    assert_eq!(read(dirs.dst(), "target"), "T");
    assert_eq!(dirs.dst().join("target").metadata().expect("target").mode() & 0o7777, 0o640);
}

#[test]
fn rm_and_symlink() {
    let dirs = dirs();
    let rm = |path: &str, allow_not_found, allow_wildcard| {
        let action = pb::FileActionRm { path: path.into(), allow_not_found, allow_wildcard };
        with(dirs.dst(), |root| actions::rm(root, &action))
    };
    write(dirs.dst(), "d/e/f", "F");
    write(dirs.dst(), "keep", "K");
    symlink("keep", dirs.dst().join("link")).expect("symlink");
    assert_eq!(rm("/zzz", false, false).unwrap_err().to_string(), "lstat /zzz: no such file or directory");
    rm("/zzz", true, false).expect("allowed");
    rm("/no/such", true, false).expect("allowed below nothing");
    rm("/x*", false, true).expect("no match");
    rm("/link", false, false).expect("the link, not its target");
    rm("/d", false, false).expect("recursive");
    assert!(dirs.dst().join("keep").exists() && !dirs.dst().join("d").exists());
    assert!(rm("/", false, false).is_err());
    let link =
        pb::FileActionSymlink { oldpath: "keep".into(), newpath: "/l".into(), owner: None, timestamp: -1 };
    with(dirs.dst(), |root| actions::symlink(root, &link, None)).expect("new");
    assert_eq!(read(dirs.dst(), "l"), "K");
}

fn tar(entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, kind, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(5);
        header.set_gid(6);
        header.set_mtime(1_000);
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        let data: &[u8] = match kind {
            tar::EntryType::Symlink | tar::EntryType::Link => {
                header.set_link_name(content).expect("link name");
                b""
            }
            _ => content.as_bytes(),
        };
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data).expect("append");
    }
    builder.into_inner().expect("tar")
}

#[test]
fn archives_are_unpacked_whatever_their_compression() {
    use std::io::Write;
    if !is_root() {
        return;
    }
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let plain =
        tar(&[("d/", Directory, ""), ("d/f", Regular, "F"), ("d/l", Symlink, "f"), ("h", Link, "d/f")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain).expect("gzip");
    let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
    bzip2.write_all(&plain).expect("bzip2");
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&plain).expect("xz");
    let archives = [
        ("plain", plain.clone()),
        ("gzip", gzip.finish().expect("gzip")),
        ("bzip2", bzip2.finish().expect("bzip2")),
        ("xz", xz.finish().expect("xz")),
        ("zstd", zstd::encode_all(&plain[..], 1).expect("zstd")),
    ];
    for (name, bytes) in archives {
        let dirs = dirs();
        std::fs::write(dirs.src().join("a"), bytes).expect("write");
        let add = pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..action("/a", "/x") };
        dirs.copy(&add).expect(name);
        assert_eq!(read(dirs.dst(), "x/d/l"), "F", "{name}");
        let stat = dirs.dst().join("x/h").metadata().expect("h");
        assert_eq!((stat.nlink(), stat.uid(), stat.gid(), stat.mode() & 0o7777), (2, 5, 6, 0o640), "{name}");
        assert_eq!(dirs.dst().join("x/d").metadata().expect("d").mtime(), 1_000, "{name}");
    }
    let dirs = dirs();
    write(dirs.src(), "text", "no archive");
    let add = pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..action("/text", "/x") };
    dirs.copy(&add).expect("copied as it is");
    assert_eq!(read(dirs.dst(), "x"), "no archive");
}

#[test]
fn hostile_archives_stay_inside() {
    use tar::EntryType::{Link, Regular, Symlink};
    if !is_root() {
        return;
    }
    let outside = TempDir::new().expect("temp");
    write(outside.path(), "victim", "V");
    let target = outside.path().to_str().expect("utf-8");
    let victim = format!("{target}/victim");
    let archive = tar(&[
        ("../../up", Regular, "U"),
        ("esc", Symlink, target),
        ("esc/victim", Regular, "overwritten"),
        ("dots", Symlink, "../../../../../.."),
        ("dots/etc-kiln-test", Regular, "D"),
    ]);
    let dirs = dirs();
    std::fs::write(dirs.src().join("a.tar"), archive).expect("write");
    let add = pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..action("/a.tar", "/x") };
    dirs.copy(&add).expect("unpack");
    assert_eq!(read(outside.path(), "victim"), "V");
    assert_eq!(read(dirs.dst(), "x/up"), "U");
    assert_eq!(read(dirs.dst(), "x/etc-kiln-test"), "D");
    std::fs::write(dirs.src().join("b.tar"), tar(&[("h", Link, &victim)])).expect("write");
    let add = pb::FileActionCopy { attempt_unpack_docker_compatibility: true, ..action("/b.tar", "/y") };
    assert!(dirs.copy(&add).unwrap_err().to_string().contains("no such file or directory"));
}

#[test]
fn a_cancelled_copy_ends() {
    let dirs = dirs();
    write(dirs.src(), "d/f", "F");
    let cancel = CancellationToken::new();
    cancel.cancel();
    let result = with(dirs.src(), |src| {
        with(dirs.dst(), |dst| {
            copy::copy(src, dst, &action("/d", "/x"), None, copy::Origin::default(), &cancel)
        })
    });
    assert!(matches!(result, Err(FileError::Cancelled)));
}

#[test]
fn a_very_deep_tree_needs_no_stack() {
    let dirs = dirs();
    let mut dir =
        rustix::fs::open(dirs.src(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("open");
    for _ in 0..400 {
        rustix::fs::mkdirat(&dir, "d", Mode::from_raw_mode(0o755)).expect("mkdir");
        dir = rustix::fs::openat(&dir, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("open");
    }
    dirs.copy(&action("/", "/x")).expect("copy");
    let path = format!("/x{}", "/d".repeat(400));
    with(dirs.dst(), |root| root.open_dir(&path)).expect("all levels");
    let rm = pb::FileActionRm { path: "/x".into(), ..Default::default() };
    with(dirs.dst(), |root| actions::rm(root, &rm)).expect("removed");
}

#[test]
fn names_need_not_be_text() {
    let raw = |name: &'static [u8]| Path::new(OsStr::from_bytes(name));
    let dirs = dirs();
    std::fs::create_dir(dirs.src().join(raw(b"d\xfe"))).expect("mkdir");
    for name in [&b"caf\xe8"[..], b"caf\xe9", b"d\xfe/\xff", b"d\xfe/a"] {
        std::fs::write(dirs.src().join(raw(name)), name.escape_ascii().to_string()).expect("write");
    }
    symlink(raw(b"t\xff"), dirs.src().join("link")).expect("link");
    let has = |name: &'static [u8]| dirs.dst().join(raw(name)).symlink_metadata().is_ok();

    dirs.copy(&action("/", "/all")).expect("everything");
    assert!(has(b"all/caf\xe8") && has(b"all/caf\xe9") && has(b"all/d\xfe/\xff"));
    assert_eq!(dirs.dst().join("all/link").read_link().expect("link"), raw(b"t\xff"));
    dirs.copy(&action("/d?/*", "/found/")).expect("wildcards");
    assert!(has(b"found/\xff") && has(b"found/a"));
    dirs.copy(&action("/caf\u{fffd}", "/shown/")).expect_err("no file is called as one is shown");
    let some = pb::FileActionCopy {
        include_patterns: vec!["caf?".into(), "d*".into()],
        exclude_patterns: vec!["**/\u{fffd}".into()],
        ..action("/", "/some")
    };
    dirs.copy(&some).expect("patterns");
    assert!(has(b"some/caf\xe8") && has(b"some/caf\xe9") && has(b"some/d\xfe/a"));
    assert!(!has(b"some/d\xfe/\xff") && !has(b"some/link"));

    let rm = pb::FileActionRm { path: "/all/caf*".into(), allow_wildcard: true, ..Default::default() };
    with(dirs.dst(), |root| actions::rm(root, &rm)).expect("rm");
    assert!(!has(b"all/caf\xe8") && !has(b"all/caf\xe9") && has(b"all/d\xfe/\xff"));
}
