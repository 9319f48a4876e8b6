use super::*;
use std::cell::RefCell;
use std::collections::HashSet;

use crate::sandbox::plan::{CapabilityPlan, NetworkPlan, ProcessPlan, RuntimeCommand};

/// Records the calls as text. Descriptors are short names: what they were made from.
#[derive(Default)]
struct Recorder {
    calls: RefCell<Vec<String>>,
    missing: HashSet<&'static str>,
    files: HashSet<&'static str>,
    fail: Option<&'static str>,
}

impl Recorder {
    fn call(&self, text: String) -> io::Result<()> {
        if self.fail.is_some_and(|f| text.starts_with(f)) {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        self.calls.borrow_mut().push(text);
        Ok(())
    }

    fn position(&self, call: &str) -> usize {
        let calls = self.calls.borrow();
        calls.iter().position(|c| c.starts_with(call)).unwrap_or_else(|| panic!("no {call:?} in {calls:#?}"))
    }
}

impl Sys for Recorder {
    type Fd = String;

    fn make_private(&self) -> io::Result<()> {
        self.call("private".into())
    }

    fn new_fs(&self, fstype: &str, options: &[(String, Option<String>)], attrs: u32) -> io::Result<String> {
        let options: Vec<_> =
            options.iter().map(|(k, v)| v.as_ref().map_or(k.clone(), |v| format!("{k}={v}"))).collect();
        self.call(format!("new {fstype} [{}] {attrs:#x}", options.join(",")))?;
        Ok(fstype.to_owned())
    }

    fn overlay(&self, lowers: &[PathBuf], upper: Option<(&Path, &Path)>, attrs: u32) -> io::Result<String> {
        let lowers: Vec<_> = lowers.iter().map(|l| l.display().to_string()).collect();
        let upper = upper.map_or("-".into(), |(u, w)| format!("{}+{}", u.display(), w.display()));
        self.call(format!("overlay {} on {} {attrs:#x}", upper, lowers.join(":")))?;
        Ok(format!("overlay({})", lowers.join(":")))
    }

    fn clone_tree(&self, path: &Path, recursive: bool) -> io::Result<String> {
        self.call(format!("tree {}{}", path.display(), if recursive { " all" } else { "" }))?;
        Ok(path.display().to_string())
    }

    fn clone_at(&self, at: &String, recursive: bool) -> io::Result<String> {
        self.call(format!("copy {at}{}", if recursive { " all" } else { "" }))?;
        Ok(format!("copy({at})"))
    }

    fn set_attrs(&self, mount: &String, attrs: u32, recursive: bool) -> io::Result<()> {
        self.call(format!("attrs {mount} {attrs:#x}{}", if recursive { " all" } else { "" }))
    }

    fn open_host(&self, path: &Path) -> io::Result<String> {
        Ok(path.display().to_string())
    }

    fn lookup(&self, root: &String, path: &Path) -> io::Result<String> {
        let path = path.display().to_string();
        if self.missing.contains(path.as_str()) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(if root.starts_with("overlay(/l") { format!("{root}{path}") } else { path })
    }

    fn make_target(
        &self,
        _root: &String,
        path: &Path,
        kind: TargetKind,
        made: &mut Vec<PathBuf>,
    ) -> io::Result<String> {
        let text = path.display().to_string();
        if self.missing.contains(text.as_str()) {
            self.call(format!("make {kind:?} {text}"))?;
            made.push(path.to_owned());
        }
        Ok(text)
    }

    fn is_dir(&self, fd: &String) -> io::Result<bool> {
        Ok(!self.files.contains(fd.as_str()))
    }

    fn attach(&self, mount: &String, target: &String) -> io::Result<()> {
        self.call(format!("attach {mount} at {target}"))
    }

    fn park(&self, mount: &String) -> io::Result<()> {
        self.call(format!("park {mount}"))
    }

    fn unpark(&self) -> io::Result<()> {
        self.call("unpark".into())
    }

    fn make_node(&self, dir: &String, name: &OsStr, device: &DevicePlan) -> io::Result<()> {
        let name = name.to_string_lossy();
        self.call(format!("node {dir}/{name} {}{}:{}", device.kind, device.major, device.minor))
    }

