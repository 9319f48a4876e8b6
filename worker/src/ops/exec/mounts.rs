//! From the mounts of an exec operation to what the sandbox mounts and what becomes a result.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_cache::{Ref, SnapshotMeta, SnapshotRef, Staged};
use kiln_proto::pb;
use kiln_solver::op::OpError;

use super::Step;
use super::cache_mounts::{CacheMount, Wanted};
use super::stubs::Written;
use crate::ops::file::root::clean;
use crate::sandbox::spec::Tmpfs;
use crate::sandbox::{LayeredMount, RootSource};
use crate::worker::Layers;

/// Whether a mount is the root file system.
pub(super) fn is_root(mount: &pb::Mount) -> bool {
    mount.dest == "/"
}

/// Absolute place of a mount in the sandbox.
pub(super) fn dest(mount: &pb::Mount, cwd: &str) -> String {
    if mount.dest.starts_with('/') { clean(&mount.dest) } else { clean(&format!("{cwd}/{}", mount.dest)) }
}

/// The cache mounts of a step, in the order of its mounts.
pub(super) fn wanted_caches(step: &Step, inputs: &[Ref]) -> Vec<Wanted> {
    let caches = step.op.mounts.iter().filter(|mount| mount.mount_type() == pb::MountType::Cache);
    caches
        .map(|mount| {
            let options = mount.cache_opt.clone().unwrap_or_default();
            let initial = input(mount, inputs);
            let key = match &initial {
                Some(snapshot) => format!("{}:{}", options.id, snapshot.id()),
                None => options.id.clone(),
            };
            let description = format!("cached mount {} from exec {}", mount.dest, step.command());
            Wanted { key, sharing: options.sharing(), initial, description }
        })
        .collect()
}

fn input(mount: &pb::Mount, inputs: &[Ref]) -> Ref {
    usize::try_from(mount.input).ok().and_then(|index| inputs.get(index).cloned().flatten())
}

/// What a mount of the operation becomes.
enum Output {
    /// Not a result.
    None,
    /// The input, as it was.
    Unchanged(Ref),
    /// What was written on top of the input.
    Layer(Staged),
}

/// Everything that is mounted from the store for one step.
pub(super) struct Prepared {
    pub(super) rootfs: RootSource,
    pub(super) readonly_root: bool,
    pub(super) layered: Vec<LayeredMount>,
    pub(super) tmpfs: Vec<Tmpfs>,
    /// Where the step may leave stubs.
    pub(super) written: Vec<Written>,
    outputs: Vec<Output>,
    /// Staged for writing, but no result.
    discarded: Vec<Staged>,
    /// What is mounted stays while it is.
    held: Vec<SnapshotRef>,
    _caches: Vec<Arc<CacheMount>>,
}

/// Stages layers and chooses sources for all mounts but those that come from the session. Blocking.
pub(super) fn prepare(
    layers: &Layers,
    step: &Step,
    inputs: &[Ref],
    caches: Vec<Arc<CacheMount>>,
) -> Result<Prepared, OpError> {
    let mut prepared = Prepared {
        rootfs: RootSource::Dir(PathBuf::new()),
        readonly_root: false,
        layered: Vec::new(),
        tmpfs: Vec::new(),
        written: Vec::new(),
        outputs: Vec::new(),
        discarded: Vec::new(),
        held: Vec::new(),
        _caches: caches.clone(),
    };
    let mut caches = caches.iter();
    for mount in &step.op.mounts {
        let dest = PathBuf::from(dest(mount, &step.meta.cwd));
        match mount.mount_type() {
            pb::MountType::Bind => prepared.bind(layers, mount, dest, input(mount, inputs))?,
            pb::MountType::Cache => {
                let Some(cache) = caches.next() else {
                    return Err(OpError::new("cache mount was not opened"));
                };
                prepared.cache(mount, dest, cache.path(), input(mount, inputs));
            }
            pb::MountType::Tmpfs => {
                let size = mount.tmpfs_opt.as_ref().and_then(|options| u64::try_from(options.size).ok());
                prepared.tmpfs.push(Tmpfs { dest, size: size.filter(|size| *size > 0) });
            }
            pb::MountType::Secret | pb::MountType::Ssh => {}
        }
    }
    Ok(prepared)
}

