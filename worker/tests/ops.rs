//! Operations on a real store and in real sandboxes, as a daemon runs them.
//!
//! Has its own `main`, because the executor starts this binary again as its helper. Needs root and `busybox`.

#[path = "../../session/tests/common/mod.rs"]
mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use kiln_cache::{Ref, SnapshotMeta, SnapshotRef, Store, StoreOptions};
use kiln_proto::pb::file_action::Action;
use kiln_proto::{llb, pb};
use kiln_session::SessionManager;
use kiln_session::client::{Attachables, Secret, SharedDir};
use kiln_solver::op::{CacheMap, OpContext, OpError, OpVertex, ResultStore};
use kiln_solver::progress::{Event, ProgressSink, VertexProgress};
use kiln_solver::{BuildOptions, Solver, SolverOptions};
use kiln_worker::image::Images;
use kiln_worker::ops::{BuildContext, Entitlements, SessionGroup};
use kiln_worker::registry::{Anonymous, Registry, RegistryConfig};
use kiln_worker::sandbox::spec::NetworkMode;
use kiln_worker::sandbox::{ExecutorChoice, zygote};
use kiln_worker::{Worker, WorkerConfig};
use rustix::fs::{Mode, OFlags, ResolveFlags};

const PATIENCE: Duration = Duration::from_secs(60);

type Test = for<'a> fn(&'a World) -> LocalBoxFuture<'a, ()>;

macro_rules! tests {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), |world| $name(world).boxed_local())),*] };
}

const TESTS: &[(&str, Test)] = tests![
    file_actions_make_layers,
    removed_files_are_whiteouts,
    users_are_looked_up_in_their_input,
    a_failing_action_is_named,
    a_chain_too_deep_for_one_mount_is_still_one_tree,
    merge_and_diff,
    a_step_writes_a_layer_and_reports_its_output,
    nothing_but_the_change_is_in_the_layer,
    a_failing_step_tells_its_exit_code,
    users_environment_and_hosts,
    mounts_show_inputs_and_scratch_space,
    several_outputs_are_numbered_by_mount,
    cache_mounts_persist_and_locked_ones_wait,
    secrets_come_from_the_client,
    a_dropped_step_leaves_nothing,
    forbidden_things_are_refused,
    keys_leave_out_what_does_not_matter,
    a_clients_directory_is_transferred_once,
    a_broken_transfer_is_not_taken_for_the_present_state,
    unknown_sources_are_refused_by_name,
    an_unchanged_file_keeps_the_steps_that_read_it,
];

fn main() -> ExitCode {
    zygote::run_if_requested();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: operations need root");
        return ExitCode::SUCCESS;
    }
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mounts = mount_points();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut failed = Vec::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
        let started = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let world = World::new();
                tokio::time::timeout(PATIENCE, test(&world)).await.expect("the test takes too long");
                world.worker.idle().await;
            });
        }));
        let word = if passed.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} ms)", started.elapsed().as_millis());
        if passed.is_err() {
            failed.push(*name);
        }
    }
    if mount_points() != mounts {
        println!("mounts were left behind");
        failed.push("mounts");
    }
    println!("{} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn mount_points() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect()
}

/// Logs of everything that runs.
#[derive(Default)]
struct Logs(Mutex<BTreeMap<i64, Vec<u8>>>);

impl ProgressSink for Logs {
    fn event(&self, event: Event) {
        if let Event::Log(log) = event {
            self.0.lock().unwrap().entry(log.stream).or_default().extend(log.data);
        }
    }
}

