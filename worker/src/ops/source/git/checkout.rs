//! The files of a commit, as a snapshot.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_cache::{RecordType, Ref, ScratchDir, SnapshotMeta, Staged};
use kiln_solver::op::OpError;
use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, Timespec, Timestamps};

use super::program::{Git, GitError, Output};
use super::refs::Resolved;
use super::remote::Wanted;
use super::repository::Repository;
use crate::worker::Worker;

/// Name of git's own files below a working tree.
const GIT_DIR: &str = ".git";
const READ_DIR: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Where files are put while they are checked out.
struct Tree {
    staged: Staged,
    /// Set if only a part of the files will be the result.
    whole: Option<ScratchDir>,
    /// The index and what else is not part of the result.
    beside: ScratchDir,
}

impl Tree {
    fn path(&self) -> &Path {
        self.whole.as_ref().map_or_else(|| self.staged.fs(), ScratchDir::path)
    }
}

/// One checkout.
pub(super) struct Checkout<'a> {
    pub(super) worker: &'a Arc<Worker>,
    pub(super) wanted: &'a Wanted,
    pub(super) resolved: &'a Resolved,
    pub(super) repository: &'a Repository,
    /// For submodules, which have remotes of their own.
    pub(super) git: &'a Git,
    /// Takes what git says.
    pub(super) said: &'a (dyn Fn(&Output) + Send + Sync),
}

