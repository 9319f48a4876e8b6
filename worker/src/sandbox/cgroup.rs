//! Control groups of sandboxes, on hosts with version 2, version 1, both (hybrid) or none.
//!
//! Used by the zygote only, which is single-threaded. A sandbox gets its own version 2 group where that exists; a
//! version 1 controller is joined only for a limit, because moving processes there is slow. Device rules are set
//! once: on a version 1 group the zygote itself lives in, or on the version 2 parent of all confined sandboxes.
//!
//! Directories are named after the daemon (see `owner`), so that what a killed one left behind is recognised and
//! removed.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use super::devices;
use super::limits::{Setting, wanted};
use super::mounts::CgroupView;
use super::owner::Owner;
use super::plan::CgroupPlan;

/// How often, and with which pause, the removal of busy groups is tried at the end.
const CLOSE_TRIES: u32 = 500;
const CLOSE_PAUSE: Duration = Duration::from_millis(2);

/// One hierarchy: where it is mounted, and the directory of this process's group in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    mount: PathBuf,
    own: PathBuf,
}

/// The hierarchies of the host as this process sees them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Layout {
    v2: Option<Hierarchy>,
    /// By controller; `name=systemd` and the like under their name.
    v1: BTreeMap<String, Hierarchy>,
}

impl Layout {
    /// Reads `/proc/self/mountinfo` and `/proc/self/cgroup`.
    fn parse(mountinfo: &str, own: &str) -> Self {
        let mut groups: BTreeMap<&str, &str> = BTreeMap::new();
        for line in own.lines() {
            let mut fields = line.splitn(3, ':');
            if let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) {
                for controller in controllers.split(',') {
                    groups.insert(controller, path);
                }
            }
        }
        let mut layout = Self::default();
        for line in mountinfo.lines() {
            let Some((before, after)) = line.split_once(" - ") else { continue };
            let before: Vec<&str> = before.split(' ').collect();
            let after: Vec<&str> = after.split(' ').collect();
            let (Some(root), Some(mount), Some(&fstype)) = (before.get(3), before.get(4), after.first())
            else {
                continue;
            };
            let hierarchy = |path: &str| {
                // A mount may show only a part of the hierarchy, as in a container.
                let inside = Path::new(path).strip_prefix(root).unwrap_or(Path::new("")).to_owned();
                let own = Path::new(mount).join(inside.strip_prefix("/").unwrap_or(&inside));
                Hierarchy { mount: PathBuf::from(mount), own }
            };
            match fstype {
                "cgroup2" => {
                    if let Some(path) = groups.get("") {
                        layout.v2.get_or_insert_with(|| hierarchy(path));
                    }
                }
                "cgroup" => {
                    for option in after.get(2).unwrap_or(&"").split(',') {
                        if let Some(path) = groups.get(option) {
                            layout.v1.entry(option.to_owned()).or_insert_with(|| hierarchy(path));
                        }
                    }
                }
                _ => {}
            }
        }
        layout
    }
}

/// The groups of one running sandbox.
#[derive(Debug, Default)]
pub(super) struct Placement {
    /// Version 2 group to start the process in.
    pub(super) into: Option<OwnedFd>,
    /// Version 1 `tasks` files the process writes itself to.
    pub(super) tasks: Vec<PathBuf>,
    /// What the process is shown under `/sys/fs/cgroup`.
    pub(super) view: CgroupView,
    /// No cgroup confines its devices although the plan asks for it.
    pub(super) devices_open: bool,
    /// Directories to remove afterwards, children before parents.
    remove: Vec<PathBuf>,
    memory: Option<PathBuf>,
}

impl Placement {
    /// The version 1 part of this one, for a process that joins it. The groups stay whoever's they are.
    pub(super) fn for_another(&self) -> Self {
        Self { tasks: self.tasks.clone(), ..Self::default() }
    }
}

/// All that the zygote knows about control groups.
#[derive(Debug)]
pub(super) struct Cgroups {
    layout: Layout,
    /// The daemon that they are for.
    owner: Owner,
    /// Version 1 device rules hold for this process and its children.
    devices_v1: Option<Hierarchy>,
    /// Version 2 directories that have the device rules.
    confined_v2: HashSet<PathBuf>,
    /// Parents made for our groups, removed at the end.
    parents: Vec<PathBuf>,
    /// Groups that were still busy when their sandbox ended.
    busy: Vec<PathBuf>,
}

