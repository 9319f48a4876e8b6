//! One run of a step: opens what it needs, runs the sandbox, commits or throws away.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::{Failure, OpError};
use kiln_solver::progress::VertexProgress;
use tokio_util::sync::CancellationToken;

use super::forwards::{self, Agents};
use super::mounts::{self, Prepared};
use super::{Emptied, Step, cache_mounts, identity, network_files, output, stubs};
use crate::ops::run_dir::StepDir;
use crate::ops::users::ProcessUser;
use crate::sandbox::spec::{self, Bind, NetworkMode, Resources, SecurityMode, SpecParams, Ulimit};
use crate::sandbox::{ExitOutcome, MemoryFile, SandboxError, SandboxRequest, Stdio};
use crate::worker::Worker;

pub(super) struct Run {
    pub(super) worker: Arc<Worker>,
    pub(super) step: Arc<Step>,
    pub(super) progress: VertexProgress,
    /// Given if cache mounts start empty.
    pub(super) emptied: Option<Emptied>,
    pub(super) cancel: CancellationToken,
}

/// What is opened for a step and goes when it has ended.
pub(super) struct Opened {
    files: StepDir,
    binds: Vec<Bind>,
    pub(super) secrets: Vec<MemoryFile>,
    env: Vec<String>,
    _agents: Agents,
}

impl Run {
    /// Runs the step on its inputs; one result for each output.
    pub(super) async fn finish(self, inputs: Vec<Ref>) -> Result<Vec<Ref>, Failure<Ref>> {
        let wanted = mounts::wanted_caches(&self.step, &inputs);
        let caches =
            cache_mounts::open_all(&self.worker, &wanted, self.emptied.as_ref(), &self.cancel).await?;
        let opened = self.open().await?;
        let root = self.root(&inputs);
        let (layers, step) = (self.worker.layers().clone(), self.step.clone());
        let prepare = move || {
            let user = identity::resolve(&layers, &root, &step.meta.user).map_err(OpError::new)?;
            Ok::<_, OpError>((mounts::prepare(&layers, &step, &inputs, caches)?, user))
        };
        let (prepared, user) = blocking(prepare).await??;
        let outcome = self.sandbox(&prepared, &opened, &user).await;
        let (layers, step) = (self.worker.layers().clone(), self.step.clone());
        let cancelled = self.cancel.is_cancelled();
        blocking(move || {
            let judged = outcome.and_then(|outcome| {
                stubs::remove(&outcome.stubs, &prepared.written, step.meta.remove_mount_stubs_recursive);
                step.judge(&outcome)
            });
            let description = format!("mount / from exec {}", step.command());
            match judged {
                Ok(()) => Ok(prepared.commit(&layers, &description)?),
                // Nobody looks into what was given up.
                Err(error) if cancelled => Err(error.into()),
                Err(error) => {
                    let remains = Arc::new(prepared.hold(&layers, &description));
                    Err(Failure { error, remains: Some(remains) })
                }
            }
        })
        .await?
    }

    pub(super) fn root(&self, inputs: &[Ref]) -> Ref {
        let root = self.step.op.mounts.iter().find(|mount| mounts::is_root(mount));
        root.and_then(|mount| usize::try_from(mount.input).ok())
            .and_then(|index| inputs.get(index).cloned().flatten())
    }

