//! Layers, stacks, lazy layers, and who keeps whom.

mod common;

use common::*;
use kiln_cache::layerview::LayerView;
use kiln_cache::{LayerBlob, LazyLayer, MutableKind, PruneOptions, RecordType, SnapshotMeta, StoreError};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn lazy(chain: &str, source: &str) -> LazyLayer {
    LazyLayer {
        blob: LayerBlob {
            digest: format!("sha256:blob-of-{chain}"),
            size: 10,
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
            diff_id: format!("sha256:diff-of-{chain}"),
        },
        chain_id: chain.into(),
        sources: vec![source.into()],
    }
}

fn ids(layers: &[kiln_cache::SnapshotRef]) -> Vec<&str> {
    layers.iter().map(|layer| layer.id()).collect()
}

#[test]
fn a_layer_stands_on_its_parent() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, |fs| write(fs, "a", "1"));
    let top = layer(&store, Some(&base), |fs| write(fs, "b", "2"));
    assert_eq!(ids(&top.layers()), [base.id(), top.id()]);
    assert_eq!(top.parent().as_ref(), Some(&base));
    assert!(!top.dir().join("a").exists(), "a layer has only what it adds");
    assert!(top.is_materialized() && !top.is_stack());
    assert!(top.id().len() == 25 && top.id().bytes().all(|b| b.is_ascii_digit() || b.is_ascii_lowercase()));
    assert_eq!(top.meta().description, "test layer");
    assert_eq!(
        std::fs::read_dir(top.dir().parent().unwrap()).unwrap().count(),
        1,
        "no work directory is left"
    );
}

#[test]
fn a_staged_root_looks_like_the_parents() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = store.snapshots().stage(None).unwrap();
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(first.fs()), 0o755);
    std::fs::set_permissions(first.fs(), std::fs::Permissions::from_mode(0o1711)).unwrap();
    if is_root() {
        std::os::unix::fs::chown(first.fs(), Some(7), Some(8)).unwrap();
    }
    let owner = std::fs::metadata(first.fs()).unwrap().uid();
    let first = store.snapshots().commit(first, SnapshotMeta::new("")).unwrap();
    let second = store.snapshots().stage(Some(&first)).unwrap();
    assert_eq!(mode(second.fs()), 0o1711);
    assert_eq!(std::fs::metadata(second.fs()).unwrap().uid(), owner);
}

#[test]
fn a_dropped_stage_is_removed_however_deep_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let staged = store.snapshots().stage(None).unwrap();
    // Deeper than a path can be long, than there are file descriptors, and than a stack would bear.
    let mut fd = rustix::fs::openat(
        rustix::fs::CWD,
        staged.fs(),
        rustix::fs::OFlags::DIRECTORY,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    for _ in 0..5000 {
        rustix::fs::mkdirat(&fd, "deep", rustix::fs::Mode::from(0o000)).unwrap();
        fd = rustix::fs::openat(
            &fd,
            "deep",
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
    }
    drop(fd);
    write(staged.fs(), ".1.removed/x", "a name that the remover might want");
    link(staged.fs(), "out", "/etc");
    drop(staged);
    assert!(is_empty_dir(&dir.path().join("staging")));
    eventually("emptying the trash", || is_empty_dir(&dir.path().join("trash")));
    assert!(std::path::Path::new("/etc/passwd").exists());
}

#[test]
fn handles_to_one_snapshot_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let made = layer(&store, None, |_| {});
    let found = store.snapshots().get(made.id()).unwrap().unwrap();
    assert_eq!(made, found);
    found.set_kv("a", b"1").unwrap();
    found.set_kv("a", b"2").unwrap();
    assert_eq!(made.kv("a").unwrap().as_deref(), Some(&b"2"[..]));
    assert_eq!(made.kv("b").unwrap(), None);
    assert!(store.snapshots().get("nosuchsnapshot").unwrap().is_none());
}

