//! Transfers between two directories: selection, equality, incremental updates, and peers that break the rules.

mod common;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{listing, paths, select, transfer, write};
use futures::StreamExt;
use kiln_proto::fsutil::packet::PacketType;
use kiln_proto::fsutil::{Packet, Stat};
use kiln_proto::gomode;
use kiln_session::fsutil::{self, Change, ChangeKind, ReceiveMode, ReceiveOptions, Selection, Subtree};
use proptest::prelude::*;
use tempfile::tempdir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};

fn sample(root: &Path) {
    write(root, "a.txt", "alpha");
    write(root, "a/b/c.txt", "see");
    write(root, "a-b", "dash");
    write(root, "empty", "");
    write(root, "big", &"0123456789".repeat(40_000));
    write(root, "bin/tool", "#!/bin/sh\n");
    std::fs::set_permissions(root.join("bin/tool"), PermissionsExt::from_mode(0o4755)).unwrap();
    std::fs::set_permissions(root.join("a/b"), PermissionsExt::from_mode(0o1777)).unwrap();
    symlink("../a.txt", root.join("a/up")).unwrap();
    symlink("/nowhere", root.join("dangling")).unwrap();
    std::fs::hard_link(root.join("a.txt"), root.join("z-link")).unwrap();
}

#[tokio::test]
async fn a_directory_arrives_as_it_is() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    sample(from.path());
    let (sent, received) =
        transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await;
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!(listing(from.path()), listing(to.path()));
    assert_eq!(sent.entries, received.entries);
    assert_eq!(received.bytes, 5 + 3 + 4 + 400_000 + 10);
    let inode = |name: &str| to.path().join(name).metadata().unwrap().ino();
    assert_eq!(inode("a.txt"), inode("z-link"));
}

#[tokio::test]
async fn extended_attributes_arrive_with_their_values() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "file", "x");
    let long = "v".repeat(1500);
    let mut attributes = vec![("user.long".to_owned(), long.as_str()), ("user.none".to_owned(), "")];
    // More names than fit a first guess.
    attributes.extend((0..30).map(|n| (format!("user.attribute_with_a_long_name_{n:02}"), "value")));
    let flags = rustix::fs::XattrFlags::empty();
    for (name, value) in &attributes {
        rustix::fs::lsetxattr(from.path().join("file"), name.as_str(), value.as_bytes(), flags).unwrap();
    }
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    for (name, value) in &attributes {
        let mut found = vec![0; 4096];
        let size = rustix::fs::lgetxattr(to.path().join("file"), name.as_str(), &mut found[..]).unwrap();
        assert_eq!(std::str::from_utf8(&found[..size]).unwrap(), *value, "{name}");
    }
}

#[tokio::test]
async fn a_second_transfer_moves_only_what_differs_and_never_writes_in_place() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    sample(from.path());
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    let again =
        transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    assert!(!again.changed(), "{again:?}");
    assert_eq!(again.bytes, 0);

    let kept = to.path().with_extension("kept");
    std::fs::hard_link(to.path().join("a-b"), &kept).unwrap();
    write(from.path(), "a-b", "DASH");
    std::fs::remove_dir_all(from.path().join("a/b")).unwrap();
    write(from.path(), "a/b", "now a file");
    std::fs::remove_file(from.path().join("empty")).unwrap();
    write(from.path(), "empty/now-a-dir", "x");
    std::fs::remove_dir_all(from.path().join("bin")).unwrap();
    std::fs::remove_file(from.path().join("dangling")).unwrap();
    symlink("/elsewhere", from.path().join("dangling")).unwrap();

    let changes = Arc::new(Mutex::new(Vec::new()));
    let seen = changes.clone();
    let options = ReceiveOptions {
        on_change: Some(Box::new(move |change| seen.lock().unwrap().push(change))),
        ..Default::default()
    };
    let received = transfer(from.path(), Selection::default(), to.path(), options).await.1.unwrap();
    assert_eq!(listing(from.path()), listing(to.path()));
    assert_eq!(received.bytes, 4 + 10 + 1);
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "dash", "a linked old file must keep its content");
    std::fs::remove_file(kept).unwrap();

    let mut changes = changes.lock().unwrap().clone();
    changes.retain(|change| change.kind != ChangeKind::Touched);
    assert_eq!(changes.len() as u64, received.changes);
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    let change = |path: &str, kind, digest| Change { path: path.into(), kind, digest };
    let wrote = |path: &str| change(path, ChangeKind::Written, None);
    let received = |path: &str, content: &str| {
        change(path, ChangeKind::Written, Some(*blake3::hash(content.as_bytes()).as_bytes()))
    };
    assert_eq!(
        changes,
        [
            received("a-b", "DASH"),
            received("a/b", "now a file"),
            change("bin", ChangeKind::Deleted, None),
            wrote("dangling"),
            wrote("empty"),
            received("empty/now-a-dir", "x")
        ]
    );
}

