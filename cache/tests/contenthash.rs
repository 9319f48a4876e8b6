//! What content digests see and what they don't.

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, SystemTime};

use common::*;
use kiln_cache::contenthash::{ContentPath, ContentQuery, content_digest, output_digest, record_files};
use kiln_cache::{LayerBlob, LazyLayer, SnapshotMeta, SnapshotRef, Store, StoreError};

fn path(path: &str) -> ContentPath {
    ContentPath { path: path.into(), must_exist: true, ..ContentPath::default() }
}

fn query(paths: impl IntoIterator<Item = ContentPath>) -> ContentQuery {
    ContentQuery { paths: paths.into_iter().collect() }
}

fn digest(snapshot: &SnapshotRef, wanted: ContentPath) -> blake3::Hash {
    content_digest(Some(snapshot), &query([wanted])).unwrap()
}

fn error(snapshot: &SnapshotRef, wanted: ContentPath) -> String {
    content_digest(Some(snapshot), &query([wanted])).unwrap_err().to_string()
}

struct Fixture {
    _dir: tempfile::TempDir,
    store: std::sync::Arc<Store>,
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    Fixture { _dir: dir, store }
}

impl Fixture {
    fn tree(&self, make: impl FnOnce(&Path)) -> SnapshotRef {
        layer(&self.store, None, make)
    }
}

fn sample(fs: &Path) {
    write(fs, "d/f", "x\n");
    write(fs, "d/e/g", "y\n");
    link(fs, "d/l", "e/g");
    write(fs, "other", "z");
}