#[test]
fn what_is_held_to_be_looked_into_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let snapshots = store.snapshots();
    let base = layer(&store, None, |_| {});
    let staged = snapshots.stage(Some(&base)).unwrap();
    write(staged.fs(), "seen", "by some");
    let held = snapshots.hold(staged, &SnapshotMeta::new("held"));
    assert_eq!(std::fs::read_to_string(held.dir().join("seen")).unwrap(), "by some");
    assert_eq!(ids(&held.layers()), [base.id(), held.id()]);
    assert!(held.is_materialized());
    assert!(snapshots.get(held.id()).unwrap().is_none(), "nobody is told of it");
    let on_top = snapshots.stage(Some(&held)).unwrap();
    assert!(matches!(snapshots.commit(on_top, SnapshotMeta::new("")), Err(StoreError::Invalid(_))));
    let merged = snapshots.merge(&[base.clone(), held.clone()], SnapshotMeta::new(""));
    assert!(matches!(merged, Err(StoreError::Invalid(_))));
    drop(held);
    assert!(is_empty_dir(&dir.path().join("staging")));
    eventually("emptying the trash", || is_empty_dir(&dir.path().join("trash")));
}

#[test]
fn merging_puts_later_inputs_on_top() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let snapshots = store.snapshots();
    let base = layer(&store, None, |_| {});
    let (left, right) = (layer(&store, Some(&base), |_| {}), layer(&store, Some(&base), |_| {}));
    let merged = snapshots.merge(&[left.clone(), right.clone()], SnapshotMeta::new("merge")).unwrap();
    // The base comes twice and counts in its upper place.
    assert_eq!(ids(&merged.layers()), [left.id(), base.id(), right.id()]);
    assert!(merged.is_stack() && merged.parent().is_none());
    assert_eq!(snapshots.merge(&[left.clone(), left.clone()], SnapshotMeta::new("")).unwrap(), left);
    let on_top = layer(&store, Some(&merged), |_| {});
    assert_eq!(ids(&on_top.layers()), [left.id(), base.id(), right.id(), on_top.id()]);
    let again = snapshots.merge(&[on_top.clone(), base.clone()], SnapshotMeta::new("")).unwrap();
    assert_eq!(ids(&again.layers()), [left.id(), right.id(), on_top.id(), base.id()]);
    assert!(matches!(snapshots.stack(&[merged], SnapshotMeta::new("")), Err(StoreError::Invalid(_))));
    let nothing = snapshots.stack(&[], SnapshotMeta::new("")).unwrap();
    assert!(nothing.layers().is_empty() && nothing.is_materialized());
}

#[test]
fn a_directory_that_was_made_anew_hides_only_what_was_there() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = &open(dir.path());
    let base = layer(store, None, |fs| {
        for name in ["bar/old", "bar/sub/old", "bar/sub/deep/old", "bar/gone/old", "file"] {
            write(fs, name, "base");
        }
    });
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let anew = layer(store, Some(&base), |fs| {
        opaque(fs, "bar");
        write(fs, "bar/new", "anew");
        write(fs, "bar/sub/deep/new", "anew");
        opaque(fs, "elsewhere");
        std::fs::File::open(fs.join("bar")).unwrap().set_modified(time).unwrap();
    });
    let other = layer(store, None, |fs| {
        for name in ["bar/other", "bar/sub/deep/other", "elsewhere/other"] {
            write(fs, name, "other");
        }
    });
    assert_eq!(files(&anew), ["bar/new", "bar/sub/deep/new", "file"]);
    assert_eq!(std::fs::metadata(anew.dir().join("bar")).unwrap().modified().unwrap(), time);
    let merged = store.snapshots().merge(&[other, anew], SnapshotMeta::new("merged")).unwrap();
    assert_eq!(
        files(&merged),
        ["bar/new", "bar/other", "bar/sub/deep/new", "bar/sub/deep/other", "elsewhere/other", "file"]
    );
}

/// All files of a snapshot, by name.
fn files(snapshot: &kiln_cache::SnapshotRef) -> Vec<String> {
    let view = LayerView::of(snapshot).unwrap();
    let mut pending = vec![view.root().unwrap()];
    let mut found = Vec::new();
    while let Some(dir) = pending.pop() {
        for (_, node) in view.children(&dir).unwrap() {
            match node.is_dir() {
                true => pending.push(node),
                false => found.push(String::from_utf8(node.path().to_vec()).unwrap()),
            }
        }
    }
    found.sort();
    found
}

