//! The merged view against the kernel's own overlay, and resolution of hostile paths.

mod common;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::*;
use kiln_cache::layerview::{LayerView, Node};
use proptest::prelude::*;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// What a tree shows: path to (mode with type, link target or content).
type Listing = BTreeMap<Vec<u8>, (u32, Vec<u8>)>;

fn list_view(view: &LayerView) -> Listing {
    let mut out = Listing::new();
    let mut pending: Vec<Node> = vec![view.root().unwrap()];
    while let Some(node) = pending.pop() {
        let content = match node.kind() {
            rustix::fs::FileType::Symlink => view.read_link(&node).unwrap(),
            rustix::fs::FileType::RegularFile => {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut view.open_file(&node).unwrap(), &mut bytes).unwrap();
                bytes
            }
            _ => Vec::new(),
        };
        out.insert(node.path().to_vec(), (node.stat().st_mode, content));
        for (name, child) in view.children(&node).unwrap() {
            assert!(child.path().ends_with(&name));
            let again = view.child(&node, &name).unwrap().unwrap();
            assert_eq!(format!("{again:?}"), format!("{child:?}"), "one by one as all at once");
            pending.push(child);
        }
    }
    out
}

fn list_dir(root: &Path) -> Listing {
    let mut out = Listing::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(relative) = pending.pop() {
        let path = if relative.as_os_str().is_empty() { root.join(".") } else { root.join(&relative) };
        // In a directory of one layer the kernel lists whiteouts as names that can't be looked up.
        let Ok(stat) = fs::symlink_metadata(&path) else { continue };
        let content = if stat.is_symlink() {
            fs::read_link(&path).unwrap().into_os_string().into_vec()
        } else if stat.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        out.insert(relative.as_os_str().as_bytes().to_vec(), (stat.mode(), content));
        if stat.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                pending.push(relative.join(entry.unwrap().file_name()));
            }
        }
    }
    out
}

/// A read-only overlay that is attached nowhere.
fn mount(dirs_top_first: &[PathBuf]) -> OwnedFd {
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for dir in dirs_top_first {
        rustix::mount::fsconfig_set_string(&context, "lowerdir+", dir.as_path()).unwrap();
    }
    rustix::mount::fsconfig_create(&context).unwrap();
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap()
}

#[derive(Debug, Clone)]
enum Make {
    File(String, u8),
    Dir(String),
    Link(String),
    Whiteout(String),
    Opaque(String),
}

fn make(dir: &Path, what: &Make) {
    let (Make::File(name, _)
    | Make::Dir(name)
    | Make::Link(name)
    | Make::Whiteout(name)
    | Make::Opaque(name)) = what;
    let path = dir.join(name);
    // What can't be made because of what is there already is left out.
    if fs::create_dir_all(path.parent().unwrap()).is_err()
        || (fs::symlink_metadata(&path).is_ok() && !path.is_dir())
    {
        return;
    }
    match what {
        Make::Dir(_) => fs::create_dir_all(&path).unwrap(),
        Make::Opaque(name) => opaque(dir, name),
        _ if path.exists() => {}
        Make::File(_, content) => fs::write(&path, [*content]).unwrap(),
        Make::Link(name) => link(dir, name, "a/b"),
        Make::Whiteout(name) => whiteout(dir, name),
    }
}

fn any_make() -> impl Strategy<Value = Make> {
    let name = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|parts| parts.join("/"));
    (name, 0..8u8, any::<u8>()).prop_map(|(name, kind, content)| match kind {
        0..=2 => Make::File(name, content),
        3 => Make::Dir(name),
        4 => Make::Link(name),
        5 | 6 => Make::Whiteout(name),
        _ => Make::Opaque(name),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]
    #[test]
    fn the_view_shows_what_the_kernel_shows(layers in prop::collection::vec(prop::collection::vec(any_make(), 0..8), 2..5)) {
        if !is_root() {
            return Ok(());
        }
        let dir = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = (0..layers.len()).map(|i| dir.path().join(i.to_string())).collect();
        for (dir, entries) in dirs.iter().zip(&layers) {
            fs::create_dir(dir).unwrap();
            entries.iter().for_each(|entry| make(dir, entry));
        }
        let mounted = mount(&dirs);
        let expected = list_dir(Path::new(&format!("/proc/self/fd/{}", mounted.as_raw_fd())));
        prop_assert_eq!(list_view(&LayerView::of_dirs(dirs).unwrap()), expected);
    }
}

fn tree(make: impl FnOnce(&Path)) -> (tempfile::TempDir, LayerView) {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path());
    let view = LayerView::of_dirs(vec![dir.path().to_owned()]).unwrap();
    (dir, view)
}

fn resolve(view: &LayerView, path: &str, follow: bool) -> Option<String> {
    let node = view.resolve(path.as_bytes(), follow).unwrap()?;
    Some(OsString::from_vec(node.path().to_vec()).into_string().unwrap())
}

#[test]
fn symlinks_are_followed_inside_the_root() {
    let (_dir, view) = tree(|dir| {
        write(dir, "etc/passwd", "inside");
        write(dir, "a/b/file", "");
        link(dir, "abs", "/etc");
        link(dir, "out", "../../../../etc/passwd");
        link(dir, "a/up", "../etc/../a/b");
        link(dir, "a/b/self", ".");
        link(dir, "dangling", "nowhere");
    });
    assert_eq!(resolve(&view, "/abs/passwd", false).as_deref(), Some("etc/passwd"));
    assert_eq!(resolve(&view, "out", true).as_deref(), Some("etc/passwd"));
    assert_eq!(resolve(&view, "out", false).as_deref(), Some("out"));
    assert_eq!(resolve(&view, "a/up/self/self/file", false).as_deref(), Some("a/b/file"));
    assert_eq!(resolve(&view, "../../a/./b//../b/", false).as_deref(), Some("a/b"));
    assert_eq!(resolve(&view, "/", false).as_deref(), Some(""));
    assert_eq!(resolve(&view, "dangling", true), None);
    assert_eq!(resolve(&view, "a/b/file/x", true), None);
    assert_eq!(resolve(&view, "a/b/file/../file", true), None, "a file is no directory");
}

#[test]
fn a_loop_of_symlinks_is_an_error() {
    let (_dir, view) = tree(|dir| {
        link(dir, "a", "b");
        link(dir, "b", "a");
    });
    assert!(view.resolve(b"a", true).unwrap_err().to_string().contains("too many symlinks"));
}

#[test]
fn overlay_attributes_are_not_shown() {
    if !is_root() {
        return;
    }
    let (dir, view) = tree(|dir| opaque(dir, "d"));
    let path = dir.path().join("d");
    rustix::fs::setxattr(&path, "user.note", b"x", rustix::fs::XattrFlags::empty()).unwrap();
    let node = view.resolve(b"d", false).unwrap().unwrap();
    assert_eq!(view.xattrs(&node).unwrap(), [(b"user.note".to_vec(), b"x".to_vec())]);
}
