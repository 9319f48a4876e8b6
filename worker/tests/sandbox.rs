//! Behaviour of sandboxes, the same for every executor.
//!
//! Has its own `main`, because executors start this binary again as their helper. Needs root and
//! `busybox` (static); runs on Kiln's own executor and on each of `runc` and `crun` that is installed, and again on
//! Kiln's own in mount namespaces that show only version 2 cgroups, and none.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kiln_worker::sandbox::spec::{
    Bind, NetworkMode, Resources, SecurityMode, SpecParams, Tmpfs, Ulimit, build,
};
use kiln_worker::sandbox::{
    Executor, ExecutorChoice, ExitOutcome, LayeredMount, RootSource, SandboxError, SandboxRequest, open,
    zygote,
};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    zygote::run_if_requested();
    if let Some(mode) = std::env::var_os("KILN_TEST_DAEMON") {
        return daemon(mode.to_str().unwrap_or_default());
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: sandbox tests need root");
        return ExitCode::SUCCESS;
    }
    let groups = std::env::var("KILN_TEST_CGROUPS").unwrap_or_default();
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let base = tempfile::tempdir().unwrap();
    let root = make_root(base.path());
    let mounts_before = mount_points();
    let mut failed = Vec::new();
    let mut ran = 0;
    for choice in if groups.is_empty() { choices() } else { vec![ExecutorChoice::Lean] } {
        let state = base.path().join("state");
        let executor = open(&choice, &state).unwrap();
        let world = World {
            executor,
            root: root.clone(),
            base: base.path().to_owned(),
            choice,
            groups: groups.clone(),
        };
        for (name, test) in TESTS {
            let name = format!("{}::{name}", world.executor.name());
            let name = if groups.is_empty() { name } else { format!("{groups}::{name}") };
            if !name.contains(&filter) {
                continue;
            }
            ran += 1;
            let started = Instant::now();
            let passed = catch_unwind(AssertUnwindSafe(|| test(&world))).is_ok();
            let word = if passed { "ok" } else { "FAILED" };
            println!("test {name} ... {word} ({} ms)", started.elapsed().as_millis());
            if !passed {
                failed.push(name);
            }
        }
        drop(world);
    }
    for kind in if groups.is_empty() { ["cgroup2", "no_cgroups"].as_slice() } else { &[] } {
        if !again_with(kind) {
            failed.push((*kind).to_owned());
        }
    }
    let mine = format!("kiln-{}-", std::process::id());
    let left = cgroups_named(&mine);
    if mount_points() != mounts_before || !left.is_empty() {
        println!("left behind: cgroups {left:?}, mounts {:#?}", mount_points());
        failed.push("nothing is left".into());
    }
    println!("{ran} tests, {} failed", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Runs the tests of this program where the host seems to have other cgroups.
fn again_with(kind: &str) -> bool {
    let mount = if kind == "cgroup2" { "mount -t cgroup2 none /sys/fs/cgroup" } else { "true" };
    let script = format!("umount -R /sys/fs/cgroup && {mount} && exec \"$0\" \"$@\"");
    let exe = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(exe).args(std::env::args().skip(1));
    command.env("KILN_TEST_CGROUPS", kind).status().unwrap().success()
}

type Test = fn(&World);

const TESTS: &[(&str, Test)] = &[
    ("exit_status", exit_status),
    ("process", process),
    ("own_namespaces", own_namespaces),
    ("confinement", confinement),
    ("system_calls", system_calls),
    ("devices", devices),
    ("insecure", insecure),
    ("user_and_directory", user_and_directory),
    ("changes_go_to_the_upper_directory", changes_go_to_the_upper_directory),
    ("mount_points_are_reported", mount_points_are_reported),
    ("layered_mounts", layered_mounts),
    ("plain_mounts", plain_mounts),
    ("links_do_not_lead_out", links_do_not_lead_out),
    ("readonly_root", readonly_root),
    ("no_network", no_network),
    ("resource_limits", resource_limits),
    ("memory_limit", memory_limit),
    ("programs_that_do_not_start", programs_that_do_not_start),
    ("bad_sources", bad_sources),
    ("background_processes_end", background_processes_end),
    ("cancel", cancel),
    ("dropped", dropped),
    ("many_at_once", many_at_once),
    ("many_layers", many_layers),
    ("death_of_the_daemon", death_of_the_daemon),
    ("death_of_the_helper", death_of_the_helper),
    ("large_environment", large_environment),
];

struct World {
    executor: Arc<dyn Executor>,
    root: PathBuf,
    base: PathBuf,
    choice: ExecutorChoice,
    /// Which cgroups the host shows, if not its own.
    groups: String,
}

fn choices() -> Vec<ExecutorChoice> {
    let mut list = vec![ExecutorChoice::Lean];
    for name in ["runc", "crun"] {
        let found = Command::new(name).arg("--version").stdout(Stdio::null()).status();
        if found.is_ok_and(|s| s.success()) {
            list.push(ExecutorChoice::Runtime(name.into()));
        } else {
            println!("not installed, not tested: {name}");
        }
    }
    list
}

/// A root of busybox and an account file; no /proc, /sys or /dev.
fn make_root(base: &Path) -> PathBuf {
    let root = base.join("root");
    for dir in ["bin", "etc", "tmp", "keep/sub"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|p| Path::new(p).exists());
    fs::copy(busybox.expect("busybox (package busybox-static) is not installed"), root.join("bin/busybox"))
        .unwrap();
    let list = Command::new(root.join("bin/busybox")).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|a| *a != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n")
        .unwrap();
    fs::write(root.join("keep/old"), "old").unwrap();
    fs::write(root.join("keep/gone"), "gone").unwrap();
    root
}

static NEXT: AtomicU32 = AtomicU32::new(0);

/// One run: change what differs from `sh -c TEXT` in a fresh overlay.
struct Step {
    params: SpecParams,
    rootfs: RootSource,
    mounts: Vec<LayeredMount>,
    dir: PathBuf,
}

struct Ran {
    result: Result<ExitOutcome, SandboxError>,
    stdout: String,
    stderr: String,
}

impl Ran {
    fn code(&self) -> u32 {
        match &self.result {
            Ok(outcome) => outcome.code,
            Err(e) => panic!("{e} (stdout {:?}, stderr {:?})", self.stdout, self.stderr),
        }
    }

    fn out(&self) -> &str {
        assert_eq!(self.code(), 0, "stdout {:?}, stderr {:?}", self.stdout, self.stderr);
        self.stdout.trim_end()
    }

    fn error(&self) -> &SandboxError {
        match &self.result {
            Err(e) => e,
            Ok(o) => panic!("ended with {o:?} (stdout {:?}, stderr {:?})", self.stdout, self.stderr),
        }
    }
}

impl World {
    fn sh(&self, text: &str) -> Step {
        self.program(&["sh", "-c", text])
    }

    fn program(&self, args: &[&str]) -> Step {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let id = format!("t{}-{n}", std::process::id());
        let dir = self.base.join("steps").join(&id);
        for name in ["upper", "work"] {
            fs::create_dir_all(dir.join(name)).unwrap();
        }
        Step {
            params: SpecParams {
                id,
                args: args.iter().map(|a| (*a).to_owned()).collect(),
                env: vec!["PATH=/bin".into()],
                cwd: "/".into(),
                ..SpecParams::default()
            },
            rootfs: RootSource::Overlay {
                lowers: vec![self.root.clone()],
                upper: Some(dir.join("upper")),
                work: Some(dir.join("work")),
            },
            mounts: Vec::new(),
            dir,
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn null() -> OwnedFd {
    fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

impl Step {
    fn request(self, stdout: OwnedFd, stderr: OwnedFd) -> SandboxRequest {
        SandboxRequest {
            id: self.params.id.clone(),
            spec: build(&self.params).unwrap(),
            rootfs: self.rootfs,
            layered_mounts: self.mounts,
            stdin: null(),
            stdout,
            stderr,
        }
    }

    fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    fn run(self, world: &World) -> Ran {
        let (out, out_end) = std::io::pipe().unwrap();
        let (err, err_end) = std::io::pipe().unwrap();
        let read = |mut pipe: std::io::PipeReader| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                pipe.read_to_end(&mut bytes).unwrap();
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let (out, err) = (read(out), read(err));
        let request = self.request(out_end.into(), err_end.into());
        let result = runtime().block_on(world.executor.run(request, CancellationToken::new()));
        Ran { result, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
    }
}

/// Waits for something the kernel does in its own time.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A duration to sleep that no other test uses, to find the sleeping process by.
fn mark() -> String {
    format!("3600.{}{:03}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Whether a process has this argument.
fn process_with(argument: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let own = entry.file_name().to_str() == Some(&std::process::id().to_string());
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        !own && line.split(|b| *b == 0).any(|a| a == argument.as_bytes())
    })
}

fn mount_points() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter_map(|l| l.split(' ').nth(4)).map(str::to_owned).collect()
}

fn cgroups_named(prefix: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                if entry.file_name().to_string_lossy().starts_with(prefix) {
                    found.push(entry.path());
                }
                todo.push(entry.path());
            }
        }
    }
    found
}

fn status_fields(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k, v.trim())).collect()
}

