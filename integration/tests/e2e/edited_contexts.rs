//! Whatever is done to a context between builds, what comes out is the context.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use kiln_integration::peers::buildctl;
use kiln_integration::tools::run;
use kiln_integration::{Context, Kiln};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

const DOCKERFILE: &str = "FROM scratch\nCOPY tree /\n";
/// The same on top of something.
const ON_A_BASE: &str = "FROM scratch AS base\nCOPY base /\nFROM base\nCOPY tree /\n";

/// What matters of a tree, by path: type, permissions, content or target, and the first of a file's names. Times are no
/// content: a step is not run again for them.
fn listing(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut names = HashMap::new();
    let mut all = BTreeMap::new();
    for path in everything(root) {
        let found = path.symlink_metadata().expect("stat");
        let below = path.strip_prefix(root).expect("below").to_owned();
        let text = match found.file_type() {
            kind if kind.is_dir() => format!("{:o}", found.mode()),
            kind if kind.is_symlink() => format!("-> {:?}", path.read_link().expect("a link")),
            _ => {
                let content = std::fs::read_to_string(&path).expect("content");
                let first = names.entry(found.ino()).or_insert(below.clone());
                format!("{:o} {content:?} {first:?}", found.mode())
            }
        };
        all.insert(below, text);
    }
    all
}

/// All paths below `root`, parents first.
fn everything(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).expect("list") {
            let entry = entry.expect("entry");
            if entry.file_type().expect("type").is_dir() {
                open.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(path).expect("remove"),
        Ok(_) => std::fs::remove_file(path).expect("remove"),
        Err(_) => {}
    }
}

/// What names end in; half of them are no text.
const ANY: &[u8] = b"0123\xe8\xe9\xfe\xff";
/// For clients that take no other names of directories.
const TEXT: &[u8] = b"01234567";

/// One edit somewhere in the tree.
fn edit(random: &mut StdRng, root: &Path, names: &[u8]) {
    let all = everything(root);
    let is_dir = |path: &&PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_dir());
    let is_file = |path: &&PathBuf| path.symlink_metadata().is_ok_and(|found| found.is_file());
    let dirs: Vec<&PathBuf> = all.iter().filter(is_dir).collect();
    let files: Vec<&PathBuf> = all.iter().filter(is_file).collect();
    let dir = dirs.choose(random).map_or(root.to_owned(), |dir| dir.to_path_buf());
    let last = *names.choose(random).expect("some");
    let name = dir.join(OsStr::from_bytes(&[b'n', last]));
    let content = format!("{:08x}", random.random::<u32>());
    match random.random_range(0..9) {
        0 => all.choose(random).into_iter().for_each(|path| remove(path)),
        1 | 2 => {
            remove(&name);
            std::fs::write(&name, content).expect("write");
        }
        3 => {
            remove(&name);
            std::fs::create_dir_all(name.join("in")).expect("make directory");
            std::fs::write(name.join("in/x"), content).expect("write");
        }
        4 => {
            remove(&name);
            symlink(&content, &name).expect("link");
        }
        5 => {
            let Some(file) = files.choose(random).filter(|file| **file != &name) else { return };
            if !name.exists() || name.is_file() {
                remove(&name);
                std::fs::hard_link(file, &name).expect("link");
            }
        }
        6 => {
            let Some(path) = files.iter().chain(&dirs).collect::<Vec<_>>().choose(random).copied() else {
                return;
            };
            let mode = if path.is_dir() { 0o700 } else { 0o600 } | random.random_range(0..0o100);
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        }
        7 => {
            let Some(from) = all.choose(random).filter(|from| !name.starts_with(from)) else { return };
            if !name.exists() {
                std::fs::rename(from, &name).expect("rename");
            }
        }
        _ => {
            let Some(file) = files.choose(random) else { return };
            std::fs::write(file, content).expect("write");
        }
    }
}

/// Edits and builds, with `build` filling the second directory from the first.
fn check(seed: u64, dockerfile: &str, names: &[u8], build: impl Fn(&Path, &Path)) {
    let mut random = StdRng::seed_from_u64(seed);
    let context = Context::new(dockerfile);
    context.file("tree/a/b", "1").file("tree/c", "2");
    context
        .file("base/a/b", "below")
        .file("base/a/base", "3")
        .file("base/c", "below")
        .file("base/d/base", "4");
    let tree = context.path().join("tree");
    let base = match dockerfile {
        ON_A_BASE => listing(&context.path().join("base")),
        _ => BTreeMap::new(),
    };
    for round in 0..16 {
        let out = TempDir::new().expect("temporary directory");
        build(context.path(), out.path());
        let mut expected = base.clone();
        expected.extend(listing(&tree));
        assert_eq!(listing(out.path()), expected, "seed {seed}, round {round}");
        for _ in 0..random.random_range(1..6) {
            edit(&mut random, &tree, names);
        }
    }
}

#[test]
fn edits_of_every_kind_arrive() {
    let mut kiln = Kiln::with_mirror("127.0.0.1:1");
    kiln.start();
    for (seed, dockerfile) in (0..).zip([DOCKERFILE, DOCKERFILE, ON_A_BASE, ON_A_BASE, ON_A_BASE]) {
        check(seed, dockerfile, ANY, |context, out| {
            kiln.build(context, &["-o", &format!("type=local,dest={}", out.display())]).ok();
        });
    }
}

/// buildctl doesn't say which directory it sends: here several take turns.
#[test]
fn directories_without_a_name_do_not_mix() {
    let mut kiln = Kiln::with_mirror("127.0.0.1:1");
    kiln.start();
    if buildctl(&kiln, &[]).is_none() {
        return;
    }
    let build = |context: &Path, out: &Path| {
        let mut command = buildctl(&kiln, &["build", "--frontend=dockerfile.v0"]).expect("named");
        let local = |name: &str| format!("--local={name}={}", context.display());
        command.args([local("context"), local("dockerfile")]);
        run(command.args(["--output", &format!("type=local,dest={}", out.display())]));
    };
    for seed in 0..2 {
        check(seed, DOCKERFILE, TEXT, build);
    }
    // As alike as they can be without being the same.
    let pair = ["one", "two"].map(|word| {
        let context = Context::new(DOCKERFILE);
        (context.file("tree/file", word).path().to_owned(), word, context)
    });
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    // A whole second long ago, and one moment just now.
    for time in [long_ago, SystemTime::now()] {
        for (path, _, _) in &pair {
            let file = std::fs::File::options().append(true).open(path.join("tree/file")).expect("open");
            file.set_modified(time).expect("set time");
        }
        for (path, word, _) in &pair {
            let out = TempDir::new().expect("temporary directory");
            build(path, out.path());
            assert_eq!(std::fs::read_to_string(out.path().join("file")).expect("file"), *word);
        }
    }
}
