//! The ledger has every byte once, limits hold over all of it, and records of what is gone go, too.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::*;
use kiln_cache::{
    KeyChange, KeyRecord, KeyStorage, LayerBlob, MutableKind, OpRecord, PruneOptions, RecordType,
    SnapshotMeta, SnapshotRef, Store, StoreOptions,
};

/// What `du` says of the store's directory, without what is in the trash.
fn du(root: &Path) -> u64 {
    eventually("emptying the trash", || is_empty_dir(&root.join("trash")));
    let out = std::process::Command::new("du").args(["-s", "-B1"]).arg(root).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    text.split_whitespace().next().unwrap().parse().unwrap()
}

#[track_caller]
fn assert_close(ledger: u64, disk: u64) {
    assert!(ledger.abs_diff(disk) * 50 <= disk, "ledger {ledger}, disk {disk}");
}

/// A snapshot of a mutable directory's files, by links.
fn linked(store: &Store, dir: &Path) -> SnapshotRef {
    let snapshots = store.snapshots();
    let staged = snapshots.stage(None).unwrap();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()) {
        std::fs::hard_link(entry.path(), staged.fs().join(entry.file_name())).unwrap();
    }
    snapshots.commit(staged, SnapshotMeta::of_type(RecordType::LocalSource, "")).unwrap()
}

#[test]
fn every_byte_is_in_the_ledger_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let base = layer(&store, None, |fs| write(fs, "deep/er/a", &"x".repeat(300_000)));
    let top = layer(&store, Some(&base), |fs| {
        write(fs, "b", &"x".repeat(100_000));
        std::fs::hard_link(fs.join("b"), fs.join("c")).unwrap();
    });
    let blob = store.blobs().put(&[1; 50_001]).unwrap();
    let form = LayerBlob {
        digest: blob.digest().into(),
        size: 50_001,
        media_type: "m".into(),
        diff_id: "sha256:d".into(),
    };
    base.set_blob("gzip", &form).unwrap();
    top.set_blob("gzip", &form).unwrap();
    store.blobs().put(b"a blob of its own").unwrap();
    let local = store.mutable().open(MutableKind::Local, "key", "").unwrap();
    write(local.path(), "kept", &"x".repeat(400_000));
    write(local.path(), "replaced", &"x".repeat(200_000));
    let first = linked(&store, local.path());
    assert_close(total(&store), du(dir.path()));
    std::fs::remove_file(local.path().join("replaced")).unwrap();
    write(local.path(), "replaced", &"y".repeat(200_000));
    let second = linked(&store, local.path());
    drop(local);
    assert_close(total(&store), du(dir.path()));
    let staged = store.snapshots().stage(None).unwrap();
    write(staged.fs(), "half", &"x".repeat(500_000));
    assert_close(total(&store), du(dir.path()));
    drop(staged);

    // What goes frees what nothing else holds, and says so.
    let mut removed = 0;
    drop((first, second, base, top, blob));
    let all = [
        PruneOptions { filters: vec!["type==source.local,immutable".into()], ..Default::default() },
        PruneOptions::default(),
    ];
    for options in all {
        let before = total(&store);
        let mut freed = 0;
        store.prune(&options, &mut |record| freed += record.size).unwrap();
        assert!(freed > 0);
        removed += freed;
        assert_close(total(&store), before - freed);
        assert_close(total(&store), du(dir.path()));
    }
    assert!(removed > 1_200_000);
}

#[test]
fn a_file_that_is_linked_after_it_was_measured_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let layer = layer(&store, None, |fs| write(fs, "a", &"x".repeat(1 << 20)));
    assert_close(total(&store), du(dir.path()));
    let flat = linked(&store, &layer.dir());
    layer.remeasure().unwrap();
    assert_close(total(&store), du(dir.path()));
    drop((layer, flat));
}

#[test]
fn what_was_removed_but_still_lies_in_the_trash_counts_as_free() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for _ in 0..8 {
        layer(&store, None, |fs| write(fs, "a", &"x".repeat(4 << 20)));
    }
    let stat = rustix::fs::statvfs(dir.path()).unwrap();
    let free = stat.f_bavail * stat.f_frsize;
    // Other programs write to the same disk meanwhile; they would have to write much to matter.
    let policy = PruneOptions { min_free_space: free + (10 << 20), ..Default::default() };
    store.collect_garbage(&[policy.clone(), policy.clone(), policy], &mut |_| {}).unwrap();
    let left = records(&store, &[]).len();
    assert!(left >= 2, "each of the rules removed as much as the first: {left} left");
}

#[test]
fn reserved_space_alone_is_what_may_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for _ in 0..4 {
        layer(&store, None, |fs| write(fs, "a", &"x".repeat(1 << 20)));
    }
    let reserved_space = total(&store) - (1 << 19);
    store.prune(&PruneOptions { reserved_space, ..Default::default() }, &mut |_| {}).unwrap();
    assert_eq!(records(&store, &[]).len(), 3);
    // Enough free space is no reason to remove anything.
    store.prune(&PruneOptions { min_free_space: 1, ..Default::default() }, &mut |_| {}).unwrap();
    assert_eq!(records(&store, &[]).len(), 3);
}