fn exit_status(world: &World) {
    assert_eq!(world.sh("exit 0").run(world).code(), 0);
    assert_eq!(world.sh("exit 7").run(world).code(), 7);
    // The first process of a pid namespace cannot kill itself; a child reports its signal as a shell does.
    assert_eq!(world.sh("sh -c 'kill -9 $$'; exit $?").run(world).code(), 137);
}

fn process(world: &World) {
    let mut step = world.sh("echo \"$0,$1,$A,$HOME\"; echo oops >&2; cat; umask");
    step.params.args.extend(["zero".into(), "one two".into()]);
    step.params.env.push("A=b c".into());
    let ran = step.run(world);
    assert_eq!(ran.out(), "zero,one two,b c,/root\n0022");
    assert_eq!(ran.stderr, "oops\n");
    let mut step = world.sh("echo $HOME; trap; ls -l /proc/self/fd | grep -c ' -> '");
    step.params.env.push("HOME=/mine".into());
    // Input, output and errors; nothing else is inherited.
    assert_eq!(step.run(world).out(), "/mine\n3");
    let signals = world.program(&["cat", "/proc/self/status"]).run(world);
    let fields = status_fields(signals.out());
    // 32 and 33 belong to the C library, which does not let runtimes written with it reset them.
    let internal = 3 << 31;
    for name in ["SigBlk", "SigIgn"] {
        assert_eq!(u64::from_str_radix(fields[name], 16).unwrap() & !internal, 0, "{name}");
    }
}

