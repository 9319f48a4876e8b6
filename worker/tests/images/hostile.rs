//! Archives that lie, break off, or try to get out of the layer.

use std::path::Path;

use kiln_worker::layer::{LayerError, settle, unpack};
use tar::EntryType;

use super::support::{Member, archive, root};

fn apply(bytes: &[u8], dir: &Path) -> Result<(), LayerError> {
    let unpacked = unpack(bytes, dir)?;
    settle(dir, unpacked, &[])
}

fn refused(members: &[Member<'_>]) -> String {
    let dir = tempfile::tempdir().expect("temp dir");
    apply(&archive(members), dir.path()).expect_err("must be refused").to_string()
}

#[test]
fn nothing_gets_out_of_the_layer() {
    let world = tempfile::tempdir().expect("temp dir");
    let (layer, outside) = (world.path().join("layer"), world.path().join("outside"));
    std::fs::create_dir(&layer).expect("dir");
    std::fs::create_dir(&outside).expect("dir");
    std::fs::write(outside.join("secret"), "s").expect("write");
    let target = outside.to_str().expect("utf-8");
    let secret = outside.join("secret");
    let secret = secret.to_str().expect("utf-8");
    let bytes = archive(&[
        Member::link("abs", EntryType::Symlink, target),
        Member::file("abs/escaped", b"1"),
        Member::link("rel", EntryType::Symlink, "../outside"),
        Member::file("rel/escaped", b"2"),
        Member::link("up", EntryType::Symlink, "/../../../.."),
        Member::file("up/top", b"3"),
        Member::link("over", EntryType::Symlink, secret),
        Member::file("over", b"4"),
        Member::file("/absolute/name", b"5"),
        Member::file("a/../b", b"6"),
    ]);
    apply(&bytes, &layer).expect("all of it stays inside");
    assert_eq!(std::fs::read_dir(&outside).expect("list").count(), 1);
    assert_eq!(std::fs::read(outside.join("secret")).expect("secret"), b"s");
    assert_eq!(std::fs::read(layer.join(&target[1..]).join("escaped")).expect("inside"), b"1");
    assert_eq!(std::fs::read(layer.join("outside/escaped")).expect("inside"), b"2");
    assert_eq!(std::fs::read(layer.join("top")).expect("inside"), b"3");
    assert_eq!(std::fs::read(layer.join("over")).expect("replaced"), b"4");
    assert_eq!(std::fs::read(layer.join("absolute/name")).expect("inside"), b"5");
    assert_eq!(std::fs::read(layer.join("b")).expect("inside"), b"6");
}

#[test]
fn impossible_entries_are_refused_by_name() {
    assert!(refused(&[Member::file("../x", b"")]).contains("../x: path leads out of the layer"));
    assert!(refused(&[Member::file("a/../../x", b"")]).contains("path leads out of the layer"));
    assert!(refused(&[Member::file(".wh.", b"")]).contains("whiteout of no name"));
    assert!(refused(&[Member::file(".wh...", b"")]).contains("whiteout of no name"));
    assert!(refused(&[Member::link("x", EntryType::Link, "../../etc/passwd")]).contains("path leads out"));
    assert!(refused(&[Member::link("x", EntryType::Link, "/")]).contains("hard link to the root"));
    assert!(refused(&[Member::link("x", EntryType::Link, "etc/passwd")]).contains("not found"));
    assert!(refused(&[Member::file("f", b""), Member::file("f/g", b"")]).contains("Not a directory"));
    assert!(
        refused(&[Member { kind: EntryType::new(b'M'), ..Member::file("v", b"") }]).contains("unsupported")
    );
    let circle = [
        Member::link("a", EntryType::Symlink, "b"),
        Member::link("b", EntryType::Symlink, "a"),
        Member::file("a/x", b""),
    ];
    assert!(refused(&circle).contains("Too many levels of symbolic links"));
    let outside_link =
        [Member::link("l", EntryType::Symlink, "/etc"), Member::link("x", EntryType::Link, "l/passwd")];
    assert!(refused(&outside_link).contains("not found"), "hard links stay inside too");
}

#[test]
fn overlay_marks_of_an_archive_are_not_believed() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let pax: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("SCHILY.xattr.user.fine", b"1"),
    ];
    apply(&archive(&[Member { pax, ..Member::dir("d") }]), dir.path()).expect("unpack");
    let mut names = vec![0u8; 256];
    let n = rustix::fs::llistxattr(dir.path().join("d"), &mut names[..]).expect("list");
    let names = String::from_utf8_lossy(&names[..n]).into_owned();
    assert!(names.contains("user.fine") && !names.contains("overlay"), "{names}");
}

#[test]
fn pax_records_are_read_by_their_length() {
    // A reader that splits at newlines loses the size, and takes the data for headers.
    let inner = archive(&[Member::file("smuggled", b"x")]);
    let size = inner.len().to_string();
    let pax: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", b"\n\n9 b=c\n"), ("size", size.as_bytes())];
    let mut bytes = archive(&[Member { pax, ..Member::file("outer", &inner) }, Member::file("last", b"l")]);
    // The header itself says zero.
    let header = 1024;
    bytes[header + 124..header + 135].copy_from_slice(b"00000000000");
    let mut block: [u8; 512] = bytes[header..header + 512].try_into().expect("block");
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
    bytes[header + 148..header + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let dir = tempfile::tempdir().expect("temp dir");
    apply(&bytes, dir.path()).expect("unpack");
    assert_eq!(std::fs::read(dir.path().join("outer")).expect("outer"), inner);
    assert!(!dir.path().join("smuggled").exists());
    assert_eq!(std::fs::read(dir.path().join("last")).expect("last"), b"l");
}

#[test]
fn damaged_archives_say_so() {
    let whole = archive(&[Member::file("a", &[7; 2000]), Member::dir("d")]);
    let error = |bytes: &[u8]| {
        let dir = tempfile::tempdir().expect("temp dir");
        apply(bytes, dir.path()).expect_err("damaged").to_string()
    };
    assert!(error(&whole[..300]).contains("archive ends within a header"));
    assert!(error(&whole[..1000]).contains("archive ends within a file"));
    let mut flipped = whole.clone();
    flipped[3] ^= 1;
    assert!(error(&flipped).contains("checksum"));
    assert!(error(b"not an archive, but long enough to be taken for one").contains("header"));
    let pax: &[(&str, &[u8])] = &[("GNU.sparse.map", b"0,99999999999"), ("GNU.sparse.size", b"10")];
    let sparse = archive(&[Member { pax, ..Member::file("s", b"x") }]);
    assert!(error(&sparse).contains("sparse map"));
    let huge: &[(&str, &[u8])] = &[("uid", b"99999999999")];
    assert!(error(&archive(&[Member { pax: huge, ..Member::file("u", b"") }])).contains("out of range"));
}

#[test]
fn extension_headers_of_one_entry_have_an_end() {
    let record = format!("1000 comment={}\n", "c".repeat(1000 - 14));
    let extension = || Member { kind: EntryType::XHeader, ..Member::file("pax", record.as_bytes()) };
    let members =
        |count| (0..count).map(|_| extension()).chain([Member::file("f", b"f")]).collect::<Vec<_>>();
    let dir = tempfile::tempdir().expect("temp dir");
    apply(&archive(&members(1000)), dir.path()).expect("a megabyte");
    assert!(refused(&members(1100)).contains("extension headers of 1049000 bytes are too long"));
}
