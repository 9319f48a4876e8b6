//! What each instruction does to the file system's environment and to the image's configuration.
//! RUN and COPY have their own modules.

use kiln_proto::{llb, pattern, pb};

use crate::compile::Compiler;
use crate::error::{Fault, Lines, Result};
use crate::expand::{Env, Lexer};
use crate::graph::Meta;
use crate::image::{DEFAULT_PATH, Empty, Healthcheck};
use crate::instruction::{ArgDef, CommandLine, Health, Instruction, KeyValue, Kind};
use crate::lint;
use crate::stage::{Command, Stage, locate};
use crate::suggest::nearest;
use crate::{expose, gofmt};

/// Arguments that steer the compiler and are no variables.
const NO_VARIABLE: &[&str] = &["BUILDKIT_SBOM_SCAN_CONTEXT", "BUILDKIT_SBOM_SCAN_STAGE"];

const SIGNALS: &[&str] = &[
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE",
    "POLL", "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU",
    "URG", "USR1", "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
];

impl Compiler<'_> {
    /// Runs the instructions of a stage whose base is known.
    pub(crate) fn run_stage(&mut self, at: usize) -> Result<()> {
        self.inherit(at);
        let mut stage = std::mem::take(&mut self.stages[at]);
        let result = self.run_commands(&mut stage);
        stage.dispatched = true;
        self.stages[at] = stage;
        result
    }

    fn run_commands(&mut self, stage: &mut Stage) -> Result<()> {
        let on = stage.platform.get_or_insert_with(|| self.target_platform.clone()).clone();
        if on.os == "windows" {
            let fault = Fault::new("unsupported: building for windows");
            return Err(stage
                .lines
                .map_or_else(|| Fault::new(&*fault.message), |l| Fault::new(&*fault.message).within(l)));
        }
        let config = &mut stage.image.config;
        if !config.env.iter().any(|e| e.split_once('=').map_or(e.as_str(), |(k, _)| k) == "PATH") {
            config.env.push(format!("PATH={DEFAULT_PATH}"));
        }
        for entry in &config.env {
            let (key, value) = entry.split_once('=').unwrap_or((entry, ""));
            stage.fs.env.set(key, value);
        }
        if !config.working_dir.is_empty() {
            config.working_dir = absolute("/", &config.working_dir);
            stage.fs.cwd.clone_from(&config.working_dir);
        }
        if !config.user.is_empty() {
            stage.fs.user.clone_from(&config.user);
        }
        let commands = std::mem::take(&mut stage.commands);
        if !commands.is_empty() {
            self.reads(stage.fs.output, "/".into());
        }
        for command in &commands {
            self.run_command(stage, command).map_err(|f| locate(f, &command.instruction))?;
        }
        stage.commands = commands;
        Ok(())
    }

    fn run_command(&mut self, stage: &mut Stage, command: &Command) -> Result<()> {
        let i = &command.instruction;
        match &i.kind {
            Kind::Add(copy) | Kind::Copy(copy) => {
                self.copy(stage, command, copy, matches!(i.kind, Kind::Add(_)))
            }
            Kind::Run(run) => self.run_step(stage, command, run),
            Kind::Arg(args) => self.arg(stage, i, args),
            Kind::Cmd(line) => {
                let args = self.command_line(stage, i, line);
                if let Some(before) = stage.cmd_at.replace(i.lines) {
                    self.lint_repeated(i, before);
                }
                self.record(stage, format!("CMD {}", gofmt::quoted_slice(&args)), false);
                stage.image.config.cmd = args;
                stage.image.config.args_escaped = true;
                Ok(())
            }
            Kind::Entrypoint(line) => {
                let args = self.command_line(stage, i, line);
                if let Some(before) = stage.entrypoint_at.replace(i.lines) {
                    self.lint_repeated(i, before);
                }
                self.record(stage, format!("ENTRYPOINT {}", gofmt::quoted_slice(&args)), false);
                stage.image.config.entrypoint = args;
                if stage.cmd_at.is_none() {
                    stage.image.config.cmd.clear();
                }
                Ok(())
            }
            Kind::Env(pairs) => {
                let pairs = self.expand_pairs(stage, i, pairs)?;
                let mut text = String::from("ENV");
                for (key, value) in &pairs {
                    text.push_str(&format!(" {key}={value}"));
                    self.lint_secret("ENV", key, i.lines);
                    stage.fs.env.set(key, value);
                    stage.image.set_env(key, value);
                }
                self.record(stage, text, false);
                Ok(())
            }
            Kind::Label(pairs) => {
                let pairs = self.expand_pairs(stage, i, pairs)?;
                let mut text = String::from("LABEL");
                for (key, value) in pairs {
                    text.push_str(&format!(" {key}={value}"));
                    stage.image.config.labels.insert(key, value);
                }
                self.record(stage, text, false);
                Ok(())
            }
            Kind::Expose(ports) => {
                let mut words = Vec::new();
                for port in ports {
                    words.extend(Lexer::new(self.escape).expand(port, &stage.fs.env)?.words);
                }
                let ports =
                    expose::ports(&words, &mut |rule, message| self.lint.warn(rule, i.lines, message))?;
                self.record(stage, format!("EXPOSE {}", gofmt::slice(&ports)), false);
                stage.image.config.exposed_ports.extend(ports.into_iter().map(|p| (p, Empty {})));
                Ok(())
            }
            Kind::From(_) => Err("FROM is not a command".into()),
            Kind::Healthcheck(health) => {
                if let Some(before) = stage.healthcheck_at.replace(i.lines) {
                    self.lint_repeated(i, before);
                }
                self.record(stage, health_text(health), false);
                stage.image.config.healthcheck = Some(Healthcheck {
                    test: health.test.clone(),
                    interval: health.interval,
                    timeout: health.timeout,
                    start_period: health.start_period,
                    start_interval: health.start_interval,
                    retries: health.retries,
                });
                Ok(())
            }
            Kind::Maintainer(author) => {
                self.record(stage, format!("MAINTAINER {author}"), false);
                stage.image.author.clone_from(author);
                Ok(())
            }
            Kind::Onbuild(trigger) => {
                stage.image.config.on_build.push(trigger.clone());
                Ok(())
            }
            Kind::Shell(shell) => {
                self.record(stage, format!("SHELL {}", gofmt::slice(shell)), false);
                stage.image.config.shell.clone_from(shell);
                Ok(())
            }
            Kind::StopSignal(signal) => {
                let signal = self.expand(stage, i, signal)?;
                if !is_signal(&signal) {
                    return Err(Fault::new(format!("invalid signal: {signal}")));
                }
                self.record(stage, format!("STOPSIGNAL {signal}"), false);
                stage.image.config.stop_signal = signal;
                Ok(())
            }
            Kind::User(user) => {
                let user = self.expand(stage, i, user)?;
                self.record(stage, format!("USER {user}"), false);
                stage.fs.user.clone_from(&user);
                stage.image.config.user = user;
                Ok(())
            }
            Kind::Volume(paths) => {
                let paths: Vec<String> =
                    paths.iter().map(|p| self.expand(stage, i, p)).collect::<Result<_>>()?;
                if paths.iter().any(String::is_empty) {
                    return Err("VOLUME specified can not be an empty string".into());
                }
                self.record(stage, format!("VOLUME {}", gofmt::slice(&paths)), false);
                stage.image.config.volumes.extend(paths.into_iter().map(|p| (p, Empty {})));
                Ok(())
            }
            Kind::Workdir(path) => self.workdir(stage, command, path),
        }
    }

    /// Expands one word with the stage's variables.
    pub(crate) fn expand(&mut self, stage: &Stage, i: &Instruction, word: &str) -> Result<String> {
        self.expand_with(Lexer::new(self.escape), stage, i, word)
    }

    /// Expands with a given lexer, and reports variables that are not set.
    pub(crate) fn expand_with(
        &mut self,
        lexer: Lexer,
        stage: &Stage,
        i: &Instruction,
        word: &str,
    ) -> Result<String> {
        let expanded = lexer.expand(word, &stage.fs.env)?;
        for name in &expanded.unmatched {
            let declared = stage.build_args.iter().any(|(k, _)| k == name);
            if declared || NO_VARIABLE.contains(&name.as_str()) {
                continue;
            }
            let mut message = format!("Usage of undefined variable '${name}'");
            if let Some(found) = nearest(name, stage.fs.env.keys(), true) {
                message.push_str(&format!(" (did you mean ${found}?)"));
            }
            self.lint.warn(lint::UNDEFINED_VAR, i.lines, message);
        }
        Ok(expanded.text)
    }

    fn expand_pairs(
        &mut self,
        stage: &Stage,
        i: &Instruction,
        pairs: &[KeyValue],
    ) -> Result<Vec<(String, String)>> {
        let mut out = Vec::with_capacity(pairs.len());
        for pair in pairs {
            if pair.legacy {
                let name = i.keyword.to_uppercase();
                let message = format!(
                    "\"{name} key=value\" should be used instead of legacy \"{name} key value\" format"
                );
                self.lint.warn(lint::LEGACY_KEY_VALUE, i.lines, message);
            }
            out.push((self.expand(stage, i, &pair.key)?, self.expand(stage, i, &pair.value)?));
        }
        Ok(out)
    }

    pub(crate) fn record(&self, stage: &mut Stage, created_by: String, layer: bool) {
        stage.image.record(created_by, layer, self.epoch_text().as_deref());
    }

    /// The arguments of CMD or ENTRYPOINT with the shell that runs them, if one does.
    fn command_line(&mut self, stage: &Stage, i: &Instruction, line: &CommandLine) -> Vec<String> {
        if !line.shell {
            return line.args.clone();
        }
        if stage.image.config.shell.is_empty() {
            let message = format!(
                "JSON arguments recommended for {} to prevent unintended behavior related to OS signals",
                i.keyword.to_uppercase()
            );
            self.lint.warn(lint::JSON_ARGS, i.lines, message);
        }
        with_shell(stage, &line.args)
    }

    fn lint_repeated(&mut self, i: &Instruction, before: Lines) {
        let message = format!(
            "Multiple {} instructions should not be used in the same stage because only the last one will be used",
            i.keyword.to_uppercase()
        );
        self.lint.warn(lint::MULTIPLE_INSTRUCTIONS, before, message);
    }

    fn lint_secret(&mut self, keyword: &str, key: &str, lines: Lines) {
        const SECRET: &[&str] = &[
            "apikey",
            "auth",
            "credential",
            "credentials",
            "key",
            "password",
            "pword",
            "passwd",
            "secret",
            "token",
        ];
        const HARMLESS: &[&str] = &["public", "file", "version"];
        let lower = key.to_lowercase();
        let has = |list: &[&str]| lower.split('_').any(|word| list.contains(&word));
        if has(SECRET) && !has(HARMLESS) {
            let message = format!(
                "Do not use ARG or ENV instructions for sensitive data ({keyword} {})",
                gofmt::quote(key)
            );
            self.lint.warn(lint::SECRETS_IN_ENV, lines, message);
        }
    }

    fn arg(&mut self, stage: &mut Stage, i: &Instruction, args: &[ArgDef]) -> Result<()> {
        let mut texts = Vec::with_capacity(args.len());
        for arg in args {
            self.lint_secret("ARG", &arg.key, i.lines);
            let given = self.build_args.get(&arg.key).cloned();
            let of_file = given.is_none() && arg.value.is_none() && self.global_args.get(&arg.key).is_some();
            let value = match (given, &arg.value) {
                (Some(value), _) => Some(value),
                (None, Some(default)) => Some(self.expand(stage, i, default)?),
                (None, None) => self.global_args.get(&arg.key).map(str::to_string),
            };
            if let Some(value) = value.as_ref().filter(|_| !NO_VARIABLE.contains(&arg.key.as_str())) {
                stage.fs.env.set(&arg.key, value);
            }
            stage.uses.arg(i, arg, value.as_deref(), of_file);
            texts.push(match &value {
                Some(value) => format!("{}={value}", arg.key),
                None => arg.key.clone(),
            });
            stage.build_args.push((arg.key.clone(), value));
        }
        self.record(stage, format!("ARG {}", texts.join(" ")), false);
        Ok(())
    }

    fn workdir(&mut self, stage: &mut Stage, command: &Command, path: &str) -> Result<()> {
        let i = &command.instruction;
        let path = self.expand(stage, i, path)?;
        if !stage.workdir_set && !path.starts_with('/') {
            let quoted = gofmt::quote(&path);
            let message =
                format!("Relative workdir {quoted} can have unexpected results if the base image changes");
            self.lint.warn(lint::WORKDIR_RELATIVE, i.lines, message);
        }
        stage.workdir_set = true;
        let dir = absolute(&stage.image.config.working_dir, &path);
        stage.image.config.working_dir.clone_from(&dir);
        stage.fs.cwd.clone_from(&dir);
        let layer = dir != "/";
        if layer {
            let name = self.command_name(stage, command, Lexer::new(self.escape), &i.text);
            let inputs: Vec<_> = stage.fs.output.into_iter().collect();
            let base = if inputs.is_empty() { llb::EMPTY } else { 0 };
            let mkdir = pb::FileActionMkDir {
                path: dir.clone(),
                mode: 0o755,
                make_parents: true,
                owner: owner(&stage.image.config.user, base),
                timestamp: self.epoch.map_or(-1, |s| s.saturating_mul(1_000_000_000)),
            };
            let action = pb::FileAction {
                input: base,
                secondary_input: llb::EMPTY,
                output: 0,
                action: Some(pb::file_action::Action::Mkdir(mkdir)),
            };
            let op = pb::op::Op::File(pb::FileOp { actions: vec![action] });
            let meta = Meta { lines: Some(i.lines), ..Meta::named(name, &[llb::caps::FILE_BASE]) };
            stage.fs.output = Some(self.graph.add(op, None, inputs, meta));
        }
        self.record(stage, format!("WORKDIR {dir}"), layer);
        Ok(())
    }

    /// The numbered name of a step: its text with variables filled in as far as they are known.
    pub(crate) fn command_name(
        &mut self,
        stage: &mut Stage,
        command: &Command,
        lexer: Lexer,
        text: &str,
    ) -> String {
        let expanded = lexer.expand(text, &stage.fs.env).map_or_else(|_| text.to_string(), |e| e.text);
        self.number_step(stage, command, &upper_keyword(&expanded))
    }

    /// `[stage i/n] text`, counting the step.
    pub(crate) fn number_step(&self, stage: &mut Stage, command: &Command, text: &str) -> String {
        let on = stage.platform.clone().filter(|_| self.input.options.multi_platform);
        let env = stage.fs.env.clone();
        crate::step::step_name(stage, text, command.triggered, on.as_ref(), &env)
    }
}

