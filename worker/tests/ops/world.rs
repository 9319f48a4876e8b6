//! A worker on a fresh store, and short ways to say operations.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use kiln_cache::{Ref, SnapshotMeta, SnapshotRef, Store, StoreOptions};
use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use kiln_session::SessionManager;
use kiln_solver::op::{CacheMap, OpContext, OpError, OpVertex};
use kiln_solver::progress::{Event, ProgressSink, VertexProgress};
use kiln_worker::image::Images;
use kiln_worker::ops::{BuildContext, Entitlements, SessionGroup};
use kiln_worker::registry::{Anonymous, Registry, RegistryConfig};
use kiln_worker::sandbox::ExecutorChoice;
use kiln_worker::sandbox::spec::NetworkMode;
use kiln_worker::{Dns, Worker, WorkerConfig};
use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Logs of everything that runs.
#[derive(Default)]
pub(crate) struct Logs(pub(crate) Mutex<BTreeMap<i64, Vec<u8>>>);

impl ProgressSink for Logs {
    fn event(&self, event: Event) {
        if let Event::Log(log) = event {
            self.0.lock().unwrap().entry(log.stream).or_default().extend(log.data);
        }
    }
}

pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) worker: Arc<Worker>,
    pub(crate) sessions: Arc<SessionManager>,
    pub(crate) logs: Arc<Logs>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let worker = Worker::open(WorkerConfig {
            images: Images::new(Registry::new(RegistryConfig::default()), &store),
            store,
            executor: ExecutorChoice::Lean,
            network: NetworkMode::Host,
            dns: Dns::default(),
            run_dir: dir.path().join("run"),
        });
        Self { dir, worker: worker.unwrap(), sessions: SessionManager::new(), logs: Arc::default() }
    }

    pub(crate) fn context(&self, sessions: &[&str]) -> BuildContext {
        BuildContext {
            sessions: SessionGroup::new(
                self.sessions.clone(),
                sessions.iter().map(ToString::to_string).collect(),
            ),
            entitlements: Entitlements::default(),
            credentials: Arc::new(Anonymous),
            cgroup_parent: String::new(),
            git: Default::default(),
            http: Default::default(),
        }
    }

    pub(crate) fn op_context(&self) -> OpContext {
        OpContext {
            progress: VertexProgress::new("sha256:test".into(), self.logs.clone()),
            ignore_cache: false,
        }
    }

    /// Runs one operation on its inputs.
    pub(crate) async fn run(&self, op: pb::op::Op, inputs: &[&Ref]) -> Result<Vec<Ref>, OpError> {
        self.run_in(&self.context(&[]), op, inputs).await
    }

    pub(crate) async fn run_in(
        &self,
        context: &BuildContext,
        op: pb::op::Op,
        inputs: &[&Ref],
    ) -> Result<Vec<Ref>, OpError> {
        let op = self.worker.factory(context.clone()).op(vertex(op, inputs.len()))?;
        let inputs = inputs.iter().map(|input| (*input).clone()).collect();
        op.execute(&self.op_context(), inputs).await.map_err(|failure| failure.error)
    }

    pub(crate) async fn key(&self, op: pb::op::Op, inputs: usize) -> CacheMap {
        let op = self.worker.factory(self.context(&[])).op(vertex(op, inputs)).unwrap();
        op.cache_map(&self.op_context()).await.unwrap()
    }

    /// Content of a file in a result; `None` if there is none.
    pub(crate) async fn read(&self, result: &Ref, path: &str) -> Option<String> {
        let view = self.worker.view(result).await.unwrap();
        let fd = rustix::fs::openat2(view.fd(), path, OFlags::RDONLY, Mode::empty(), ResolveFlags::IN_ROOT)
            .ok()?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(fd), &mut text).unwrap();
        Some(text)
    }

    pub(crate) fn snapshot(&self, fill: impl FnOnce(&Path)) -> Ref {
        let snapshots = self.worker.layers().snapshots();
        let staged = snapshots.stage(None).unwrap();
        fill(staged.fs());
        Some(snapshots.commit(staged, SnapshotMeta::new("test")).unwrap())
    }

    /// A root with busybox.
    pub(crate) fn busybox(&self) -> Ref {
        self.snapshot(|root| {
            for dir in ["bin", "etc", "tmp", "root", "proc", "dev", "sys"] {
                std::fs::create_dir_all(root.join(dir)).unwrap();
            }
            let busybox =
                ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
            let busybox = busybox.expect("busybox (package busybox-static) is not installed");
            std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
            let list = Command::new(busybox).arg("--list").output().unwrap();
            for applet in
                String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox")
            {
                symlink("busybox", root.join("bin").join(applet)).unwrap();
            }
            let users = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n";
            std::fs::write(root.join("etc/passwd"), users).unwrap();
            std::fs::write(root.join("etc/group"), "root:x:0:\nstaff:x:50:ann\n").unwrap();
        })
    }

    pub(crate) fn log(&self, stream: i64) -> String {
        String::from_utf8(self.logs.0.lock().unwrap().remove(&stream).unwrap_or_default()).unwrap()
    }
}