struct World {
    dir: tempfile::TempDir,
    worker: Arc<Worker>,
    sessions: Arc<SessionManager>,
    logs: Arc<Logs>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
        let worker = Worker::open(WorkerConfig {
            images: Images::new(Registry::new(RegistryConfig::default()), &store),
            store,
            executor: ExecutorChoice::Lean,
            network: NetworkMode::Host,
            run_dir: dir.path().join("run"),
        });
        Self { dir, worker: worker.unwrap(), sessions: SessionManager::new(), logs: Arc::default() }
    }

    fn context(&self, sessions: &[&str]) -> BuildContext {
        BuildContext {
            sessions: SessionGroup::new(
                self.sessions.clone(),
                sessions.iter().map(ToString::to_string).collect(),
            ),
            entitlements: Entitlements::default(),
            credentials: Arc::new(Anonymous),
            cgroup_parent: String::new(),
        }
    }

    fn op_context(&self) -> OpContext {
        OpContext { progress: VertexProgress::new("sha256:test", self.logs.clone()), ignore_cache: false }
    }

    /// Runs one operation on its inputs.
    async fn run(&self, op: pb::op::Op, inputs: &[&Ref]) -> Result<Vec<Ref>, OpError> {
        self.run_in(&self.context(&[]), op, inputs).await
    }

    async fn run_in(
        &self,
        context: &BuildContext,
        op: pb::op::Op,
        inputs: &[&Ref],
    ) -> Result<Vec<Ref>, OpError> {
        let op = self.worker.factory(context.clone()).op(&vertex(op, inputs.len()))?;
        op.execute(&self.op_context(), inputs.iter().map(|input| (*input).clone()).collect()).await
    }

    async fn key(&self, op: pb::op::Op, inputs: usize) -> CacheMap {
        let op = self.worker.factory(self.context(&[])).op(&vertex(op, inputs)).unwrap();
        op.cache_map(&self.op_context()).await.unwrap()
    }

    /// Content of a file in a result; `None` if there is none.
    async fn read(&self, result: &Ref, path: &str) -> Option<String> {
        let view = self.worker.view(result).await.unwrap();
        let fd = rustix::fs::openat2(view.fd(), path, OFlags::RDONLY, Mode::empty(), ResolveFlags::IN_ROOT)
            .ok()?;
        let mut text = String::new();
        std::io::Read::read_to_string(&mut std::fs::File::from(fd), &mut text).unwrap();
        Some(text)
    }

    fn snapshot(&self, fill: impl FnOnce(&Path)) -> Ref {
        let snapshots = self.worker.layers().snapshots();
        let staged = snapshots.stage(None).unwrap();
        fill(staged.fs());
        Some(snapshots.commit(staged, SnapshotMeta::new("test")).unwrap())
    }

    /// A root with busybox.
    fn busybox(&self) -> Ref {
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

    fn log(&self, stream: i64) -> String {
        String::from_utf8(self.logs.0.lock().unwrap().remove(&stream).unwrap_or_default()).unwrap()
    }
}

fn vertex(op: pb::op::Op, inputs: usize) -> OpVertex {
    let input = |index: usize| pb::Input { digest: format!("sha256:{index}"), index: 0 };
    let op = pb::Op { inputs: (0..inputs).map(input).collect(), op: Some(op), ..Default::default() };
    OpVertex { digest: "sha256:test".into(), op, metadata: pb::OpMetadata::default(), name: "test".into() }
}

fn file(actions: Vec<pb::FileAction>) -> pb::op::Op {
    pb::op::Op::File(pb::FileOp { actions })
}

fn action(input: i64, secondary_input: i64, output: i64, action: Action) -> pb::FileAction {
    pb::FileAction { input, secondary_input, output, action: Some(action) }
}

fn mkfile(path: &str, data: &str) -> Action {
    let file = pb::FileActionMkFile {
        path: path.into(),
        mode: 0o644,
        data: data.into(),
        owner: None,
        timestamp: -1,
    };
    Action::Mkfile(file)
}

fn rm(path: &str) -> Action {
    Action::Rm(pb::FileActionRm { path: path.into(), ..Default::default() })
}

