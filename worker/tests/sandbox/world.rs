//! An executor with a root of busybox, and steps to run in it.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kiln_worker::sandbox::spec::{SpecParams, build};
use kiln_worker::sandbox::{
    Executor, ExecutorChoice, ExitOutcome, LayeredMount, MemoryFile, RootSource, SandboxError,
    SandboxRequest, Stdio,
};
use tokio_util::sync::CancellationToken;

use crate::PATIENCE;

pub(crate) struct World {
    pub(crate) executor: Arc<dyn Executor>,
    pub(crate) root: PathBuf,
    pub(crate) base: PathBuf,
    pub(crate) choice: ExecutorChoice,
    /// Which cgroups the host shows, if not its own.
    pub(crate) groups: String,
}

pub(crate) fn choices() -> Vec<ExecutorChoice> {
    let mut list = vec![ExecutorChoice::Lean];
    for name in ["runc", "crun"] {
        let found = Command::new(name).arg("--version").stdout(process::Stdio::null()).status();
        if found.is_ok_and(|s| s.success()) {
            list.push(ExecutorChoice::Runtime(name.into()));
        } else {
            println!("not installed, not tested: {name}");
        }
    }
    list
}

/// A root of busybox and an account file; no /proc, /sys or /dev.
pub(crate) fn make_root(base: &Path) -> PathBuf {
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

pub(crate) static NEXT: AtomicU32 = AtomicU32::new(0);

/// One run: change what differs from `sh -c TEXT` in a fresh overlay.
pub(crate) struct Step {
    pub(crate) params: SpecParams,
    pub(crate) rootfs: RootSource,
    pub(crate) mounts: Vec<LayeredMount>,
    pub(crate) files: Vec<MemoryFile>,
    pub(crate) dir: PathBuf,
}

pub(crate) struct Ran {
    pub(crate) result: Result<ExitOutcome, SandboxError>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn code(&self) -> u32 {
        match &self.result {
            Ok(outcome) => outcome.code,
            Err(e) => panic!("{e} (stdout {:?}, stderr {:?})", self.stdout, self.stderr),
        }
    }

    pub(crate) fn out(&self) -> &str {
        assert_eq!(self.code(), 0, "stdout {:?}, stderr {:?}", self.stdout, self.stderr);
        self.stdout.trim_end()
    }

    pub(crate) fn error(&self) -> &SandboxError {
        match &self.result {
            Err(e) => e,
            Ok(o) => panic!("ended with {o:?} (stdout {:?}, stderr {:?})", self.stdout, self.stderr),
        }
    }
}

impl World {
    pub(crate) fn sh(&self, text: &str) -> Step {
        self.program(&["sh", "-c", text])
    }

    pub(crate) fn program(&self, args: &[&str]) -> Step {
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
            files: Vec::new(),
            dir,
        }
    }
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(crate) fn null() -> OwnedFd {
    fs::File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

impl Step {
    pub(crate) fn request(self, stdout: OwnedFd, stderr: OwnedFd) -> SandboxRequest {
        SandboxRequest {
            id: self.params.id.clone(),
            spec: build(&self.params).unwrap(),
            rootfs: self.rootfs,
            layered_mounts: self.mounts,
            memory_files: self.files,
            stdio: Stdio::Files { stdin: null(), stdout, stderr },
            attendance: None,
        }
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    pub(crate) fn run(self, world: &World) -> Ran {
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
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A duration to sleep that no other test uses, to find the sleeping process by.
pub(crate) fn mark() -> String {
    format!("3600.{}{:03}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Whether a process has this argument.
pub(crate) fn process_with(argument: &str) -> bool {
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        let own = entry.file_name().to_str() == Some(&std::process::id().to_string());
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        !own && line.split(|b| *b == 0).any(|a| a == argument.as_bytes())
    })
}

pub(crate) fn mount_points() -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    text.lines().filter_map(|l| l.split(' ').nth(4)).map(str::to_owned).collect()
}

pub(crate) fn cgroups_named(prefix: &str) -> Vec<PathBuf> {
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

pub(crate) fn status_fields(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|l| l.split_once(':')).map(|(k, v)| (k, v.trim())).collect()
}