/// The text with its first word in upper case.
pub(crate) fn upper_keyword(text: &str) -> String {
    match text.split_once(' ') {
        Some((keyword, rest)) => format!("{} {rest}", keyword.to_uppercase()),
        None => text.to_uppercase(),
    }
}

/// `args` joined, behind the stage's shell.
pub(crate) fn with_shell(stage: &Stage, args: &[String]) -> Vec<String> {
    let mut out = match stage.image.config.shell.as_slice() {
        [] => vec!["/bin/sh".to_string(), "-c".to_string()],
        shell => shell.to_vec(),
    };
    out.push(args.join(" "));
    out
}

/// `path` seen from `dir`, cleaned.
pub(crate) fn absolute(dir: &str, path: &str) -> String {
    if path.starts_with('/') { pattern::clean(path) } else { pattern::clean(&format!("/{dir}/{path}")) }
}

/// `user[:group]` by number or name; names are looked up in input `base`.
pub(crate) fn owner(text: &str, base: i64) -> Option<pb::ChownOpt> {
    if text.is_empty() {
        return None;
    }
    let part = |text: &str| {
        let user = match text.parse::<i32>() {
            _ if text == "root" => pb::user_opt::User::ById(0),
            Ok(id) => pb::user_opt::User::ById(id.cast_unsigned()),
            Err(_) if text.is_empty() => pb::user_opt::User::ById(0),
            Err(_) => pb::user_opt::User::ByName(pb::NamedUserOpt { name: text.to_string(), input: base }),
        };
        pb::UserOpt { user: Some(user) }
    };
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    Some(pb::ChownOpt { user: Some(part(user)), group: group.map(part) })
}

fn health_text(health: &Health) -> String {
    format!(
        "HEALTHCHECK &{{{} {:?} {:?} {:?} {:?} {}}}",
        gofmt::quoted_slice(&health.test),
        gofmt::duration(health.interval),
        gofmt::duration(health.timeout),
        gofmt::duration(health.start_period),
        gofmt::duration(health.start_interval),
        gofmt::quoted_number(health.retries)
    )
}

fn is_signal(text: &str) -> bool {
    if let Ok(number) = text.parse::<u32>() {
        return number != 0;
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let realtime = |prefix: &str, sign: char| {
        name.strip_prefix(prefix).is_some_and(|rest| {
            rest.is_empty()
                || rest.strip_prefix(sign).is_some_and(|n| n.parse::<u32>().is_ok_and(|n| n <= 30))
        })
    };
    SIGNALS.contains(&name) || realtime("RTMIN", '+') || realtime("RTMAX", '-')
}
