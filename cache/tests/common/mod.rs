//! Helpers shared by the tests of the store.
#![allow(dead_code)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;

use kiln_cache::{SnapshotMeta, SnapshotRef, Store, StoreOptions, UsageRecord};
use rustix::fs::{FileType, Mode};

pub(crate) const BOOT: &str = "boot-1";

pub(crate) fn options() -> StoreOptions {
    StoreOptions { boot_id: Some(BOOT.to_owned()), ..StoreOptions::default() }
}

pub(crate) fn open(root: &Path) -> Arc<Store> {
    Store::open(root, options()).unwrap()
}

pub(crate) fn open_on_boot(root: &Path, boot: &str) -> Arc<Store> {
    Store::open(root, StoreOptions { boot_id: Some(boot.to_owned()), ..StoreOptions::default() }).unwrap()
}

/// What `kill -9` leaves of an open store: a copy of its files at this moment.
pub(crate) fn crash_image(root: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    // What is in the trash vanishes at any time, here as there.
    std::fs::create_dir(copy.path().join("trash")).unwrap();
    let entries = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap());
    let status = std::process::Command::new("cp")
        .args(["-a", "-t"])
        .arg(copy.path())
        .arg("--")
        .args(entries.filter(|entry| entry.file_name() != "trash").map(|entry| entry.path()))
        .status()
        .unwrap();
    assert!(status.success());
    copy
}

/// Commits a layer that `make` fills.
pub(crate) fn layer(store: &Store, parent: Option<&SnapshotRef>, make: impl FnOnce(&Path)) -> SnapshotRef {
    let snapshots = store.snapshots();
    let staged = snapshots.stage(parent).unwrap();
    make(staged.fs());
    snapshots.commit(staged, SnapshotMeta::new("test layer")).unwrap()
}

pub(crate) fn write(dir: &Path, name: &str, content: &str) {
    let path = dir.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
}

pub(crate) fn link(dir: &Path, name: &str, target: &str) {
    symlink(target, dir.join(name)).unwrap();
}

pub(crate) fn whiteout(dir: &Path, name: &str) {
    let path = dir.join(name);
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

pub(crate) fn opaque(dir: &Path, name: &str) {
    let path = dir.join(name);
    fs::create_dir_all(&path).unwrap();
    rustix::fs::setxattr(&path, "trusted.overlay.opaque", b"y", rustix::fs::XattrFlags::empty()).unwrap();
}

/// False, with a note, where a test can't make device nodes and mounts.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

/// The ledger's records that match, without the store's own.
pub(crate) fn records(store: &Store, filters: &[&str]) -> Vec<UsageRecord> {
    let filters: Vec<String> = filters.iter().map(|filter| filter.to_string()).collect();
    let mut records = store.usage(&filters, None).unwrap();
    records.retain(|record| !["database", "staging"].contains(&record.id.as_str()));
    records
}

/// Bytes in the ledger.
pub(crate) fn total(store: &Store) -> u64 {
    store.usage(&[], None).unwrap().iter().map(|record| record.size).sum()
}

/// Waits for background work whose effect can be seen.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

pub(crate) fn is_empty_dir(path: &Path) -> bool {
    fs::read_dir(path).unwrap().next().is_none()
}