#[test]
fn cache_mounts_and_local_sources_stay_below_the_budget_and_go_first_above_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    for kind in [MutableKind::CacheMount, MutableKind::Local] {
        let mount = store.mutable().open(kind, "key", "").unwrap();
        write(mount.path(), "f", &"x".repeat(1 << 20));
    }
    layer(&store, None, |fs| write(fs, "a", &"x".repeat(1 << 20)));
    let budget = total(&store) + (1 << 20);
    let mut policies = PruneOptions::defaults(0, budget, 0);
    assert!(policies.iter().all(|policy| policy.max_used_space == budget));
    // As if two months had gone by.
    for policy in &mut policies {
        policy.keep_duration = Duration::ZERO;
    }
    store.collect_garbage(&policies, &mut |record| panic!("removed {record:?}")).unwrap();
    for policy in &mut policies {
        policy.max_used_space = budget - (3 << 19);
    }
    let mut removed = Vec::new();
    store.collect_garbage(&policies, &mut |record| removed.push(record.record_type)).unwrap();
    assert_eq!(removed, ["exec.cachemount"], "the oldest of its kind, although the layer was never used");
}

fn record(result: &str) -> KeyRecord {
    KeyRecord { results: vec![result.to_owned(), String::new()], name: "".into(), content_key: None }
}

/// A store that keeps no notes on what it removed.
fn forgetful(root: &Path) -> Arc<Store> {
    Store::open(root, StoreOptions { eviction_notes: 0, ..options() }).unwrap()
}

fn under(key: [u8; 32], record: KeyRecord) -> KeyChange {
    KeyChange::Record { keys: vec![key], record: record.into() }
}

#[test]
fn keys_go_with_their_results() {
    let dir = tempfile::tempdir().unwrap();
    let store = forgetful(dir.path());
    let keys = store.keys();
    let kept = layer(&store, None, |_| {});
    let gone = layer(&store, None, |_| {}).id().to_owned();
    for i in 0..200 {
        keys.write(&[under([i; 32], record(if i % 2 == 0 { kept.id() } else { &gone }))]).unwrap();
    }
    keys.write(&[under([255; 32], record(""))]).unwrap();
    let known = OpRecord { duration: Duration::from_secs(1), follows_outputs: true };
    keys.write(&[KeyChange::Op { digest: [1; 32], record: known }]).unwrap();
    assert_eq!(store.forget_gone().unwrap(), 0, "nothing was removed");
    store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(store.forget_gone().unwrap(), 100);
    assert_eq!(store.forget_gone().unwrap(), 0);
    for i in 0..200 {
        assert_eq!(keys.get(&[i; 32]).unwrap().is_some(), i % 2 == 0);
    }
    assert!(keys.get(&[255; 32]).unwrap().is_some(), "an empty result is never gone");
    assert_eq!(keys.op(&[1; 32]).unwrap(), Some(known));
    drop(kept);
}

#[test]
fn keys_recorded_while_others_are_forgotten_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = forgetful(dir.path());
    let keys = store.keys();
    std::thread::scope(|scope| {
        let builder = scope.spawn(|| {
            let mut held = Vec::new();
            for i in 0..200u8 {
                // The same keys again and again, as a step does whose result was pruned.
                drop(layer(&store, None, |_| {}));
                let made = layer(&store, None, |_| {});
                keys.write(&[under([i % 50; 32], record(made.id()))]).unwrap();
                held.push(made);
            }
            held
        });
        while !builder.is_finished() {
            store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
            store.forget_gone().unwrap();
        }
        let held = builder.join().unwrap();
        for i in 0..50u8 {
            let found = keys.get(&[i; 32]).unwrap().unwrap_or_else(|| panic!("key {i} was lost"));
            assert_eq!(found.results[0], held[150 + usize::from(i)].id());
        }
    });
}

#[test]
fn a_key_stays_while_it_is_known_why_its_result_went() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let gone = layer(&store, None, |_| {}).id().to_owned();
    store.keys().write(&[under([1; 32], record(&gone))]).unwrap();
    store.prune(&PruneOptions { all: true, ..PruneOptions::default() }, &mut |_| {}).unwrap();
    assert_eq!(store.forget_gone().unwrap(), 0);
    assert!(store.keys().get(&[1; 32]).unwrap().is_some());
    assert_eq!(store.eviction(&gone).unwrap().unwrap().rule, "kiln prune --all");
}

#[test]
fn what_is_known_of_operations_goes_when_nobody_ran_them_for_long() {
    use kiln_cache::kv::{Batch, Cf, Kv, RocksKv};
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let record = OpRecord { duration: Duration::from_secs(1), follows_outputs: true };
    store.keys().write(&[KeyChange::Op { digest: [1; 32], record }]).unwrap();
    drop(layer(&store, None, |_| {}));
    store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
    drop(store);
    let kv = RocksKv::open(&dir.path().join("meta")).unwrap();
    let today = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() / 86_400;
    // A record's version, and its day as field 3 of a protobuf message.
    let written = |ago: u64| {
        let day = u32::try_from(today - ago).unwrap();
        let varint =
            [day & 0x7f | 0x80, day >> 7 & 0x7f | 0x80, day >> 14].map(|part| u8::try_from(part).unwrap());
        [&[1, 3 << 3][..], &varint].concat()
    };
    let mut batch = Batch::new();
    batch.put(Cf::Ops, [2; 32], written(61));
    batch.put(Cf::Ops, [3; 32], written(59));
    kv.write(batch).unwrap();
    drop(kv);
    let store = open(dir.path());
    assert_eq!(store.forget_gone().unwrap(), 1);
    let known = |byte| store.keys().op(&[byte; 32]).unwrap().is_some();
    assert_eq!([known(1), known(2), known(3)], [true, false, true]);
}