#[tokio::test]
async fn nothing_is_changed_before_that_is_said() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "a/file", "content");
    let saying = |result: fn() -> std::io::Result<()>| ReceiveOptions {
        on_begin: Some(Box::new(result)),
        ..Default::default()
    };
    let refusing = || saying(|| Err(std::io::Error::other("not now")));
    let refused = transfer(from.path(), Selection::default(), to.path(), refusing()).await.1.unwrap_err();
    assert!(refused.to_string().contains("not now"), "{refused}");
    assert_eq!(paths(to.path()), [""; 0]);
    transfer(from.path(), Selection::default(), to.path(), saying(|| Ok(()))).await.1.unwrap();
    // Where nothing differs there is nothing to say.
    transfer(from.path(), Selection::default(), to.path(), refusing()).await.1.unwrap();
    let edits: [fn(&Path); 4] = [
        |root| std::fs::remove_file(root.join("a/file")).unwrap(),
        |root| write(root, "a/file", "other"),
        |root| symlink("x", root.join("link")).unwrap(),
        |root| std::fs::hard_link(root.join("a/file"), root.join("b")).unwrap(),
    ];
    for edit in edits {
        edit(from.path());
        let before = listing(to.path());
        transfer(from.path(), Selection::default(), to.path(), refusing()).await.1.unwrap_err();
        assert_eq!(listing(to.path()), before);
        transfer(from.path(), Selection::default(), to.path(), saying(|| Ok(()))).await.1.unwrap();
        assert_eq!(listing(to.path()), listing(from.path()));
    }
}

#[tokio::test]
async fn hard_links_are_broken_and_made_by_later_transfers() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "one", "same");
    std::fs::hard_link(from.path().join("one"), from.path().join("two")).unwrap();
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    write(from.path(), "one", "both changed");
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    assert_eq!(listing(from.path()), listing(to.path()));
    std::fs::remove_file(from.path().join("two")).unwrap();
    write(from.path(), "two", "on its own");
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    assert_eq!(listing(from.path()), listing(to.path()));
    assert_ne!(
        to.path().join("one").metadata().unwrap().ino(),
        to.path().join("two").metadata().unwrap().ino()
    );
}

#[tokio::test]
async fn mode_none_requests_everything_and_merge_deletes_nothing() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "file", "content");
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    let options = ReceiveOptions { mode: ReceiveMode::MirrorAll, ..Default::default() };
    let received = transfer(from.path(), Selection::default(), to.path(), options).await.1.unwrap();
    assert_eq!(received.bytes, 7);

    write(to.path(), "mine", "stays");
    let options = ReceiveOptions { mode: ReceiveMode::Merge, ..Default::default() };
    let received = transfer(from.path(), Selection::default(), to.path(), options).await.1.unwrap();
    assert_eq!(received.bytes, 7);
    assert_eq!(paths(to.path()), ["file", "mine"]);
}