fn own_namespaces(world: &World) {
    let mut step = world.sh("echo $$; hostname; for n in pid mnt ipc uts cgroup net; do readlink /proc/self/ns/$n; done; ls -d /proc/[0-9]* | wc -l");
    step.params.hostname = "box".into();
    let ran = step.run(world);
    let lines: Vec<_> = ran.out().lines().collect();
    assert_eq!(lines[..2], ["1", "box"]);
    for (at, name) in ["pid", "mnt", "ipc", "uts", "cgroup", "net"].into_iter().enumerate() {
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        let same = ours.to_str().unwrap() == lines[2 + at];
        assert_eq!(same, name == "net", "{name}");
    }
    let processes: u32 = lines[8].parse().unwrap();
    assert!(processes <= 4, "{processes} processes are visible");
    // Nothing of it is seen outside.
    let host = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!host.contains(world.base.to_str().unwrap()), "{host}");
}

fn confinement(world: &World) {
    let ran = world.sh("cat /proc/self/status").run(world);
    let fields = status_fields(ran.out());
    let zero = "0000000000000000";
    for (set, bits) in
        [("CapEff", "00000000a80425fb"), ("CapBnd", "00000000a80425fb"), ("CapInh", zero), ("CapAmb", zero)]
    {
        assert_eq!(fields[set], bits, "{set}");
    }
    assert_eq!((fields["Seccomp"], fields["NoNewPrivs"]), ("2", "0"));
    assert!(!fs::read("/proc/keys").unwrap().is_empty());
    let hidden = world.sh("cat /proc/keys | wc -c; ls /sys/firmware 2>/dev/null | wc -l").run(world);
    assert_eq!(hidden.out(), "0\n0");
    for text in [
        "echo x > /proc/sys/kernel/domainname",
        "echo b > /proc/sysrq-trigger",
        "for f in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/*/cgroup.procs; do test -e $f && echo 1 > $f && exit 0; done; exit 1",
        "echo 1 > /sys/kernel/profiling",
        "mount -t tmpfs x /tmp",
        "umount /proc/sys",
        "hostname other",
    ] {
        assert_ne!(world.sh(text).run(world).code(), 0, "{text}");
    }
}

fn system_calls(world: &World) {
    assert_ne!(world.program(&["unshare", "-U", "true"]).run(world).code(), 0);
    assert_ne!(world.program(&["unshare", "-m", "true"]).run(world).code(), 0);
    assert_eq!(world.program(&["chroot", "/", "true"]).run(world).code(), 0);
    // The filter stays when an ordinary user runs the program.
    let mut step = world.program(&["unshare", "-U", "true"]);
    (step.params.uid, step.params.gid) = (1000, 1001);
    assert_ne!(step.run(world).code(), 0);
}