    /// Fetches secrets, opens agents' sockets, writes the files that name hosts.
    pub(super) async fn open(&self) -> Result<Opened, OpError> {
        let failed = |err: std::io::Error| OpError::new(format!("preparing the step's files: {err}"));
        let step = &self.step;
        let mut opened = Opened {
            files: self.worker.run_dir().step().map_err(failed)?,
            binds: Vec::new(),
            secrets: Vec::new(),
            env: Vec::new(),
            _agents: Agents::default(),
        };
        let hosts = network_files::hosts(&self.hostname(), &step.meta.extra_hosts);
        let resolv_conf = network_files::resolv_conf(&self.worker.dns);
        for (name, content) in [("hosts", hosts), ("resolv.conf", resolv_conf)] {
            let source = opened.files.write(name, content.as_bytes(), 0o644).map_err(failed)?;
            opened.binds.push(Bind { source, dest: PathBuf::from("/etc").join(name), readonly: true });
        }
        for (number, mount) in step.op.mounts.iter().enumerate() {
            let cwd = &step.meta.cwd;
            match mount.mount_type() {
                pb::MountType::Secret => {
                    let options = mount.secret_opt.clone().unwrap_or_default();
                    let content = forwards::secret(&step.sessions, &options.id, options.optional).await?;
                    opened.secrets.extend(content.map(|content| MemoryFile {
                        dest: PathBuf::from(mounts::dest(mount, cwd)),
                        content,
                        uid: options.uid,
                        gid: options.gid,
                        mode: options.mode & 0o777,
                    }));
                }
                pb::MountType::Ssh => {
                    let options = mount.ssh_opt.clone().unwrap_or_default();
                    let Opened { files, _agents: agents, .. } = &mut opened;
                    if let Some(socket) = agents.open(&step.sessions, &options, files, number).await? {
                        let dest = PathBuf::from(mounts::dest(mount, cwd));
                        opened.binds.push(Bind { source: socket, dest, readonly: false });
                    }
                }
                pb::MountType::Bind | pb::MountType::Cache | pb::MountType::Tmpfs => {}
            }
        }
        opened.env = self.secret_env().await?;
        Ok(opened)
    }

    /// Fetches the variables whose values are secrets.
    pub(super) async fn secret_env(&self) -> Result<Vec<String>, OpError> {
        let mut env = Vec::new();
        for variable in &self.step.op.secretenv {
            let value = forwards::secret(&self.step.sessions, &variable.id, variable.optional).await?;
            let value = value.unwrap_or_default();
            env.push(format!("{}={}", variable.name, String::from_utf8_lossy(&value)));
        }
        Ok(env)
    }

    fn hostname(&self) -> String {
        match self.step.meta.hostname.as_str() {
            "" => spec::DEFAULT_HOSTNAME.to_owned(),
            name => name.to_owned(),
        }
    }

    /// The process and what it is mounted.
    pub(super) fn params(
        &self,
        id: &str,
        prepared: &Prepared,
        opened: &Opened,
        user: &ProcessUser,
    ) -> SpecParams {
        let (step, meta) = (&self.step, &self.step.meta);
        SpecParams {
            readonly_root: prepared.readonly_root,
            binds: opened.binds.clone(),
            tmpfs: prepared.tmpfs.clone(),
            cgroup_parent: Some(meta.cgroup_parent.clone()).filter(|parent| !parent.is_empty()),
            resources: step.resources.as_ref().map(resources),
            ..self.process(id, &opened.env, user)
        }
    }

    /// The process alone.
    pub(super) fn process(&self, id: &str, secrets: &[String], user: &ProcessUser) -> SpecParams {
        let (step, meta) = (&self.step, &self.step.meta);
        let mut env = meta.env.clone();
        env.extend(meta.proxy_env.iter().flat_map(proxy_env));
        env.extend(secrets.iter().cloned());
        if !env.iter().any(|variable| variable.starts_with("HOME=")) {
            env.push(format!("HOME={}", user.home));
        }
        SpecParams {
            id: id.to_owned(),
            args: meta.args.clone(),
            env,
            cwd: if meta.cwd.is_empty() { "/".to_owned() } else { meta.cwd.clone() },
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
            hostname: self.hostname(),
            network: match step.op.network() {
                pb::NetMode::Unset => self.worker.network(),
                pb::NetMode::Host => NetworkMode::Host,
                pb::NetMode::None => NetworkMode::None,
            },
            security: security(step.op.security()),
            ulimits: meta
                .ulimit
                .iter()
                .map(|limit| Ulimit { name: limit.name.clone(), soft: limit.soft, hard: limit.hard })
                .collect(),
            ..SpecParams::default()
        }
    }

