//! The executor that hands sandboxes to an OCI runtime, `runc` or `crun`.
//!
//! The zygote's child mounts the root in a private mount namespace of its own and runs the runtime there, so the
//! bundle's mounts exist for that runtime only and vanish with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use oci_spec::runtime::{Mount, MountBuilder, Root, Spec};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::lean::{Errand, Helper, blocking, named};
use super::plan::{self, CgroupPlan, Limits, Plan, RuntimeCommand, RuntimePlan, Task, depth};
use super::zygote::Order;
use super::{
    Attendance, Executor, ExitOutcome, ProcessRequest, SandboxError, SandboxRequest, Stdio, terminal,
};

/// Parent cgroup of sandboxes whose spec names none.
const CGROUP_PARENT: &str = "/kiln";

/// Runs sandboxes with an OCI runtime binary.
#[derive(Debug)]
pub struct OciRuntimeExecutor {
    helper: Arc<Helper>,
    settings: Arc<Settings>,
    name: String,
}

#[derive(Debug)]
struct Settings {
    binary: PathBuf,
    state: PathBuf,
}

impl OciRuntimeExecutor {
    /// Uses `binary` (a path, or a name in `PATH`). `state` becomes this executor's own directory: leftovers of an
    /// earlier one are removed.
    pub fn new(binary: &Path, state: &Path) -> Result<Self, SandboxError> {
        let binary = find(binary)
            .ok_or_else(|| SandboxError::Setup(format!("OCI runtime {} not found", binary.display())))?;
        let name = binary.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        match fs::remove_dir_all(state) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(SandboxError::io(format!("clearing {}", state.display()), e));
            }
            _ => {}
        }
        let what = |e| SandboxError::io(format!("runtime state in {}", state.display()), e);
        fs::create_dir_all(state).map_err(what)?;
        let state = state.canonicalize().map_err(what)?;
        Ok(Self { helper: Arc::new(Helper::new()?), settings: Arc::new(Settings { binary, state }), name })
    }
}

fn find(binary: &Path) -> Option<PathBuf> {
    if depth(binary) > 1 || binary.is_absolute() {
        return binary.canonicalize().ok();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|dir| dir.join(binary)).find(|c| c.is_file())
}