    fn symlink(&self, dir: &String, name: &str, target: &str) -> io::Result<()> {
        self.call(format!("link {dir}/{name} to {target}"))
    }

    fn chown(&self, _root: &String, path: &Path, uid: u32, gid: u32) -> io::Result<()> {
        self.call(format!("chown {} {uid}:{gid}", path.display()))
    }

    fn chmod(&self, root: &String, path: &Path, mode: u32) -> io::Result<()> {
        self.call(format!("chmod {root} {} {mode:o}", path.display()))
    }

    fn write(&self, _root: &String, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.call(format!("write {} {}", path.display(), String::from_utf8_lossy(bytes)))
    }

    fn pivot(&self, root: &String) -> io::Result<()> {
        self.call(format!("pivot {root}"))
    }
}

fn layers() -> RootSource {
    RootSource::Overlay {
        lowers: vec!["/top".into(), "/base".into()],
        upper: Some("/up".into()),
        work: Some("/work".into()),
    }
}

fn plan(root: RootSource, mounts: Vec<MountPlan>) -> SandboxPlan {
    SandboxPlan {
        root,
        readonly_root: false,
        mounts,
        devices: vec![],
        masked: vec!["/proc/kcore".into(), "/proc/acpi".into(), "/proc/scsi".into(), "/sys/firmware".into()],
        readonly: vec!["/proc/sys".into()],
        sysctl: vec![("net.ipv4.ip_forward".into(), "1".into())],
        hostname: None,
        domainname: None,
        network: NetworkPlan::Host,
        process: ProcessPlan {
            args: vec!["true".into()],
            env: vec![],
            cwd: "/work/dir".into(),
            uid: 7,
            gid: 8,
            groups: vec![],
            umask: 0o022,
            rlimits: vec![],
            capabilities: CapabilityPlan::default(),
            no_new_privileges: false,
            oom_score_adj: None,
            terminal: false,
        },
    }
}

fn fresh(fstype: &str, dest: &str) -> MountPlan {
    MountPlan {
        dest: dest.into(),
        source: MountSource::New { fstype: fstype.into(), options: vec![] },
        attrs: 0,
    }
}

fn bind(path: &str, dest: &str, attrs: u32) -> MountPlan {
    MountPlan { dest: dest.into(), source: MountSource::Bind { path: path.into(), recursive: true }, attrs }
}

fn memory_file(dest: &str, mode: u32) -> MemoryFile {
    MemoryFile { dest: dest.into(), content: b"s3cret".into(), uid: 3, gid: 4, mode }
}

#[test]
fn a_file_in_memory_is_a_read_only_copy_of_the_file_alone() {
    let sys = Recorder { files: ["copy(file)"].into(), ..Recorder::default() };
    let mount = MountPlan {
        dest: "/run/token".into(),
        source: MountSource::File(memory_file("/run/token", 0o400)),
        attrs: 0,
    };
    assemble(&sys, &plan(layers(), vec![mount.clone()]), &Host::default()).unwrap();
    let order = ["new tmpfs", "park tmpfs", "write file", "chmod tmpfs", "copy file", "park overlay"];
    let places: Vec<_> = order.iter().map(|c| sys.position(c)).collect();
    assert!(places.is_sorted(), "{places:?}");
    // Not to be executed, as no bit of its mode says so.
    sys.position("attrs copy(file) 0xf");
    sys.position("attach copy(file) at /run/token");
    assert!(!format!("{mount:?}").contains("115"), "the content is nobody's to print: {mount:?}");
}

#[test]
fn mounts_are_made_first_then_the_root_then_attached_then_hidden_then_entered() {
    let sys = Recorder {
        missing: ["/etc/hosts", "/proc/acpi", "/work/dir"].into(),
        files: ["/host/hosts", "/proc/kcore"].into(),
        ..Recorder::default()
    };
    let mounts =
        vec![fresh("proc", "/proc"), fresh("tmpfs", "/dev"), bind("/host/hosts", "/etc/hosts", RDONLY)];
    let made = assemble(&sys, &plan(layers(), mounts), &Host::default()).unwrap();
    assert_eq!(made, [PathBuf::from("/etc/hosts")]);
    let overlay = "overlay(/top:/base)";
    let mut wanted: Vec<String> = [
        "private",
        "new proc [] 0x0",
        "new tmpfs [] 0x0",
        "tree /host/hosts all",
        "attrs /host/hosts 0x1 all",
        "overlay /up+/work on /top:/base 0x0",
        "park overlay(/top:/base)",
        "attach proc at /proc",
        "attach tmpfs at /dev",
        "make File /etc/hosts",
        "attach /host/hosts at /etc/hosts",
    ]
    .map(str::to_owned)
    .to_vec();
    wanted.extend(DEFAULT_NODES.iter().map(|(n, major, minor)| format!("node /dev/{n} c{major}:{minor}")));
    wanted.extend(DEFAULT_LINKS.iter().map(|(n, target)| format!("link /dev/{n} to {target}")));
    wanted.extend(
        [
            "write /proc/sys/net/ipv4/ip_forward 1",
            "tree /dev/null",
            "attach /dev/null at /proc/kcore",
            "new tmpfs [] 0xf",
            "attach tmpfs at /proc/scsi",
            "copy tmpfs",
            "attach copy(tmpfs) at /sys/firmware",
            "copy /proc/sys all",
            "attrs copy(/proc/sys) 0x1 all",
            "attach copy(/proc/sys) at /proc/sys",
            "make Dir /work/dir",
            "chown /work/dir 7:8",
        ]
        .map(str::to_owned),
    );
    wanted.push(format!("pivot {overlay}"));
    assert_eq!(*sys.calls.borrow(), wanted);
}

#[test]
fn few_layers_need_no_overlay() {
    let one = |lowers: &[&str], upper: Option<&str>| RootSource::Overlay {
        lowers: lowers.iter().map(PathBuf::from).collect(),
        upper: upper.map(PathBuf::from),
        work: upper.map(|_| "/work".into()),
    };
    let cases: [(RootSource, &[&str]); 4] = [
        (one(&[], Some("/up")), &["tree /up", "park /up"]),
        (one(&["/base"], None), &["tree /base", "attrs /base 0x1", "park /base"]),
        (RootSource::Dir("/dir".into()), &["tree /dir", "park /dir"]),
        (one(&["/a", "/b"], None), &["overlay - on /a:/b 0x1", "park overlay(/a:/b)"]),
    ];
    for (source, calls) in cases {
        let sys = Recorder::default();
        assemble(&sys, &plan(source, vec![]), &Host::default()).unwrap();
        assert_eq!(sys.calls.borrow()[1..=calls.len()], *calls);
    }
}

#[test]
fn a_selected_part_is_copied_out_of_its_layers() {
    let sys = Recorder { files: ["copy(overlay(/l1:/l2)src/file)"].into(), ..Recorder::default() };
    let source = RootSource::Overlay { lowers: vec!["/l1".into(), "/l2".into()], upper: None, work: None };
    let mount = MountPlan {
        dest: "/mnt".into(),
        source: MountSource::Layers { source, selector: Some("src/file".into()) },
        attrs: RDONLY,
    };
    assemble(&sys, &plan(layers(), vec![mount]), &Host::default()).unwrap();
    let order =
        ["overlay -", "park overlay(/l1", "copy overlay(/l1", "attrs copy(overlay", "park overlay(/top"];
    let places: Vec<_> = order.iter().map(|c| sys.position(c)).collect();
    assert!(places.is_sorted(), "{places:?}");
    sys.position("attach copy(overlay(/l1:/l2)src/file) at /mnt");
}

#[test]
fn without_a_device_cgroup_nothing_but_bound_devices_opens() {
    let sys = Recorder { missing: ["/dev/null"].into(), ..Recorder::default() };
    let mounts = vec![fresh("tmpfs", "/dev"), fresh("devpts", "/dev/pts"), bind("/cache", "/c", 0)];
    let host = Host { nodev: true, ..Host::default() };
    assemble(&sys, &plan(layers(), mounts), &host).unwrap();
    for call in
        ["new tmpfs [] 0x4", "new devpts [] 0x0", "attrs /cache 0x4", "overlay /up+/work on /top:/base 0x4"]
    {
        sys.position(call);
    }
    sys.position("make File /dev/null");
    sys.position("attach /dev/null at /dev/null");
    assert!(!sys.calls.borrow().iter().any(|c| c.starts_with("node ")));
}

#[test]
fn cgroup_views() {
    let view = MountPlan { dest: "/sys/fs/cgroup".into(), source: MountSource::Cgroup, attrs: RDONLY };
    let run = |cgroups| {
        let sys = Recorder::default();
        let host = Host { cgroups, ..Host::default() };
        assemble(&sys, &plan(layers(), vec![view.clone()]), &host).unwrap();
        sys
    };
    assert!(!run(CgroupView::None).calls.borrow().iter().any(|c| c.contains("cgroup")));
    run(CgroupView::Unified).position("attach cgroup2 at /sys/fs/cgroup");
    let split = run(CgroupView::Split(vec![("memory".into(), "/h/memory/x".into())]));
    assert!(
        split.position("attach tmpfs at /sys/fs/cgroup") < split.position("attach /h/memory/x at memory")
    );
    assert!(split.position("attach /h/memory/x at memory") < split.position("attrs tmpfs 0x1"));
}

#[test]
fn failures_name_the_step() {
    let cases = [
        ("private", "making mounts private"),
        ("overlay", "root file system"),
        ("new proc", "mount /proc"),
        ("attach /src", "mount /dst"),
        ("node", "filling /dev"),
        ("write", "sysctl net.ipv4.ip_forward"),
        ("attach /dev/null", "masking /proc/kcore"),
        ("copy /proc/sys", "making /proc/sys read-only"),
        ("chown", "working directory /work/dir"),
        ("pivot", "changing the root"),
    ];
    for (fail, what) in cases {
        let sys = Recorder {
            fail: Some(fail),
            missing: ["/work/dir"].into(),
            files: ["/proc/kcore"].into(),
            ..Recorder::default()
        };
        let mounts = vec![fresh("proc", "/proc"), fresh("tmpfs", "/dev"), bind("/src", "/dst", 0)];
        let error = assemble(&sys, &plan(layers(), mounts), &Host::default()).unwrap_err();
        assert_eq!(error.what, what, "{fail}");
        assert!(!sys.calls.borrow().iter().any(|c| c.starts_with("pivot")), "{fail}");
    }
}

#[test]
fn a_runtime_gets_its_root_and_mount_points_but_no_pivot() {
    let sys = Recorder {
        missing: ["/etc/hosts", "/proc", "/work"].into(),
        files: ["/host/hosts"].into(),
        ..Recorder::default()
    };
    let runtime = RuntimePlan {
        command: RuntimeCommand {
            args: vec!["runc".into()],
            pid_file: "/bundle/pid".into(),
            terminal: false,
        },
        rootfs: "/bundle/rootfs".into(),
        root: layers(),
        layered: vec![("/bundle/m0".into(), RootSource::Dir("/cache".into()), None)],
        files: vec![("/bundle/f0".into(), memory_file("/run/secrets/token", 0o500))],
        targets: vec![("/proc".into(), None), ("/etc/hosts".into(), Some("/host/hosts".into()))],
        cwd: ("/work".into(), 1, 2),
        hide_unified: false,
    };
    let made = assemble_for_runtime(&sys, &runtime).unwrap();
    assert_eq!(made, [PathBuf::from("/proc"), PathBuf::from("/etc/hosts")]);
    let wanted = [
        "private",
        "tree /cache",
        "attach /cache at /bundle/m0",
        "new tmpfs [mode=700,size=131072] 0x0",
        "park tmpfs",
        "write file s3cret",
        "chown file 3:4",
        "chmod tmpfs file 500",
        "copy file",
        "attrs copy(file) 0x7",
        "attach copy(file) at /bundle/f0",
        "overlay /up+/work on /top:/base 0x0",
        "attach overlay(/top:/base) at /bundle/rootfs",
        "make Dir /proc",
        "make File /etc/hosts",
        "make Dir /work",
        "chown /work 1:2",
        "unpark",
    ];
    assert_eq!(*sys.calls.borrow(), wanted);
}
