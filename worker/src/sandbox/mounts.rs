//! Assembles the file system of a sandbox: which mount goes where, in which order.
//!
//! Runs in the sandbox's own mount namespace, before its process. Generic over [`Sys`], so that order and failures
//! are tested without a kernel.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use super::devices::{DEFAULT_LINKS, DEFAULT_NODES};
use super::plan::{DevicePlan, MountPlan, MountSource, RuntimePlan, SandboxPlan, depth};
use super::sys::{Sys, TargetKind};
use super::{MemoryFile, RootSource};

const RDONLY: u32 = MountAttrFlags::MOUNT_ATTR_RDONLY.bits();
const NODEV: u32 = MountAttrFlags::MOUNT_ATTR_NODEV.bits();
const NOSUID: u32 = MountAttrFlags::MOUNT_ATTR_NOSUID.bits();
const NOEXEC: u32 = MountAttrFlags::MOUNT_ATTR_NOEXEC.bits();

/// File systems in memory count in pages; a larger one only makes a limit higher.
const PAGE: usize = 64 << 10;

/// What the host decides about a sandbox's mounts.
#[derive(Debug, Clone, Default)]
pub(super) struct Host {
    /// No cgroup confines devices, so no file system of the sandbox may have working device nodes; the default ones
    /// are bound from the host.
    pub(super) nodev: bool,
    /// The cgroup file systems the sandbox sees.
    pub(super) cgroups: CgroupView,
}

/// The cgroup file systems of a process, as they are shown to it.
#[derive(Debug, Clone, Default)]
pub(super) enum CgroupView {
    /// None on this host.
    #[default]
    None,
    /// Version 2 alone.
    Unified,
    /// Version 1 hierarchies by directory name, with the host directory of the process's group, and links of joint
    /// ones.
    Split(Vec<(String, PathBuf)>),
}

/// A step that failed and why.
#[derive(Debug)]
pub(super) struct MountError {
    pub(super) what: String,
    pub(super) cause: io::Error,
}

trait During<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, MountError>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, MountError> {
        self.map_err(|cause| MountError { what: what(), cause })
    }
}

/// Mounts everything and makes it the root. Returns the mount points that had to be made.
pub(super) fn assemble<S: Sys>(sys: &S, plan: &SandboxPlan, host: &Host) -> Result<Vec<PathBuf>, MountError> {
    sys.make_private().during(|| "making mounts private".into())?;
    let everywhere = if host.nodev { NODEV } else { 0 };

    // Sources come first, while no path of the host is covered.
    let mut sources = Vec::with_capacity(plan.mounts.len());
    for mount in &plan.mounts {
        sources.push(source(sys, mount, everywhere).during(|| format!("mount {}", mount.dest.display()))?);
    }
    let root = tree(sys, &plan.root, everywhere).during(|| "root file system".into())?;
    sys.park(&root).during(|| "root file system".into())?;

    let mut made = Vec::new();
    for (mount, source) in plan.mounts.iter().zip(&sources) {
        let at = || format!("mount {}", mount.dest.display());
        let mut new = Vec::new();
        match source {
            Some(source) => {
                let kind = if sys.is_dir(source).during(at)? { TargetKind::Dir } else { TargetKind::File };
                let target = sys.make_target(&root, &mount.dest, kind, &mut new).during(at)?;
                sys.attach(source, &target).during(at)?;
            }
            None => cgroup_mount(sys, &root, mount, host, &mut new).during(at)?,
        }
        // What was made inside another mount is not in the root.
        let inside = |path: &Path| plan.mounts.iter().any(|m| path != m.dest && path.starts_with(&m.dest));
        made.extend(new.into_iter().filter(|path| !inside(path)));
    }
    devices(sys, &root, plan, host)?;
    for (key, value) in &plan.sysctl {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        sys.write(&root, &path, value.as_bytes()).during(|| format!("sysctl {key}"))?;
    }
    mask(sys, &root, plan)?;

    working_directory(sys, &root, &plan.process.cwd, plan.process.uid, plan.process.gid)?;
    if plan.readonly_root {
        sys.set_attrs(&root, RDONLY, false).during(|| "making the root read-only".into())?;
    }
    sys.pivot(&root).during(|| "changing the root".into())?;
    Ok(made)
}

/// Makes the working directory. It belongs to the user who works there and is part of the result, not a stub.
fn working_directory<S: Sys>(
    sys: &S,
    root: &S::Fd,
    cwd: &Path,
    uid: u32,
    gid: u32,
) -> Result<(), MountError> {
    let at = || format!("working directory {}", cwd.display());
    let mut created = Vec::new();
    sys.make_target(root, cwd, TargetKind::Dir, &mut created).during(at)?;
    for path in &created {
        sys.chown(root, path, uid, gid).during(at)?;
    }
    Ok(())
}

