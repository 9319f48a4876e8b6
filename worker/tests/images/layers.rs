//! What goes into a layer comes out of it again.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_worker::layer::{Compression, Compressor, Decompressor, PackOptions, pack_layer, settle, unpack};

use super::support::{Member, archive, listing, pack, root, run, sh};

fn temp() -> tempfile::TempDir {
    tempfile::tempdir().expect("temp dir")
}

/// A layer directory with one of everything.
fn everything(dir: &Path) {
    sh(
        dir,
        "mkdir -p d/sub opaque/kept; chmod 1777 d; chown 12:34 d/sub; echo hello >d/file; chmod 4755 d/file
         ln d/file d/hard; ln -s ../../etc/passwd d/link; chown -h 5:6 d/link; : >empty
         mknod null c 1 3; mknod disk b 7 300; mkfifo pipe; mknod gone c 0 0
         head -c 3000000 /dev/urandom >big; chown 3000000:4000000 big
         setfattr -n trusted.overlay.opaque -v y opaque 2>/dev/null || python3 -c \"import os; os.setxattr('opaque', 'trusted.overlay.opaque', b'y')\"
         python3 -c \"import os
os.setxattr('d/file', 'user.note', b'a\\nb\\x00c')
os.setxattr('d/file', 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
os.utime('d/file', ns=(1500000000123456789, 1500000000123456789))
os.utime('empty', ns=(-5, -1500000000))
n = 'l' * 120
os.makedirs(n + '/' + n); open(n + '/' + n + '/' + 'f' * 200, 'w').write('deep')
open('gr\\u00fc\\u00dfe', 'w').write('x')
os.symlink('t' * 300, 'long-link')\"
         touch -d @1400000000 d opaque",
    );
}

fn unpack_to(bytes: &[u8], dir: &Path, lowers: &[PathBuf]) {
    let reader = Decompressor::new(bytes).expect("decompressor");
    let unpacked = unpack(reader, dir).expect("unpack");
    settle(dir, unpacked, lowers).expect("settle");
}

#[test]
fn everything_survives_every_compression() {
    if !root() {
        return;
    }
    let source = temp();
    everything(source.path());
    let (plain, stats) = pack(source.path(), Compression::Uncompressed);
    assert_eq!(stats.digest, stats.diff_id);
    assert_eq!(plain.len() as u64, stats.size);
    for compression in [Compression::Uncompressed, Compression::Gzip, Compression::Zstd] {
        let (blob, packed) = pack(source.path(), compression);
        assert_eq!(packed.diff_id, stats.diff_id, "{compression:?}");
        assert_eq!(packed.size, blob.len() as u64);
        let again = pack(source.path(), compression);
        assert_eq!(again.0, blob, "{compression:?} is deterministic");
        let target = temp();
        unpack_to(&blob, target.path(), &[]);
        assert_eq!(listing(target.path()), listing(source.path()), "{compression:?}");
        let repacked = pack(target.path(), Compression::Uncompressed);
        assert_eq!(repacked.1.diff_id, stats.diff_id, "xattrs and times survive {compression:?}");
        let times = |dir: &Path, name: &str| {
            let meta = std::fs::metadata(dir.join(name)).expect("stat");
            (meta.mtime(), meta.mtime_nsec())
        };
        assert_eq!(times(target.path(), "d/file"), (1_500_000_000, 0), "whole seconds");
        assert_eq!(times(target.path(), "empty"), (-2, 0), "rounded down");
        assert_eq!(times(target.path(), "d"), (1_400_000_000, 0), "directory times are set last");
    }
}

#[test]
fn other_tools_read_what_is_written() {
    if !root() {
        return;
    }
    let source = temp();
    everything(source.path());
    let work = temp();
    for (compression, name) in [(Compression::Gzip, "l.tar.gz"), (Compression::Uncompressed, "l.tar")] {
        let file = work.path().join(name);
        std::fs::write(&file, pack(source.path(), compression).0).expect("write");
        let list = run(Command::new("tar")
            .arg("--warning=no-timestamp")
            .arg("-tvf")
            .arg(&file)
            .arg("--numeric-owner"));
        for expected in [
            "drwxrwxrwt 0/0",
            "-rwsr-xr-x 0/0",
            "12/34",
            "d/hard link to d/file",
            "-> ../../etc/passwd",
            ".wh.gone",
            "opaque/.wh..wh..opq",
            "3000000/4000000",
            "crw-",
            "1,3",
            "7,300",
            "1969-12-31",
        ] {
            assert!(list.contains(expected), "{expected} in\n{list}");
        }
        let mode = if compression == Compression::Gzip { "r:gz" } else { "r:" };
        let script = "import sys, tarfile
t = tarfile.open(sys.argv[1], sys.argv[2])
m = t.getmember('d/file')
assert 'mtime' not in m.pax_headers and m.mtime == 1500000000, m.pax_headers
assert m.pax_headers['SCHILY.xattr.user.note'] == 'a\\nb\\x00c', m.pax_headers
assert len([n for n in t.getnames() if n.endswith('f' * 200)]) == 1
assert t.getmember('long-link').linkname == 't' * 300
assert 'gr\\u00fc\\u00dfe' in t.getnames()
assert t.extractfile('d/hard').read() == b'hello\\n'
print('ok')";
        run(Command::new("python3").arg("-c").arg(script).arg(&file).arg(mode));
    }
    let zstd = pack(source.path(), Compression::Zstd).0;
    let plain = zstd::stream::decode_all(&zstd[..]).expect("zstd");
    assert_eq!(plain, pack(source.path(), Compression::Uncompressed).0);
}

#[test]
fn gzip_of_any_length_reads_back() {
    for length in [0usize, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_001] {
        let data: Vec<u8> = (0..length).map(|i| (i * i / 7) as u8).collect();
        for level in [None, Some(0), Some(1)] {
            let mut out = Compressor::new(Vec::new(), Compression::Gzip, level).expect("compressor");
            for piece in data.chunks(777_777) {
                std::io::Write::write_all(&mut out, piece).expect("write");
            }
            let blob = out.finish().expect("finish");
            let mut back = Vec::new();
            // One member: readers that stop after the first must get everything.
            flate2::bufread::GzDecoder::new(&blob[..]).read_to_end(&mut back).expect("decode");
            assert_eq!(back, data, "{length} at level {level:?}");
        }
    }
    assert!(Compressor::new(Vec::new(), Compression::Gzip, Some(10)).is_err());
}

#[test]
fn every_kind_of_sparse_file_is_read() {
    let work = temp();
    sh(
        work.path(),
        "truncate -s 20M s; for i in 0 3 7 11 12 13 14 15 16 17 18 19; do
           printf block$i | dd of=s bs=1 seek=$((i * 1000000 + i)) conv=notrunc status=none; done
         echo after >t; truncate -s 5M hole",
    );
    let expected = std::fs::read(work.path().join("s")).expect("read");
    for format in [
        "--format=gnu",
        "--format=posix --sparse-version=0.0",
        "--format=posix --sparse-version=0.1",
        "--format=posix --sparse-version=1.0",
    ] {
        sh(work.path(), &format!("tar --sparse {format} -cf s.tar s hole t"));
        let target = temp();
        unpack_to(&std::fs::read(work.path().join("s.tar")).expect("tar"), target.path(), &[]);
        assert!(std::fs::read(target.path().join("s")).expect("s") == expected, "{format}");
        let hole = std::fs::metadata(target.path().join("hole")).expect("hole");
        assert_eq!(hole.len(), 5 << 20, "{format}");
        assert!(hole.blocks() < 16, "{format}: holes stay holes");
        assert_eq!(std::fs::read(target.path().join("t")).expect("t"), b"after\n", "{format}");
    }
}

#[test]
fn long_names_of_every_format_are_read() {
    let work = temp();
    let deep = format!("{0}/{0}/{0}", "n".repeat(110));
    sh(
        work.path(),
        &format!("mkdir -p {deep}; echo x >{deep}/f; ln -s $(printf 'z%.0s' $(seq 250)) {deep}/l"),
    );
    for format in ["gnu", "posix", "oldgnu"] {
        sh(work.path(), &format!("tar --format={format} -cf n.tar nnn*"));
        let target = temp();
        unpack_to(&std::fs::read(work.path().join("n.tar")).expect("tar"), target.path(), &[]);
        assert_eq!(std::fs::read(target.path().join(&deep).join("f")).expect("file"), b"x\n", "{format}");
        let link = std::fs::read_link(target.path().join(&deep).join("l")).expect("link");
        assert_eq!(link.as_os_str().len(), 250, "{format}");
    }
}

#[test]
fn whiteouts_hide_the_lower_layer_only() {
    if !root() {
        return;
    }
    let bytes = archive(&[
        Member::file(".wh.gone", b""),
        Member::dir("own"),
        Member::file(".wh.own", b""),
        Member::file("replaced/.wh.inner", b""),
        Member::file(".wh.again", b""),
        Member::dir("again"),
        Member::dir("all"),
        Member::file("all/new", b"n"),
        Member::file("all/.wh..wh..opq", b""),
        Member::file(".wh..wh.plnk", b""),
        Member::file("both", b"b"),
        Member::file(".wh.both", b""),
        Member::file(".wh.parent", b""),
        Member::file("parent/child", b"c"),
    ]);
    let target = temp();
    unpack_to(&bytes, target.path(), &[]);
    let opaque = |name: &str| {
        let mut value = [0u8; 4];
        rustix::fs::lgetxattr(target.path().join(name), "trusted.overlay.opaque", &mut value[..]).is_ok()
    };
    let whiteout = |name: &str| {
        let meta = std::fs::symlink_metadata(target.path().join(name)).expect("stat");
        meta.rdev() == 0 && !meta.is_file() && !meta.is_dir()
    };
    assert!(whiteout("gone") && whiteout("replaced/inner"));
    assert!(opaque("own") && opaque("again") && opaque("all") && opaque("parent"));
    assert_eq!(std::fs::read(target.path().join("both")).expect("both"), b"b");
    assert_eq!(std::fs::read(target.path().join("parent/child")).expect("child"), b"c");
    assert!(!target.path().join(".wh..wh.plnk").exists());
}

#[test]
fn independent_layers_are_fitted_onto_those_below() {
    if !root() {
        return;
    }
    let (bottom, middle, top) = (temp(), temp(), temp());
    sh(
        bottom.path(),
        "chmod 711 .; mkdir -p usr/lib tmp a/b; chmod 1777 tmp; chown 7:8 a/b; ln -s usr/lib lib; ln -s /lib lib64
         echo old >usr/lib/shared; chmod 600 usr/lib/shared; ln -s loop2 loop1; ln -s loop1 loop2; echo f >file",
    );
    sh(middle.path(), "mkdir a; mknod a/b c 0 0");
    let bytes = archive(&[
        Member::file("tmp/new", b"1"),
        Member::file("lib/one", b"2"),
        Member::file("lib64/sub/two", b"3"),
        Member::file("a/b/c", b"4"),
        Member::link("copy", tar::EntryType::Link, "lib/shared"),
    ]);
    unpack_to(&bytes, top.path(), &[middle.path().into(), bottom.path().into()]);
    let meta = |name: &str| std::fs::symlink_metadata(top.path().join(name)).expect(name);
    assert_eq!(meta("").mode() & 0o7777, 0o755, "the root is that of the layer below");
    assert_eq!(meta("tmp").mode() & 0o7777, 0o1777);
    assert_eq!(std::fs::read(top.path().join("usr/lib/one")).expect("one"), b"2");
    assert_eq!(std::fs::read(top.path().join("usr/lib/sub/two")).expect("two"), b"3");
    assert!(std::fs::symlink_metadata(top.path().join("lib")).is_err(), "the symlink below stays visible");
    assert!(std::fs::symlink_metadata(top.path().join("lib64")).is_err());
    assert_eq!((meta("a/b").uid(), meta("a/b").gid()), (0, 0), "a deleted directory lends nothing");
    assert_eq!(std::fs::read(top.path().join("copy")).expect("copy"), b"old\n");
    assert_eq!(meta("copy").ino(), meta("usr/lib/shared").ino());
    assert_eq!(meta("copy").mode() & 0o7777, 0o600);

    let bytes = archive(&[Member::file("loop1/x", b"")]);
    let target = temp();
    let unpacked = unpack(&bytes[..], target.path()).expect("unpack");
    assert!(settle(target.path(), unpacked, &[bottom.path().into()]).is_err(), "symlinks in a circle");

    let bytes = archive(&[Member::link("x", tar::EntryType::Link, "nowhere")]);
    let target = temp();
    let unpacked = unpack(&bytes[..], target.path()).expect("unpack");
    let error = settle(target.path(), unpacked, &[bottom.path().into()]).expect_err("no target").to_string();
    assert!(error.contains("hard link target nowhere not found"), "{error}");
}

#[test]
fn times_are_clamped_on_request() {
    let source = temp();
    sh(source.path(), "echo a >a; touch -d @2000000000 a; echo b >b; touch -d @1000000000 b");
    let options = PackOptions { overlay: true, clamp: Some(1_500_000_000), prefix: "p/".into() };
    let (bytes, stats) =
        pack_layer(source.path(), &options, Compression::Uncompressed, None, Vec::new()).expect("pack");
    assert_eq!(stats.entries, 3, "the prefix is an entry too");
    let target = temp();
    unpack_to(&bytes, target.path(), &[]);
    let time = |name: &str| std::fs::metadata(target.path().join("p").join(name)).expect("stat").mtime();
    assert_eq!((time("a"), time("b")), (1_500_000_000, 1_000_000_000));
}

#[test]
fn nothing_is_an_empty_layer() {
    let source = temp();
    let (_, stats) = pack(source.path(), Compression::Gzip);
    assert_eq!(stats.entries, 0);
    assert_eq!(stats.diff_id, "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef");
}
