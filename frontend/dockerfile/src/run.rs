//! RUN: an exec operation with its mounts.

use kiln_proto::{llb, pattern, pb};

use crate::compile::Compiler;
use crate::dispatch::{absolute, owner, upper_keyword, with_shell};
use crate::error::{Fault, Result};
use crate::expand::{Env, EnvList, Lexer};
use crate::graph::{Meta, Out, input_index};
use crate::instruction::Run;
use crate::mount::{self, Mount, MountKind};
use crate::source::parse_heredoc;
use crate::stage::{Command, Stage};

/// Mounts of an exec operation while they are gathered.
#[derive(Default)]
struct Gathered {
    /// With the file system that each shows.
    mounts: Vec<(pb::Mount, Option<Out>)>,
    secrets: Vec<pb::Mount>,
    secret_env: Vec<pb::SecretEnv>,
    ssh: Vec<pb::Mount>,
    caps: Vec<&'static str>,
}

impl Compiler<'_> {
    pub(crate) fn run_step(&mut self, stage: &mut Stage, command: &Command, run: &Run) -> Result<()> {
        let i = &command.instruction;
        let on = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let mut parsed = Vec::with_capacity(run.mounts.len());
        for (text, _) in &run.mounts {
            parsed.push(mount::parse(text, &mut |word| self.expand(stage, i, word))?);
        }
        let mut gathered = Gathered::default();
        let (args, title) = self.arguments(stage, run, &i.text, &mut gathered)?;
        for (n, mount) in parsed.iter().enumerate() {
            let source = command.sources.get(n).copied();
            match mount.kind {
                MountKind::Secret => stage.uses.secret(&secret_id(mount), mount.required, i.lines),
                MountKind::Ssh => stage.uses.ssh(&mount.id, mount.required, i.lines),
                _ => {}
            }
            self.mount(stage, mount, source, &mut gathered)?;
        }
        if self.input.options.shm_size > 0 {
            let size = self.input.options.shm_size;
            gathered.caps.extend([llb::caps::EXEC_MOUNT_TMPFS, llb::caps::EXEC_MOUNT_TMPFS_SIZE]);
            let tmpfs = pb::TmpfsOpt { size };
            gathered.mounts.push((tmpfs_mount("/dev/shm".into(), tmpfs, false), None));
        }
        let name = self.run_name(stage, command, &parsed, &title);
        let created_by = format!("RUN {}", history(&args, stage));
        let (op, inputs, caps) = self.exec(stage, run, args, gathered);
        let meta = Meta {
            command: Some(i.text.clone()),
            ignore_cache: stage.ignore_cache,
            lines: Some(i.lines),
            resources: self.input.options.resources.clone(),
            ..Meta::named(name, &caps)
        };
        stage.fs.output = Some(self.graph.add(pb::op::Op::Exec(Box::new(op)), Some(&on), inputs, meta));
        self.record(stage, format!("{created_by} # buildkit"), true);
        Ok(())
    }

    /// The process's arguments and the text that names the step.
    fn arguments(
        &mut self,
        stage: &Stage,
        run: &Run,
        text: &str,
        gathered: &mut Gathered,
    ) -> Result<(Vec<String>, String)> {
        let line = &run.command;
        let mut title = text.to_string();
        let Some(first) = run.files.first() else {
            let args = if line.shell { with_shell(stage, &line.args) } else { line.args.clone() };
            return Ok((args, title));
        };
        let [script] = line.args.as_slice() else {
            return Err("RUN with a heredoc must be in shell form".into());
        };
        if !line.shell {
            return Err("RUN with a heredoc must be in shell form".into());
        }
        let single = parse_heredoc(script)?.is_some();
        if !single {
            // Only the shell knows what to do with several documents, or with one inside a command.
            let mut whole = script.clone();
            for file in &run.files {
                whole.push('\n');
                whole.push_str(&file.content);
                whole.push_str(&file.name);
            }
            return Ok((with_shell(stage, &[whole]), title));
        }
        title.push_str(&format!(" ({})", summary(&first.content)));
        let body = first.body();
        if !body.starts_with("#!") {
            return Ok((with_shell(stage, &[body]), title));
        }
        const PIPES: &str = "/dev/pipes/";
        let script_file = self.inline_file(&first.name, body.into_bytes(), 0o755);
        gathered.caps.push(llb::caps::EXEC_MOUNT_SELECTOR);
        gathered.mounts.push((
            pb::Mount {
                dest: PIPES.into(),
                selector: "/".into(),
                readonly: true,
                output: llb::EMPTY,
                ..Default::default()
            },
            Some(script_file),
        ));
        Ok((with_shell(stage, &[absolute(PIPES, &first.name)]), title))
    }

    fn mount(
        &mut self,
        stage: &mut Stage,
        mount: &Mount,
        source: Option<usize>,
        gathered: &mut Gathered,
    ) -> Result<()> {
        match mount.kind {
            MountKind::Secret => {
                secret(mount, gathered);
                return Ok(());
            }
            MountKind::Ssh => {
                gathered.ssh.push(ssh(mount));
                return Ok(());
            }
            _ => {}
        }
        let target = absolute(&stage.fs.cwd, &mount.target);
        if target == "/" {
            return Err(Fault::new(format!("invalid mount target {}", crate::gofmt::quote(&mount.target))));
        }
        let selector = absolute("/", &mount.source);
        if mount.kind == MountKind::Tmpfs {
            gathered.caps.push(llb::caps::EXEC_MOUNT_TMPFS);
            if mount.size > 0 {
                gathered.caps.push(llb::caps::EXEC_MOUNT_TMPFS_SIZE);
            }
            gathered
                .mounts
                .push((tmpfs_mount(target, pb::TmpfsOpt { size: mount.size }, mount.readonly), None));
            return Ok(());
        }
        let mut shown = if !mount.from.is_empty() {
            let source = source.map(|s| &self.stages[s]);
            let Some(source) = source.filter(|s| s.dispatched) else {
                return Err(Fault::new(format!(
                    "cannot mount from stage {} to {}, stage needs to be defined before current command",
                    crate::gofmt::quote(&mount.from),
                    crate::gofmt::quote(&mount.target)
                )));
            };
            source.fs.output
        } else if mount.kind == MountKind::Cache {
            None
        } else {
            self.context
        };
        self.reads(shown, selector.clone());
        let mut out =
            pb::Mount { dest: target, readonly: mount.readonly, output: llb::EMPTY, ..Default::default() };
        if mount.kind == MountKind::Cache {
            gathered.caps.extend([llb::caps::EXEC_MOUNT_CACHE, llb::caps::EXEC_MOUNT_CACHE_SHARING]);
            let id = if mount.id.is_empty() { pattern::clean(&mount.target) } else { mount.id.clone() };
            out.set_mount_type(pb::MountType::Cache);
            let mut cache = pb::CacheOpt {
                id: format!("{}/{id}", self.input.options.cache_mount_namespace),
                ..Default::default()
            };
            cache.set_sharing(mount.sharing.unwrap_or(pb::CacheSharingOpt::Shared));
            out.cache_opt = Some(cache);
        } else if !mount.readonly {
            gathered.caps.push(llb::caps::EXEC_MOUNT_BIND_READWRITE_NO_OUTPUT);
        }
        if selector != "/" {
            out.selector = selector;
        } else if mount.uid.is_some() || mount.gid.is_some() || mount.mode.is_some() {
            shown = Some(self.cache_directory(mount, shown));
            out.selector = "/cache".into();
        }
        if !out.selector.is_empty() {
            gathered.caps.push(llb::caps::EXEC_MOUNT_SELECTOR);
        }
        gathered.mounts.push((out, shown));
        Ok(())
    }

    /// An empty directory with the owner and mode of a new cache mount.
    fn cache_directory(&mut self, mount: &Mount, base: Option<Out>) -> Out {
        let inputs: Vec<Out> = base.into_iter().collect();
        let input = if inputs.is_empty() { llb::EMPTY } else { 0 };
        let ids = format!("{}:{}", mount.uid.unwrap_or(0), mount.gid.unwrap_or(0));
        let mkdir = pb::FileActionMkDir {
            path: "/cache".into(),
            mode: mount.mode.unwrap_or(0o755).cast_signed(),
            make_parents: false,
            owner: owner(&ids, input),
            timestamp: -1,
        };
        let action = pb::FileAction {
            input,
            secondary_input: llb::EMPTY,
            output: 0,
            action: Some(pb::file_action::Action::Mkdir(mkdir)),
        };
        let meta = Meta::named("[internal] setting cache mount permissions", &[llb::caps::FILE_BASE]);
        self.graph.add(pb::op::Op::File(pb::FileOp { actions: vec![action] }), None, inputs, meta)
    }

    /// A file that stands in the Dockerfile itself, at the root of an otherwise empty file system.
    pub(crate) fn inline_file(&mut self, name: &str, data: Vec<u8>, mode: i32) -> Out {
        let mkfile =
            pb::FileActionMkFile { path: absolute("/", name), mode, data, owner: None, timestamp: -1 };
        let action = pb::FileAction {
            input: llb::EMPTY,
            secondary_input: llb::EMPTY,
            output: 0,
            action: Some(pb::file_action::Action::Mkfile(mkfile.into())),
        };
        let meta = Meta::named("[internal] preparing inline document", &[llb::caps::FILE_BASE]);
        self.graph.add(pb::op::Op::File(pb::FileOp { actions: vec![action] }), None, Vec::new(), meta)
    }

    /// The step's name. Values of secrets that become variables are unknown here, and shown as stars.
    fn run_name(&mut self, stage: &mut Stage, command: &Command, mounts: &[Mount], title: &str) -> String {
        let mut env = stage.fs.env.clone();
        for name in mounts.iter().filter(|m| m.kind == MountKind::Secret).filter_map(|m| m.env.as_deref()) {
            env.set(name, "****");
        }
        let lexer = Lexer { raw_quotes: true, keep_unset: true, ..Lexer::new(self.escape) };
        let text = lexer.expand(title, &env).map_or_else(|_| title.to_string(), |e| e.text);
        self.number_step(stage, command, &upper_keyword(&text))
    }

    fn exec(
        &self,
        stage: &Stage,
        run: &Run,
        args: Vec<String>,
        gathered: Gathered,
    ) -> (pb::ExecOp, Vec<Out>, Vec<&'static str>) {
        let options = self.input.options;
        let Gathered { mut mounts, secrets, secret_env, mut ssh, mut caps } = gathered;
        caps.extend([llb::caps::EXEC_META_BASE, llb::caps::EXEC_META_SETS_DEFAULT_PATH]);
        let root = pb::Mount { dest: "/".into(), output: 0, ..Default::default() };
        mounts.insert(0, (root, stage.fs.output));
        mounts.sort_by(|a, b| a.0.dest.cmp(&b.0.dest));

        let mut env: EnvList = stage.fs.env.clone();
        for (n, mount) in ssh.iter_mut().enumerate() {
            if mount.dest.is_empty() {
                mount.dest = format!("/run/buildkit/ssh_agent.{n}");
            }
        }
        if let Some(first) = ssh.first() {
            caps.push(llb::caps::EXEC_MOUNT_SSH);
            if env.get("SSH_AUTH_SOCK").is_none() {
                env.set("SSH_AUTH_SOCK", &first.dest);
            }
        }
        if !secrets.is_empty() || !secret_env.is_empty() {
            caps.push(llb::caps::EXEC_MOUNT_SECRET);
        }
        if !secret_env.is_empty() {
            caps.push(llb::caps::EXEC_SECRET_ENV);
        }
        let proxy_env = self.proxy_env();
        if proxy_env.is_some() {
            caps.push(llb::caps::EXEC_META_PROXY_ENV);
        }
        if !options.ulimits.is_empty() {
            caps.push(llb::caps::EXEC_META_ULIMIT);
        }
        if !options.cgroup_parent.is_empty() {
            caps.push(llb::caps::EXEC_META_CGROUP_PARENT);
        }
        if options.resources.is_some() {
            caps.push(llb::caps::EXEC_META_LINUX_RESOURCES);
        }
        if !run.devices.is_empty() {
            caps.push(llb::caps::EXEC_META_CDI);
        }
        let network = run.network.unwrap_or(options.network);
        if network != pb::NetMode::Unset {
            caps.push(llb::caps::EXEC_META_NETWORK);
        }
        if run.security == pb::SecurityMode::Insecure {
            caps.push(llb::caps::EXEC_META_SECURITY);
        }
        let mut inputs = Vec::new();
        let mut wire = Vec::with_capacity(mounts.len() + secrets.len() + ssh.len());
        for (mut mount, shown) in mounts {
            mount.input = input_index(&mut inputs, shown);
            if shown.is_some() && mount.mount_type() == pb::MountType::Bind {
                caps.push(llb::caps::EXEC_MOUNT_BIND);
            }
            wire.push(mount);
        }
        wire.extend(secrets);
        wire.extend(ssh);
        let mut op = pb::ExecOp {
            meta: Some(pb::Meta {
                args,
                env: env.to_vec(),
                cwd: if stage.fs.cwd.is_empty() { "/".into() } else { stage.fs.cwd.clone() },
                user: stage.fs.user.clone(),
                proxy_env,
                extra_hosts: options.extra_hosts.clone(),
                hostname: options.hostname.clone(),
                ulimit: options.ulimits.clone(),
                cgroup_parent: options.cgroup_parent.clone(),
                remove_mount_stubs_recursive: true,
                valid_exit_codes: Vec::new(),
            }),
            mounts: wire,
            secretenv: secret_env,
            cdi_devices: run.devices.clone(),
            ..Default::default()
        };
        op.set_network(network);
        op.set_security(run.security);
        (op, inputs, caps)
    }

    fn proxy_env(&self) -> Option<pb::ProxyEnv> {
        let mut env = pb::ProxyEnv::default();
        let mut any = false;
        for (key, value) in &self.build_args {
            let slot = match key.to_ascii_lowercase().as_str() {
                "http_proxy" => &mut env.http_proxy,
                "https_proxy" => &mut env.https_proxy,
                "ftp_proxy" => &mut env.ftp_proxy,
                "no_proxy" => &mut env.no_proxy,
                "all_proxy" => &mut env.all_proxy,
                _ => continue,
            };
            slot.clone_from(value);
            any = true;
        }
        any.then_some(env)
    }
}