fn devices(world: &World) {
    let ran = world.sh("echo x > /dev/null; head -c 3 /dev/zero | wc -c; head -c 2 /dev/urandom | wc -c; for l in stdout ptmx fd; do readlink /dev/$l; done; stat -c %a /dev/null /dev/shm /dev/pts").run(world);
    assert_eq!(ran.out(), "3\n2\n/proc/self/fd/1\npts/ptmx\n/proc/self/fd\n666\n1777\n755");
    // Making a node is allowed, opening the disk or memory behind it is not. Where no cgroup can tell devices apart,
    // nodes made in the sandbox do not work at all.
    let own = if world.groups == "no_cgroups" {
        "! sh -c 'echo x > /tmp/null' 2>/dev/null"
    } else {
        "echo x > /tmp/null"
    };
    let root = fs::metadata("/").unwrap().dev();
    let (major, minor) = (rustix::fs::major(root), rustix::fs::minor(root));
    let ran = world.sh(&format!("mknod /tmp/disk b {major} {minor} && mknod /tmp/mem c 1 1 && mknod /tmp/null c 1 3 && echo made; head -c 1 /tmp/disk || head -c 1 /tmp/mem || {own} && echo refused")).run(world);
    assert_eq!(ran.out(), "made\nrefused", "{}", ran.stderr);
    // Nor in the file system of devices.
    let ran = world.sh(&format!("mknod /dev/disk b {major} {minor}; head -c 1 /dev/disk")).run(world);
    assert_ne!(ran.code(), 0);
}

fn insecure(world: &World) {
    let mut step = world.sh("cat /proc/self/status; mkdir /m && mount -t tmpfs x /m && echo x > /m/f && test -c /dev/loop-control");
    step.params.security = SecurityMode::Insecure;
    let ran = step.run(world);
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let (theirs, ours) = (status_fields(ran.out()), status_fields(&ours));
    assert_eq!((theirs["CapEff"], theirs["Seccomp"]), (ours["CapPrm"], "0"));
}

fn user_and_directory(world: &World) {
    let mut step = world.sh("id -u; id -g; id -G; echo $HOME; pwd; touch here && stat -c %u:%g . here; grep CapEff /proc/self/status");
    (step.params.uid, step.params.gid, step.params.groups) = (1000, 1001, vec![5, 6]);
    step.params.cwd = "/made/for/ann".into();
    let upper = step.upper();
    let ran = step.run(world);
    let wanted =
        "1000\n1001\n1001 5 6\n/home/ann\n/made/for/ann\n1000:1001\n1000:1001\nCapEff:\t0000000000000000";
    assert_eq!(ran.out(), wanted);
    let made = fs::metadata(upper.join("made/for")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (1000, 1001, 0o755));
    assert!(!ran.result.unwrap().stubs.iter().any(|s| s.starts_with("/made")));
    // A directory that only root may enter.
    let mut step = world.sh("pwd");
    let closed = step.upper().join("closed");
    fs::create_dir_all(closed.join("in")).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    (step.params.uid, step.params.gid, step.params.cwd) = (1000, 1001, "/closed/in".into());
    assert_eq!(step.run(world).code(), 0);
    let mut step = world.program(&["true"]);
    step.params.cwd = "/etc/passwd".into();
    assert!(matches!(step.run(world).error(), SandboxError::Setup(_) | SandboxError::Exec(_)));
}

fn changes_go_to_the_upper_directory(world: &World) {
    let step = world.sh("echo new > /keep/new && echo more >> /keep/old && rm /keep/gone && mv /keep/sub /keep/moved && chown 5:6 /keep/new");
    let upper = step.upper();
    assert_eq!(step.run(world).out(), "");
    assert_eq!(fs::read_to_string(upper.join("keep/old")).unwrap(), "oldmore\n");
    assert_eq!(fs::metadata(upper.join("keep/new")).unwrap().uid(), 5);
    for gone in ["keep/gone", "keep/sub"] {
        let whiteout = fs::symlink_metadata(upper.join(gone)).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{gone}");
    }
    assert!(upper.join("keep/moved").is_dir());
    assert_eq!(fs::read_to_string(world.root.join("keep/old")).unwrap(), "old");
    assert!(!upper.join("bin").exists());
}