impl Prepared {
    fn bind(&mut self, layers: &Layers, mount: &pb::Mount, dest: PathBuf, input: Ref) -> Result<(), OpError> {
        let failed = |err: &dyn std::fmt::Display| OpError::new(format!("mount {}: {err}", mount.dest));
        let chain = layers.chain(&input).map_err(|err| failed(&err))?;
        let lowers: Vec<PathBuf> = chain.iter().rev().map(|layer| layer.dir()).collect();
        self.held.extend(chain);
        let root = is_root(mount);
        let keeps = mount.output != -1;
        let selector = Some(clean(&mount.selector)).filter(|path| path != "/").map(PathBuf::from);
        if root && selector.is_some() {
            return Err(OpError::new("unsupported: selector on the root mount"));
        }
        if !root && mount.readonly {
            let source = match lowers.is_empty() {
                true => RootSource::Dir(layers.empty_dir().to_owned()),
                false => RootSource::Overlay { lowers, upper: None, work: None },
            };
            self.layered.push(LayeredMount { dest, source, selector, readonly: true });
            self.outputs.push(if keeps { Output::Unchanged(input) } else { Output::None });
            return Ok(());
        }
        let staged = layers.snapshots().stage(input.as_ref()).map_err(|err| failed(&err))?;
        let work = staged.work().map_err(|err| failed(&err))?.to_owned();
        let upper = staged.fs().to_owned();
        let inner = selector.as_deref().and_then(|path| path.strip_prefix("/").ok()).unwrap_or(Path::new(""));
        self.written.push(Written {
            dest: dest.clone(),
            dir: upper.join(inner),
            lowers: lowers.iter().map(|lower| lower.join(inner)).collect(),
        });
        let source = RootSource::Overlay { lowers, upper: Some(upper), work: Some(work) };
        if root {
            self.rootfs = source;
            self.readonly_root = mount.readonly;
        } else {
            self.layered.push(LayeredMount { dest, source, selector, readonly: false });
        }
        let output = match (keeps, mount.readonly) {
            (true, true) => {
                self.discarded.push(staged);
                Output::Unchanged(input)
            }
            (true, false) => Output::Layer(staged),
            (false, _) => {
                self.discarded.push(staged);
                Output::None
            }
        };
        self.outputs.push(output);
        Ok(())
    }

    fn cache(&mut self, mount: &pb::Mount, dest: PathBuf, path: &Path, input: Ref) {
        let selector = Some(clean(&mount.selector)).filter(|path| path != "/").map(PathBuf::from);
        if selector.is_none() {
            self.written.push(Written { dest: dest.clone(), dir: path.to_owned(), lowers: Vec::new() });
        }
        let source = RootSource::Dir(path.to_owned());
        self.layered.push(LayeredMount { dest, source, selector, readonly: mount.readonly });
        // What a cache holds is nobody's result.
        self.outputs.push(if mount.output == -1 { Output::None } else { Output::Unchanged(input) });
    }

    /// What is mounted at a place, and which part of it.
    pub(super) fn source(&self, dest: &Path) -> Option<(RootSource, Option<PathBuf>)> {
        if dest == Path::new("/") {
            return Some((self.rootfs.clone(), None));
        }
        let mount = self.layered.iter().find(|mount| mount.dest == dest)?;
        Some((mount.source.clone(), mount.selector.clone()))
    }

    /// Commits what was written; the results in the order of the operation's outputs. Blocking.
    pub(super) fn commit(self, layers: &Layers, description: &str) -> Result<Vec<Ref>, OpError> {
        drop(self.discarded);
        let mut results = Vec::new();
        for output in self.outputs {
            match output {
                Output::None => {}
                Output::Unchanged(input) => results.push(input),
                Output::Layer(staged) => {
                    let made = layers.snapshots().commit(staged, SnapshotMeta::new(description));
                    results.push(Some(made.map_err(|err| OpError::new(err.to_string()))?));
                }
            }
        }
        Ok(results)
    }
}