#[tokio::test]
async fn patterns_select_and_parents_come_along() {
    let from = tempdir().unwrap();
    for path in
        ["src/main.rs", "src/lib.rs", "src/deep/x.o", "target/a.o", "target/keep/b", "README", "docs/x"]
    {
        write(from.path(), path, path);
    }
    let cases: &[(&[&str], &[&str], &[&str])] = &[
        (&["src/*.rs"], &[], &["src", "src/lib.rs", "src/main.rs"]),
        (&["src"], &["**/*.o"], &["src", "src/deep", "src/lib.rs", "src/main.rs"]),
        (
            &[],
            &["target", "!target/keep", "docs"],
            &[
                "README",
                "src",
                "src/deep",
                "src/deep/x.o",
                "src/lib.rs",
                "src/main.rs",
                "target",
                "target/keep",
                "target/keep/b",
            ],
        ),
        (&[], &["**", "!README"], &["README"]),
        (&["**/x*"], &[], &["docs", "docs/x", "src", "src/deep", "src/deep/x.o"]),
    ];
    for (include, exclude, expected) in cases {
        let to = tempdir().unwrap();
        transfer(from.path(), select(include, exclude, &[]), to.path(), ReceiveOptions::default())
            .await
            .1
            .unwrap();
        assert_eq!(paths(to.path()), *expected, "include {include:?} exclude {exclude:?}");
    }
}

#[tokio::test]
async fn followed_paths_bring_the_links_on_their_way() {
    let from = tempdir().unwrap();
    let root = from.path();
    write(root, "real/data/file", "x");
    write(root, "real/other", "y");
    write(root, "unrelated", "z");
    symlink("real", root.join("alias")).unwrap();
    symlink("/alias/data", root.join("abs")).unwrap();
    symlink("../../../../etc", root.join("out")).unwrap();
    symlink("loop2", root.join("loop1")).unwrap();
    symlink("loop1", root.join("loop2")).unwrap();
    let cases: &[(&[&str], &[&str])] = &[
        (&["abs/file"], &["abs", "alias", "real", "real/data", "real/data/file"]),
        (&["alias/o*"], &["alias", "real", "real/other"]),
        (&["out/passwd"], &["out"]),
        (&["missing"], &[]),
        (&["loop1"], &["loop1", "loop2"]),
        (&["unrelated", "real/data"], &["real", "real/data", "real/data/file", "unrelated"]),
    ];
    for (follow, expected) in cases {
        let to = tempdir().unwrap();
        transfer(root, select(&[], &[], follow), to.path(), ReceiveOptions::default()).await.1.unwrap();
        assert_eq!(paths(to.path()), *expected, "follow {follow:?}");
    }
    let to = tempdir().unwrap();
    transfer(root, select(&[], &[], &["unrelated", "/"]), to.path(), ReceiveOptions::default())
        .await
        .1
        .unwrap();
    assert_eq!(paths(to.path()), paths(root));
}

#[tokio::test]
async fn a_prefix_becomes_the_parent_directory() {
    let (one, two, to) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    write(one.path(), "file", "amd");
    write(two.path(), "file", "arm");
    let tree = |prefix: &str, path: &Path| Subtree { prefix: prefix.into(), ..Subtree::open(path).unwrap() };
    let trees = vec![tree("linux_arm64", two.path()), tree("linux_amd64", one.path())];
    let (packets, outgoing) = mpsc::channel(4);
    let (requests, incoming) = mpsc::unbounded_channel();
    let (sent, received) = tokio::join!(
        fsutil::send(trees, UnboundedReceiverStream::new(incoming).map(Ok).boxed(), packets, None),
        fsutil::receive(
            to.path(),
            ReceiveOptions::default(),
            ReceiverStream::new(outgoing).map(Ok).boxed(),
            requests
        )
    );
    sent.unwrap();
    received.unwrap();
    assert_eq!(paths(to.path()), ["linux_amd64", "linux_amd64/file", "linux_arm64", "linux_arm64/file"]);
    assert_eq!(std::fs::read_to_string(to.path().join("linux_arm64/file")).unwrap(), "arm");
}

fn stat(path: &str, mode: u32) -> Packet {
    Packet { stat: Some(Stat { path: path.into(), mode, ..Default::default() }), ..Default::default() }
}

fn link(path: &str, mode: u32, target: &str) -> Packet {
    let stat = Stat { path: path.into(), mode, linkname: target.into(), ..Default::default() };
    Packet { stat: Some(stat), ..Default::default() }
}