#[test]
fn a_lazy_layer_is_filled_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let snapshots = store.snapshots();
    let base = snapshots.lazy_layer(None, lazy("c1", "a"), SnapshotMeta::new("")).unwrap();
    let top = snapshots.lazy_layer(Some(&base), lazy("c2", "a"), SnapshotMeta::new("")).unwrap();
    assert!(!top.is_filled() && !top.dir().exists());
    assert_eq!(snapshots.by_chain_id("c2").unwrap().unwrap(), top);
    assert!(snapshots.by_chain_id("c3").unwrap().is_none());
    let again = snapshots.lazy_layer(Some(&base), lazy("c2", "b"), SnapshotMeta::new("")).unwrap();
    assert_eq!(again, top);
    assert_eq!(top.lazy().unwrap().unwrap().sources, ["a", "b"]);

    let (one, two) = (snapshots.stage(None).unwrap(), snapshots.stage(None).unwrap());
    write(one.fs(), "f", "first");
    write(two.fs(), "f", "second");
    snapshots.fill(&top, one).unwrap();
    snapshots.fill(&top, two).unwrap();
    assert_eq!(std::fs::read(top.dir().join("f")).unwrap(), b"first");
    assert!(top.is_filled() && !top.is_materialized(), "what is below is still missing");
    snapshots.fill(&base, snapshots.stage(None).unwrap()).unwrap();
    assert!(top.is_materialized());
    let stack = snapshots.stack(&[top], SnapshotMeta::new("")).unwrap();
    assert!(snapshots.fill(&stack, snapshots.stage(None).unwrap()).is_err());
}

#[test]
fn threads_that_announce_the_same_layer_get_one_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let found: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|i| {
                let snapshots = store.snapshots();
                scope.spawn(move || {
                    let layer =
                        snapshots.lazy_layer(None, lazy("c", &i.to_string()), SnapshotMeta::new("")).unwrap();
                    let staged = snapshots.stage(None).unwrap();
                    write(staged.fs(), "f", &i.to_string());
                    snapshots.fill(&layer, staged).unwrap();
                    layer
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(found[0].lazy().unwrap().unwrap().sources.len(), 8);
    assert_eq!(std::fs::read_dir(dir.path().join("snapshots")).unwrap().count(), 1);
}

#[test]
fn a_long_chain_is_dropped_and_found_without_deep_recursion() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let snapshots = store.snapshots();
    let id = {
        let mut top = None;
        for i in 0..20_000 {
            let layer = lazy(&format!("c{i}"), "");
            top = Some(snapshots.lazy_layer(top.as_ref(), layer, SnapshotMeta::new("")).unwrap());
        }
        top.unwrap().id().to_owned()
    };
    let top = snapshots.get(&id).unwrap().unwrap();
    assert_eq!(top.layers().len(), 20_000);
}

#[test]
fn pruning_takes_all_but_what_is_held_and_what_that_stands_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, |fs| write(fs, "a", &"x".repeat(10_000)));
    let base_id = base.id().to_owned();
    let held = layer(&store, Some(&base), |_| {});
    let gone = layer(&store, Some(&base), |fs| write(fs, "b", "2")).id().to_owned();
    drop(base);
    let mut removed = Vec::new();
    store.prune(&PruneOptions::default(), &mut |record| removed.push(record)).unwrap();
    assert_eq!(removed.iter().map(|r| r.id.as_str()).collect::<Vec<_>>(), [gone.as_str()]);
    assert!(removed[0].size > 0 && removed[0].parents == [base_id.clone()]);
    assert!(store.snapshots().get(&gone).unwrap().is_none());
    assert!(held.parent().unwrap().dir().join("a").exists());
    drop(held);
    store.prune(&PruneOptions::default(), &mut |record| removed.push(record)).unwrap();
    assert_eq!(removed.len(), 3);
    assert_eq!(removed[2].id, base_id, "what others stand on goes last");
    assert_eq!(records(&store, &[]), []);
    assert!(is_empty_dir(&dir.path().join("snapshots")));
}

