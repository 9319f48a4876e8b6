//! File operations, merge and diff.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_cache::{RecordType, Ref, SnapshotMeta};
use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use kiln_solver::op::ResultStore;
use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat, openat};
use rustix::io::Errno;

use crate::common;
use crate::world::{World, action, copy, file, layer, mkfile, rm, top};

pub(crate) async fn file_actions_make_layers(world: &World) {
    let chained = file(vec![action(-1, -1, -1, mkfile("/a", "A")), action(0, -1, 0, mkfile("/b", "B"))]);
    let base = world.run(chained, &[]).await.unwrap().remove(0);
    assert_eq!((top(&base).layers().len(), layer(&base)), (1, vec!["a".to_owned(), "b".to_owned()]));
    let copied = file(vec![action(0, 1, 0, Action::Copy(copy("/a", "/dir/c").into()))]);
    let copied = world.run(copied, &[&base, &base]).await.unwrap().remove(0);
    assert_eq!(layer(&copied), ["dir", "dir/c"]);
    assert_eq!(world.read(&copied, "/dir/c").await.as_deref(), Some("A"));
    assert_eq!(world.read(&copied, "/b").await.as_deref(), Some("B"));
    let two = file(vec![action(0, -1, 1, mkfile("/x", "X")), action(1, -1, 0, mkfile("/y", "Y"))]);
    let results = world.run(two, &[&base]).await.unwrap();
    assert_eq!((layer(&results[0]), layer(&results[1])), (vec!["y".to_owned()], vec!["x".to_owned()]));
    let scratch = file(vec![action(
        -1,
        -1,
        0,
        Action::Copy(Box::new(pb::FileActionCopy {
            allow_wildcard: true,
            allow_empty_wildcard: true,
            ..copy("/*", "/")
        })),
    )]);
    let empty = world.run(scratch, &[]).await.unwrap().remove(0);
    assert!(layer(&empty).is_empty());
    // The store's name for what can't be gone.
    assert_eq!(ResultStore::id(&*world.worker, &None), "");
    assert!(matches!(world.worker.load("").await, Ok(Some(None))));
}

pub(crate) async fn removed_files_are_whiteouts(world: &World) {
    let base = world.snapshot(|root| {
        std::fs::create_dir_all(root.join("d/e")).unwrap();
        std::fs::write(root.join("d/e/f"), "F").unwrap();
        std::fs::write(root.join("keep"), "K").unwrap();
    });
    let removed = world.run(file(vec![action(0, -1, 0, rm("/d/e"))]), &[&base]).await.unwrap().remove(0);
    let whiteout = top(&removed).dir().join("d/e").symlink_metadata().unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(world.read(&removed, "/d/e/f").await, None);
    assert_eq!(world.read(&removed, "/keep").await.as_deref(), Some("K"));
    assert_eq!(world.read(&base, "/d/e/f").await.as_deref(), Some("F"));
}

pub(crate) async fn users_are_looked_up_in_their_input(world: &World) {
    let users = world.busybox();
    let named = |name: &str| {
        let user = pb::user_opt::User::ByName(pb::NamedUserOpt { name: name.into(), input: 1 });
        Some(pb::UserOpt { user: Some(user) })
    };
    let owner = Some(pb::ChownOpt { user: named("ann"), group: named("staff") });
    let owned = Action::Mkfile(Box::new(pb::FileActionMkFile {
        path: "/f".into(),
        owner,
        timestamp: -1,
        ..Default::default()
    }));
    let made = world.run(file(vec![action(0, -1, 0, owned)]), &[&None, &users]).await.unwrap().remove(0);
    let stat = top(&made).dir().join("f").metadata().unwrap();
    assert_eq!((stat.uid(), stat.gid()), (1000, 50));
}

pub(crate) async fn a_failing_action_is_named(world: &World) {
    let op = file(vec![action(0, -1, -1, mkfile("/a", "A")), action(1, -1, 0, rm("/zzz"))]);
    let error = world.run(op, &[&None]).await.unwrap_err();
    assert_eq!(error.message, "lstat /zzz: no such file or directory");
    assert_eq!(error.file_action, Some(1));
}

