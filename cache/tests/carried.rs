//! What is known of one snapshot's content and carried over to the next.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::Path;

use common::*;
use kiln_cache::contenthash::{
    ContentPath, ContentQuery, content_digest, forget_changed, known_files, record_files,
};
use kiln_cache::{SnapshotRef, Store};
use proptest::prelude::*;

fn digest(snapshot: &SnapshotRef, path: &str) -> blake3::Hash {
    let path = ContentPath { path: path.into(), must_exist: true, ..ContentPath::default() };
    content_digest(Some(snapshot), &ContentQuery { paths: vec![path] }).unwrap()
}

/// Hands what is known of `from` to `to`, which differs from it at `changed`.
fn carry(from: &SnapshotRef, to: &SnapshotRef, changed: &[&str]) {
    let mut known = known_files(from).unwrap();
    forget_changed(&mut known, &changed.iter().map(|path| path.as_bytes()).collect());
    record_files(to, known).unwrap();
}

fn sample(fs: &Path) {
    for name in ["a/f", "a/e/g", "b/f", "top"] {
        write(fs, name, name);
    }
    fs::create_dir(fs.join("empty")).unwrap();
}

#[test]
fn directories_are_looked_into_only_where_something_changed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let first = layer(&store, None, sample);
    let whole = digest(&first, "/");
    let same = layer(&store, None, sample);
    carry(&first, &same, &[]);
    fs::write(same.dir().join("b/f"), "unseen").unwrap();
    fs::write(same.dir().join("top"), "unseen").unwrap();
    assert_eq!(digest(&same, "/"), whole);
    assert_eq!(digest(&same, "/b"), digest(&first, "/b"));

    let next = layer(&store, None, |fs| {
        sample(fs);
        write(fs, "a/e/g", "changed");
        write(fs, "b/f", "unseen");
    });
    carry(&first, &next, &["a/e/g"]);
    let plain = layer(&store, None, |fs| {
        sample(fs);
        write(fs, "a/e/g", "changed");
    });
    assert_eq!(digest(&next, "/"), digest(&plain, "/"));
    let told = store.content_changes(whole.as_bytes(), digest(&next, "/").as_bytes()).unwrap().unwrap();
    assert_eq!(told.iter().map(|change| change.path.as_str()).collect::<Vec<_>>(), ["a/e/g"]);
}

#[test]
fn what_was_made_of_a_digest_is_found_out_again_where_it_is_not_kept() {
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let stores = [open(dirs[0].path()), open(dirs[1].path())];
    let known = layer(&stores[0], None, sample);
    let whole = digest(&known, "/");
    // The other store has never seen what is in these directories.
    let here = layer(&stores[1], None, sample);
    carry(&known, &here, &[]);
    assert_eq!(digest(&here, "/"), whole);
    let other = layer(&stores[1], None, |fs| {
        sample(fs);
        write(fs, "a/new", "n");
    });
    let other = digest(&other, "/");
    let told = stores[1].content_changes(whole.as_bytes(), other.as_bytes()).unwrap().unwrap();
    assert_eq!(told.iter().map(|change| change.path.as_str()).collect::<Vec<_>>(), ["a/new"]);
}

/// Entries by path; of files the content.
type Tree = BTreeMap<String, Option<String>>;

/// Makes a file of that content, or removes what is there; tells which paths are others now.
fn edit(tree: &mut Tree, path: &str, content: Option<String>) -> Vec<String> {
    let gone = |tree: &mut Tree, path: &str| {
        let below = format!("{path}/");
        let there = tree.contains_key(path);
        tree.retain(|other, _| other != path && !other.starts_with(&below));
        there
    };
    let mut changed = Vec::new();
    match content {
        None => {
            if gone(tree, path) {
                changed.push(path.to_owned());
            }
        }
        Some(content) => {
            for (end, _) in path.match_indices('/') {
                let dir = &path[..end];
                if tree.get(dir) != Some(&None) {
                    gone(tree, dir);
                    tree.insert(dir.to_owned(), None);
                    changed.push(dir.to_owned());
                }
            }
            gone(tree, path);
            tree.insert(path.to_owned(), Some(content));
            changed.push(path.to_owned());
        }
    }
    changed
}

fn made(store: &Store, tree: &Tree) -> SnapshotRef {
    layer(store, None, |fs| {
        for (path, content) in tree {
            match content {
                Some(content) => write(fs, path, content),
                None => fs::create_dir_all(fs.join(path)).unwrap(),
            }
        }
    })
}

fn any_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c", "d"]), 1..5)
        .prop_map(|parts| parts.join("/"))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]
    #[test]
    fn what_is_carried_over_is_what_would_be_found(
        first in prop::collection::vec(any_path(), 0..30),
        rounds in prop::collection::vec(prop::collection::vec((any_path(), any::<bool>()), 0..5), 1..4),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let mut tree = Tree::new();
        // No two files are equal, so that none is taken for one that was renamed.
        let mut number = 0..;
        let mut content = || number.next().map(|n: u32| n.to_string());
        for path in first {
            edit(&mut tree, &path, content());
        }
        let mut last = (made(&store, &tree), tree.clone());
        for edits in rounds {
            let before = digest(&last.0, "/");
            let mut changed = HashSet::new();
            for (path, written) in edits {
                changed.extend(edit(&mut tree, &path, written.then(&mut content).flatten()));
            }
            let next = made(&store, &tree);
            carry(&last.0, &next, &changed.iter().map(String::as_str).collect::<Vec<_>>());
            let after = digest(&next, "/");
            prop_assert_eq!(after, digest(&made(&store, &tree), "/"));
            let told = store.content_changes(before.as_bytes(), after.as_bytes()).unwrap().unwrap();
            let told: BTreeSet<_> = told.into_iter().map(|change| change.path).collect();
            let of = |path: &String| (last.1.get(path), tree.get(path));
            let differ = last.1.keys().chain(tree.keys()).filter(|path| of(path).0 != of(path).1);
            prop_assert_eq!(told, differ.cloned().collect::<BTreeSet<_>>());
            last = (next, tree.clone());
        }
    }
}