fn data(id: u32, bytes: &'static [u8]) -> Packet {
    Packet { r#type: PacketType::PacketData.into(), id, data: bytes.into(), ..Default::default() }
}

/// Feeds packets to a receiver; the error it ends with, and what it left in the directory.
async fn refused(packets: Vec<Packet>) -> (String, Vec<String>) {
    let to = tempdir().unwrap();
    let outside = tempdir().unwrap();
    symlink(outside.path(), to.path().join("escape")).unwrap();
    let (requests, mut replies) = mpsc::unbounded_channel();
    let options = ReceiveOptions { mode: ReceiveMode::Merge, ..Default::default() };
    let packets = futures::stream::iter(packets.into_iter().map(Ok)).boxed();
    let error = fsutil::receive(to.path(), options, packets, requests).await.unwrap_err().to_string();
    assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none(), "wrote outside");
    let mut last = None;
    while let Some(packet) = replies.recv().await {
        last = Some(packet);
    }
    assert_eq!(last.unwrap().r#type(), PacketType::PacketErr, "the sender must be told");
    (error, paths(to.path()))
}

#[tokio::test]
async fn listings_that_break_the_rules_are_refused() {
    let dir = gomode::DIR | 0o755;
    let cases = [
        (vec![stat("../up", 0o644)], "invalid path \"../up\""),
        (vec![stat("/abs", 0o644)], "invalid path \"/abs\""),
        (vec![stat("a//b", 0o644)], "invalid path"),
        (vec![stat("b", dir), stat("a", dir)], "\"a\" is out of order"),
        (vec![stat("a", dir), stat("a", dir)], "\"a\" is out of order"),
        (vec![stat("a-b", dir), stat("a/b", dir)], "out of order"),
        (vec![stat("a/b", 0o644)], "\"a/b\" comes without its directory"),
        (vec![stat("a", 0o644), stat("a/b", 0o644)], "comes without its directory"),
        (vec![stat("escape/file", 0o644)], "comes without its directory"),
        (vec![link("hard", 0o644, "later")], "\"later\", which did not come before it"),
        (vec![link("hard", 0o644, "../x")], "invalid path \"../x\""),
        (vec![stat("odd", gomode::IRREGULAR)], "unknown mode"),
        (vec![data(7, b"x")], "file 7, which was not requested"),
        (
            vec![stat("f", 0o644), data(0, b"x"), data(0, b""), data(0, b"")],
            "file 0, which was not requested",
        ),
        (vec![stat("f", 0o644), data(0, b"half")], "connection closed before the transfer ended"),
        (vec![Packet::default(), Packet::default()], "unexpected PACKET_STAT"),
    ];
    for (packets, expected) in cases {
        let shown = format!("{packets:?}");
        let (error, left) = refused(packets).await;
        assert!(error.contains(expected), "{shown}: {error}");
        assert!(!left.iter().any(|path| path.contains(".kiln-")), "temporary files left: {left:?}");
    }
}

#[tokio::test]
async fn a_directory_replaces_a_link_of_its_name_instead_of_following_it() {
    let (to, outside) = (tempdir().unwrap(), tempdir().unwrap());
    symlink(outside.path(), to.path().join("escape")).unwrap();
    let from = tempdir().unwrap();
    write(from.path(), "escape/file", "x");
    let options = ReceiveOptions { mode: ReceiveMode::Merge, ..Default::default() };
    transfer(from.path(), Selection::default(), to.path(), options).await.1.unwrap();
    assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
    assert_eq!(paths(to.path()), ["escape", "escape/file"]);
}

#[tokio::test]
async fn requests_that_make_no_sense_fail_the_sender() {
    let from = tempdir().unwrap();
    write(from.path(), "dir/file", "x");
    for (ids, expected) in
        [(vec![9], "invalid file id 9"), (vec![0], "invalid file id 0"), (vec![1, 1], "invalid file id 1")]
    {
        let (packets, mut outgoing) = mpsc::channel(64);
        let (requests, incoming) = mpsc::unbounded_channel();
        let tree = Subtree::open(from.path()).unwrap();
        let sending = tokio::spawn(fsutil::send(
            vec![tree],
            UnboundedReceiverStream::new(incoming).map(Ok).boxed(),
            packets,
            None,
        ));
        // The whole listing is out before anything is asked for.
        while outgoing.recv().await.unwrap().stat.is_some() {}
        for id in ids {
            requests.send(Packet { r#type: PacketType::PacketReq.into(), id, ..Default::default() }).unwrap();
        }
        let error = sending.await.unwrap().unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        // Content that was asked for rightly may still be on its way.
        let mut told = false;
        while let Some(packet) = outgoing.recv().await {
            told |= packet.r#type() == PacketType::PacketErr;
        }
        assert!(told, "the receiver is not told of {expected}");
    }
}

#[tokio::test]
async fn failures_name_the_path_at_both_ends() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "file", "x");
    let (sent, received) =
        transfer(from.path(), select(&["["], &[], &[]), to.path(), ReceiveOptions::default()).await;
    assert!(sent.unwrap_err().to_string().contains("syntax error in pattern"));
    assert!(received.unwrap_err().to_string().contains("syntax error in pattern"));
}

/// A name that need not be text.
fn raw(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

/// What is not text, in every place that a name can have.
fn no_text(root: &Path) {
    std::fs::create_dir(root.join(raw(b"d\xfe"))).unwrap();
    for (path, content) in [(&b"caf\xe8"[..], "grave"), (b"caf\xe9", "acute"), (b"d\xfe/\xff", "below")] {
        std::fs::write(root.join(raw(path)), content).unwrap();
    }
    std::fs::hard_link(root.join(raw(b"caf\xe9")), root.join(raw(b"hard\xe9"))).unwrap();
    symlink(raw(b"d\xfe"), root.join("link")).unwrap();
    symlink(raw(b"t\xff"), root.join(raw(b"\xe9link"))).unwrap();
}

#[tokio::test]
async fn names_and_targets_are_any_bytes() {
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    no_text(from.path());
    let update = async |mode| {
        let changes = Arc::new(Mutex::new(Vec::new()));
        let seen = changes.clone();
        let options = ReceiveOptions {
            mode,
            on_change: Some(Box::new(move |change| seen.lock().unwrap().push(change))),
            ..Default::default()
        };
        let (sent, received) = transfer(from.path(), Selection::default(), to.path(), options).await;
        sent.unwrap();
        assert_eq!(listing(from.path()), listing(to.path()));
        let mut changes = changes.lock().unwrap().clone();
        changes.retain(|change| change.kind != ChangeKind::Touched);
        changes.sort_by(|a, b| a.path.cmp(&b.path));
        (received.unwrap(), changes.into_iter().map(|change| (change.path, change.kind)).collect::<Vec<_>>())
    };
    update(ReceiveMode::Mirror).await;
    let inode = |name: &[u8]| to.path().join(raw(name)).metadata().unwrap().ino();
    assert_eq!(inode(b"caf\xe9"), inode(b"hard\xe9"));
    let (again, changes) = update(ReceiveMode::Mirror).await;
    assert!(!again.changed() && again.bytes == 0 && changes.is_empty(), "{again:?} {changes:?}");

    // Names that look the same as text stay apart.
    std::fs::write(from.path().join(raw(b"caf\xe8")), "changed").unwrap();
    std::fs::remove_file(from.path().join(raw(b"\xe9link"))).unwrap();
    symlink(raw(b"t\xfe"), from.path().join(raw(b"\xe9link"))).unwrap();
    std::fs::remove_file(from.path().join(raw(b"hard\xe9"))).unwrap();
    std::fs::write(from.path().join(raw(b"d\xfe/\xfe")), "new").unwrap();
    let (received, changes) = update(ReceiveMode::Mirror).await;
    assert_eq!(received.bytes, 7 + 3);
    let written = |path: &[u8]| (path.to_vec(), ChangeKind::Written);
    assert_eq!(
        changes,
        [
            written(b"caf\xe8"),
            written(b"d\xfe/\xfe"),
            (b"hard\xe9".to_vec(), ChangeKind::Deleted),
            written(b"\xe9link"),
        ]
    );
    std::fs::remove_dir_all(from.path().join(raw(b"d\xfe"))).unwrap();
    let (_, changes) = update(ReceiveMode::Mirror).await;
    assert_eq!(changes, [(b"d\xfe".to_vec(), ChangeKind::Deleted)]);
    assert_eq!(update(ReceiveMode::Merge).await.0.bytes, 12);
}

#[tokio::test]
async fn patterns_see_a_replacement_for_what_is_no_text() {
    let from = tempdir().unwrap();
    no_text(from.path());
    type Case<'a> = (Selection, &'a [&'a str]);
    let cases: &[Case<'_>] = &[
        (select(&["caf?", "d*/?"], &[], &[]), &["caf\\xe8", "caf\\xe9", "d\\xfe", "d\\xfe/\\xff"]),
        (select(&["caf\u{fffd}"], &[], &[]), &["caf\\xe8", "caf\\xe9"]),
        (select(&[], &["*", "!d*"], &[]), &["d\\xfe", "d\\xfe/\\xff"]),
        (select(&[], &["**/?", "*link", "caf[a-z]"], &[]), &["caf\\xe8", "caf\\xe9", "d\\xfe", "hard\\xe9"]),
        (select(&[], &[], &["link/*"]), &["d\\xfe", "d\\xfe/\\xff", "link"]),
        (select(&[], &[], &["h*"]), &["hard\\xe9"]),
        (select(&[], &[], &["?link"]), &["\\xe9link"]),
    ];
    for (selection, expected) in cases {
        let to = tempdir().unwrap();
        transfer(from.path(), selection.clone(), to.path(), ReceiveOptions::default()).await.1.unwrap();
        assert_eq!(paths(to.path()), *expected, "{selection:?}");
    }
}

#[tokio::test]
async fn devices_and_pipes_travel() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: devices need root");
        return;
    }
    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    mknodat(
        CWD,
        from.path().join("null"),
        FileType::CharacterDevice,
        Mode::from_raw_mode(0o600),
        makedev(1, 3),
    )
    .unwrap();
    mknodat(CWD, from.path().join("pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).unwrap();
    transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
    assert_eq!(listing(from.path()), listing(to.path()));
    assert!(
        !transfer(from.path(), Selection::default(), to.path(), ReceiveOptions::default())
            .await
            .1
            .unwrap()
            .changed()
    );
}

#[derive(Debug, Clone)]
enum Node {
    File(String, u32),
    Dir,
    Link(String),
}

fn trees() -> impl Strategy<Value = Vec<(String, Node)>> {
    let name = "[a-c.\\-]{0,1}[a-c]";
    let path = proptest::collection::vec(name, 1..4).prop_map(|parts| parts.join("/"));
    let node = prop_oneof![
        ("[a-z]{0,5}", prop_oneof![Just(0o644u32), Just(0o600), Just(0o755)])
            .prop_map(|(text, mode)| Node::File(text, mode)),
        Just(Node::Dir),
        "[a-c]{1,3}".prop_map(Node::Link),
    ];
    proptest::collection::vec((path, node), 0..12)
}

/// Makes what can be made; entries that get in each other's way are dropped.
fn plant(root: &Path, nodes: &[(String, Node)]) {
    for (path, node) in nodes {
        let path = root.join(path);
        let Some(parent) = path.parent() else { continue };
        if parent.ancestors().take_while(|above| *above != root).any(|above| above.is_symlink()) {
            continue;
        }
        if std::fs::create_dir_all(parent).is_err() || path.symlink_metadata().is_ok() {
            continue;
        }
        match node {
            Node::File(text, mode) => {
                std::fs::write(&path, text).unwrap();
                std::fs::set_permissions(&path, PermissionsExt::from_mode(*mode)).unwrap();
            }
            Node::Dir => std::fs::create_dir(&path).unwrap(),
            Node::Link(target) => symlink(target, &path).unwrap(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever was there before, a mirror ends up equal to its source.
    #[test]
    fn a_mirror_equals_its_source(before in trees(), after in trees()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (one, two, to) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
            plant(one.path(), &before);
            plant(two.path(), &after);
            transfer(one.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
            assert_eq!(listing(one.path()), listing(to.path()));
            transfer(two.path(), Selection::default(), to.path(), ReceiveOptions::default()).await.1.unwrap();
            assert_eq!(listing(two.path()), listing(to.path()));
        });
    }
}