pub(crate) async fn device_nodes_are_not_opened(world: &World) {
    let node = |root: &Path, name: &str, kind, device| {
        mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o666), device).unwrap();
    };
    // /dev/null: writing to it does no harm, and would succeed.
    let archive = tempfile::tempdir().unwrap();
    node(archive.path(), "null", FileType::CharacterDevice, makedev(1, 3));
    node(archive.path(), "pipe", FileType::Fifo, 0);
    let tar = archive.path().join("nodes.tar");
    let mut pack = Command::new("tar");
    pack.arg("-C").arg(archive.path()).arg("-cf").arg(&tar).args(["null", "pipe"]);
    assert!(pack.status().unwrap().success());
    let source = world.snapshot(|root| std::fs::copy(&tar, root.join("nodes.tar")).map(drop).unwrap());
    for (name, base) in [("null", -1), ("pipe", -1), ("null", 1), ("pipe", 1)] {
        let unpack = Action::Copy(Box::new(pb::FileActionCopy {
            attempt_unpack_docker_compatibility: true,
            ..copy("/nodes.tar", "/")
        }));
        let chain = vec![action(base, 0, -1, unpack), action(2, -1, 0, mkfile(&format!("/{name}"), "data"))];
        let error = world.run(file(chain), &[&source, &world.busybox()]).await.unwrap_err();
        assert_eq!(error.message, format!("mkfile /{name}: not a regular file"));
    }

    // A client's directory is one layer and shown as it is, but for its devices.
    let snapshots = world.worker.layers().snapshots();
    let staged = snapshots.stage(None).unwrap();
    node(staged.fs(), "null", FileType::CharacterDevice, makedev(1, 3));
    let meta = SnapshotMeta::of_type(RecordType::LocalSource, "test");
    let local = Some(snapshots.commit(staged, meta).unwrap());
    let view = world.worker.view(&local).await.unwrap();
    let opened = openat(view.fd(), "null", OFlags::RDONLY, Mode::empty());
    assert_eq!(opened.unwrap_err(), Errno::ACCESS);
}

pub(crate) async fn a_chain_too_deep_for_one_mount_is_still_one_tree(world: &World) {
    let mut result: Ref = None;
    for number in 0..300 {
        let mut actions = vec![action(0, -1, -1, mkfile(&format!("/f{number}"), &number.to_string()))];
        actions.push(match number {
            10..20 => action(1, -1, 0, rm(&format!("/f{}", number - 10))),
            _ => action(1, -1, 0, mkfile("/last", &number.to_string())),
        });
        result = world.run(file(actions), &[&result]).await.unwrap().remove(0);
    }
    assert_eq!(top(&result).layers().len(), 300);
    assert_eq!(world.read(&result, "/f250").await.as_deref(), Some("250"));
    assert_eq!(world.read(&result, "/f15").await.as_deref(), Some("15"));
    assert_eq!(world.read(&result, "/f5").await, None);
    assert_eq!(world.read(&result, "/last").await.as_deref(), Some("299"));
}

pub(crate) async fn merge_and_diff(world: &World) {
    let tree = |files: &[(&str, &str)]| {
        world.snapshot(|root| {
            for (path, text) in files {
                common::write(root, path, text);
            }
        })
    };
    let (a, b) = (tree(&[("a", "A"), ("both", "from a")]), tree(&[("b", "B"), ("both", "from b")]));
    let inputs = [0, 1].map(|input| pb::MergeInput { input }).to_vec();
    let merged = pb::op::Op::Merge(pb::MergeOp { inputs });
    let merged = world.run(merged, &[&a, &b]).await.unwrap().remove(0);
    for (path, text) in [("a", "A"), ("b", "B"), ("both", "from b")] {
        assert_eq!(world.read(&merged, path).await.as_deref(), Some(text));
    }
    let diff = |lower: i64, upper: i64| {
        pb::op::Op::Diff(pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: lower }),
            upper: Some(pb::UpperDiffInput { input: upper }),
        })
    };
    let more = world.run(file(vec![action(0, -1, 0, mkfile("/new", "N"))]), &[&a]).await.unwrap().remove(0);
    let above = world.run(diff(0, 1), &[&a, &more]).await.unwrap().remove(0);
    assert_eq!(top(&above).layers(), [top(&more)], "the layers above are taken as they are");
    assert_eq!(world.run(diff(0, 1), &[&a, &a]).await.unwrap(), [None]);
    assert_eq!(world.run(diff(-1, 0), &[&a]).await.unwrap(), std::slice::from_ref(&a));

    let old = tree(&[("gone", "G"), ("same", "S"), ("d/changed", "1"), ("d/kept", "K"), ("kind/f", "x")]);
    let new = tree(&[
        ("same", "S"),
        ("d/changed", "22"),
        ("d/kept", "K"),
        ("kind", "now a file"),
        ("added/x", "X"),
    ]);
    for path in ["same", "d/kept", "d"] {
        let time = std::time::UNIX_EPOCH + Duration::from_secs(1_000);
        for tree in [&old, &new] {
            std::fs::File::open(top(tree).dir().join(path)).unwrap().set_modified(time).unwrap();
        }
    }
    let changes = world.run(diff(0, 1), &[&old, &new]).await.unwrap().remove(0);
    assert_eq!(layer(&changes), ["added", "added/x", "d", "d/changed", "gone", "kind"]);
    let inputs = [0, 1].map(|input| pb::MergeInput { input }).to_vec();
    let applied =
        world.run(pb::op::Op::Merge(pb::MergeOp { inputs }), &[&old, &changes]).await.unwrap().remove(0);
    assert_eq!(world.read(&applied, "gone").await, None);
    for (path, text) in [("d/changed", "22"), ("d/kept", "K"), ("kind", "now a file"), ("added/x", "X")] {
        assert_eq!(world.read(&applied, path).await.as_deref(), Some(text));
    }
}