#[test]
fn times_and_neighbours_do_not_count_but_everything_else_does() {
    let f = fixture();
    let base = digest(&f.tree(sample), path("/d"));
    let same = f.tree(|fs| {
        sample(fs);
        let file = fs::File::open(fs.join("d/f")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        write(fs, "other", "different");
        write(fs, "new", "");
    });
    assert_eq!(digest(&same, path("/d")), base);
    assert_eq!(digest(&same, path("d/")), base, "a path is a path however it is written");
    let mut seen = vec![base];
    type Change = (&'static str, fn(&Path));
    let changes: &[Change] = &[
        ("content", |fs| fs::write(fs.join("d/e/g"), "Y\n").unwrap()),
        ("mode", |fs| fs::set_permissions(fs.join("d/f"), fs::Permissions::from_mode(0o755)).unwrap()),
        ("setuid", |fs| fs::set_permissions(fs.join("d/f"), fs::Permissions::from_mode(0o4644)).unwrap()),
        ("directory mode", |fs| {
            fs::set_permissions(fs.join("d/e"), fs::Permissions::from_mode(0o700)).unwrap()
        }),
        ("own mode", |fs| fs::set_permissions(fs.join("d"), fs::Permissions::from_mode(0o700)).unwrap()),
        ("link target", |fs| {
            fs::remove_file(fs.join("d/l")).unwrap();
            link(fs, "d/l", "e/h");
        }),
        ("link or file", |fs| {
            fs::remove_file(fs.join("d/l")).unwrap();
            write(fs, "d/l", "y\n");
        }),
        ("a new name", |fs| fs::rename(fs.join("d/f"), fs.join("d/ff")).unwrap()),
        ("moved up", |fs| fs::rename(fs.join("d/e/g"), fs.join("d/g")).unwrap()),
        ("an empty file", |fs| write(fs, "d/empty", "")),
        ("an empty directory", |fs| fs::create_dir(fs.join("d/empty")).unwrap()),
        ("an attribute", |fs| {
            rustix::fs::setxattr(fs.join("d/f"), "user.a", b"1", rustix::fs::XattrFlags::empty()).unwrap()
        }),
    ];
    for (what, change) in changes {
        let changed = f.tree(|fs| {
            sample(fs);
            change(fs);
        });
        let digest = digest(&changed, path("/d"));
        assert!(!seen.contains(&digest), "{what} must count");
        seen.push(digest);
    }
    if is_root() {
        let owned = f.tree(|fs| {
            sample(fs);
            chown(fs.join("d/f"), Some(1), None).unwrap();
        });
        assert!(!seen.contains(&digest(&owned, path("/d"))));
    }
}

#[test]
fn a_chain_counts_as_the_tree_that_it_shows() {
    if !is_root() {
        return;
    }
    let f = fixture();
    let base = f.tree(|fs| {
        write(fs, "d/f", "old");
        write(fs, "d/gone", "1");
        write(fs, "replaced/inner", "1");
        write(fs, "emptied/1", "1");
        write(fs, "dir_to_file/x", "1");
    });
    let top = layer(&f.store, Some(&base), |fs| {
        write(fs, "d/f", "new");
        whiteout(fs, "replaced");
        fs::create_dir_all(fs.join("d")).unwrap();
        whiteout(fs, "d/gone");
        opaque(fs, "emptied");
        write(fs, "emptied/2", "2");
        write(fs, "dir_to_file", "2");
    });
    let flat = f.tree(|fs| {
        write(fs, "d/f", "new");
        write(fs, "emptied/2", "2");
        write(fs, "dir_to_file", "2");
    });
    for wanted in [path("/"), path("/d"), path("/emptied"), ContentPath { wildcard: true, ..path("/d*") }] {
        assert_eq!(digest(&top, wanted.clone()), digest(&flat, wanted.clone()), "{wanted:?}");
    }
    assert_eq!(error(&top, path("/d/gone")), "\"/d/gone\": not found");
    assert_eq!(error(&top, path("replaced/inner")), "\"/replaced/inner\": not found");
    let merged = f.store.snapshots().merge(&[base.clone(), flat.clone()], SnapshotMeta::new("")).unwrap();
    assert_eq!(digest(&merged, path("/d/f")), digest(&flat, path("/d/f")));
}

#[test]
fn what_is_missing_is_an_error_or_counts_as_absent() {
    let f = fixture();
    let tree = f.tree(sample);
    assert_eq!(error(&tree, path("/nope")), "\"/nope\": not found");
    let optional = |p: &str| ContentPath { must_exist: false, ..path(p) };
    let absent = digest(&tree, optional("/nope"));
    assert_eq!(digest(&tree, optional("/nope/deeper")), absent);
    assert_ne!(digest(&tree, optional("/other")), absent);
    assert_eq!(content_digest(None, &query([optional("/nope")])).unwrap(), absent);
    let nothing = content_digest(None, &query([path("/a")])).unwrap_err();
    assert!(matches!(nothing, StoreError::PathNotFound(_)));
    let empty = f.tree(|_| {});
    assert_eq!(content_digest(None, &query([path("/")])).unwrap(), digest(&empty, path("/")));
    let stack = f.store.snapshots().stack(&[], SnapshotMeta::new("")).unwrap();
    assert_eq!(digest(&stack, path("/")), digest(&empty, path("/")));
    let listed = ContentPath { exclude: vec!["x".into()], ..path("/nope") };
    assert_eq!(error(&tree, listed), "\"/nope\": not found");
}

#[test]
fn symlinks_count_as_themselves_unless_followed() {
    let f = fixture();
    let make = |content: &str| {
        f.tree(|fs| {
            write(fs, "real/f", content);
            link(fs, "link", "real");
        })
    };
    let (one, two) = (make("1"), make("2"));
    assert_eq!(digest(&one, path("/link")), digest(&two, path("/link")));
    let followed = || ContentPath { follow_symlink: true, ..path("/link") };
    assert_ne!(digest(&one, followed()), digest(&two, followed()));
    assert_eq!(digest(&one, followed()), digest(&one, path("/real")));
    assert_eq!(
        digest(&one, path("/link/f")),
        digest(&one, path("/real/f")),
        "a link on the way is always followed"
    );
    let pattern = |follow| ContentPath { wildcard: true, follow_symlink: follow, ..path("/lin*") };
    assert_eq!(digest(&one, pattern(false)), digest(&two, pattern(false)));
    assert_ne!(digest(&one, pattern(true)), digest(&two, pattern(true)));
    let filtered =
        |follow| ContentPath { follow_symlink: follow, include: vec!["f".into()], ..path("/link") };
    assert_ne!(digest(&one, filtered(true)), digest(&two, filtered(true)));
}

#[test]
fn wildcards_select_by_component_and_take_all_below() {
    let f = fixture();
    let make = |change: fn(&Path)| {
        f.tree(|fs| {
            for name in ["src/a.rs", "src/b.rs", "src/c.txt", "src/sub/d.rs", "docs/a.rs"] {
                write(fs, name, name);
            }
            change(fs);
        })
    };
    let base = make(|_| {});
    let wild = |p: &str| ContentPath { wildcard: true, ..path(p) };
    let differs = |p: &str, change: fn(&Path)| digest(&base, wild(p)) != digest(&make(change), wild(p));
    assert!(!differs("/src/*.rs", |fs| write(fs, "src/c.txt", "changed")));
    assert!(!differs("/src/*.rs", |fs| write(fs, "src/sub/d.rs", "changed")));
    assert!(differs("/src/*.rs", |fs| write(fs, "src/b.rs", "changed")));
    assert!(differs("/src/*.rs", |fs| write(fs, "src/new.rs", "")));
    assert!(differs("/s*", |fs| write(fs, "src/sub/d.rs", "changed")));
    assert!(differs("/*/a.rs", |fs| write(fs, "docs/a.rs", "changed")));
    assert!(!differs("/*/a.rs", |fs| write(fs, "src/b.rs", "changed")));
    assert!(!differs("/none*", |_| {}));
    // Without a wildcard in it the path is plain, whatever the flag says; one match under its own
    // name counts the same.
    assert_eq!(digest(&base, wild("/src/a.rs")), digest(&base, path("/src/a.rs")));
    assert_eq!(error(&base, wild("/src/nope.rs")), "\"/src/nope.rs\": not found");
    assert!(error(&base, wild("/src/[")).contains("["));
    assert_ne!(digest(&base, wild("/src/[a].rs")), digest(&base, wild("/src/[b].rs")));
}

#[test]
fn patterns_narrow_what_counts() {
    let f = fixture();
    let make = |change: fn(&Path)| {
        f.tree(|fs| {
            for name in ["src/a.rs", "src/b.txt", "src/sub/c.rs", "src/target/big", "src/empty/x"] {
                write(fs, name, name);
            }
            change(fs);
        })
    };
    let base = make(|_| {});
    let wanted = |include: &[&str], exclude: &[&str]| ContentPath {
        include: include.iter().map(|s| s.to_string()).collect(),
        exclude: exclude.iter().map(|s| s.to_string()).collect(),
        ..path("/src")
    };
    let differs = |w: ContentPath, change: fn(&Path)| digest(&base, w.clone()) != digest(&make(change), w);
    let rust = || wanted(&["**/*.rs"], &[]);
    assert!(!differs(rust(), |fs| write(fs, "src/b.txt", "changed")));
    assert!(
        !differs(rust(), |fs| write(fs, "src/new/only.txt", "")),
        "a directory without matches does not count"
    );
    assert!(differs(rust(), |fs| write(fs, "src/sub/c.rs", "changed")));
    assert!(differs(rust(), |fs| write(fs, "src/new/x.rs", "")));
    assert!(
        differs(rust(), |fs| fs::set_permissions(fs.join("src/sub"), fs::Permissions::from_mode(0o700))
            .unwrap()),
        "the way to a match counts"
    );
    let without = || wanted(&[], &["target", "**/*.txt"]);
    assert!(!differs(without(), |fs| write(fs, "src/target/more", "")));
    assert!(!differs(without(), |fs| write(fs, "src/b.txt", "changed")));
    assert!(differs(without(), |fs| write(fs, "src/empty/x", "changed")));
    let back = || wanted(&[], &["target", "!target/big"]);
    assert!(differs(back(), |fs| write(fs, "src/target/big", "changed")));
    assert!(!differs(back(), |fs| write(fs, "src/target/small", "new")));
    let both = || wanted(&["sub", "target"], &["**/big"]);
    assert!(!differs(both(), |fs| write(fs, "src/target/big", "changed")));
    assert!(differs(both(), |fs| write(fs, "src/sub/c.rs", "changed")));
    let root = || ContentPath { exclude: vec!["src/target".into()], ..path("/") };
    assert!(!differs(root(), |fs| write(fs, "src/target/big", "changed")));
    assert!(differs(root(), |fs| write(fs, "src/b.txt", "changed")));
    let required = |p: &str| ContentPath { required: vec![p.into()], ..rust() };
    assert_eq!(digest(&base, required("/src/a.rs")).as_bytes().len(), 32);
    assert_eq!(error(&base, required("/src/su")), "\"/src/su\": not found");
    assert!(error(&base, wanted(&["["], &[])).contains("["));
}

#[test]
fn a_trailing_slash_leaves_the_directory_itself_out_of_a_list() {
    let f = fixture();
    let make = |mode| {
        f.tree(|fs| {
            write(fs, "src/a.rs", "1");
            fs::set_permissions(fs.join("src"), fs::Permissions::from_mode(mode)).unwrap();
        })
    };
    let (one, two) = (make(0o755), make(0o700));
    let list = |p: &str| ContentPath { exclude: vec!["none".into()], ..path(p) };
    assert_ne!(digest(&one, list("/src")), digest(&two, list("/src")));
    assert_eq!(digest(&one, list("/src/")), digest(&two, list("/src/")));
}

#[test]
fn several_paths_count_in_order() {
    let f = fixture();
    let tree = f.tree(sample);
    let of = |paths: &[&str]| content_digest(Some(&tree), &query(paths.iter().map(|p| path(p)))).unwrap();
    assert_ne!(of(&["/d", "/other"]), of(&["/other", "/d"]));
    assert_ne!(of(&["/d"]), of(&["/d", "/d"]));
    assert_eq!(of(&["/d", "/other"]), of(&["/d", "/other"]));
}

#[test]
fn answers_are_remembered_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let (id, first) = {
        let tree = layer(&store, None, sample);
        (tree.id().to_owned(), digest(&tree, path("/d")))
    };
    drop(store);
    let store = open(dir.path());
    let tree = store.snapshots().get(&id).unwrap().unwrap();
    // A snapshot never changes; if it does, behind the store's back, that shows what was read again.
    fs::write(tree.dir().join("d/f"), "!\n").unwrap();
    assert_eq!(digest(&tree, path("/d")), first);
    assert_eq!(digest(&tree, path("/d/f")), {
        let same = layer(&store, None, sample);
        digest(&same, path("/d/f"))
    });
}

#[test]
fn digests_that_were_handed_over_are_not_computed_again() {
    let f = fixture();
    let normal = f.tree(sample);
    let handed = f.tree(sample);
    record_files(&handed, [(b"d/f".to_vec(), *blake3::hash(b"x\n").as_bytes())].into()).unwrap();
    fs::write(handed.dir().join("d/f"), "!\n").unwrap();
    assert_eq!(digest(&handed, path("/d")), digest(&normal, path("/d")));
}

#[test]
fn many_and_large_files_are_read_on_several_threads_with_one_answer() {
    let f = fixture();
    let make = |last: &str| {
        f.tree(|fs| {
            for i in 0..300 {
                write(fs, &format!("d/{i}"), &i.to_string().repeat(5000));
            }
            write(fs, "d/999", last);
        })
    };
    assert_eq!(digest(&make("a"), path("/")), digest(&make("a"), path("/")));
    assert_ne!(digest(&make("a"), path("/")), digest(&make("b"), path("/")));
    let broken = make("a");
    fs::remove_dir_all(broken.dir()).unwrap();
    assert!(content_digest(Some(&broken), &query([path("/")])).is_err());
}

#[test]
fn a_deep_tree_does_not_exhaust_the_stack() {
    let f = fixture();
    let deep = "d/".repeat(1500);
    let make = |content: &str| f.tree(|fs| write(fs, &format!("{deep}f"), content));
    assert_ne!(digest(&make("1"), path("/")), digest(&make("2"), path("/")));
}

#[test]
fn an_output_counts_by_what_was_made_and_on_what() {
    if !is_root() {
        return;
    }
    let f = fixture();
    let of = |snapshot: &SnapshotRef| output_digest(Some(snapshot)).unwrap();
    let base = f.tree(|fs| write(fs, "a", "1"));
    let same_base = f.tree(|fs| write(fs, "a", "1"));
    assert_eq!(of(&base), of(&same_base));
    let other_base = f.tree(|fs| write(fs, "a", "2"));
    let on = |parent: &SnapshotRef, make: fn(&Path)| of(&layer(&f.store, Some(parent), make));
    let add: fn(&Path) = |fs| write(fs, "b", "1");
    assert_eq!(on(&base, add), on(&same_base, add));
    let new: fn(&Path) = |fs| fs::create_dir(fs.join("d")).unwrap();
    assert_eq!(on(&base, |fs| opaque(fs, "d")), on(&base, new), "it hides nothing");
    let all = [
        of(&base),
        on(&base, add),
        on(&other_base, add),
        on(&base, |_| {}),
        on(&base, |fs| whiteout(fs, "a")),
        on(&base, |fs| whiteout(fs, "b")),
        on(&base, new),
        on(&base, |fs| fs::set_permissions(fs, fs::Permissions::from_mode(0o700)).unwrap()),
        output_digest(None).unwrap(),
    ];
    let distinct: std::collections::HashSet<_> = all.iter().collect();
    assert_eq!(distinct.len(), all.len());
    let (l, r) = (layer(&f.store, Some(&base), add), layer(&f.store, Some(&base), |fs| write(fs, "c", "1")));
    let merge = |a: &SnapshotRef, b: &SnapshotRef| {
        f.store.snapshots().merge(&[a.clone(), b.clone()], SnapshotMeta::new("")).unwrap()
    };
    let (lr, rl) = (merge(&l, &r), merge(&r, &l));
    assert_ne!(of(&lr), of(&rl));
    assert_eq!(of(&lr), of(&merge(&l, &r)));
    assert_ne!(of(&layer(&f.store, Some(&lr), add)), of(&layer(&f.store, Some(&rl), add)));
    assert_eq!(of(&layer(&f.store, Some(&lr), add)), of(&layer(&f.store, Some(&merge(&l, &r)), add)));
    let other = layer(&f.store, Some(&base), |fs| write(fs, "d", "1"));
    assert_ne!(
        of(&layer(&f.store, Some(&lr), add)),
        of(&layer(&f.store, Some(&merge(&other, &r)), add)),
        "all of a stack counts, not only its top and what that was made on"
    );
}

#[test]
fn an_images_output_is_known_without_its_files_but_its_content_is_not() {
    let f = fixture();
    let lazy = |chain: &str| {
        let blob = LayerBlob {
            digest: format!("sha256:{chain}"),
            size: 1,
            media_type: "m".into(),
            diff_id: format!("sha256:d{chain}"),
        };
        let lazy = LazyLayer { blob, chain_id: chain.into(), sources: vec![] };
        f.store.snapshots().lazy_layer(None, lazy, SnapshotMeta::new("")).unwrap()
    };
    let (one, two) = (lazy("1"), lazy("2"));
    assert_ne!(output_digest(Some(&one)).unwrap(), output_digest(Some(&two)).unwrap());
    let error = content_digest(Some(&one), &query([path("/a")])).unwrap_err();
    assert!(matches!(&error, StoreError::NotMaterialized(id) if id == one.id()), "{error}");
    let staged = f.store.snapshots().stage(None).unwrap();
    write(staged.fs(), "a", "1");
    f.store.snapshots().fill(&one, staged).unwrap();
    assert!(content_digest(Some(&one), &query([path("/a")])).is_ok());
}
