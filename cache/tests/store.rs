//! Opening, closing, crashing, and what is still there afterwards.

mod common;

use std::os::unix::fs::MetadataExt;

use common::*;
use kiln_cache::kv::{Batch, Cf, Kv, RocksKv};
use kiln_cache::{
    KeyStorage, LayerBlob, LazyLayer, MutableKind, PruneOptions, SnapshotMeta, Store, StoreError,
};

#[test]
fn a_second_owner_is_refused_and_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let error = Store::open(dir.path(), options()).err().unwrap();
    assert!(
        matches!(&error, StoreError::Locked { pid: Some(pid), .. } if *pid == std::process::id()),
        "{error}"
    );
    assert!(error.to_string().contains("in use by another daemon"), "{error}");
    drop(first);
    open(dir.path());
}

#[test]
fn an_older_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let top = {
        let store = open(dir.path());
        let top = layer(&store, None, |fs| write(fs, "a", "1"));
        let id = top.id().to_owned();
        drop(top);
        store.close().unwrap();
        id
    };
    {
        let kv = RocksKv::open(&dir.path().join("meta")).unwrap();
        let mut batch = Batch::new();
        batch.put(Cf::Meta, *b"schema", 1u32.to_le_bytes());
        batch.put(Cf::Ops, [b'f'; 33], [1]);
        kv.write(batch).unwrap();
    }
    let store = open(dir.path());
    assert!(store.snapshots().get(&top).unwrap().is_some());
    store.close().unwrap();
    drop(store);
    let kv = RocksKv::open(&dir.path().join("meta")).unwrap();
    assert_eq!(kv.get(Cf::Ops, &[b'f'; 33]).unwrap(), None);
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path()));
    let kv = RocksKv::open(&dir.path().join("meta")).unwrap();
    let mut batch = Batch::new();
    batch.put(Cf::Meta, *b"schema", 99u32.to_le_bytes());
    kv.write(batch).unwrap();
    drop(kv);
    let error = Store::open(dir.path(), options()).err().unwrap();
    assert!(matches!(error, StoreError::Schema { found: 99, .. }), "{error}");
}

#[test]
fn everything_survives_a_clean_restart_and_a_reboot() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (base, top) = {
        let base = layer(&store, None, |fs| write(fs, "a", "1"));
        let top = layer(&store, Some(&base), |fs| write(fs, "b", "2"));
        top.set_kv("name", b"value").unwrap();
        (base.id().to_owned(), top.id().to_owned())
    };
    let blob = store.blobs().put(b"content").unwrap().digest().to_owned();
    store.values().put("git", "url", b"commit").unwrap();
    let record = kiln_cache::KeyRecord { results: vec![top.clone()], name: "".into(), content_key: None };
    let change = kiln_cache::KeyChange::Record { keys: vec![[1; 32]], record: record.into() };
    store.keys().write(&[change]).unwrap();
    store.close().unwrap();
    assert!(matches!(store.snapshots().stage(None), Err(StoreError::Closed)));
    drop(store);

    let store = open_on_boot(dir.path(), "boot-2");
    let found = store.snapshots().get(&top).unwrap().unwrap();
    assert_eq!(found.parent().unwrap().id(), base);
    assert_eq!(found.kv("name").unwrap().as_deref(), Some(&b"value"[..]));
    assert_eq!(std::fs::read(found.dir().join("b")).unwrap(), b"2");
    assert_eq!(store.blobs().get(&blob).unwrap().unwrap().read(100).unwrap(), b"content");
    assert_eq!(store.values().list("git").unwrap(), [("url".to_owned(), b"commit".to_vec())]);
    assert_eq!(store.keys().get(&[1; 32]).unwrap().unwrap().results, [top]);
}

#[test]
fn after_a_kill_nothing_committed_is_lost_and_nothing_unfinished_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let done = layer(&store, None, |fs| write(fs, "a", "1"));
    let blob = store.blobs().put(b"content").unwrap();
    let staged = store.snapshots().stage(Some(&done)).unwrap();
    write(staged.fs(), "deep/er/unfinished", "x");
    let mut writer = store.blobs().writer().unwrap();
    std::io::Write::write_all(&mut writer, b"half").unwrap();
    // A directory that was moved into place, but whose record was not written any more.
    std::fs::create_dir_all(dir.path().join("snapshots/orphan/fs")).unwrap();

    let image = crash_image(dir.path());
    let store = open(image.path());
    assert!(store.snapshots().get(done.id()).unwrap().is_some());
    assert!(store.blobs().exists(blob.digest()).unwrap());
    assert!(is_empty_dir(&image.path().join("staging")));
    assert!(!image.path().join("snapshots/orphan").exists());
    eventually("emptying the trash", || is_empty_dir(&image.path().join("trash")));
}