fn copy(src: &str, dest: &str) -> pb::FileActionCopy {
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

fn bind(input: i64, dest: &str, output: i64, readonly: bool) -> pb::Mount {
    pb::Mount { input, dest: dest.into(), output, readonly, ..Default::default() }
}

fn sh(text: &str) -> pb::ExecOp {
    let meta = pb::Meta {
        args: vec!["/bin/sh".into(), "-c".into(), text.into()],
        cwd: "/".into(),
        remove_mount_stubs_recursive: true,
        ..Default::default()
    };
    pb::ExecOp { meta: Some(meta), mounts: vec![bind(0, "/", 0, false)], ..Default::default() }
}

fn exec(op: pb::ExecOp) -> pb::op::Op {
    pb::op::Op::Exec(op)
}

fn top(result: &Ref) -> SnapshotRef {
    result.clone().expect("a snapshot")
}

/// Paths in the topmost layer alone.
fn layer(result: &Ref) -> Vec<String> {
    let dir = top(result).dir();
    let mut found: Vec<String> =
        walk(&dir).map(|path| path.strip_prefix(&dir).unwrap().display().to_string()).collect();
    found.sort();
    found
}

fn walk(dir: &Path) -> impl Iterator<Item = PathBuf> {
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

async fn file_actions_make_layers(world: &World) {
    let chained = file(vec![action(-1, -1, -1, mkfile("/a", "A")), action(0, -1, 0, mkfile("/b", "B"))]);
    let base = world.run(chained, &[]).await.unwrap().remove(0);
    assert_eq!((top(&base).layers().len(), layer(&base)), (1, vec!["a".to_owned(), "b".to_owned()]));
    let copied = file(vec![action(0, 1, 0, Action::Copy(copy("/a", "/dir/c")))]);
    let copied = world.run(copied, &[&base, &base]).await.unwrap().remove(0);
    assert_eq!(layer(&copied), ["dir", "dir/c"]);
    assert_eq!(world.read(&copied, "/dir/c").await.as_deref(), Some("A"));
    assert_eq!(world.read(&copied, "/b").await.as_deref(), Some("B"));
    let two = file(vec![action(0, -1, 1, mkfile("/x", "X")), action(1, -1, 0, mkfile("/y", "Y"))]);
    let results = world.run(two, &[&base]).await.unwrap();
    assert_eq!((layer(&results[0]), layer(&results[1])), (vec!["y".to_owned()], vec!["x".to_owned()]));
    let scratch = file(vec![action(
        -1,
        -1,
        0,
        Action::Copy(pb::FileActionCopy {
            allow_wildcard: true,
            allow_empty_wildcard: true,
            ..copy("/*", "/")
        }),
    )]);
    let empty = world.run(scratch, &[]).await.unwrap().remove(0);
    assert!(layer(&empty).is_empty());
}

async fn removed_files_are_whiteouts(world: &World) {
    let base = world.snapshot(|root| {
        std::fs::create_dir_all(root.join("d/e")).unwrap();
        std::fs::write(root.join("d/e/f"), "F").unwrap();
        std::fs::write(root.join("keep"), "K").unwrap();
    });
    let removed = world.run(file(vec![action(0, -1, 0, rm("/d/e"))]), &[&base]).await.unwrap().remove(0);
    let whiteout = top(&removed).dir().join("d/e").symlink_metadata().unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    assert_eq!(world.read(&removed, "/d/e/f").await, None);
    assert_eq!(world.read(&removed, "/keep").await.as_deref(), Some("K"));
    assert_eq!(world.read(&base, "/d/e/f").await.as_deref(), Some("F"));
}

async fn users_are_looked_up_in_their_input(world: &World) {
    let users = world.busybox();
    let named = |name: &str| {
        let user = pb::user_opt::User::ByName(pb::NamedUserOpt { name: name.into(), input: 1 });
        Some(pb::UserOpt { user: Some(user) })
    };
    let owner = Some(pb::ChownOpt { user: named("ann"), group: named("staff") });
    let owned = Action::Mkfile(pb::FileActionMkFile {
        path: "/f".into(),
        owner,
        timestamp: -1,
        ..Default::default()
    });
    let made = world.run(file(vec![action(0, -1, 0, owned)]), &[&None, &users]).await.unwrap().remove(0);
    let stat = top(&made).dir().join("f").metadata().unwrap();
    assert_eq!((stat.uid(), stat.gid()), (1000, 50));
}

async fn a_failing_action_is_named(world: &World) {
    let op = file(vec![action(0, -1, -1, mkfile("/a", "A")), action(1, -1, 0, rm("/zzz"))]);
    let error = world.run(op, &[&None]).await.unwrap_err();
    assert_eq!(error.message, "lstat /zzz: no such file or directory");
    assert_eq!(error.file_action, Some(1));
}

async fn a_chain_too_deep_for_one_mount_is_still_one_tree(world: &World) {
    let mut result: Ref = None;
    for number in 0..300 {
        let mut actions = vec![action(0, -1, -1, mkfile(&format!("/f{number}"), &number.to_string()))];
        actions.push(match number {
            10..20 => action(1, -1, 0, rm(&format!("/f{}", number - 10))),
            _ => action(1, -1, 0, mkfile("/last", &number.to_string())),
        });
        result = world.run(file(actions), &[&result]).await.unwrap().remove(0);
    }
    assert_eq!(top(&result).layers().len(), 300);
    assert_eq!(world.read(&result, "/f250").await.as_deref(), Some("250"));
    assert_eq!(world.read(&result, "/f15").await.as_deref(), Some("15"));
    assert_eq!(world.read(&result, "/f5").await, None);
    assert_eq!(world.read(&result, "/last").await.as_deref(), Some("299"));
}

async fn merge_and_diff(world: &World) {
    let tree = |files: &[(&str, &str)]| {
        world.snapshot(|root| {
            for (path, text) in files {
                common::write(root, path, text);
            }
        })
    };
    let (a, b) = (tree(&[("a", "A"), ("both", "from a")]), tree(&[("b", "B"), ("both", "from b")]));
    let inputs = [0, 1].map(|input| pb::MergeInput { input }).to_vec();
    let merged = pb::op::Op::Merge(pb::MergeOp { inputs });
    let merged = world.run(merged, &[&a, &b]).await.unwrap().remove(0);
    for (path, text) in [("a", "A"), ("b", "B"), ("both", "from b")] {
        assert_eq!(world.read(&merged, path).await.as_deref(), Some(text));
    }
    let diff = |lower: i64, upper: i64| {
        pb::op::Op::Diff(pb::DiffOp {
            lower: Some(pb::LowerDiffInput { input: lower }),
            upper: Some(pb::UpperDiffInput { input: upper }),
        })
    };
    let more = world.run(file(vec![action(0, -1, 0, mkfile("/new", "N"))]), &[&a]).await.unwrap().remove(0);
    let above = world.run(diff(0, 1), &[&a, &more]).await.unwrap().remove(0);
    assert_eq!(top(&above).layers(), [top(&more)], "the layers above are taken as they are");
    assert_eq!(world.run(diff(0, 1), &[&a, &a]).await.unwrap(), [None]);
    assert_eq!(world.run(diff(-1, 0), &[&a]).await.unwrap(), std::slice::from_ref(&a));

    let old = tree(&[("gone", "G"), ("same", "S"), ("d/changed", "1"), ("d/kept", "K"), ("kind/f", "x")]);
    let new = tree(&[
        ("same", "S"),
        ("d/changed", "22"),
        ("d/kept", "K"),
        ("kind", "now a file"),
        ("added/x", "X"),
    ]);
    for path in ["same", "d/kept", "d"] {
        let time = std::time::UNIX_EPOCH + Duration::from_secs(1_000);
        for tree in [&old, &new] {
            std::fs::File::open(top(tree).dir().join(path)).unwrap().set_modified(time).unwrap();
        }
    }
    let changes = world.run(diff(0, 1), &[&old, &new]).await.unwrap().remove(0);
    assert_eq!(layer(&changes), ["added", "added/x", "d", "d/changed", "gone", "kind"]);
    let inputs = [0, 1].map(|input| pb::MergeInput { input }).to_vec();
    let applied =
        world.run(pb::op::Op::Merge(pb::MergeOp { inputs }), &[&old, &changes]).await.unwrap().remove(0);
    assert_eq!(world.read(&applied, "gone").await, None);
    for (path, text) in [("d/changed", "22"), ("d/kept", "K"), ("kind", "now a file"), ("added/x", "X")] {
        assert_eq!(world.read(&applied, path).await.as_deref(), Some(text));
    }
}

async fn a_step_writes_a_layer_and_reports_its_output(world: &World) {
    let base = world.busybox();
    let op = sh("echo out; echo err >&2; mkdir -p /made/here; echo text > /made/here/file; rm /etc/group");
    let result = world.run(exec(op), &[&base]).await.unwrap().remove(0);
    assert_eq!((world.log(1).as_str(), world.log(2).as_str()), ("out\n", "err\n"));
    assert_eq!(world.read(&result, "/made/here/file").await.as_deref(), Some("text\n"));
    assert_eq!(world.read(&result, "/etc/group").await, None);
    assert!(world.read(&base, "/etc/group").await.is_some());
    assert_eq!(top(&result).parent(), base);
}

async fn nothing_but_the_change_is_in_the_layer(world: &World) {
    let base = world.busybox();
    let nothing = world.run(exec(sh("true")), &[&base]).await.unwrap().remove(0);
    assert_eq!(layer(&nothing), Vec::<String>::new());
    let one = world.run(exec(sh("echo x > /etc/conf")), &[&base]).await.unwrap().remove(0);
    assert_eq!(layer(&one), ["etc", "etc/conf"]);
    let bare = world.snapshot(|root| {
        std::fs::create_dir(root.join("bin")).unwrap();
        std::fs::copy(top(&base).dir().join("bin/busybox"), root.join("bin/sh")).unwrap();
    });
    let nothing = world.run(exec(sh(":")), &[&bare]).await.unwrap().remove(0);
    assert_eq!(layer(&nothing), Vec::<String>::new(), "directories made as mount points are gone");
}

async fn a_failing_step_tells_its_exit_code(world: &World) {
    let base = world.busybox();
    let error = world.run(exec(sh("exit 7")), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "process \"/bin/sh -c exit 7\" did not complete successfully: exit code: 7");
    assert_eq!(error.exit_code, Some(7));
    let mut allowed = sh("exit 7");
    allowed.meta.as_mut().unwrap().valid_exit_codes = vec![7];
    world.run(exec(allowed.clone()), &[&base]).await.unwrap();
    allowed.meta.as_mut().unwrap().args[2] = "exit 0".into();
    assert_eq!(world.run(exec(allowed), &[&base]).await.unwrap_err().exit_code, Some(0));
    let mut missing = sh("");
    missing.meta.as_mut().unwrap().args = vec!["/no/such/program".into()];
    let error = world.run(exec(missing), &[&base]).await.unwrap_err();
    assert!(error.message.contains("/no/such/program"), "{error}");
}

async fn users_environment_and_hosts(world: &World) {
    let base = world.busybox();
    let mut op =
        sh("id -u; id -g; id -G; echo $HOME $HTTP_PROXY $http_proxy $A; pwd; cat /etc/hosts; hostname");
    let meta = op.meta.as_mut().unwrap();
    meta.user = "ann".into();
    meta.env = vec!["A=b".into()];
    meta.cwd = "/tmp".into();
    meta.hostname = "builder".into();
    meta.proxy_env = Some(pb::ProxyEnv { http_proxy: "http://p".into(), ..Default::default() });
    meta.extra_hosts = vec![pb::HostIp { host: "db".into(), ip: "10.1.2.3".into() }];
    world.run(exec(op), &[&base]).await.unwrap();
    let log = world.log(1);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[..2], ["1000", "1001"]);
    assert!(lines[2].split(' ').any(|group| group == "50"), "{log}");
    assert_eq!(lines[3..5], ["/home/ann http://p http://p b", "/tmp"]);
    assert!(log.contains("10.1.2.3\tdb") && log.contains("127.0.0.1\tlocalhost builder"), "{log}");
    assert_eq!(lines.last(), Some(&"builder"));
    let mut unknown = sh("true");
    unknown.meta.as_mut().unwrap().user = "nobody-here".into();
    let error = world.run(exec(unknown), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "unable to find user nobody-here: no matching entries in passwd file");
}

async fn mounts_show_inputs_and_scratch_space(world: &World) {
    let base = world.busybox();
    let data = world.snapshot(|root| {
        common::write(root, "dir/file", "text");
        common::write(root, "other", "o");
    });
    let mut op = sh("cat /in/file; cat /one; echo more >> /rw/other; cat /rw/other; \
        touch /in/x 2>/dev/null && echo bad; df -t tmpfs /scratch | tail -1 | awk '{print $2}'; test ! -e /in/other");
    op.mounts.push(pb::Mount { selector: "/dir".into(), ..bind(1, "/in", -1, true) });
    op.mounts.push(pb::Mount { selector: "/dir/file".into(), ..bind(1, "one", -1, true) });
    op.mounts.push(bind(1, "/rw", -1, false));
    op.mounts.push(pb::Mount {
        mount_type: pb::MountType::Tmpfs as i32,
        tmpfs_opt: Some(pb::TmpfsOpt { size: 1 << 20 }),
        ..bind(-1, "/scratch", -1, false)
    });
    let result =
        world.run(exec(op), &[&base, &data]).await.unwrap_or_else(|err| panic!("{err} {}", world.log(2)));
    assert_eq!(world.log(1), "texttextomore\n1024\n");
    assert_eq!(layer(&result[0]), Vec::<String>::new());
    assert_eq!(world.read(&data, "/other").await.as_deref(), Some("o"));
}

async fn several_outputs_are_numbered_by_mount(world: &World) {
    let (base, data) = (world.busybox(), world.snapshot(|root| common::write(root, "f", "1")));
    let mut op = sh("echo 2 > /second/g; echo r > /r");
    op.mounts = vec![bind(1, "/second", 0, false), bind(0, "/", 1, false), bind(1, "/third", 2, true)];
    let results = world.run(exec(op), &[&base, &data]).await.unwrap();
    assert_eq!((layer(&results[0]), layer(&results[1])), (vec!["g".to_owned()], vec!["r".to_owned()]));
    assert_eq!(results[2], data);
    let mut scratch = sh("echo s > /out/s");
    scratch.mounts.push(bind(-1, "/out", 1, false));
    let results = world.run(exec(scratch), &[&base]).await.unwrap();
    assert_eq!(world.read(&results[1], "/s").await.as_deref(), Some("s\n"));
    assert_eq!(top(&results[1]).layers().len(), 1);
}

fn cache(id: &str, sharing: pb::CacheSharingOpt) -> pb::Mount {
    let options = pb::CacheOpt { id: id.into(), sharing: sharing as i32 };
    pb::Mount {
        mount_type: pb::MountType::Cache as i32,
        cache_opt: Some(options),
        ..bind(-1, "/cache", -1, false)
    }
}

async fn cache_mounts_persist_and_locked_ones_wait(world: &World) {
    let base = world.busybox();
    let step = |text: &str, mount: pb::Mount| {
        let mut op = sh(text);
        op.mounts.push(mount);
        exec(op)
    };
    let shared = pb::CacheSharingOpt::Shared;
    world.run(step("echo kept > /cache/f", cache("one", shared)), &[&base]).await.unwrap();
    world.run(step("cat /cache/f", cache("one", shared)), &[&base]).await.unwrap();
    assert_eq!(world.log(1), "kept\n");
    assert!(world.run(step("cat /cache/f", cache("two", shared)), &[&base]).await.is_err());
    let initial = world.snapshot(|root| common::write(root, "f", "initial"));
    let with_content = pb::Mount { input: 1, ..cache("three", shared) };
    world.run(step("cat /cache/f; rm /cache/f", with_content.clone()), &[&base, &initial]).await.unwrap();
    assert_eq!(world.log(1), "initial");
    let gone = world.run(step("test ! -e /cache/f", with_content), &[&base, &initial]).await;
    gone.expect("content is given once");

    // Each of these fails if another is inside at the same time.
    let alone = "mkdir /cache/inside && sleep 0.2 && rmdir /cache/inside";
    let inputs = [&base];
    let locked = || world.run(step(alone, cache("lock", pb::CacheSharingOpt::Locked)), &inputs);
    // A private one sees no other.
    let private = || world.run(step(alone, cache("private", pb::CacheSharingOpt::Private)), &inputs);
    let (a, b, c, d) = tokio::join!(locked(), locked(), private(), private());
    for result in [a, b, c, d] {
        result.unwrap();
    }
}

async fn secrets_come_from_the_client(world: &World) {
    let base = world.busybox();
    let (manager, mut control) = common::daemon().await;
    let mut offer = Attachables::new();
    offer.secrets(vec![Secret::Value { id: "token".into(), value: b"s3cret".to_vec() }]);
    let _client = offer.attach(&mut control, "client", "").await.unwrap();
    let context =
        BuildContext { sessions: SessionGroup::new(manager, vec!["client".into()]), ..world.context(&[]) };
    let secret = |id: &str, optional| pb::Mount {
        mount_type: pb::MountType::Secret as i32,
        secret_opt: Some(pb::SecretOpt { id: id.into(), uid: 1000, gid: 0, mode: 0o400, optional }),
        ..bind(-1, "/run/secrets/token", 0, false)
    };
    let mut op = sh("cat /run/secrets/token; stat -c ' %u %a' /run/secrets/token; echo $TOKEN");
    op.mounts.push(secret("token", false));
    op.secretenv = vec![pb::SecretEnv { id: "token".into(), name: "TOKEN".into(), optional: false }];
    let result = world.run_in(&context, exec(op.clone()), &[&base]).await.unwrap();
    assert_eq!(world.log(1), "s3cret 1000 400\ns3cret\n");
    assert_eq!(layer(&result[0]), Vec::<String>::new());
    op.mounts[1] = secret("zz", false);
    let error = world.run_in(&context, exec(op.clone()), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "secret zz: not found");
    let mut optional = sh("test ! -e /run/secrets/token");
    optional.mounts.push(secret("zz", true));
    world.run_in(&context, exec(optional), &[&base]).await.unwrap();
    let mut agent = sh("true");
    agent.mounts.push(pb::Mount {
        mount_type: pb::MountType::Ssh as i32,
        ssh_opt: Some(pb::SshOpt { id: "x".into(), mode: 0o600, ..Default::default() }),
        ..bind(-1, "/run/agent", 0, false)
    });
    let error = world.run_in(&context, exec(agent), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "no SSH key \"x\" forwarded from the client");
    let left: Vec<_> = walk(&world.dir.path().join("run")).filter(|path| path.is_file()).collect();
    assert!(left.is_empty(), "{left:?}");
}

async fn a_dropped_step_leaves_nothing(world: &World) {
    let base = world.busybox();
    let staging = || std::fs::read_dir(world.dir.path().join("store/staging")).unwrap().count();
    let before = staging();
    let marker = format!("31{}", std::process::id());
    let running = || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|entry| {
                let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                command.windows(marker.len()).any(|part| part == marker.as_bytes())
            })
            .count()
    };
    let op = exec(sh(&format!("echo started; exec sleep {marker}")));
    let inputs = [&base];
    let run = world.run(op, &inputs);
    tokio::select! {
        result = run => panic!("{result:?}"),
        () = async {
            while world.logs.0.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        } => {}
    }
    world.worker.idle().await;
    assert_eq!(running(), 0);
    // Directories are removed in the background.
    let deadline = Instant::now() + Duration::from_secs(10);
    while staging() > before && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(staging(), before);
}