fn mount_points_are_reported(world: &World) {
    let file = world.base.join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.1\n").unwrap();
    let mut step = world.sh("cat /etc/resolv.conf");
    step.params.binds.push(Bind { source: file, dest: "/etc/resolv.conf".into(), readonly: true });
    step.mounts.push(LayeredMount {
        dest: "/deep/er/dir".into(),
        source: RootSource::Dir(world.root.join("keep")),
        selector: None,
        readonly: true,
    });
    let upper = step.upper();
    let ran = step.run(world);
    assert_eq!(ran.out(), "nameserver 127.0.0.1");
    let mut stubs = ran.result.unwrap().stubs;
    stubs.sort();
    let wanted = ["/deep", "/deep/er", "/deep/er/dir", "/dev", "/etc/resolv.conf", "/proc", "/sys"];
    assert_eq!(stubs, wanted.map(PathBuf::from));
    assert_eq!(fs::read(upper.join("etc/resolv.conf")).unwrap(), b"");
    for stub in stubs.iter().rev() {
        let path = upper.join(stub.strip_prefix("/").unwrap());
        if path.is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
}

fn layered_mounts(world: &World) {
    let layer = |name: &str, files: &[(&str, &str)]| {
        let dir = world.base.join(format!("layer-{name}"));
        for (path, text) in files {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs::write(dir.join(path), text).unwrap();
        }
        dir
    };
    let low = layer("low", &[("a/x", "low"), ("a/y", "y"), ("f", "file")]);
    let high = layer("high", &[("a/x", "high")]);
    symlink("/a", high.join("link")).ok();
    let both = || RootSource::Overlay { lowers: vec![high.clone(), low.clone()], upper: None, work: None };
    let mount = |dest: &str, source: RootSource, selector: Option<&str>, readonly: bool| LayeredMount {
        dest: dest.into(),
        source,
        selector: selector.map(PathBuf::from),
        readonly,
    };
    let cache = world.base.join("cache");
    fs::create_dir_all(cache.join("sub")).unwrap();
    let mut step = world.sh("cat /m/all/a/x /m/dir/y /m/file /m/link/x /m/all/inner/old; ls /m/one; echo kept > /c/sub/kept; echo up > /w/up; ! touch /m/all/n; ! touch /m/dir/n; ! sh -c 'echo > /m/file'");
    let scratch = step.dir.join("scratch");
    for name in ["upper", "work"] {
        fs::create_dir_all(scratch.join(name)).unwrap();
    }
    let writable = RootSource::Overlay {
        lowers: vec![low.clone()],
        upper: Some(scratch.join("upper")),
        work: Some(scratch.join("work")),
    };
    step.mounts = vec![
        // Given before its parent: parents are mounted first all the same.
        mount("/m/all/a", both(), Some("a"), true),
        mount("/m/all", both(), None, true),
        mount("/m/dir", both(), Some("/a"), true),
        mount("/m/file", both(), Some("f"), true),
        mount("/m/link", both(), Some("link"), true),
        mount(
            "/m/one",
            RootSource::Overlay { lowers: vec![low.clone()], upper: None, work: None },
            None,
            false,
        ),
        mount("/w", writable, None, false),
        mount("/c", RootSource::Dir(cache.clone()), None, false),
    ];
    // A mount point inside a read-only mount has to exist.
    fs::create_dir_all(low.join("inner")).unwrap();
    step.mounts.push(mount("/m/all/inner", RootSource::Dir(world.root.join("keep")), None, true));
    let ran = step.run(world);
    assert_eq!(ran.out(), "highyfilehigholda\nf\ninner");
    assert_eq!(fs::read_to_string(cache.join("sub/kept")).unwrap(), "kept\n");
    assert_eq!(fs::read_to_string(scratch.join("upper/up")).unwrap(), "up\n");
}

fn plain_mounts(world: &World) {
    let mut step = world.sh("df -k /t /dev/shm | awk 'NR>1{print $2}'; echo x > /t/x; cat /secret; ! sh -c 'echo > /secret'; stat -c %t:%T /dev/null");
    let secret = world.base.join("secret");
    fs::write(&secret, "hush\n").unwrap();
    step.params.binds.push(Bind { source: secret, dest: "/secret".into(), readonly: true });
    step.params.tmpfs.push(Tmpfs { dest: "/t".into(), size: Some(2 << 20) });
    step.params.tmpfs.push(Tmpfs { dest: "/dev/shm".into(), size: Some(3 << 20) });
    assert_eq!(step.run(world).out(), "2048\n3072\nhush\n1:3");
    let mut step = world.sh("df -k /dev/shm | awk 'NR>1{print $2}'");
    step.params.shm_size = Some(1 << 20);
    assert_eq!(step.run(world).out(), "1024");
}

fn links_do_not_lead_out(world: &World) {
    let outside = world.base.join("outside");
    fs::create_dir_all(&outside).unwrap();
    let layer = world.base.join("hostile");
    fs::create_dir_all(layer.join("real")).unwrap();
    for (name, target) in [
        ("up", "../../../../../../../..".to_owned() + outside.to_str().unwrap()),
        ("abs", outside.to_str().unwrap().to_owned()),
        ("dangling", "real/../run/resolve/stub".to_owned()),
    ] {
        symlink(target, layer.join(name)).ok();
    }
    let file = world.base.join("content");
    fs::write(&file, "bound\n").unwrap();
    let mut step = world.sh("cat /dangling /abs/one /up/two");
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    lowers.insert(0, layer);
    for dest in ["/dangling", "/abs/one", "/up/two"] {
        step.params.binds.push(Bind { source: file.clone(), dest: dest.into(), readonly: true });
    }
    let upper = step.upper();
    let ran = step.run(world);
    assert_eq!(ran.out(), "bound\nbound\nbound");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(upper.join("run/resolve/stub").exists());
    assert!(upper.join(outside.strip_prefix("/").unwrap()).join("one").exists());
}

fn readonly_root(world: &World) {
    let mut step = world.sh("! touch /x && touch /tmp/x && echo done");
    step.params.readonly_root = true;
    step.params.tmpfs.push(Tmpfs { dest: "/tmp".into(), size: None });
    assert_eq!(step.run(world).out(), "done");
}

fn no_network(world: &World) {
    let mut step = world.sh("ls /sys/class/net; cat /sys/class/net/lo/flags");
    step.params.network = NetworkMode::None;
    assert_eq!(step.run(world).out(), "lo\n0x9");
    let host = world.sh("ls /sys/class/net").run(world);
    let names = fs::read_dir("/sys/class/net").unwrap().count();
    assert_eq!(host.out().lines().count(), names);
}

fn resource_limits(world: &World) {
    let mut step = world.sh("ulimit -Sn; ulimit -Hn; ulimit -c");
    step.params.ulimits = vec![
        Ulimit { name: "nofile".into(), soft: 77, hard: 99 },
        Ulimit { name: "core".into(), soft: 0, hard: 0 },
    ];
    assert_eq!(step.run(world).out(), "77\n99\n0");
}

fn memory_limit(world: &World) {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !world.groups.is_empty() && !controllers.contains("memory") {
        // The host has the controller on version 1, if at all. A limit that cannot be kept is not ignored.
        let mut step = world.sh("exit 0");
        step.params.resources = Some(Resources { memory: 32 << 20, ..Resources::default() });
        let ran = step.run(world);
        assert!(ran.error().to_string().contains("memory"), "{}", ran.error());
        return;
    }
    let mut step = world.sh("dd if=/dev/zero of=/dev/null bs=200M count=1");
    step.params.resources =
        Some(Resources { memory: 32 << 20, memory_swap: 32 << 20, cpu_shares: 512, ..Resources::default() });
    let ran = step.run(world);
    assert_eq!(ran.code(), 137, "{} {}", ran.stdout, ran.stderr);
    if world.choice == ExecutorChoice::Lean {
        assert!(ran.result.unwrap().oom_killed);
    }
    let mut step = world.sh("exit 3");
    step.params.resources = Some(Resources { memory: 64 << 20, ..Resources::default() });
    step.params.cgroup_parent = Some("/kiln-test-parent".into());
    let ran = step.run(world);
    assert_eq!(ran.result.unwrap(), ExitOutcome { code: 3, oom_killed: false, stubs: stubs() });
    for dir in cgroups_named("kiln-test-parent") {
        assert_eq!(
            fs::read_dir(dir.join("buildkit"))
                .unwrap()
                .filter(|e| e.as_ref().unwrap().path().is_dir())
                .count(),
            0
        );
        fs::remove_dir(dir.join("buildkit")).unwrap();
        fs::remove_dir(dir).unwrap();
    }
}

fn stubs() -> Vec<PathBuf> {
    ["/proc", "/dev", "/sys"].map(PathBuf::from).to_vec()
}

fn programs_that_do_not_start(world: &World) {
    let missing = world.program(&["no-such-program"]).run(world);
    let text = missing.error().to_string();
    assert!(
        text.contains("no-such-program")
            && text.contains("executable file")
            && text.contains("not found in $PATH"),
        "{text}"
    );
    let missing = world.program(&["/no/such"]).run(world);
    let text = missing.error().to_string();
    assert!(text.contains("/no/such") && text.to_lowercase().contains("no such file or directory"), "{text}");
    let refused = world.program(&["/etc/passwd"]).run(world);
    let text = refused.error().to_string();
    assert!(text.to_lowercase().contains("permission denied"), "{text}");
}

fn bad_sources(world: &World) {
    let mut step = world.program(&["true"]);
    step.mounts.push(LayeredMount {
        dest: "/m".into(),
        source: RootSource::Dir(world.root.clone()),
        selector: Some("not/there".into()),
        readonly: true,
    });
    let text = step.run(world).error().to_string();
    assert!(text.contains("not/there") && text.contains("No such file"), "{text}");
    let mut step = world.program(&["true"]);
    step.rootfs = RootSource::Overlay { lowers: vec![], upper: None, work: None };
    assert!(matches!(step.run(world).error(), SandboxError::Invalid(_)));
    let mut step = world.program(&["true"]);
    step.rootfs = RootSource::Dir(world.base.join("nowhere"));
    assert!(matches!(step.run(world).error(), SandboxError::Setup(_)));
    let step = world.program(&["true"]);
    let mut request = step.request(null(), null());
    request.id = "../up".into();
    let result = runtime().block_on(world.executor.run(request, CancellationToken::new()));
    assert!(matches!(result, Err(SandboxError::Invalid(_))));
}

fn background_processes_end(world: &World) {
    let mark = mark();
    let started = Instant::now();
    let ran = world.sh(&format!("sleep {mark} & (setsid sleep {mark} &) ; echo started")).run(world);
    assert_eq!(ran.out(), "started");
    assert!(started.elapsed() < PATIENCE && !process_with(&mark));
}

/// Starts a step that says when it runs, and gives the rest to `then`.
fn while_running(world: &World, mark: &str, then: impl AsyncFnOnce(SandboxRun<'_>, CancellationToken)) {
    let (out, out_end) = std::io::pipe().unwrap();
    let step = world.sh(&format!("(setsid sleep {mark} &) ; sleep {mark} & echo ready; wait"));
    let request = step.request(out_end.into(), null());
    let token = CancellationToken::new();
    let run = world.executor.run(request, token.clone());
    runtime().block_on(async {
        let mut run = run;
        let ready = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(out).read_line(&mut line).unwrap();
            line
        });
        tokio::select! {
            result = &mut run => panic!("ended early: {result:?}"),
            line = ready => assert_eq!(line.unwrap(), "ready\n"),
        }
        eventually("the sandbox runs", || process_with(mark));
        then(run, token).await;
    });
}