fn tmpfs_mount(dest: String, tmpfs: pb::TmpfsOpt, readonly: bool) -> pb::Mount {
    let mut mount = pb::Mount {
        input: llb::EMPTY,
        dest,
        readonly,
        output: llb::EMPTY,
        tmpfs_opt: Some(tmpfs),
        ..Default::default()
    };
    mount.set_mount_type(pb::MountType::Tmpfs);
    mount
}

fn base(path: &str) -> String {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_string()
}

fn secret_id(mount: &Mount) -> String {
    let given = [&mount.source, &mount.id].into_iter().find(|s| !s.is_empty()).cloned();
    given.unwrap_or_else(|| base(&mount.target))
}

fn secret(mount: &Mount, gathered: &mut Gathered) {
    let id = secret_id(mount);
    if let Some(name) = &mount.env {
        gathered.secret_env.push(pb::SecretEnv {
            id: id.clone(),
            name: name.clone(),
            optional: !mount.required,
        });
    }
    let dest = match (mount.target.as_str(), &mount.env) {
        ("", Some(_)) => return,
        ("", None) => format!("/run/secrets/{}", base(&id)),
        (target, _) => target.to_string(),
    };
    let mut out = pb::Mount {
        input: llb::EMPTY,
        dest,
        secret_opt: Some(pb::SecretOpt {
            id,
            uid: mount.uid.unwrap_or(0),
            gid: mount.gid.unwrap_or(0),
            mode: mount.mode.unwrap_or(0o400),
            optional: !mount.required,
        }),
        ..Default::default()
    };
    out.set_mount_type(pb::MountType::Secret);
    gathered.secrets.push(out);
}