    async fn sandbox(
        &self,
        prepared: &Prepared,
        opened: &Opened,
        user: &ProcessUser,
    ) -> Result<ExitOutcome, OpError> {
        let failed = |err: std::io::Error| OpError::new(format!("preparing the step's streams: {err}"));
        let id = kiln_session::new_id();
        let spec = spec::build(&self.params(&id, prepared, opened, user)).map_err(|err| self.failed(&err))?;
        let (stdout, stdout_writer) = output::pipe().map_err(failed)?;
        let (stderr, stderr_writer) = output::pipe().map_err(failed)?;
        let stdin: OwnedFd = std::fs::File::open("/dev/null").map_err(failed)?.into();
        let request = SandboxRequest {
            id,
            spec,
            rootfs: prepared.rootfs.clone(),
            layered_mounts: prepared.layered.clone(),
            memory_files: opened.secrets.clone(),
            stdio: Stdio::Files { stdin, stdout: stdout_writer, stderr: stderr_writer },
            attendance: None,
        };
        let worker = self.worker.clone();
        let executor = blocking(move || worker.executor()).await?.map_err(|err| self.failed(&err))?;
        let (outcome, (), ()) = tokio::join!(
            executor.run(request, self.cancel.clone()),
            output::pump(stdout, output::STDOUT, self.progress.clone()),
            output::pump(stderr, output::STDERR, self.progress.clone()),
        );
        outcome.map_err(|err| self.failed(&err))
    }

    fn failed(&self, err: &SandboxError) -> OpError {
        match err {
            SandboxError::Cancelled => OpError::new("context canceled"),
            err => failed_run(&self.step, err),
        }
    }
}

impl Step {
    /// An exit status that is not allowed is an error.
    fn judge(&self, outcome: &ExitOutcome) -> Result<(), OpError> {
        let allowed: &[i32] =
            if self.meta.valid_exit_codes.is_empty() { &[0] } else { &self.meta.valid_exit_codes };
        let code = i32::try_from(outcome.code).unwrap_or(i32::MAX);
        if allowed.contains(&code) {
            return Ok(());
        }
        let memory = if outcome.oom_killed { ": cannot allocate memory" } else { "" };
        let command = self.command();
        let text = format!("process \"{command}\" did not complete successfully: exit code: {code}{memory}");
        Err(OpError { exit_code: Some(code), ..OpError::new(text) })
    }
}

/// A process that did not run.
pub(super) fn failed_run(step: &Step, err: &SandboxError) -> OpError {
    OpError::new(format!("process {:?} did not complete successfully: {err}", step.command()))
}

pub(super) fn security(mode: pb::SecurityMode) -> SecurityMode {
    match mode {
        pb::SecurityMode::Sandbox => SecurityMode::Sandbox,
        pb::SecurityMode::Insecure => SecurityMode::Insecure,
    }
}

/// Both spellings of each proxy variable that is set.
fn proxy_env(proxy: &pb::ProxyEnv) -> Vec<String> {
    let values = [
        ("HTTP_PROXY", &proxy.http_proxy),
        ("HTTPS_PROXY", &proxy.https_proxy),
        ("FTP_PROXY", &proxy.ftp_proxy),
        ("NO_PROXY", &proxy.no_proxy),
        ("ALL_PROXY", &proxy.all_proxy),
    ];
    let set = values.into_iter().filter(|(_, value)| !value.is_empty());
    set.flat_map(|(name, value)| [format!("{name}={value}"), format!("{}={value}", name.to_lowercase())])
        .collect()
}

fn resources(asked: &pb::LinuxResources) -> Resources {
    Resources {
        memory: asked.memory,
        memory_swap: asked.memory_swap,
        cpu_shares: asked.cpu_shares,
        cpu_quota: asked.cpu_quota,
        cpu_period: asked.cpu_period,
        cpuset_cpus: asked.cpuset_cpus.clone(),
        cpuset_mems: asked.cpuset_mems.clone(),
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, OpError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| OpError::new(format!("a task of the step failed: {err}")))
}
