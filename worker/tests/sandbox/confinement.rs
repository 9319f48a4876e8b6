//! What a program in a sandbox is, sees and may do.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kiln_worker::sandbox::spec::{Bind, NetworkMode, Resources, SecurityMode, Tmpfs, Ulimit};
use kiln_worker::sandbox::{ExecutorChoice, ExitOutcome, SandboxError};

use rustix::process::{Resource, getrlimit};

use crate::FEW_FILES;
use crate::world::{Step, World, cgroups_named, status_fields};

pub(crate) fn exit_status(world: &World) {
    assert_eq!(world.sh("exit 0").run(world).code(), 0);
    assert_eq!(world.sh("exit 7").run(world).code(), 7);
    // The first process of a pid namespace cannot kill itself; a child reports its signal as a shell does.
    assert_eq!(world.sh("sh -c 'kill -9 $$'; exit $?").run(world).code(), 137);
}

pub(crate) fn process(world: &World) {
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

pub(crate) fn own_namespaces(world: &World) {
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

pub(crate) fn confinement(world: &World) {
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

pub(crate) fn system_calls(world: &World) {
    assert_ne!(world.program(&["unshare", "-U", "true"]).run(world).code(), 0);
    assert_ne!(world.program(&["unshare", "-m", "true"]).run(world).code(), 0);
    assert_eq!(world.program(&["chroot", "/", "true"]).run(world).code(), 0);
    // The filter stays when an ordinary user runs the program.
    let mut step = world.program(&["unshare", "-U", "true"]);
    (step.params.uid, step.params.gid) = (1000, 1001);
    assert_ne!(step.run(world).code(), 0);
}

pub(crate) fn devices(world: &World) {
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

pub(crate) fn insecure(world: &World) {
    let mut step = world.sh("cat /proc/self/status; mkdir /m && mount -t tmpfs x /m && echo x > /m/f && test -c /dev/loop-control");
    step.params.security = SecurityMode::Insecure;
    let ran = step.run(world);
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let (theirs, ours) = (status_fields(ran.out()), status_fields(&ours));
    assert_eq!((theirs["CapEff"], theirs["Seccomp"]), (ours["CapPrm"], "0"));
}

/// Descriptors of the helper that a program could find as its own.
const DESCRIPTORS: std::ops::RangeInclusive<u32> = 3..=32;

pub(crate) fn descriptors_lead_nowhere(world: &World) {
    if world.choice != ExecutorChoice::Lean {
        return;
    }
    let outside = world.base.join("outside-program");
    fs::create_dir_all(&outside).unwrap();
    // The program is looked for by the kernel while descriptors that only close with the exec are still open.
    fs::copy(world.root.join("bin/busybox"), outside.join("echo")).unwrap();
    let through = |n: u32| format!("/proc/self/fd/{n}{}{}", "/..".repeat(16), outside.display());
    let refused = |what: &str, step: Step| {
        let ran = step.run(world);
        assert!(ran.result.is_err() && ran.stdout.is_empty(), "{what}: {:?} {}", ran.result, ran.stdout);
    };
    for n in DESCRIPTORS {
        let program = format!("{}/echo", through(n));
        refused(&program, world.program(&[&program, "reached"]));

        let step = world.program(&["/script"]);
        fs::write(step.upper().join("script"), format!("#!{program}\n")).unwrap();
        fs::set_permissions(step.upper().join("script"), fs::Permissions::from_mode(0o755)).unwrap();
        refused(&format!("script of {program}"), step);

        let mut step = world.program(&["./echo", "reached"]);
        step.params.cwd = through(n);
        refused(&format!("working directory {}", through(n)), step);
    }
    let mut step = world.program(&["echo", "reached"]);
    step.params.env = vec![format!("PATH={}", DESCRIPTORS.map(through).collect::<Vec<_>>().join(":"))];
    refused("PATH", step);
}

/// Runs in a sandbox, as the program that was there before the one of the image.
pub(crate) fn touch_own_program() -> ExitCode {
    let program = Path::new("/proc/self/exe");
    let mode = fs::metadata(program).unwrap().permissions();
    println!("{:?}", fs::set_permissions(program, mode).map_err(|e| e.kind()));
    ExitCode::SUCCESS
}

pub(crate) fn the_hosts_program_stays_as_it_is(world: &World) {
    if world.choice != ExecutorChoice::Lean {
        return;
    }
    // Before the image's program runs, this is the helper's. With the host's libraries it runs in the sandbox.
    let mut step = world.program(&["/proc/self/exe"]);
    step.params.env.push("KILN_TEST_DAEMON=touch".into());
    for libraries in ["/lib", "/lib64", "/usr/lib"].map(PathBuf::from).into_iter().filter(|p| p.exists()) {
        step.params.binds.push(Bind { source: libraries.clone(), dest: libraries, readonly: true });
    }
    assert_eq!(step.run(world).out(), "Err(ReadOnlyFilesystem)");
}

pub(crate) fn user_and_directory(world: &World) {
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
pub(crate) fn readonly_root(world: &World) {
    let mut step = world.sh("! touch /x && touch /tmp/x && echo done");
    step.params.readonly_root = true;
    step.params.tmpfs.push(Tmpfs { dest: "/tmp".into(), size: None });
    assert_eq!(step.run(world).out(), "done");
}

pub(crate) fn no_network(world: &World) {
    let mut step = world.sh("ls /sys/class/net; cat /sys/class/net/lo/flags");
    step.params.network = NetworkMode::None;
    assert_eq!(step.run(world).out(), "lo\n0x9");
    let host = world.sh("ls /sys/class/net").run(world);
    let names = fs::read_dir("/sys/class/net").unwrap().count();
    assert_eq!(host.out().lines().count(), names);
}

pub(crate) fn resource_limits(world: &World) {
    let mut step = world.sh("ulimit -Sn; ulimit -Hn; ulimit -c");
    step.params.ulimits = vec![
        Ulimit { name: "nofile".into(), soft: 77, hard: 99 },
        Ulimit { name: "core".into(), soft: 0, hard: 0 },
    ];
    assert_eq!(step.run(world).out(), "77\n99\n0");
}

pub(crate) fn open_files(world: &World) {
    let ours = getrlimit(Resource::Nofile);
    assert_eq!(ours.current, ours.maximum, "the daemon's own limit is raised");
    if world.choice == ExecutorChoice::Runtime("runc".into()) {
        // It raises the limit itself, and hands on what it has then.
        return;
    }
    let hard = ours.maximum.unwrap().to_string();
    assert_eq!(world.sh("ulimit -Sn; ulimit -Hn").run(world).out(), format!("{FEW_FILES}\n{hard}"));
}

pub(crate) fn memory_limit(world: &World) {
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

pub(crate) fn stubs() -> Vec<PathBuf> {
    ["/proc", "/dev", "/sys"].map(PathBuf::from).to_vec()
}