type SandboxRun<'a> = futures::future::BoxFuture<'a, Result<ExitOutcome, SandboxError>>;

fn cancel(world: &World) {
    let mark = mark();
    while_running(world, &mark, async |run, token| {
        token.cancel();
        let result = tokio::time::timeout(PATIENCE, run).await.unwrap();
        assert!(matches!(result, Err(SandboxError::Cancelled)), "{result:?}");
        assert!(!process_with(&mark));
    });
    let token = CancellationToken::new();
    token.cancel();
    let request = world.sh("echo never").request(null(), null());
    let result = runtime().block_on(world.executor.run(request, token));
    assert!(matches!(result, Err(SandboxError::Cancelled)));
}

fn dropped(world: &World) {
    let mark = mark();
    while_running(world, &mark, async |run, _| drop(run));
    eventually("the processes of a dropped run are gone", || !process_with(&mark));
}

fn many_at_once(world: &World) {
    let requests: Vec<_> = (0..24)
        .map(|n| world.sh(&format!("echo {n} > /n; exit {n}")))
        .map(|step| (step.upper(), step.request(null(), null())))
        .collect();
    runtime().block_on(async {
        let runs = requests.into_iter().map(|(upper, request)| async move {
            (upper, world.executor.run(request, CancellationToken::new()).await)
        });
        for (n, (upper, result)) in futures::future::join_all(runs).await.into_iter().enumerate() {
            assert_eq!(result.unwrap().code, n as u32);
            assert_eq!(fs::read_to_string(upper.join("n")).unwrap(), format!("{n}\n"));
        }
    });
}