#[test]
fn the_trash_of_many_things_gives_its_own_room_back() {
    let dir = tempfile::tempdir().unwrap();
    let trash = dir.path().join("trash");
    std::fs::create_dir_all(&trash).unwrap();
    for number in 0..4000 {
        std::fs::create_dir(trash.join(format!("{number:032}"))).unwrap();
    }
    let room = || std::fs::symlink_metadata(&trash).map_or(u64::MAX, |found| found.blocks() * 512);
    // A file system in memory counts nothing for directories.
    let needed = room();
    let store = open(dir.path());
    eventually("emptying the trash", || is_empty_dir(&trash) && (needed == 0 || room() < needed / 2));
    // What is removed later finds its way.
    drop(layer(&store, None, |fs| write(fs, "a", "1")));
    let mut pruned = 0;
    store.prune(&PruneOptions { all: true, ..PruneOptions::default() }, &mut |_| pruned += 1).unwrap();
    assert_eq!(pruned, 1);
    eventually("emptying the trash", || is_empty_dir(&trash));
    assert!(is_empty_dir(&dir.path().join("staging")));
}

#[test]
fn after_a_power_cut_only_what_was_synced_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let old = layer(&store, None, |fs| write(fs, "a", "1")).id().to_owned();
    let old_blob = store.blobs().put(b"old").unwrap().digest().to_owned();
    store.close().unwrap();
    drop(store);

    let store = open(dir.path());
    let on_old =
        layer(&store, Some(&store.snapshots().get(&old).unwrap().unwrap()), |fs| write(fs, "b", "2"));
    let on_new = layer(&store, Some(&on_old), |_| {});
    let blob = store.blobs().put(b"new").unwrap();
    let mount = store.mutable().open(MutableKind::Local, "key", "").unwrap();
    let pulled = LazyLayer {
        blob: LayerBlob {
            digest: "sha256:1".into(),
            size: 1,
            media_type: "m".into(),
            diff_id: "sha256:2".into(),
        },
        chain_id: "sha256:2".into(),
        sources: vec!["docker.io/library/x".into()],
    };
    let lazy = store.snapshots().lazy_layer(None, pulled, SnapshotMeta::new("pulled")).unwrap();
    let staged = store.snapshots().stage(None).unwrap();
    store.snapshots().fill(&lazy, staged).unwrap();
    let image = crash_image(dir.path());

    // The same machine, still running: all is there.
    let same = open(image.path());
    assert!(same.snapshots().get(on_new.id()).unwrap().unwrap().is_materialized());
    drop(same);

    let image = crash_image(dir.path());
    let later = open_on_boot(image.path(), "boot-2");
    assert!(later.snapshots().get(&old).unwrap().is_some());
    assert!(later.blobs().exists(&old_blob).unwrap());
    assert!(later.snapshots().get(on_old.id()).unwrap().is_none());
    assert!(later.snapshots().get(on_new.id()).unwrap().is_none());
    assert!(!image.path().join("snapshots").join(on_old.id()).exists());
    assert!(!later.blobs().exists(blob.digest()).unwrap());
    assert_ne!(later.mutable().open(MutableKind::Local, "key", "").unwrap().id(), mount.id());
    let lazy = later.snapshots().get(lazy.id()).unwrap().unwrap();
    assert!(!lazy.is_filled(), "a pulled layer is kept, to be pulled again");
    assert_eq!(later.snapshots().by_chain_id("sha256:2").unwrap().unwrap(), lazy);
}

#[test]
fn what_a_step_wrote_late_to_its_cache_mount_is_not_taken_for_durable() {
    let dir = tempfile::tempdir().unwrap();
    let quick = kiln_cache::StoreOptions { sync_interval: std::time::Duration::ZERO, ..options() };
    let store = Store::open(dir.path(), quick).unwrap();
    let mount = store.mutable().open(MutableKind::CacheMount, "key", "").unwrap();
    let again = store.mutable().open(MutableKind::CacheMount, "key", "").unwrap();
    drop(again);
    let kept = layer(&store, None, |fs| write(fs, "a", "1"));
    let id_after_power_cut = || {
        let image = crash_image(dir.path());
        let later = open_on_boot(image.path(), "boot-2");
        let synced = later.snapshots().get(kept.id()).unwrap().is_some();
        synced.then(|| later.mutable().open(MutableKind::CacheMount, "key", "").unwrap().id().to_owned())
    };
    eventually("the sync", || id_after_power_cut().is_some());
    assert_ne!(id_after_power_cut().as_deref(), Some(mount.id()), "still open");
    let id = mount.id().to_owned();
    // A daemon that is killed does not take the machine along.
    let image = crash_image(dir.path());
    assert_eq!(open(image.path()).mutable().open(MutableKind::CacheMount, "key", "").unwrap().id(), id);
    drop(mount);
    eventually("the sync after its end", || id_after_power_cut().as_deref() == Some(&id));
}