async fn forbidden_things_are_refused(world: &World) {
    let refused = |op: pb::ExecOp, inputs| {
        let factory = world.worker.factory(world.context(&[]));
        factory.op(&vertex(exec(op), inputs)).err().map(|err| err.message).unwrap_or_default()
    };
    let mut op = sh("true");
    op.network = pb::NetMode::Host as i32;
    assert_eq!(refused(op, 1), "network.host is not allowed");
    let mut op = sh("true");
    op.security = pb::SecurityMode::Insecure as i32;
    assert_eq!(refused(op, 1), "security.insecure is not allowed");
    assert_eq!(refused(sh("true"), 0), "invalid input index 0 in an operation with 0 inputs");
    let mut op = sh("true");
    op.mounts[0].dest = "/elsewhere".into();
    assert_eq!(refused(op, 1), "invalid exec op with no rootfs");
    let mut op = sh("true");
    op.mounts.push(pb::Mount {
        selector: "/part".into(),
        content_cache: pb::MountContentCache::On as i32,
        ..bind(1, "/rw", 1, false)
    });
    assert_eq!(refused(op, 2), "invalid mount cache content for /rw");
}

async fn keys_leave_out_what_does_not_matter(world: &World) {
    let base = world.key(exec(sh("make")), 1).await;
    let mut same = sh("make");
    let meta = same.meta.as_mut().unwrap();
    meta.proxy_env = Some(pb::ProxyEnv { https_proxy: "http://p".into(), ..Default::default() });
    assert_eq!(world.key(exec(same), 1).await.digest, base.digest);
    let hosts = |ip: &str| {
        let mut op = sh("make");
        op.meta.as_mut().unwrap().extra_hosts = vec![pb::HostIp { host: "db".into(), ip: ip.into() }];
        exec(op)
    };
    assert_eq!(world.key(hosts("1.1.1.1"), 1).await.digest, world.key(hosts("2.2.2.2"), 1).await.digest);
    assert_ne!(world.key(hosts("1.1.1.1"), 1).await.digest, base.digest);
    assert_ne!(world.key(exec(sh("make all")), 1).await.digest, base.digest);
    let mut env = sh("make");
    env.meta.as_mut().unwrap().env = vec!["A=1".into()];
    let env = world.key(exec(env), 1).await;
    assert_ne!(env.digest, base.digest);
    assert!(env.parts.contains(&("env A".into(), "1".into())));
    assert!(base.inputs[0].content.is_none(), "the root counts whole");

    let mut mounted = sh("make");
    mounted.mounts.push(pb::Mount { selector: "/src".into(), ..bind(1, "/src", -1, true) });
    let mounted = world.key(exec(mounted), 2).await;
    assert_eq!(mounted.inputs[1].content.as_ref().unwrap().paths[0].path, "/src");

    let from = |src: &str| file(vec![action(0, 1, 0, Action::Copy(copy(src, "/x")))]);
    let (one, other) = (world.key(from("/a/f"), 2).await, world.key(from("/b/f"), 2).await);
    assert_eq!(one.digest, other.digest, "only the name of the source shows");
    assert_ne!(one.inputs[1], other.inputs[1]);
    assert!(one.inputs[0].content.is_none());
    assert_ne!(world.key(from("/a/g"), 2).await.digest, one.digest);
}