fn many_layers(world: &World) {
    let stack = world.base.join("stack");
    let layers = |count: usize| -> Vec<PathBuf> {
        let make = |n: usize| {
            // Longer than one configuration string of the kernel may be.
            let dir = stack.join(format!("{n:0>220}"));
            fs::create_dir_all(dir.join("d")).unwrap();
            fs::write(dir.join("d/top"), n.to_string()).unwrap();
            fs::write(dir.join(format!("d/{n}")), "").unwrap();
            dir
        };
        (0..count).rev().map(make).collect()
    };
    // runc reads the mount table by lines, and refuses one as long as that of hundreds of layers.
    let count = if world.choice == ExecutorChoice::Lean { 620 } else { 20 };
    let mut step = world.sh("echo $(cat /d/top) $(ls /d | wc -l)");
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    lowers.splice(0..0, layers(count));
    assert_eq!(step.run(world).out(), format!("{} {}", count - 1, count + 1));
    let mut step = world.program(&["true"]);
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    let one = lowers[0].clone();
    lowers.extend(std::iter::repeat_n(one, 1000));
    let ran = step.run(world);
    assert!(matches!(ran.error(), SandboxError::Unsupported(_)), "{}", ran.error());
}

fn large_environment(world: &World) {
    let mut step = world.sh("echo ${#BIG} ${#LAST}");
    step.params.env.push(format!("BIG={}", "x".repeat(100_000)));
    step.params.env.extend((0..20).map(|n| format!("V{n}={}", "y".repeat(50_000))));
    step.params.env.push("LAST=z".into());
    assert_eq!(step.run(world).out(), "100000 1");
}