#[test]
fn limits_keep_what_was_used_last() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let made: Vec<String> = (0..4)
        .map(|_| layer(&store, None, |fs| write(fs, "a", &"x".repeat(1 << 20))).id().to_owned())
        .collect();
    drop(store.snapshots().get(&made[0]).unwrap());
    let total = total(&store);
    let options = PruneOptions { max_used_space: total - (1 << 19), ..PruneOptions::default() };
    store.prune(&options, &mut |_| {}).unwrap();
    let left: Vec<bool> = made.iter().map(|id| store.snapshots().get(id).unwrap().is_some()).collect();
    assert_eq!(left, [true, false, true, true]);
    // The reserved space wins over everything else.
    let options = PruneOptions {
        max_used_space: 1,
        reserved_space: total,
        min_free_space: u64::MAX,
        ..PruneOptions::default()
    };
    store.prune(&options, &mut |_| {}).unwrap();
    assert_eq!(records(&store, &[]).len(), 3);
    let options = PruneOptions { min_free_space: u64::MAX, ..PruneOptions::default() };
    let mut freed = 0;
    store.collect_garbage(&[options], &mut |record| freed += record.size).unwrap();
    assert!(freed > 3 << 20);
    assert_eq!(records(&store, &[]), []);
}

#[test]
fn filters_and_ages_narrow_a_prune() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let snapshots = store.snapshots();
    let internal = SnapshotMeta::of_type(RecordType::Internal, "inner, \"quoted\"");
    drop(snapshots.commit(snapshots.stage(None).unwrap(), internal).unwrap());
    drop(store.mutable().open(MutableKind::CacheMount, "k", "cached mount /x").unwrap());
    drop(layer(&store, None, |_| {}));
    let count = |filters: &[&str]| records(&store, filters).len();
    assert_eq!(count(&[]), 3);
    assert_eq!(count(&[""]), 3);
    assert_eq!(count(&["type==exec.cachemount"]), 1);
    assert_eq!(count(&["type==exec.cachemount", "type==internal"]), 2);
    assert_eq!(count(&["type==internal,mutable"]), 0);
    assert_eq!(count(&["mutable"]), 1);
    assert_eq!(count(&["immutable,private"]), 2);
    assert_eq!(count(&["type!=regular"]), 2);
    assert_eq!(count(&["description~=^cached"]), 1);
    assert_eq!(count(&["description==\"inner, \\\"quoted\\\"\""]), 1);
    assert_eq!(count(&["inuse"]), 0);
    assert_eq!(count(&["nosuchfield"]), 0);
    for bad in ["==x", "type=regular", "type==a,", "id~=[", "id==\"x", "a b"] {
        let error = store.usage(&[bad.to_owned()], None).unwrap_err();
        assert!(error.to_string().contains("invalid filter"), "{bad}: {error}");
    }
    let prune = |options: PruneOptions| {
        let mut types = Vec::new();
        store.prune(&options, &mut |r| types.push(r.record_type)).unwrap();
        types.sort();
        types
    };
    let hour = std::time::Duration::from_secs(3600);
    assert!(prune(PruneOptions { keep_duration: hour, all: true, ..Default::default() }).is_empty());
    let old: Vec<_> = store.usage(&[], Some(hour)).unwrap();
    assert!(old.is_empty(), "{old:?}");
    assert_eq!(prune(PruneOptions::default()), ["exec.cachemount", "regular"]);
    assert_eq!(prune(PruneOptions { all: true, ..Default::default() }), ["internal"]);
}

#[test]
fn pruning_while_others_build_never_breaks_a_chain() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
            }
        });
        let builders: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut last: Option<String> = None;
                    for _ in 0..150 {
                        // Goes on from the last result if it is still there, as a cached build does.
                        let parent = last.take().and_then(|id| store.snapshots().get(&id).unwrap());
                        let made = layer(&store, parent.as_ref(), |fs| write(fs, "f", "x"));
                        assert!(made.layers().iter().all(|layer| layer.dir().join("f").exists()));
                        last = Some(made.id().to_owned());
                    }
                })
            })
            .collect();
        let done: Vec<_> = builders.into_iter().map(|builder| builder.join()).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(done.iter().all(|result| result.is_ok()));
    });
    for record in records(&store, &[]) {
        assert!(store.snapshots().get(&record.id).unwrap().is_some());
    }
}