impl Executor for OciRuntimeExecutor {
    fn run(
        &self,
        request: SandboxRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>> {
        let (helper, settings) = (Arc::clone(&self.helper), Arc::clone(&self.settings));
        async move {
            if cancel.is_cancelled() {
                return Err(SandboxError::Cancelled);
            }
            let (order, bundle) = blocking(move || {
                plan::check(&request)?;
                let mut bundle = Bundle::new(&settings, &request.id)?;
                let plan = bundle.plan(&settings, &request)?;
                Ok((errand(&plan, request.stdio, request.attendance)?, bundle))
            })
            .await?;
            bundle.judge(helper.run(order, cancel).await).await
        }
        .boxed()
    }

    fn exec(
        &self,
        request: ProcessRequest,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<ExitOutcome, SandboxError>> {
        let (helper, settings) = (Arc::clone(&self.helper), Arc::clone(&self.settings));
        async move {
            if cancel.is_cancelled() {
                return Err(SandboxError::Cancelled);
            }
            helper.joinable(&request.sandbox)?;
            let sandbox = request.sandbox.clone();
            let (order, bundle) = blocking(move || {
                plan::check_id(&request.id)?;
                let bundle = Bundle::new(&settings, &request.id)?;
                let plan = bundle.process(&settings, &request)?;
                Ok((errand(&plan, request.stdio, request.attendance)?, bundle))
            })
            .await?;
            bundle.judge(helper.run(order, cancel).await).await.map_err(|error| named(error, sandbox))
        }
        .boxed()
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// What the helper is told. The runtime takes a terminal for its own, and passes on what comes and goes.
fn errand(plan: &Plan, stdio: Stdio, attendance: Option<Attendance>) -> Result<Errand, SandboxError> {
    let (stdio, terminal) = match stdio {
        Stdio::Files { stdin, stdout, stderr } => ([stdin, stdout, stderr], None),
        Stdio::Terminal => {
            let open = || {
                let (controller, process) = terminal::of_host()?;
                Ok((terminal::streams(process)?, Some(controller)))
            };
            open().map_err(|e: io::Error| SandboxError::io("terminal", e))?
        }
    };
    let joinable = (plan.joins.is_none() && plan.attended).then(|| plan.id.clone());
    Ok(Errand { order: Order::new(plan, Arc::default(), stdio)?, joinable, attendance, terminal })
}

/// The directory of one container, or of a further process of one; removed with it.
#[derive(Debug)]
struct Bundle {
    dir: PathBuf,
    /// What the runtime keeps about the container while it runs, and leaves when it is killed.
    container: PathBuf,
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for dir in [&self.dir, &self.container] {
            match fs::remove_dir_all(dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(dir = %dir.display(), error = %e, "runtime state not removed");
                }
                _ => {}
            }
        }
    }
}

impl Bundle {
    fn new(settings: &Settings, id: &str) -> Result<Self, SandboxError> {
        let dir = settings.state.join("bundles").join(id);
        let container = settings.state.join("runtime").join(id);
        fs::create_dir_all(dir.join("rootfs"))
            .and_then(|()| fs::create_dir_all(settings.state.join("runtime")))
            .map_err(|e| SandboxError::io(format!("bundle {}", dir.display()), e))?;
        Ok(Self { dir, container })
    }

    fn log(&self) -> PathBuf {
        self.dir.join("log.json")
    }

    /// A subcommand of the runtime that starts a process.
    fn command(&self, settings: &Settings, subcommand: &[&str], terminal: bool) -> RuntimeCommand {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let pid_file = self.dir.join("pid");
        let mut args = vec![
            text(&settings.binary),
            "--root".into(),
            text(&settings.state.join("runtime")),
            "--log".into(),
            text(&self.log()),
            "--log-format".into(),
            "json".into(),
        ];
        args.extend(subcommand[..1].iter().map(|arg| (*arg).to_owned()));
        args.extend(["--pid-file".into(), text(&pid_file)]);
        args.extend(subcommand[1..].iter().map(|arg| (*arg).to_owned()));
        RuntimeCommand { args, pid_file, terminal }
    }

    /// Writes down a further process and says what the zygote has to do for it.
    fn process(&self, settings: &Settings, request: &ProcessRequest) -> Result<Plan, SandboxError> {
        let Some(process) = request.spec.process() else {
            return Err(SandboxError::Invalid("no process in the spec".into()));
        };
        let file = self.dir.join("process.json");
        let invalid = |e: String| SandboxError::Invalid(format!("{}: {e}", file.display()));
        let json = serde_json::to_vec(process).map_err(|e| invalid(e.to_string()))?;
        fs::write(&file, json).map_err(|e| SandboxError::io(file.display().to_string(), e))?;
        let path = file.to_string_lossy();
        let subcommand = ["exec", "--process", path.as_ref(), request.sandbox.as_str()];
        let command = self.command(settings, &subcommand, process.terminal().unwrap_or(false));
        Ok(Plan {
            id: request.id.clone(),
            namespaces: 0,
            cgroup: CgroupPlan::default(),
            joins: Some(request.sandbox.clone()),
            attended: request.attendance.is_some(),
            task: Task::RuntimeExec(command),
        })
    }

    /// What became of the runtime's run. Its own failure has the same exit statuses as a program's.
    async fn judge(self, result: Result<ExitOutcome, SandboxError>) -> Result<ExitOutcome, SandboxError> {
        blocking(move || {
            let outcome = result?;
            match self.failure() {
                Some(error) if outcome.code != 0 => Err(error),
                _ => Ok(outcome),
            }
        })
        .await
    }

    /// Writes the bundle and says what the zygote has to do for it.
    fn plan(&mut self, settings: &Settings, request: &SandboxRequest) -> Result<Plan, SandboxError> {
        let io = |what: &Path| {
            let what = what.display().to_string();
            move |e: io::Error| SandboxError::io(what, e)
        };
        let mut spec = request.spec.clone();
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        let mut layered = Vec::new();
        for (number, mount) in request.layered_mounts.iter().enumerate() {
            let place = self.dir.join(format!("m{number}"));
            if is_file(mount.selector.as_deref(), &mount.source) {
                fs::write(&place, "").map_err(io(&place))?;
            } else {
                fs::create_dir(&place).map_err(io(&place))?;
            }
            mounts.push(bind(&mount.dest, &place, &[if mount.readonly { "ro" } else { "rw" }])?);
            layered.push((place, mount.source.clone(), mount.selector.clone()));
        }
        let mut files = Vec::new();
        for (number, file) in request.memory_files.iter().enumerate() {
            let place = self.dir.join(format!("f{number}"));
            fs::write(&place, "").map_err(io(&place))?;
            let program = if file.mode & 0o111 == 0 { "noexec" } else { "exec" };
            mounts.push(bind(&file.dest, &place, &["ro", "nosuid", "nodev", program])?);
            files.push((place, file.clone()));
        }
        mounts.sort_by_key(|m| depth(m.destination()));
        let targets = targets(&mounts);
        spec.set_mounts(Some(mounts));

        let rootfs = self.dir.join("rootfs");
        let mut root = Root::default();
        root.set_path(rootfs.clone());
        root.set_readonly(spec.root().as_ref().and_then(Root::readonly));
        spec.set_root(Some(root));
        let cgroup = cgroup_path(&mut spec, &request.id);
        let config = self.dir.join("config.json");
        spec.save(&config).map_err(|e| SandboxError::Invalid(format!("{}: {e}", config.display())))?;

        let Some(process) = spec.process() else {
            return Err(SandboxError::Invalid("no process in the spec".into()));
        };
        let bundle = self.dir.to_string_lossy();
        let subcommand = ["run", "--bundle", bundle.as_ref(), request.id.as_str()];
        let command = self.command(settings, &subcommand, process.terminal().unwrap_or(false));
        let crun = settings.binary.file_name().is_some_and(|n| n.to_string_lossy().contains("crun"));
        Ok(Plan {
            id: request.id.clone(),
            namespaces: (libc::CLONE_NEWNS | libc::CLONE_NEWPID) as u64,
            cgroup: CgroupPlan {
                path: Some(cgroup),
                confine_devices: false,
                namespace: false,
                by_runtime: true,
                limits: Limits::default(),
            },
            joins: None,
            attended: request.attendance.is_some(),
            task: Task::Runtime(Box::new(RuntimePlan {
                command,
                rootfs,
                root: request.rootfs.clone(),
                layered,
                files,
                targets,
                cwd: (process.cwd().clone(), process.user().uid(), process.user().gid()),
                hide_unified: crun,
            })),
        })
    }

    /// What the runtime logged as an error, if it did.
    fn failure(&self) -> Option<SandboxError> {
        #[derive(Deserialize)]
        struct Line {
            level: String,
            msg: String,
        }
        let text = fs::read_to_string(self.log()).ok()?;
        let lines = text.lines().filter_map(|l| serde_json::from_str::<Line>(l).ok());
        let message = lines.rev().find(|l| matches!(l.level.as_str(), "error" | "fatal"))?.msg;
        match message.find("exec: ").or_else(|| message.find("executable file")) {
            Some(at) => Some(SandboxError::Exec(message[at..].to_owned())),
            None => Some(SandboxError::Setup(message)),
        }
    }
}

/// Whether a selector names something other than a directory, looked up layer by layer from the top.
fn is_file(selector: Option<&Path>, source: &super::RootSource) -> bool {
    use super::RootSource as R;
    let Some(selector) = selector else { return false };
    let dirs: Vec<&PathBuf> = match source {
        R::Dir(dir) => vec![dir],
        R::Overlay { lowers, upper, .. } => upper.iter().chain(lowers).collect(),
    };
    for dir in dirs {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let Ok(dir) = rustix::fs::open(dir, flags, rustix::fs::Mode::empty()) else { continue };
        if let Ok(found) = super::sys::open_in(std::os::fd::AsFd::as_fd(&dir), selector, flags) {
            let directory = rustix::fs::fstat(&found).is_ok_and(|s| {
                rustix::fs::FileType::from_raw_mode(s.st_mode) == rustix::fs::FileType::Directory
            });
            return !directory;
        }
    }
    false
}

fn bind(dest: &Path, source: &Path, options: &[&str]) -> Result<Mount, SandboxError> {
    MountBuilder::default()
        .destination(dest)
        .typ("bind")
        .source(source)
        .options(["rbind"].iter().chain(options).map(|o| (*o).to_owned()).collect::<Vec<_>>())
        .build()
        .map_err(|e| SandboxError::Invalid(e.to_string()))
}

/// The mount points in the root itself, and the source of binds.
fn targets(mounts: &[Mount]) -> Vec<(PathBuf, Option<PathBuf>)> {
    let below_another = |m: &Mount| {
        let dest = m.destination();
        mounts.iter().any(|o| o.destination() != dest && dest.starts_with(o.destination()))
    };
    mounts
        .iter()
        .filter(|m| !below_another(m))
        .map(|m| {
            let options = m.options().as_deref().unwrap_or_default();
            let bind =
                m.typ().as_deref() == Some("bind") || options.iter().any(|o| o == "bind" || o == "rbind");
            (m.destination().clone(), bind.then(|| m.source().clone()).flatten())
        })
        .collect()
}

fn cgroup_path(spec: &mut Spec, id: &str) -> PathBuf {
    let mut linux = spec.linux().clone().unwrap_or_default();
    let path = linux.cgroups_path().clone().unwrap_or_else(|| Path::new(CGROUP_PARENT).join(id));
    linux.set_cgroups_path(Some(path.clone()));
    spec.set_linux(Some(linux));
    path
}