pub(crate) fn vertex(op: pb::op::Op, inputs: usize) -> OpVertex {
    let input = |index: usize| pb::Input { digest: format!("sha256:{index}"), index: 0 };
    let op = pb::Op { inputs: (0..inputs).map(input).collect(), op: Some(op), ..Default::default() };
    OpVertex { digest: "sha256:test".into(), op: op.into(), metadata: Arc::default(), name: "test".into() }
}

pub(crate) fn file(actions: Vec<pb::FileAction>) -> pb::op::Op {
    pb::op::Op::File(pb::FileOp { actions })
}

pub(crate) fn action(input: i64, secondary_input: i64, output: i64, action: Action) -> pb::FileAction {
    pb::FileAction { input, secondary_input, output, action: Some(action) }
}

pub(crate) fn mkfile(path: &str, data: &str) -> Action {
    let file = pb::FileActionMkFile {
        path: path.into(),
        mode: 0o644,
        data: data.into(),
        owner: None,
        timestamp: -1,
    };
    Action::Mkfile(file.into())
}

pub(crate) fn rm(path: &str) -> Action {
    Action::Rm(pb::FileActionRm { path: path.into(), ..Default::default() })
}

pub(crate) fn copy(src: &str, dest: &str) -> pb::FileActionCopy {
    pb::FileActionCopy {
        src: src.into(),
        dest: dest.into(),
        mode: -1,
        timestamp: -1,
        dir_copy_contents: true,
        create_dest_path: true,
        ..Default::default()
    }
}

pub(crate) fn bind(input: i64, dest: &str, output: i64, readonly: bool) -> pb::Mount {
    pb::Mount { input, dest: dest.into(), output, readonly, ..Default::default() }
}

pub(crate) fn sh(text: &str) -> pb::ExecOp {
    let meta = pb::Meta {
        args: vec!["/bin/sh".into(), "-c".into(), text.into()],
        cwd: "/".into(),
        remove_mount_stubs_recursive: true,
        ..Default::default()
    };
    pb::ExecOp { meta: Some(meta), mounts: vec![bind(0, "/", 0, false)], ..Default::default() }
}

pub(crate) fn exec(op: pb::ExecOp) -> pb::op::Op {
    pb::op::Op::Exec(Box::new(op))
}

pub(crate) fn top(result: &Ref) -> SnapshotRef {
    result.clone().expect("a snapshot")
}

/// Paths in the topmost layer alone.
pub(crate) fn layer(result: &Ref) -> Vec<String> {
    let dir = top(result).dir();
    let mut found: Vec<String> =
        walk(&dir).map(|path| path.strip_prefix(&dir).unwrap().display().to_string()).collect();
    found.sort();
    found
}

pub(crate) fn walk(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let mut dirs = vec![dir.to_owned()];
    let mut found = Vec::new();
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                dirs.push(path.clone());
            }
            found.push(path);
        }
    }
    found.into_iter()
}