/// The destination stays empty if none is given: it depends on the mount's number.
fn ssh(mount: &Mount) -> pb::Mount {
    let mut out = pb::Mount {
        input: llb::EMPTY,
        dest: mount.target.clone(),
        ssh_opt: Some(pb::SshOpt {
            id: mount.id.clone(),
            uid: mount.uid.unwrap_or(0),
            gid: mount.gid.unwrap_or(0),
            mode: mount.mode.unwrap_or(0o600),
            optional: !mount.required,
        }),
        ..Default::default()
    };
    out.set_mount_type(pb::MountType::Ssh);
    out
}

/// The first line of a heredoc, with dots if there are more.
fn summary(content: &str) -> String {
    let mut lines = content.trim().lines();
    let first = lines.next().unwrap_or_default();
    if lines.next().is_some() { format!("{first}...") } else { first.to_string() }
}

/// The command as history shows it: behind the build arguments that it could see.
fn history(args: &[String], stage: &Stage) -> String {
    let mut seen: Vec<(&str, String)> = Vec::new();
    for (key, default) in &stage.build_args {
        let value = stage.fs.env.get(key).or(default.as_deref()).unwrap_or_default().to_string();
        match seen.iter_mut().find(|(k, _)| *k == key.as_str()) {
            Some(entry) => entry.1 = value,
            None => seen.push((key.as_str(), value)),
        }
    }
    let mut words = Vec::new();
    if !seen.is_empty() {
        words.push(format!("|{}", seen.len()));
        words.extend(seen.into_iter().map(|(k, v)| format!("{k}={v}")));
    }
    words.extend(args.iter().cloned());
    words.join(" ")
}