impl Cgroups {
    /// Finds the hierarchies, removes what dead daemons left, and confines this process's devices on version 1.
    /// `daemon` is the process id that names our directories, in terms of the mounted `/proc`.
    pub(super) fn open(daemon: u32) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let layout = Layout::parse(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"));
        let mut this = Self {
            layout,
            owner: Owner::new(daemon),
            devices_v1: None,
            confined_v2: HashSet::new(),
            parents: Vec::new(),
            busy: Vec::new(),
        };
        this.sweep();
        this.devices_v1 = this.confine_v1().ok().flatten();
        this
    }

    fn confine_v1(&mut self) -> io::Result<Option<Hierarchy>> {
        let Some(devices) = self.layout.v1.get("devices").cloned() else { return Ok(None) };
        let dir = devices.own.join(self.owner.name());
        self.owner.make(&dir)?;
        self.parents.push(dir.clone());
        fs::write(dir.join("devices.deny"), "a")?;
        for line in devices::v1_lines(devices::CONFINED) {
            fs::write(dir.join("devices.allow"), line)?;
        }
        fs::write(dir.join("tasks"), "0")?;
        Ok(Some(devices))
    }

    /// Makes the groups of one sandbox.
    pub(super) fn place(&mut self, id: &str, plan: &CgroupPlan) -> io::Result<Placement> {
        let mut placement = Placement::default();
        if plan.by_runtime {
            if let (Some(devices), Some(_)) = (&self.devices_v1, &plan.path) {
                placement.tasks.push(devices.own.join("tasks"));
            }
            placement.remove = plan.path.iter().flat_map(|p| self.everywhere(p)).collect();
            return Ok(placement);
        }
        let made = self.fill(id, plan, &mut placement);
        if let Err(error) = made {
            self.release(placement);
            return Err(error);
        }
        Ok(placement)
    }

    fn fill(&mut self, id: &str, plan: &CgroupPlan, placement: &mut Placement) -> io::Result<()> {
        let wanted = wanted(&plan.limits);
        let (on_v1, on_v2): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|w| self.layout.v1.contains_key(w.controller()));
        let needs_v2 = !on_v2.is_empty() || plan.path.is_some();
        let mut confined = !plan.confine_devices;

        match self.v2_group(id, plan, &on_v2) {
            Ok(Some((dir, has_rules))) => {
                placement.remove.push(dir.clone());
                confined |= has_rules;
                for setting in &on_v2 {
                    setting.apply_v2(&dir)?;
                }
                if on_v2.iter().any(|s| s.controller() == "memory") {
                    placement.memory = Some(dir.join("memory.events"));
                }
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                placement.into = Some(rustix::fs::open(&dir, flags, Mode::empty())?);
            }
            Ok(None) if on_v2.is_empty() => {}
            Ok(None) => {
                let names: Vec<_> = on_v2.iter().map(Setting::controller).collect();
                return Err(io::Error::other(format!(
                    "no cgroup controller for limits: {}",
                    names.join(", ")
                )));
            }
            // Without a limit to enforce, a group of its own is a convenience only.
            Err(_) if !needs_v2 => {}
            Err(error) => return Err(error),
        }

        // A path asked for by name means all of its limits, whatever they are.
        let mut controllers: Vec<String> = on_v1.iter().map(|s| s.controller().to_owned()).collect();
        if plan.path.is_some() {
            controllers.extend(self.layout.v1.keys().filter(|c| *c != "devices").cloned());
        }
        controllers.sort();
        controllers.dedup();
        let mut done = HashSet::new();
        for controller in &controllers {
            let hierarchy = self.layout.v1[controller].clone();
            let dir = match &plan.path {
                Some(path) => hierarchy.mount.join(relative(path)),
                None => hierarchy.own.join(self.owner.name()).join(id),
            };
            if done.insert(dir.clone()) {
                for parent in missing_parents(&dir, &hierarchy.mount) {
                    self.owner.make(&parent)?;
                    inherit_cpuset(&parent)?;
                    if plan.path.is_none() && parent != dir {
                        self.parents.push(parent.clone());
                    }
                }
                placement.remove.push(dir.clone());
                placement.tasks.push(dir.join("tasks"));
            }
            for setting in on_v1.iter().filter(|s| s.controller() == controller) {
                setting.apply_v1(&dir)?;
            }
            if controller == "memory" && plan.limits.memory.is_some() {
                placement.memory = Some(dir.join("memory.oom_control"));
            }
        }