#[test]
fn the_background_sync_makes_commits_durable() {
    let dir = tempfile::tempdir().unwrap();
    let quick = kiln_cache::StoreOptions { sync_interval: std::time::Duration::ZERO, ..options() };
    let store = Store::open(dir.path(), quick).unwrap();
    let kept = layer(&store, None, |fs| write(fs, "a", "1"));
    eventually("the sync", || {
        let image = crash_image(dir.path());
        open_on_boot(image.path(), "boot-2").snapshots().get(kept.id()).unwrap().is_some()
    });
}

#[test]
fn a_snapshot_that_lost_its_directory_goes_with_all_that_stands_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let ids: Vec<String> = {
        let base = layer(&store, None, |_| {});
        let lost = layer(&store, Some(&base), |_| {});
        let child = layer(&store, Some(&lost), |_| {});
        let beside = layer(&store, Some(&base), |_| {});
        let stack = store.snapshots().stack(&[beside.clone(), child.clone()], SnapshotMeta::new("")).unwrap();
        let on_stack = layer(&store, Some(&stack), |_| {});
        [base, lost, child, beside, stack, on_stack].iter().map(|s| s.id().to_owned()).collect()
    };
    drop(store);
    std::fs::remove_dir_all(dir.path().join("snapshots").join(&ids[1])).unwrap();
    let store = open(dir.path());
    let there: Vec<bool> = ids.iter().map(|id| store.snapshots().get(id).unwrap().is_some()).collect();
    assert_eq!(there, [true, false, false, true, false, false]);
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", dir.path(), "tmpfs", flags, Some(c"size=64m")).unwrap();
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let detach = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0.path(), detach).unwrap();
    }
}

#[test]
fn a_full_disk_fails_what_is_written_and_nothing_else() {
    if !is_root() {
        return;
    }
    // How much room is left decides whether the log or a table is what finds none.
    std::thread::scope(|scope| {
        for room in (0..12).map(|i| i * (200 << 10)) {
            scope.spawn(move || fill_disk_up_to(room));
        }
    });
}

fn fill_disk_up_to(room: u64) {
    let disk = SmallDisk::new();
    let root = disk.0.path().join("store");
    let store = open(&root);
    let before = layer(&store, None, |fs| write(fs, "a", "1"));
    let filler = disk.0.path().join("filler");
    let mut file = std::fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}

    let mut writer = store.blobs().writer().unwrap();
    let full = std::io::Write::write_all(&mut writer, &[1; 1 << 16]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(28));
    drop(writer);
    file.set_len(file.metadata().unwrap().len() - room).unwrap();
    // Until something fails, since the database has written ahead of itself.
    let mut failed = None;
    for i in 0..20_000 {
        if let Err(error) = store.values().put("n", &i.to_string(), &[0; 1000]) {
            failed = Some(error);
            break;
        }
    }
    let failed = failed.expect("the database can't have found room for this").to_string();
    assert!(failed.to_lowercase().contains("no space"), "{failed}");
    assert!(store.snapshots().get(before.id()).unwrap().is_some(), "reading goes on");

    // Nothing at all is free: the store can be measured, and what removes something can be written all the same.
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    assert!(!store.usage(&[], None).unwrap().is_empty());
    let kept = before.id().to_owned();
    drop(before);
    let store = match room % (400 << 10) {
        0 => store,
        // Also by who opens the store only now.
        _ => {
            drop(store);
            while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
            open(&root)
        }
    };
    store.values().delete("n", "1").unwrap();
    assert_eq!(store.values().get("n", "1").unwrap(), None);
    let before = store.snapshots().get(&kept).unwrap().expect("still there");
    let full = store.values().put("n", "full", &[0; 1000]).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(28));

    file.set_len(file.metadata().unwrap().len() - (6 << 20)).unwrap();
    store.values().put("n", "again", b"1").unwrap();
    drop(file);
    std::fs::remove_file(filler).unwrap();
    let after = layer(&store, Some(&before), |fs| write(fs, "b", "2"));
    let id = after.id().to_owned();
    drop((before, after, store));
    let reopened = open(&root);
    assert!(reopened.snapshots().get(&id).unwrap().is_some());
}