fn local(name: &str, session: &str) -> pb::op::Op {
    let attrs = [("local.session".to_owned(), session.to_owned())].into_iter().collect();
    pb::op::Op::Source(pb::SourceOp { identifier: format!("local://{name}"), attrs })
}

async fn a_clients_directory_is_transferred_once(world: &World) {
    let from = world.dir.path().join("context");
    common::write(&from, "src/main", "1");
    common::write(&from, "other", "o");
    std::fs::set_permissions(from.join("other"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let (manager, mut control) = common::daemon().await;
    let mut offer = Attachables::new();
    offer.share(vec![SharedDir { name: "context".into(), path: from.clone() }]);
    let _client = offer.attach(&mut control, "s", "key").await.unwrap();
    let context =
        BuildContext { sessions: SessionGroup::new(manager, vec!["s".into()]), ..world.context(&[]) };
    let fetch = || world.run_in(&context, local("context", "s"), &[]);
    let first = fetch().await.unwrap().remove(0);
    assert_eq!(world.read(&first, "src/main").await.as_deref(), Some("1"));
    assert_eq!(top(&first).dir().join("other").metadata().unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fetch().await.unwrap(), std::slice::from_ref(&first), "nothing changed");
    common::write(&from, "src/main", "two");
    let second = fetch().await.unwrap().remove(0);
    assert_ne!(second, first);
    assert_eq!(world.read(&second, "src/main").await.as_deref(), Some("two"));
    assert_eq!(world.read(&first, "src/main").await.as_deref(), Some("1"), "a snapshot never changes");
    std::fs::remove_file(from.join("other")).unwrap();
    let third = fetch().await.unwrap().remove(0);
    assert_eq!(world.read(&third, "other").await, None);
    assert_eq!(world.read(&second, "other").await.as_deref(), Some("o"));
    let (a, b) = tokio::join!(fetch(), fetch());
    assert_eq!(world.read(&a.unwrap()[0], "src/main").await, world.read(&b.unwrap()[0], "src/main").await);
    let error = world.run_in(&context, local("secrets", "s"), &[]).await.unwrap_err();
    assert!(error.message.contains("no access allowed to dir \"secrets\""), "{error}");
}

async fn a_broken_transfer_is_not_taken_for_the_present_state(world: &World) {
    let from = world.dir.path().join("context");
    common::write(&from, "a", "1");
    let (manager, mut control) = common::daemon().await;
    let mut offer = Attachables::new();
    offer.share(vec![SharedDir { name: "context".into(), path: from.clone() }]);
    let _client = offer.attach(&mut control, "s", "key").await.unwrap();
    let context =
        BuildContext { sessions: SessionGroup::new(manager, vec!["s".into()]), ..world.context(&[]) };
    let fetch = || world.run_in(&context, local("context", "s"), &[]);
    let first = fetch().await.unwrap().remove(0);
    common::write(&from, "a", "22");
    // A name that listings can't hold breaks the transfer off after `a` has come.
    let bad = from.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"z\xff"));
    std::fs::write(&bad, "x").unwrap();
    fetch().await.unwrap_err();
    std::fs::remove_file(&bad).unwrap();
    let last = fetch().await.unwrap().remove(0);
    assert_ne!(last, first);
    assert_eq!(world.read(&last, "a").await.as_deref(), Some("22"));
}