        if let Some(devices) = &self.devices_v1 {
            confined = true;
            if !plan.confine_devices {
                placement.tasks.push(devices.own.join("tasks"));
            }
        }
        placement.devices_open = !confined;
        placement.view = self.view(&placement.tasks);
        Ok(())
    }

    /// The version 2 group of a sandbox, and whether the device rules hold in it.
    fn v2_group(
        &mut self,
        id: &str,
        plan: &CgroupPlan,
        limits: &[Setting],
    ) -> io::Result<Option<(PathBuf, bool)>> {
        let Some(v2) = self.layout.v2.clone() else { return Ok(None) };
        let rules = plan.confine_devices && self.devices_v1.is_none();
        let mut controllers: Vec<&str> = limits.iter().map(Setting::controller).collect();
        controllers.sort_unstable();
        controllers.dedup();
        if let Some(path) = &plan.path {
            let dir = v2.mount.join(relative(path));
            for parent in missing_parents(&dir, &v2.mount) {
                self.owner.make(&parent)?;
            }
            enable(&dir, &v2.mount, &controllers)?;
            let has_rules = rules && self.attach(&dir).is_ok();
            return Ok(Some((dir, has_rules)));
        }
        // Beneath our own group first, where the daemon's own limits hold as well. A group with processes cannot hand
        // controllers down, though; then beside it, at the top.
        let mut result = Err(io::Error::other("no place for a cgroup"));
        let kind = if rules { "confined" } else { "open" };
        for base in [v2.own.clone(), v2.mount.clone()] {
            let parent = base.join(self.owner.name()).join(kind);
            let dir = parent.join(id);
            result = self.v2_beneath(&base, &parent, &dir, &controllers, rules);
            if let Ok(has_rules) = result {
                return Ok(Some((dir, has_rules)));
            }
            let _ = fs::remove_dir(&dir);
            if base == v2.mount {
                break;
            }
        }
        result.map(|_| None)
    }

    fn v2_beneath(
        &mut self,
        base: &Path,
        parent: &Path,
        dir: &Path,
        controllers: &[&str],
        rules: bool,
    ) -> io::Result<bool> {
        for missing in missing_parents(parent, base) {
            self.owner.make(&missing)?;
            self.parents.push(missing);
        }
        let has_rules = rules && (self.confined_v2.contains(parent) || self.attach(parent).is_ok());
        if has_rules {
            self.confined_v2.insert(parent.to_owned());
        }
        self.owner.make(dir)?;
        enable(dir, base, controllers)?;
        Ok(has_rules)
    }

    fn attach(&self, dir: &Path) -> io::Result<()> {
        let fd = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        devices::attach_v2(fd.as_fd(), devices::CONFINED)
    }

    fn view(&self, joined: &[PathBuf]) -> CgroupView {
        if self.layout.v1.is_empty() {
            return if self.layout.v2.is_some() { CgroupView::Unified } else { CgroupView::None };
        }
        let mut seen = HashSet::new();
        let mut list = Vec::new();
        for (controller, hierarchy) in &self.layout.v1 {
            let Some(name) = hierarchy.mount.file_name().and_then(|n| n.to_str()) else { continue };
            if !seen.insert(hierarchy.mount.clone()) {
                continue;
            }
            let group = match joined.iter().find(|t| t.starts_with(&hierarchy.mount)) {
                Some(tasks) => tasks.parent().unwrap_or(&hierarchy.own).to_owned(),
                None if controller == "devices" && self.devices_v1.is_some() => {
                    hierarchy.own.join(self.owner.name())
                }
                None => hierarchy.own.clone(),
            };
            list.push((name.to_owned(), group));
        }
        CgroupView::Split(list)
    }

    /// A path in every hierarchy.
    fn everywhere(&self, path: &Path) -> Vec<PathBuf> {
        let all = self.layout.v1.values().chain(&self.layout.v2);
        let mut dirs: Vec<_> = all.map(|h| h.mount.join(relative(path))).collect();
        dirs.sort();
        dirs.dedup();
        dirs
    }

    /// Whether the device rules hold for every process the zygote starts.
    pub(super) fn confines_all(&self) -> bool {
        self.devices_v1.is_some()
    }

    /// Whether the kernel killed something for its memory limit.
    pub(super) fn oom_killed(placement: &Placement) -> bool {
        let Some(file) = &placement.memory else { return false };
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().filter_map(|l| l.strip_prefix("oom_kill ")).any(|n| n.trim() != "0")
    }

    /// Removes the groups of a sandbox whose processes are gone.
    pub(super) fn release(&mut self, placement: Placement) {
        self.busy.extend(placement.remove);
        self.retry();
    }

    /// Tries again what was busy. True when something is left to try.
    pub(super) fn retry(&mut self) -> bool {
        self.busy.retain(|dir| match fs::remove_dir(dir) {
            Ok(()) => false,
            Err(e) => e.raw_os_error() == Some(libc::EBUSY),
        });
        !self.busy.is_empty()
    }

    /// Leaves and removes everything, at the end of the daemon.
    pub(super) fn close(&mut self) {
        if let Some(devices) = &self.devices_v1 {
            let _ = fs::write(devices.own.join("tasks"), "0");
        }
        // A group stays busy for a moment after its last process was waited for.
        self.busy.extend(self.parents.drain(..).rev());
        for _ in 0..CLOSE_TRIES {
            if !self.retry() {
                break;
            }
            std::thread::sleep(CLOSE_PAUSE);
        }
    }

    /// Removes the groups of daemons that are gone.
    fn sweep(&self) {
        let mut places: Vec<&Path> = Vec::new();
        for hierarchy in self.layout.v1.values().chain(&self.layout.v2) {
            places.push(&hierarchy.own);
            places.push(&hierarchy.mount);
        }
        places.sort_unstable();
        places.dedup();
        for place in places {
            self.owner.sweep(place, remove_tree);
        }
    }
}