/// Mounts the root and layer stacks for an OCI runtime, in this private mount namespace.
pub(super) fn assemble_for_runtime<S: Sys>(sys: &S, plan: &RuntimePlan) -> Result<Vec<PathBuf>, MountError> {
    sys.make_private().during(|| "making mounts private".into())?;
    for (place, layers, selector) in &plan.layered {
        let at = || format!("mount {}", place.display());
        let mount = selected(sys, layers, selector.as_deref(), 0).during(at)?;
        let target = sys.open_host(place).during(at)?;
        sys.attach(&mount, &target).during(at)?;
    }
    for (place, file) in &plan.files {
        let at = || format!("mount {}", file.dest.display());
        let mount = memory_file(sys, file, 0).during(at)?;
        let target = sys.open_host(place).during(at)?;
        sys.attach(&mount, &target).during(at)?;
    }
    let root = tree(sys, &plan.root, 0).during(|| "root file system".into())?;
    let place = sys.open_host(&plan.rootfs).during(|| "root file system".into())?;
    sys.attach(&root, &place).during(|| "root file system".into())?;
    let mut made = Vec::new();
    for (dest, like) in &plan.targets {
        let at = || format!("mount point {}", dest.display());
        let kind = match like {
            Some(path) if !sys.open_host(path).and_then(|fd| sys.is_dir(&fd)).during(at)? => TargetKind::File,
            _ => TargetKind::Dir,
        };
        sys.make_target(&root, dest, kind, &mut made).during(at)?;
    }
    let (cwd, uid, gid) = &plan.cwd;
    let covered = plan.targets.iter().any(|(dest, _)| cwd.starts_with(dest));
    if !covered {
        working_directory(sys, &root, cwd, *uid, *gid)?;
    }
    sys.unpark().during(|| "parked mounts".into())?;
    Ok(made)
}

/// The detached mount of one entry; `None` for what is not a single mount.
fn source<S: Sys>(sys: &S, mount: &MountPlan, everywhere: u32) -> io::Result<Option<S::Fd>> {
    let attrs = mount.attrs | everywhere;
    match &mount.source {
        MountSource::New { fstype, options } => {
            // A terminal file system is made of device nodes that are confined to it.
            let attrs = if fstype == "devpts" { mount.attrs } else { attrs };
            sys.new_fs(fstype, options, attrs).map(Some)
        }
        MountSource::Bind { path, recursive } => {
            let tree = sys.clone_tree(path, *recursive).map_err(|e| named(path, e))?;
            if attrs != 0 {
                sys.set_attrs(&tree, attrs, *recursive)?;
            }
            Ok(Some(tree))
        }
        MountSource::Layers { source, selector } => {
            selected(sys, source, selector.as_deref(), attrs).map(Some)
        }
        MountSource::File(file) => memory_file(sys, file, attrs).map(Some),
        MountSource::Cgroup => Ok(None),
    }
}