async fn unknown_sources_are_refused_by_name(world: &World) {
    let source = pb::op::Op::Source(pb::SourceOp { identifier: "ipfs://x".into(), ..Default::default() });
    let error = world.run(source, &[]).await.unwrap_err();
    assert_eq!(error.message, "unsupported: source scheme ipfs (ipfs://x)");
}

/// Counts what ran.
#[derive(Default)]
struct Ran(Mutex<Vec<String>>);

impl ProgressSink for Ran {
    fn event(&self, event: Event) {
        if let Event::Vertex(vertex) = event
            && vertex.completed.is_some()
            && !vertex.cached
            && vertex.error.is_empty()
        {
            self.0.lock().unwrap().push(vertex.name);
        }
    }
}

async fn an_unchanged_file_keeps_the_steps_that_read_it(world: &World) {
    let solver: Solver<Ref> =
        Solver::new(world.worker.store().keys(), world.worker.clone(), SolverOptions::default());
    let definition = |read: &str, unread: &str| {
        let mut builder = llb::Builder::new();
        let mut add = |inputs: Vec<pb::Input>, op: pb::op::Op| {
            builder.add(&pb::Op { inputs, op: Some(op), ..Default::default() }, pb::OpMetadata::default())
        };
        let edge = |digest: &String| pb::Input { digest: digest.clone(), index: 0 };
        let made = action(-1, -1, -1, mkfile("/read", read));
        let source = add(vec![], file(vec![made, action(0, -1, 0, mkfile("/unread", unread))]));
        let copied =
            add(vec![edge(&source)], file(vec![action(-1, 0, 0, Action::Copy(copy("/read", "/x")))]));
        let last = add(vec![edge(&copied)], file(vec![action(0, -1, 0, mkfile("/after", "a"))]));
        builder.finish(&edge(&last))
    };
    let build = async |read: &str, unread: &str| {
        let ran = Arc::new(Ran::default());
        let factory = world.worker.factory(world.context(&[]));
        let build = solver.build(BuildOptions { factory, progress: ran.clone() });
        let result = build.solve(&definition(read, unread)).await.unwrap().flatten();
        drop(build);
        solver.idle().await;
        let mut names = ran.0.lock().unwrap().clone();
        names.sort();
        names.dedup();
        (ResultStore::id(&*world.worker, &result), names.len())
    };
    let (first, ran) = build("1", "a").await;
    assert_eq!(ran, 3);
    assert_eq!(build("1", "a").await, (first.clone(), 0));
    assert_eq!(build("1", "b").await, (first.clone(), 1), "only the source itself runs again");
    let (changed, ran) = build("2", "b").await;
    assert!(changed != first && ran == 3, "{ran}");
}
