//! From the mounts of an exec operation to what the sandbox mounts and what becomes a result.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_cache::{Ref, SnapshotMeta, SnapshotRef, Staged};
use kiln_proto::pb;
use kiln_solver::op::{OpError, Remains};

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

/// What a mount of the operation stands on, and what becomes of it.
#[derive(Default)]
struct Place {
    input: Ref,
    /// Where the step writes on top of that.
    written: Option<Staged>,
    output: Output,
}

#[derive(Default)]
enum Output {
    /// Not a result.
    #[default]
    None,
    /// The input, as it was.
    Unchanged,
    /// What was written on top of the input.
    Layer,
}

/// Everything that is mounted from the store for one step.
pub(super) struct Prepared {
    pub(super) rootfs: RootSource,
    pub(super) readonly_root: bool,
    pub(super) layered: Vec<LayeredMount>,
    pub(super) tmpfs: Vec<Tmpfs>,
    /// Where the step may leave stubs.
    pub(super) written: Vec<Written>,
    /// By number of the mount.
    places: Vec<Place>,
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
        places: Vec::new(),
        held: Vec::new(),
        _caches: caches.clone(),
    };
    let mut caches = caches.iter();
    for mount in &step.op.mounts {
        let dest = PathBuf::from(dest(mount, &step.meta.cwd));
        let place = match mount.mount_type() {
            pb::MountType::Bind => prepared.bind(layers, mount, dest, input(mount, inputs))?,
            pb::MountType::Cache => {
                let Some(cache) = caches.next() else {
                    return Err(OpError::new("cache mount was not opened"));
                };
                prepared.cache(mount, dest, cache.path(), input(mount, inputs))
            }
            pb::MountType::Tmpfs => {
                let size = mount.tmpfs_opt.as_ref().and_then(|options| u64::try_from(options.size).ok());
                prepared.tmpfs.push(Tmpfs { dest, size: size.filter(|size| *size > 0) });
                Place::default()
            }
            pb::MountType::Secret | pb::MountType::Ssh => Place::default(),
        };
        prepared.places.push(place);
    }
    Ok(prepared)
}

impl Prepared {
    fn bind(
        &mut self,
        layers: &Layers,
        mount: &pb::Mount,
        dest: PathBuf,
        input: Ref,
    ) -> Result<Place, OpError> {
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
            let output = if keeps { Output::Unchanged } else { Output::None };
            return Ok(Place { input, written: None, output });
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
            (true, true) => Output::Unchanged,
            (true, false) => Output::Layer,
            (false, _) => Output::None,
        };
        Ok(Place { input, written: Some(staged), output })
    }

    fn cache(&mut self, mount: &pb::Mount, dest: PathBuf, path: &Path, input: Ref) -> Place {
        let selector = Some(clean(&mount.selector)).filter(|path| path != "/").map(PathBuf::from);
        if selector.is_none() {
            self.written.push(Written { dest: dest.clone(), dir: path.to_owned(), lowers: Vec::new() });
        }
        let source = RootSource::Dir(path.to_owned());
        self.layered.push(LayeredMount { dest, source, selector, readonly: mount.readonly });
        // What a cache holds is nobody's result.
        Place {
            input,
            written: None,
            output: if mount.output == -1 { Output::None } else { Output::Unchanged },
        }
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
        let mut results = Vec::new();
        for place in self.places {
            match (place.output, place.written) {
                (Output::None, _) => {}
                (Output::Layer, Some(staged)) => {
                    let made = layers.snapshots().commit(staged, SnapshotMeta::new(description));
                    results.push(Some(made.map_err(|err| OpError::new(err.to_string()))?));
                }
                (Output::Unchanged | Output::Layer, _) => results.push(place.input),
            }
        }
        Ok(results)
    }

    /// What each mount showed, and shows now that the step has failed.
    pub(super) fn hold(self, layers: &Layers, description: &str) -> Remains<Ref> {
        let meta = SnapshotMeta::new(description);
        let look = |Place { input, written, .. }: Place| {
            let state =
                written.map(|staged| layers.snapshots().hold(staged, &meta)).or_else(|| input.clone());
            (input, state)
        };
        let (inputs, states) = self.places.into_iter().map(look).unzip();
        Remains::Run { inputs, states }
    }
}