impl Checkout<'_> {
    pub(super) async fn run(self) -> Result<Ref, OpError> {
        let wanted = self.wanted;
        self.snapshot().await.map_err(|err| wanted.failed("checkout", err))
    }

    async fn snapshot(&self) -> Result<Ref, CheckoutError> {
        let store = self.worker.store().clone();
        let part = !self.wanted.subdir.is_empty();
        let tree = self.worker.on_files(move || {
            let staged = store.snapshots().stage(None)?;
            let whole = if part { Some(store.scratch()?) } else { None };
            Ok::<_, kiln_cache::StoreError>(Tree { staged, whole, beside: store.scratch()? })
        });
        let tree = tree.await.map_err(CheckoutError::text)?.map_err(CheckoutError::text)?;
        let keep = self.wanted.keep_git_dir && !part;
        let submodules = !self.wanted.skip_submodules && self.has_submodules().await;
        match keep || submodules {
            true => self.with_git_dir(tree.path(), submodules).await?,
            false => self.files(&tree).await?,
        }
        let time = match self.wanted.commit_times {
            true => Some(self.commit_time().await?),
            false => None,
        };
        let secretive = keep && submodules && self.wanted.shown() != self.wanted.remote;
        let secretive = secretive.then(|| self.wanted.clone());
        let (subdir, layers) = (PathBuf::from(&self.wanted.subdir), self.worker.layers().clone());
        let strip = submodules && !keep;
        let description = format!("git snapshot for {}#{}", self.wanted.shown(), self.wanted.reference);
        let done = self.worker.on_files(move || {
            if strip {
                remove_git_dirs(open_dir(tree.path())?).map_err(CheckoutError::text)?;
            }
            if let Some(wanted) = secretive {
                forget_passwords(&wanted, &tree.path().join(GIT_DIR)).map_err(CheckoutError::text)?;
            }
            if tree.whole.is_some() {
                move_part(tree.path(), &subdir, tree.staged.fs())?;
            }
            if let Some(time) = time {
                set_times(open_dir(tree.staged.fs())?, time).map_err(CheckoutError::text)?;
            }
            let meta = SnapshotMeta::of_type(RecordType::GitCheckout, description);
            layers.snapshots().commit(tree.staged, meta).map(Some).map_err(CheckoutError::text)
        });
        done.await.map_err(CheckoutError::text)?
    }

    /// The commit that is checked out, in words that git understands.
    fn commit(&self) -> String {
        format!("{}^{{commit}}", self.resolved.object)
    }

    async fn has_submodules(&self) -> bool {
        let file = format!("{}:.gitmodules", self.commit());
        self.repository.run(&["cat-file", "-e", &file]).await.is_ok()
    }

    /// Only the files, straight from the shared repository.
    async fn files(&self, tree: &Tree) -> Result<(), CheckoutError> {
        let index = tree.beside.path().join("index");
        let env = [("GIT_WORK_TREE", tree.path().as_os_str()), ("GIT_INDEX_FILE", index.as_os_str())];
        let args = ["read-tree", "--reset", "-u", &self.commit()];
        self.repository.git.run_with(tree.path(), &args, &env).await?;
        Ok(())
    }

    /// The files with a repository of their own, which has the one commit.
    async fn with_git_dir(&self, tree: &Path, submodules: bool) -> Result<(), CheckoutError> {
        let object = &self.resolved.object;
        let format = if object.len() == 64 { "--object-format=sha256" } else { "--object-format=sha1" };
        self.git.run(tree, &["init", "--quiet", "--template=", format]).await?;
        let shared = format!("file://{}", self.repository.path().display());
        let kept = Repository::kept(object);
        let spec = match self.resolved.name.as_deref().filter(|name| name.starts_with("refs/")) {
            Some(name) => format!("+{kept}:{name}"),
            None => kept,
        };
        let fetch = [
            "fetch",
            "--update-head-ok",
            "--depth=1",
            "--no-tags",
            "--no-write-fetch-head",
            "--",
            "origin",
            &spec,
        ];
        self.git.local().with("remote.origin.url", shared).run(tree, &fetch).await?;
        self.git.run(tree, &["checkout", "--quiet", "--detach", &self.commit()]).await?;
        let config = tree.join(GIT_DIR).join("config");
        let written = |err: io::Error| CheckoutError::text(format_args!("write {GIT_DIR}/config: {err}"));
        let before = tokio::fs::read_to_string(&config).await.map_err(written)?;
        // Submodules may be named relative to the remote, and need what lets git in.
        let remote = if submodules { self.wanted.remote.clone() } else { self.wanted.shown() };
        tokio::fs::write(&config, before + &origin(&remote)).await.map_err(written)?;
        if submodules {
            self.submodules(tree).await?;
        }
        Ok(())
    }

    /// Fetches submodules, with no more history than need be where servers can do that.
    async fn submodules(&self, tree: &Path) -> Result<(), CheckoutError> {
        let update = ["submodule", "update", "--init", "--recursive"];
        let shallow = [&update[..], &["--depth=1"]].concat();
        let updated = match self.git.run(tree, &shallow).await {
            Err(GitError::Failed { .. }) => self.git.run(tree, &update).await,
            updated => updated,
        };
        let failed = |err| CheckoutError::text(format_args!("failed to update submodules: {err}"));
        (self.said)(&updated.map_err(failed)?);
        Ok(())
    }

    async fn commit_time(&self) -> Result<i64, CheckoutError> {
        let shown = self.repository.run(&["show", "--no-patch", "--format=%ct", &self.commit()]).await?;
        let time = shown.text();
        let time = time.trim();
        time.parse().map_err(|err| CheckoutError::text(format_args!("commit time {time:?}: {err}")))
    }
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
enum CheckoutError {
    #[error(transparent)]
    Git(#[from] GitError),
    #[error("{0}")]
    Text(String),
}

impl CheckoutError {
    fn text(err: impl Display) -> Self {
        Self::Text(err.to_string())
    }
}

/// A repository's configuration of its remote.
fn origin(remote: &str) -> String {
    let escaped = remote.replace('\\', r"\\").replace('"', "\\\"");
    format!("[remote \"origin\"]\n\turl = \"{escaped}\"\n\tfetch = +refs/heads/*:refs/remotes/origin/*\n")
}

fn open_dir(path: &Path) -> Result<OwnedFd, CheckoutError> {
    rustix::fs::open(path, READ_DIR, Mode::empty())
        .map_err(|err| CheckoutError::text(format_args!("{}: {err}", path.display())))
}

/// Moves what is in a directory of the tree. No part of its path may be a link.
fn move_part(tree: &Path, subdir: &Path, target: &Path) -> Result<(), CheckoutError> {
    let failed =
        |err: io::Error| CheckoutError::text(format_args!("invalid subdir {}: {err}", subdir.display()));
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let from = rustix::fs::openat2(open_dir(tree)?, subdir, READ_DIR, Mode::empty(), inside);
    let from = from.map_err(|err| failed(err.into()))?;
    let target = open_dir(target)?;
    for name in names(from.as_fd()).map_err(failed)? {
        rustix::fs::renameat(&from, &*name, &target, &*name).map_err(|err| failed(err.into()))?;
    }
    Ok(())
}

/// Names in a directory.
fn names(dir: impl AsFd) -> io::Result<Vec<std::ffi::CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// The directory of that name, or `None` if it is something else.
fn subdirectory(dir: impl AsFd, name: &std::ffi::CStr) -> io::Result<Option<OwnedFd>> {
    match rustix::fs::openat(dir, name, READ_DIR, Mode::empty()) {
        Ok(found) => Ok(Some(found)),
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// Removes what git keeps of submodules and of the whole. It never checks out anything of that name.
fn remove_git_dirs(root: OwnedFd) -> io::Result<()> {
    let mut left = vec![root];
    while let Some(dir) = left.pop() {
        for name in names(&dir)? {
            if name.to_bytes() == GIT_DIR.as_bytes() {
                let path = format!("/proc/self/fd/{}/{GIT_DIR}", std::os::fd::AsRawFd::as_raw_fd(&dir));
                match std::fs::symlink_metadata(&path)?.is_dir() {
                    true => std::fs::remove_dir_all(&path)?,
                    false => std::fs::remove_file(&path)?,
                }
            } else if let Some(found) = subdirectory(&dir, &name)? {
                left.push(found);
            }
        }
    }
    Ok(())
}

/// Takes passwords out of what git noted of remotes, those of submodules included.
fn forget_passwords(wanted: &Wanted, git_dir: &Path) -> io::Result<()> {
    let mut left = vec![git_dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                left.push(entry.path());
            } else if kind.is_file() && entry.file_name() == "config" {
                let text = std::fs::read_to_string(entry.path())?;
                std::fs::write(entry.path(), wanted.scrub(&text))?;
            }
        }
    }
    Ok(())
}

/// Gives everything in a directory, and the directory itself, this time of modification.
fn set_times(root: OwnedFd, seconds: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    let mut left = vec![root];
    while let Some(dir) = left.pop() {
        for name in names(&dir)? {
            match subdirectory(&dir, &name)? {
                Some(found) => left.push(found),
                None => rustix::fs::utimensat(&dir, &*name, &times, AtFlags::SYMLINK_NOFOLLOW)?,
            }
        }
        rustix::fs::futimens(&dir, &times)?;
    }
    Ok(())
}