/// A file on a new file system in memory, as a mount of that file alone.
fn memory_file<S: Sys>(sys: &S, file: &MemoryFile, attrs: u32) -> io::Result<S::Fd> {
    const NAME: &str = "file";
    let option = |name: &str, value: String| (name.to_owned(), Some(value));
    let room = file.content.len().next_multiple_of(PAGE) + PAGE;
    let fs = sys.new_fs("tmpfs", &[option("mode", "700".into()), option("size", room.to_string())], 0)?;
    // As with layers, only mounts of this namespace can be copied.
    sys.park(&fs)?;
    let path = Path::new(NAME);
    let at = sys.make_target(&fs, path, TargetKind::File, &mut Vec::new())?;
    sys.write(&fs, path, &file.content)?;
    sys.chown(&fs, path, file.uid, file.gid)?;
    sys.chmod(&fs, path, file.mode)?;
    let copy = sys.clone_at(&at, false)?;
    let program = if file.mode & 0o111 == 0 { NOEXEC } else { 0 };
    sys.set_attrs(&copy, attrs | RDONLY | NOSUID | NODEV | program, false)?;
    Ok(copy)
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// A layer stack, or the part of it that a selector names.
fn selected<S: Sys>(sys: &S, source: &RootSource, selector: Option<&Path>, attrs: u32) -> io::Result<S::Fd> {
    let whole = tree(sys, source, attrs)?;
    let Some(selector) = selector.filter(|s| depth(s) > 0) else { return Ok(whole) };
    // Only mounts of this namespace can be copied, and the copy must not carry the whole tree along.
    sys.park(&whole)?;
    let part = sys.lookup(&whole, selector).map_err(|e| named(selector, e))?;
    let part = sys.clone_at(&part, false)?;
    if attrs != 0 {
        sys.set_attrs(&part, attrs, false)?;
    }
    Ok(part)
}

/// A directory tree as a detached mount.
fn tree<S: Sys>(sys: &S, source: &RootSource, attrs: u32) -> io::Result<S::Fd> {
    let plain = |path: &Path, attrs: u32| {
        let tree = sys.clone_tree(path, false).map_err(|e| named(path, e))?;
        if attrs != 0 {
            sys.set_attrs(&tree, attrs, false)?;
        }
        Ok(tree)
    };
    match source {
        RootSource::Dir(path) => plain(path, attrs),
        RootSource::Overlay { lowers, upper: Some(upper), .. } if lowers.is_empty() => plain(upper, attrs),
        // An overlay needs two directories; one alone is what it would show.
        RootSource::Overlay { lowers, upper: None, .. } if lowers.len() == 1 => {
            plain(&lowers[0], attrs | RDONLY)
        }
        RootSource::Overlay { lowers, upper, work } => {
            let upper = upper.as_deref().zip(work.as_deref());
            sys.overlay(lowers, upper, if upper.is_none() { attrs | RDONLY } else { attrs })
        }
    }
}

fn cgroup_mount<S: Sys>(
    sys: &S,
    root: &S::Fd,
    mount: &MountPlan,
    host: &Host,
    made: &mut Vec<PathBuf>,
) -> io::Result<()> {
    match &host.cgroups {
        CgroupView::None => Ok(()),
        CgroupView::Unified => {
            let view = sys.new_fs("cgroup2", &[], mount.attrs)?;
            let target = sys.make_target(root, &mount.dest, TargetKind::Dir, made)?;
            sys.attach(&view, &target)
        }
        CgroupView::Split(hierarchies) => {
            let options = [("mode".to_owned(), Some("755".to_owned()))];
            let base = sys.new_fs("tmpfs", &options, mount.attrs & !RDONLY)?;
            let target = sys.make_target(root, &mount.dest, TargetKind::Dir, made)?;
            sys.attach(&base, &target)?;
            let mut inside = Vec::new();
            for (name, group) in hierarchies {
                let view = sys.clone_tree(group, false)?;
                sys.set_attrs(&view, mount.attrs, false)?;
                let target = sys.make_target(&base, Path::new(name), TargetKind::Dir, &mut inside)?;
                sys.attach(&view, &target)?;
            }
            if mount.attrs & RDONLY != 0 { sys.set_attrs(&base, RDONLY, false) } else { Ok(()) }
        }
    }
}

fn devices<S: Sys>(sys: &S, root: &S::Fd, plan: &SandboxPlan, host: &Host) -> Result<(), MountError> {
    let at = || "filling /dev".to_owned();
    let own_dev = plan.mounts.iter().any(|m| {
        m.dest == Path::new("/dev")
            && matches!(&m.source, MountSource::New { fstype, .. } if fstype == "tmpfs")
    });
    if own_dev {
        let dev = sys.lookup(root, Path::new("/dev")).during(at)?;
        for (name, major, minor) in DEFAULT_NODES {
            if host.nodev {
                let path = Path::new("/dev").join(name);
                let node = sys.clone_tree(&path, false).during(at)?;
                let mut ours = Vec::new();
                let target = sys.make_target(root, &path, TargetKind::File, &mut ours).during(at)?;
                sys.attach(&node, &target).during(at)?;
            } else {
                let node = DevicePlan {
                    path: Path::new("/dev").join(name),
                    kind: 'c',
                    major: *major,
                    minor: *minor,
                    mode: 0o666,
                    uid: 0,
                    gid: 0,
                };
                sys.make_node(&dev, OsStr::new(name), &node).during(at)?;
            }
        }
        for (name, target) in DEFAULT_LINKS {
            sys.symlink(&dev, name, target).during(at)?;
        }
    }
    for device in &plan.devices {
        let at = || format!("device {}", device.path.display());
        let (Some(parent), Some(name)) = (device.path.parent(), device.path.file_name()) else {
            return Err(io::Error::from(io::ErrorKind::InvalidInput)).during(at);
        };
        let mut ours = Vec::new();
        let dir = sys.make_target(root, parent, TargetKind::Dir, &mut ours).during(at)?;
        match sys.make_node(&dir, name, device) {
            // One of the default nodes.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.during(at)?,
        }
    }
    Ok(())
}

/// Hides masked paths and makes others read-only; what does not exist needs neither.
fn mask<S: Sys>(sys: &S, root: &S::Fd, plan: &SandboxPlan) -> Result<(), MountError> {
    let mut empty: Option<S::Fd> = None;
    let find = |path: &Path| match sys.lookup(root, path) {
        Ok(fd) => Ok(Some(fd)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(e),
    };
    for path in &plan.masked {
        let at = || format!("masking {}", path.display());
        let Some(target) = find(path).during(at)? else { continue };
        if sys.is_dir(&target).during(at)? {
            // One empty directory hides them all.
            let cover = match &empty {
                Some(first) => sys.clone_at(first, false),
                None => sys.new_fs("tmpfs", &[], RDONLY | NODEV | NOSUID | NOEXEC),
            };
            let cover = cover.during(at)?;
            sys.attach(&cover, &target).during(at)?;
            empty.get_or_insert(cover);
        } else {
            let cover = sys.clone_tree(Path::new("/dev/null"), false).during(at)?;
            sys.attach(&cover, &target).during(at)?;
        }
    }
    for path in &plan.readonly {
        let at = || format!("making {} read-only", path.display());
        let Some(target) = find(path).during(at)? else { continue };
        let view = sys.clone_at(&target, true).during(at)?;
        sys.set_attrs(&view, RDONLY, true).during(at)?;
        sys.attach(&view, &target).during(at)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "mounts_tests.rs"]
mod tests;
