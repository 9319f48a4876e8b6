//! What is said of two content digests, and of snapshots that were removed.

mod common;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use common::*;
use kiln_cache::contenthash::{ChangeKind, ContentPath, ContentQuery, content_digest};
use kiln_cache::{PruneOptions, Store};

fn query(path: ContentPath) -> ContentQuery {
    ContentQuery { paths: vec![ContentPath { must_exist: true, ..path }] }
}

fn digest(store: &Store, query: &ContentQuery, make: impl FnOnce(&Path)) -> blake3::Hash {
    content_digest(Some(&layer(store, None, make)), query).unwrap()
}

fn changes(store: &Store, before: blake3::Hash, after: blake3::Hash) -> Vec<(String, ChangeKind)> {
    let found = store.content_changes(before.as_bytes(), after.as_bytes()).unwrap().expect("known");
    found.into_iter().map(|change| (change.path, change.kind)).collect()
}

fn sample(fs: &Path) {
    for name in ["a", "b", "c", "sub/d"] {
        write(fs, &format!("dir/{name}"), name);
    }
    link(fs, "dir/link", "a");
    write(fs, "beside", "x");
}

#[test]
fn each_kind_of_change_is_told_by_path() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let wanted = query(ContentPath { path: "/dir".into(), ..ContentPath::default() });
    let base = digest(&store, &wanted, sample);
    type Case<'a> = (&'a str, &'a dyn Fn(&Path), ChangeKind);
    let cases: [Case<'_>; 9] = [
        ("a", &|dir| write(dir, "a", "other"), ChangeKind::Content),
        (
            "b",
            &|dir| fs::set_permissions(dir.join("b"), fs::Permissions::from_mode(0o755)).unwrap(),
            ChangeKind::Mode(0o644, 0o755),
        ),
        ("b", &|dir| chown(dir.join("b"), Some(7), Some(8)).unwrap(), ChangeKind::Owner((0, 0), (7, 8))),
        ("z", &|dir| fs::rename(dir.join("c"), dir.join("z")).unwrap(), ChangeKind::Renamed("c".into())),
        ("sub/new", &|dir| write(dir, "sub/new", "n"), ChangeKind::Added),
        ("sub/d", &|dir| fs::remove_file(dir.join("sub/d")).unwrap(), ChangeKind::Removed),
        (
            "link",
            &|dir| {
                fs::remove_file(dir.join("link")).unwrap();
                link(dir, "link", "b");
            },
            ChangeKind::Target("a".into(), "b".into()),
        ),
        (
            "a",
            &|dir| {
                fs::remove_file(dir.join("a")).unwrap();
                fs::create_dir(dir.join("a")).unwrap();
            },
            ChangeKind::Type,
        ),
        (
            "a",
            &|dir| {
                rustix::fs::setxattr(dir.join("a"), "user.x", b"1", rustix::fs::XattrFlags::empty()).unwrap();
            },
            ChangeKind::Attributes,
        ),
    ];
    for (path, change, kind) in cases {
        let after = digest(&store, &wanted, |fs| {
            sample(fs);
            change(&fs.join("dir"));
            write(fs, "beside", "no part of it");
        });
        assert_eq!(changes(&store, base, after), [(path.to_owned(), kind)]);
    }
    assert_eq!(changes(&store, base, base), []);
}

#[test]
fn long_lists_share_what_is_the_same_and_go_when_nobody_wants_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let wanted =
        query(ContentPath { path: "/".into(), exclude: vec!["no-part".into()], ..ContentPath::default() });
    let many = |fs: &Path| (0..3000).for_each(|n| write(fs, &format!("d{}/f{n}", n % 50), &n.to_string()));
    let base = digest(&store, &wanted, many);
    let after = digest(&store, &wanted, |fs| {
        many(fs);
        write(fs, "d7/f1007", "changed");
        write(fs, "no-part", "");
    });
    assert_eq!(changes(&store, base, after), [("d7/f1007".to_owned(), ChangeKind::Content)]);
    // What is new may belong to a build that runs.
    store.forget_contents(&HashSet::new()).unwrap();
    assert_eq!(changes(&store, base, after).len(), 1);
    let unknown = blake3::hash(b"never seen");
    assert_eq!(store.content_changes(base.as_bytes(), unknown.as_bytes()).unwrap(), None);
}

#[test]
fn a_removed_snapshot_is_remembered_with_the_rule() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let id = layer(&store, None, sample).id().to_owned();
    assert_eq!(store.eviction(&id).unwrap(), None);
    let options = PruneOptions { filters: vec!["type==regular".into()], ..PruneOptions::default() };
    store.prune(&options, &mut |_| {}).unwrap();
    assert_eq!(store.eviction(&id).unwrap().unwrap().rule, "kiln prune --filter type==regular");
    let id = layer(&store, None, sample).id().to_owned();
    let none = PruneOptions { filters: vec!["type==frontend".into()], ..PruneOptions::default() };
    store.collect_garbage(&[none, PruneOptions::default()], &mut |_| {}).unwrap();
    assert_eq!(store.eviction(&id).unwrap().unwrap().rule, "GC policy 1");
}