/// Another process of this program, ended with the test.
struct Daemon(std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this program as a daemon with one running sandbox; returns it once the sandbox runs.
fn start_daemon(world: &World, mode: &str, mark: &str) -> Daemon {
    let choice = match &world.choice {
        ExecutorChoice::Lean => PathBuf::new(),
        ExecutorChoice::Runtime(path) => path.clone(),
    };
    let child = Command::new("/proc/self/exe")
        .env("KILN_TEST_DAEMON", mode)
        .env("KILN_TEST_BASE", &world.base)
        .env("KILN_TEST_RUNTIME", choice)
        .env("KILN_TEST_MARK", mark)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    let mut line = String::new();
    BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    eventually("the sandbox runs", || process_with(mark));
    daemon
}

fn daemon(mode: &str) -> ExitCode {
    let base = PathBuf::from(std::env::var_os("KILN_TEST_BASE").unwrap());
    let mark = std::env::var("KILN_TEST_MARK").unwrap();
    let runtime = PathBuf::from(std::env::var_os("KILN_TEST_RUNTIME").unwrap());
    let choice =
        if runtime.as_os_str().is_empty() { ExecutorChoice::Lean } else { ExecutorChoice::Runtime(runtime) };
    let executor = open(&choice, &base.join("state-daemon")).unwrap();
    let world = World { executor, root: base.join("root"), base, choice, groups: String::new() };
    let ready = world
        .sh(&format!("echo ready; sleep {mark}"))
        .request(rustix::stdio::stdout().try_clone_to_owned().unwrap(), null());
    let result = self::runtime().block_on(world.executor.run(ready, CancellationToken::new()));
    if mode == "helper" {
        assert!(matches!(result, Err(SandboxError::Helper(_))), "{result:?}");
        // A new helper takes its place.
        assert_eq!(world.sh("exit 5").run(&world).code(), 5);
        return ExitCode::from(42);
    }
    ExitCode::FAILURE
}

fn death_of_the_daemon(world: &World) {
    let mark = mark();
    let daemon = start_daemon(world, "daemon", &mark);
    let pid = daemon.0.id();
    drop(daemon);
    eventually("the sandbox of a killed daemon is gone", || !process_with(&mark));
    let groups = format!("kiln-{pid}-");
    eventually("the cgroups of a killed daemon are gone", || cgroups_named(&groups).is_empty());
}

fn death_of_the_helper(world: &World) {
    let mark = mark();
    let mut daemon = start_daemon(world, "helper", &mark);
    let ours = format!("KILN_TEST_MARK={mark}");
    let helper = fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let line = fs::read(entry.path().join("status")).unwrap_or_default();
        // The helper's own pid is the second to last: it is the first of a nested namespace.
        let nested = String::from_utf8_lossy(&line)
            .lines()
            .any(|l| l.starts_with("NSpid:") && l.split('\t').count() == 3);
        name.trim() == "kiln-zygote" && nested && environment.split(|b| *b == 0).any(|v| v == ours.as_bytes())
    });
    let pid: i32 = helper.unwrap().file_name().to_str().unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(daemon.0.wait().unwrap().code(), Some(42));
    eventually("the sandbox of a killed helper is gone", || !process_with(&mark));
}
