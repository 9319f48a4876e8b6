//! Blobs and mutable directories.

mod common;

use std::io::{Read, Write};

use common::*;
use kiln_cache::{LayerBlob, MutableKind, PruneOptions, StoreError};

const HI: &str = "sha256:98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4";

#[test]
fn a_blob_is_there_once_it_was_checked() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let blobs = store.blobs();
    let mut writer = blobs.writer().unwrap();
    writer.write_all(b"h").unwrap();
    assert!(!blobs.exists(HI).unwrap());
    writer.write_all(b"i\n").unwrap();
    assert_eq!(writer.size(), 3);
    let blob = writer.commit(Some(HI), Some(3)).unwrap();
    assert_eq!((blob.digest(), blob.size()), (HI, 3));
    assert_eq!(blobs.digests().unwrap(), [HI]);
    let mut text = String::new();
    blobs.get(HI).unwrap().unwrap().open().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi\n");
    assert!(blob.read(2).is_err() && blob.read(3).unwrap() == b"hi\n");
}

#[test]
fn what_does_not_match_is_not_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let write = |bytes: &[u8]| {
        let mut writer = store.blobs().writer().unwrap();
        writer.write_all(bytes).unwrap();
        writer
    };
    let error = write(b"ho\n").commit(Some(HI), Some(3)).err().unwrap();
    assert!(matches!(&error, StoreError::DigestMismatch { expected, .. } if expected == HI), "{error}");
    let error = write(b"hi").commit(Some(HI), Some(3)).err().unwrap();
    assert!(matches!(error, StoreError::SizeMismatch { expected: 3, actual: 2, .. }), "{error}");
    drop(write(b"hi\n"));
    assert!(!store.blobs().exists(HI).unwrap());
    assert!(is_empty_dir(&dir.path().join("staging")) && is_empty_dir(&dir.path().join("content/sha256")));
    for bad in ["", "sha256:", "sha256:../../meta", "sha512:00", &HI.to_uppercase()] {
        assert!(matches!(store.blobs().get(bad), Err(StoreError::InvalidDigest(_))), "{bad}");
    }
}

#[test]
fn a_damaged_blob_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let blob = store.blobs().put(b"hi\n").unwrap();
    std::fs::write(blob.path(), "ha\n").unwrap();
    assert!(matches!(blob.read(10), Err(StoreError::DigestMismatch { .. })));
    std::fs::write(blob.path(), "longer").unwrap();
    assert!(store.blobs().get(HI).unwrap().is_none(), "a torn file is not offered");
    store.blobs().put(b"hi\n").unwrap();
    assert_eq!(store.blobs().get(HI).unwrap().unwrap().read(10).unwrap(), b"hi\n");
}

#[test]
fn labels_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let blobs = store.blobs();
    assert!(blobs.set_label(HI, "a", "b").is_err());
    blobs.put(b"hi\n").unwrap();
    blobs.set_label(HI, "a", "b").unwrap();
    blobs.set_label(HI, "c", "d").unwrap();
    blobs.set_label(HI, "a", "").unwrap();
    blobs.put(b"hi\n").unwrap();
    let labels = blobs.info(HI).unwrap().unwrap().labels;
    assert_eq!(labels.into_iter().collect::<Vec<_>>(), [("c".to_owned(), "d".to_owned())]);
}

#[test]
fn a_held_blob_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let blob = store.blobs().put(b"hi\n").unwrap();
    assert!(!store.blobs().delete(HI).unwrap());
    store.prune(&PruneOptions::default(), &mut |r| panic!("removed {}", r.id)).unwrap();
    drop(blob);
    assert!(store.blobs().delete(HI).unwrap());
    assert!(!store.blobs().delete(HI).unwrap() && !store.blobs().exists(HI).unwrap());
}

#[test]
fn a_layers_blob_goes_with_the_last_snapshot_that_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    drop(store.blobs().put(b"hi\n").unwrap());
    let described =
        LayerBlob { digest: HI.into(), size: 3, media_type: "m".into(), diff_id: "sha256:d".into() };
    let one = layer(&store, None, |_| {});
    let two = layer(&store, None, |_| {});
    one.set_blob("gzip", &described).unwrap();
    two.set_blob("gzip", &described).unwrap();
    assert_eq!(one.blob("gzip").unwrap(), Some(described));
    assert_eq!(one.blob("zstd").unwrap(), None);
    assert_eq!(records(&store, &[]).len(), 2, "the blob counts with its snapshots");
    drop(one);
    store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
    assert!(store.blobs().exists(HI).unwrap());
    drop(two);
    store.prune(&PruneOptions::default(), &mut |_| {}).unwrap();
    assert!(!store.blobs().exists(HI).unwrap());
}

#[test]
fn mutable_directories_keep_their_content_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let dirs = store.mutable();
    let first = dirs.open(MutableKind::CacheMount, "key", "d").unwrap();
    write(first.path(), "f", "1");
    first.set_kv("n", b"v").unwrap();
    let again = dirs.open(MutableKind::CacheMount, "key", "d").unwrap();
    assert_eq!(again.path(), first.path());
    assert_ne!(dirs.open(MutableKind::CacheMount, "other", "d").unwrap().path(), first.path());
    assert_ne!(dirs.open(MutableKind::Local, "key", "d").unwrap().path(), first.path());
    let alone = dirs.open_alone(MutableKind::CacheMount, "key", "d").unwrap();
    assert_ne!(alone.path(), first.path());
    let id = first.id().to_owned();
    drop((first, again, alone));
    let alone = dirs.open_alone(MutableKind::CacheMount, "key", "d").unwrap();
    assert_eq!(alone.id(), id);
    assert!(alone.path().join("f").exists());
    assert_eq!(alone.kv("n").unwrap().as_deref(), Some(&b"v"[..]));
}

#[test]
fn a_removed_directory_stays_with_those_who_have_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let dirs = store.mutable();
    let old = dirs.open(MutableKind::CacheMount, "key", "d").unwrap();
    write(old.path(), "f", "1");
    dirs.remove(MutableKind::CacheMount, "key").unwrap();
    dirs.remove(MutableKind::CacheMount, "key").unwrap();
    let new = dirs.open(MutableKind::CacheMount, "key", "d").unwrap();
    assert!(old.path().join("f").exists() && !new.path().join("f").exists());
    let path = old.path().to_owned();
    drop(old);
    assert!(!path.exists());
    let usage = records(&store, &[]);
    assert_eq!(usage.len(), 1);
    assert!(usage[0].mutable && usage[0].in_use && usage[0].record_type == "exec.cachemount");
}

#[test]
fn the_size_of_a_mutable_directory_follows_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let open = || store.mutable().open(MutableKind::Local, "key", "d").unwrap();
    let size = || records(&store, &[])[0].size;
    drop(open());
    let empty = size();
    let held = open();
    write(held.path(), "f", &"x".repeat(1 << 20));
    assert!(size() >= empty + (1 << 20), "measured while it is held");
    std::fs::remove_file(held.path().join("f")).unwrap();
    drop(held);
    assert_eq!(size(), empty, "and measured again after");
}