/// Kills what is in a group tree (version 2) and removes its directories, deepest first.
fn remove_tree(top: &Path) {
    let _ = fs::write(top.join("cgroup.kill"), "1");
    let mut all = vec![top.to_owned()];
    let mut at = 0;
    while at < all.len() {
        for entry in fs::read_dir(&all[at]).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                all.push(entry.path());
            }
        }
        at += 1;
    }
    for dir in all.iter().rev() {
        let _ = fs::remove_dir(dir);
    }
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The directories from below `base` to `dir` that do not exist, outermost first.
fn missing_parents(dir: &Path, base: &Path) -> Vec<PathBuf> {
    let mut list: Vec<PathBuf> =
        dir.ancestors().take_while(|a| *a != base).filter(|a| !a.exists()).map(Path::to_owned).collect();
    list.reverse();
    list
}

/// Hands controllers down from `base` to the parent of `dir`.
fn enable(dir: &Path, base: &Path, controllers: &[&str]) -> io::Result<()> {
    if controllers.is_empty() {
        return Ok(());
    }
    let mut chain: Vec<&Path> = dir.ancestors().skip(1).take_while(|a| a.starts_with(base)).collect();
    chain.reverse();
    for group in chain {
        let file = group.join("cgroup.subtree_control");
        let now = fs::read_to_string(&file)?;
        for controller in controllers {
            if !now.split_ascii_whitespace().any(|c| c == *controller) {
                fs::write(&file, format!("+{controller}")).map_err(|e| {
                    io::Error::new(
                        e.kind(),
                        format!("cgroup controller {controller} in {}: {e}", group.display()),
                    )
                })?;
            }
        }
    }
    Ok(())
}

/// A version 1 cpuset takes no process before it has processors and memory nodes.
fn inherit_cpuset(dir: &Path) -> io::Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let ours = dir.join(file);
        let Ok(now) = fs::read_to_string(&ours) else { continue };
        if let (true, Some(parent)) = (now.trim().is_empty(), dir.parent()) {
            fs::write(&ours, fs::read_to_string(parent.join(file))?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_of_all_kinds_are_understood() {
        let v2 = Layout::parse(
            "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
            "0::/system.slice/kiln.service\n",
        );
        let own = v2.v2.unwrap().own;
        assert_eq!(own, Path::new("/sys/fs/cgroup/system.slice/kiln.service"));
        assert!(v2.v1.is_empty());

        let hybrid = Layout::parse(
            "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
             36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
             41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "3:devices:/a\n2:cpu,cpuacct:/\n0::/u\n",
        );
        assert_eq!(hybrid.v1["cpu"], hybrid.v1["cpuacct"]);
        assert_eq!(hybrid.v1["devices"].own, Path::new("/sys/fs/cgroup/devices/a"));
        assert_eq!(hybrid.v2.unwrap().own, Path::new("/sys/fs/cgroup/unified/u"));

        // In a container whose mount shows its own part of the hierarchy.
        let inner = Layout::parse(
            "9 8 0:33 /docker/x /sys/fs/cgroup/devices ro - cgroup cgroup rw,devices\n",
            "3:devices:/docker/x/y\n",
        );
        assert_eq!(inner.v1["devices"].own, Path::new("/sys/fs/cgroup/devices/y"));

        assert_eq!(Layout::parse("1 1 0:1 / / rw - ext4 /dev/vda rw\nnonsense\n", "x\n"), Layout::default());
    }
}
