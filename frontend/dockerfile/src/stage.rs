//! The stages of a Dockerfile: names, dependencies, base images. What their instructions do is
//! elsewhere.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::future::try_join_all;
use kiln_proto::reference::Reference;
use kiln_proto::{llb, pb, platform};

use crate::compile::{Compiler, is_scratch};
use crate::error::{Fault, Lines, Pos, Result};
use crate::expand::{Env, EnvList, Lexer, NoEnv};
use crate::graph::{Meta, Out};
use crate::image::Image;
use crate::instruction::{self, Instruction, Kind};
use crate::options::ResolveMode;
use crate::suggest::{nearest, with_suggestion};
use crate::{ImageResolver, ResolvedImage, lint, source};

/// Names that are suggested beside the file's own stages.
const COMMON_IMAGES: &[&str] = &["alpine", "busybox", "centos", "debian", "golang", "ubuntu", "fedora"];

/// A FROM and what follows it, or an image that an instruction reads from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stage {
    /// The name after AS, lower-case; may be empty.
    pub(crate) name: String,
    /// What step names say; empty if this is the only stage.
    pub(crate) display: String,
    pub(crate) base_name: String,
    /// The base's name before it was normalised.
    pub(crate) base_written: String,
    pub(crate) text: String,
    pub(crate) lines: Option<Lines>,
    pub(crate) start: Option<Pos>,
    pub(crate) platform: Option<pb::Platform>,
    pub(crate) base: Option<usize>,
    /// The stages that this one reads from, and where.
    pub(crate) deps: Vec<(usize, Option<Lines>)>,
    pub(crate) commands: Vec<Command>,
    /// Not a FROM: made for `--from=IMAGE` or a mount.
    pub(crate) implicit: bool,
    /// Its file system is known.
    pub(crate) dispatched: bool,
    resolved: bool,
    triggers_taken: bool,
    pub(crate) image: Image,
    pub(crate) base_config: Option<Vec<u8>>,
    pub(crate) fs: FileSystem,
    pub(crate) build_args: Vec<(String, Option<String>)>,
    pub(crate) ignore_cache: bool,
    pub(crate) step: usize,
    pub(crate) steps: usize,
    pub(crate) workdir_set: bool,
    pub(crate) cmd_at: Option<Lines>,
    pub(crate) entrypoint_at: Option<Lines>,
    pub(crate) healthcheck_at: Option<Lines>,
}

/// What the next instruction starts from.
#[derive(Debug, Clone, Default)]
pub(crate) struct FileSystem {
    /// `None` is scratch.
    pub(crate) output: Option<Out>,
    pub(crate) env: EnvList,
    /// Absolute; empty counts as `/`.
    pub(crate) cwd: String,
    pub(crate) user: String,
}

/// An instruction in a stage.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub(crate) instruction: Instruction,
    /// For COPY `--from`: the stage; for RUN: one for each mount.
    pub(crate) sources: Vec<usize>,
    /// Comes from an ONBUILD of the base.
    pub(crate) triggered: bool,
}

/// A look-up that a resolver has to answer.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    reference: String,
    platform: pb::Platform,
    log_name: String,
}

impl Compiler<'_> {
    /// Makes the stages from the file's instructions.
    pub(crate) fn make_stages(&mut self, instructions: &[Instruction]) -> Result<()> {
        for instruction in instructions {
            match &instruction.kind {
                Kind::From(from) => self.add_from(instruction, from).map_err(|f| locate(f, instruction))?,
                Kind::Arg(_) if self.stages.is_empty() => {}
                _ => match self.stages.last_mut() {
                    Some(stage) => stage.commands.push(Command {
                        instruction: instruction.clone(),
                        sources: Vec::new(),
                        triggered: false,
                    }),
                    None => return Err(locate("no build stage in current context".into(), instruction)),
                },
            }
        }
        if self.stages.is_empty() {
            return Err("dockerfile contains no stages to build".into());
        }
        for at in 0..self.stages.len() {
            let stage = &mut self.stages[at];
            let from_base = !is_scratch(&stage.base_name) && stage.base.is_none();
            let steps = stage.commands.iter().filter(|c| is_step(&c.instruction.kind)).count();
            stage.steps = steps + usize::from(from_base);
        }
        Ok(())
    }

    fn add_from(&mut self, instruction: &Instruction, from: &instruction::From) -> Result<()> {
        let lexer = Lexer::new(self.escape);
        let lines = instruction.lines;
        let base = lexer.expand(&from.base, &self.global_args)?;
        let known: BTreeSet<String> =
            self.global_args.keys().map(str::to_string).chain(self.declared_args.iter().cloned()).collect();
        let undeclared = |lint: &mut lint::Linter, names: &BTreeSet<String>| {
            for name in names.iter().filter(|n| !known.contains(*n)) {
                let mut message = format!("FROM argument '{name}' is not declared");
                if let Some(found) = nearest(name, &known, true) {
                    message.push_str(&format!(" (did you mean {found}?)"));
                }
                lint.warn(lint::UNDEFINED_ARG_IN_FROM, lines, message);
            }
        };
        undeclared(&mut self.lint, &base.unmatched);
        if base.text.is_empty() {
            return Err(Fault::new(format!("base name ({}) should not be blank", from.base)));
        }
        let mut stage_platform = None;
        if !from.platform.is_empty() {
            let expanded = lexer.expand(&from.platform, &self.global_args)?;
            undeclared(&mut self.lint, &expanded.unmatched);
            self.lint_platform(
                from,
                &expanded.text,
                !expanded.matched.is_empty() || !expanded.unmatched.is_empty(),
                lines,
            );
            let hint = |message: String| -> Fault {
                let found =
                    expanded.unmatched.iter().find_map(|name| nearest(name, self.global_args.keys(), true));
                Fault::new(match found {
                    Some(found) => format!("{message} (did you mean {found}?)"),
                    None => message,
                })
            };
            if expanded.text.is_empty() {
                return Err(hint(format!("empty platform value from expression {}", from.platform)));
            }
            let parsed = platform::parse(&expanded.text)
                .map_err(|e| hint(format!("failed to parse platform {}: {e}", from.platform)))?;
            stage_platform = Some(parsed);
        }
        let number = self.stages.len();
        let stage = Stage {
            name: from.name.clone(),
            display: if from.name.is_empty() { format!("stage-{number}") } else { from.name.clone() },
            base_written: base.text.clone(),
            base_name: base.text,
            text: instruction.text.clone(),
            lines: Some(lines),
            start: Some(instruction.start),
            platform: stage_platform,
            ignore_cache: match &self.input.options.no_cache {
                None => false,
                Some(names) if names.is_empty() => true,
                Some(names) => {
                    !from.name.is_empty() && names.iter().any(|n| n.eq_ignore_ascii_case(&from.name))
                }
            },
            ..Stage::default()
        };
        let on = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let replaced = !stage.name.is_empty() && self.named_context(&stage.name, &on)?.is_some();
        let at = self.push_stage(stage);
        if replaced {
            self.stages[at].base = None;
        }
        Ok(())
    }

    fn lint_platform(&mut self, from: &instruction::From, text: &str, variable: bool, lines: Lines) {
        let target = |n: &str| [format!("${n}"), format!("${{{n}}}")].contains(&from.platform);
        if target("TARGETPLATFORM") {
            let message = format!(
                "Setting platform to predefined {} in FROM is redundant as this is the default behavior",
                from.platform
            );
            self.lint.warn(lint::REDUNDANT_PLATFORM, lines, message);
        }
        if variable {
            return;
        }
        if let Ok(p) = platform::parse(text)
            && !from.name.contains(&p.os)
            && !from.name.contains(&p.architecture)
        {
            let quoted = crate::gofmt::quote(text);
            let message = format!("FROM --platform flag should not use constant value {quoted}");
            self.lint.warn(lint::CONST_PLATFORM, lines, message);
        }
    }

    fn push_stage(&mut self, mut stage: Stage) -> usize {
        let at = self.stages.len();
        stage.base = self.by_name.get(&stage.base_name).copied();
        if !stage.name.is_empty() {
            self.by_name.insert(stage.name.clone(), at);
        }
        self.stages.push(stage);
        at
    }

    /// The stage that `target` names: the last one if it is empty.
    pub(crate) fn find_target(&self) -> Result<usize> {
        let target = &self.input.options.target;
        if target.is_empty() {
            return Ok(self.stages.len() - 1);
        }
        if let Some(&at) = self.by_name.get(&target.to_lowercase()) {
            return Ok(at);
        }
        if let Some(at) = target.parse::<usize>().ok().filter(|at| *at < self.stages.len()) {
            return Ok(at);
        }
        let names = self.stages.iter().map(|s| s.display.as_str());
        let message = format!("target stage {} could not be found", crate::gofmt::quote(target));
        Err(with_suggestion(message, target, names, true).into())
    }

    /// Finds the stages that instructions read from, adding one for each image that is none.
    pub(crate) fn link_stages(&mut self) -> Result<()> {
        let mut at = 0;
        while at < self.stages.len() {
            let mut commands = std::mem::take(&mut self.stages[at].commands);
            for command in &mut commands {
                self.link_command(at, command).map_err(|f| locate(f, &command.instruction))?;
            }
            self.stages[at].commands = commands;
            at += 1;
        }
        self.check_cycles()?;
        if let [only] = self.stages.as_mut_slice() {
            only.display.clear();
        }
        Ok(())
    }

    fn link_command(&mut self, stage: usize, command: &mut Command) -> Result<()> {
        let lines = command.instruction.lines;
        let names: Vec<String> = match &command.instruction.kind {
            Kind::Copy(copy) if !copy.from.is_empty() => {
                let expanded = Lexer::new(self.escape).expand(&copy.from, &NoEnv)?;
                if expanded.text != copy.from {
                    return Err("variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround".into());
                }
                vec![copy.from.clone()]
            }
            Kind::Run(run) => run
                .mounts
                .iter()
                .map(|(_, from)| if from.is_empty() { "scratch".to_string() } else { from.clone() })
                .collect(),
            _ => return Ok(()),
        };
        let by_index = matches!(command.instruction.kind, Kind::Copy(_));
        for name in names {
            let source = match name.parse::<usize>() {
                Ok(index) if by_index && index < self.stages.len() => index,
                Ok(index) if by_index => return Err(Fault::new(format!("invalid stage index {index}"))),
                _ => match self.by_name.get(&name.to_lowercase()) {
                    Some(&found) => found,
                    None => self.push_stage(Stage {
                        base_written: name.clone(),
                        base_name: name,
                        lines: Some(lines),
                        start: Some(command.instruction.start),
                        implicit: true,
                        ..Stage::default()
                    }),
                },
            };
            command.sources.push(source);
            self.stages[stage].deps.push((source, Some(lines)));
        }
        Ok(())
    }

    fn check_cycles(&self) -> Result<()> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.stages.len()];
        for root in 0..self.stages.len() {
            let mut stack = vec![(root, 0)];
            while let Some((at, next)) = stack.pop() {
                marks[at] = Mark::Open;
                let stage = &self.stages[at];
                let edge = match stage.base {
                    Some(base) if next == 0 => Some((base, stage.lines)),
                    _ => stage.deps.get(next - usize::from(stage.base.is_some())).copied(),
                };
                let Some((dep, lines)) = edge else {
                    marks[at] = Mark::Done;
                    continue;
                };
                stack.push((at, next + 1));
                match marks[dep] {
                    Mark::Done => {}
                    Mark::New => stack.push((dep, 0)),
                    Mark::Open => {
                        let message =
                            format!("circular dependency detected on stage: {}", self.stages[dep].display);
                        let fault = Fault::new(message);
                        return Err(match lines {
                            Some(lines) => fault.within(lines),
                            None => fault,
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn reachable(&self, target: usize) -> BTreeSet<usize> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![target];
        while let Some(at) = todo.pop() {
            if seen.insert(at) {
                todo.extend(self.stages[at].base);
                todo.extend(self.stages[at].deps.iter().map(|(dep, _)| *dep));
            }
        }
        seen
    }

    /// Resolves the base images of all stages that `target` needs, following ONBUILD triggers to
    /// further stages. The answer is what is needed.
    pub(crate) async fn resolve_stages(
        &mut self,
        target: usize,
        resolver: &dyn ImageResolver,
    ) -> Result<BTreeSet<usize>> {
        loop {
            let needed = self.reachable(target);
            self.resolve_bases(&needed, resolver).await?;
            let mut more = false;
            for &at in &needed {
                more |= self.take_triggers(at).map_err(|f| {
                    match (self.stages[at].lines, self.stages[at].start) {
                        (Some(lines), Some(start)) => f.within(lines).at(start),
                        _ => f,
                    }
                })?;
            }
            if !more {
                return Ok(needed);
            }
        }
    }

    async fn resolve_bases(&mut self, needed: &BTreeSet<usize>, resolver: &dyn ImageResolver) -> Result<()> {
        let mut requests: Vec<(usize, Request)> = Vec::new();
        for at in 0..self.stages.len() {
            let stage = &self.stages[at];
            if stage.base.is_some() || stage.dispatched || stage.resolved {
                continue;
            }
            let request = self.prepare_base(at, needed.contains(&at));
            let stage = &self.stages[at];
            let place = |f: Fault| match (stage.lines, stage.start) {
                (Some(lines), Some(start)) => f.within(lines).at(start),
                _ => f,
            };
            requests.extend(request.map_err(place)?.map(|r| (at, r)));
        }
        let mut unique: Vec<Request> = Vec::new();
        for (_, request) in &requests {
            if !unique.contains(request) {
                unique.push(request.clone());
            }
        }
        let mode = self.input.options.resolve_mode;
        let answers = try_join_all(unique.iter().map(|request| async move {
            let answer =
                resolver.resolve(&request.reference, &request.platform, mode, &request.log_name).await;
            answer.map(|image| (request, image)).map_err(|cause| (request, cause))
        }))
        .await;
        let answers = match answers {
            Ok(answers) => answers,
            Err((failed, cause)) => {
                let asker = requests.iter().find(|(_, r)| r == failed).map(|(at, _)| &self.stages[*at]);
                let name = asker.map(|s| s.base_written.clone()).unwrap_or_default();
                let common = COMMON_IMAGES.iter().flat_map(|n| [n.to_string(), format!("{n}:latest")]);
                let names = self.stages.iter().map(|s| s.display.clone()).chain(common);
                let message =
                    with_suggestion(format!("{name}: {cause}"), &name, names.filter(|n| !n.is_empty()), true);
                let fault = Fault::new(message).caused_by(cause);
                return Err(match asker.and_then(|s| Some((s.lines?, s.start?))) {
                    Some((lines, start)) => fault.within(lines).at(start),
                    None => fault,
                });
            }
        };
        for (at, request) in &requests {
            let answer = answers.iter().find(|(r, _)| *r == request).map(|(_, image)| image.clone());
            if let Some(image) = answer {
                self.use_base(*at, request, image)?;
            }
        }
        Ok(())
    }

    /// Settles a base that needs no look-up, or says which look-up it needs.
    fn prepare_base(&mut self, at: usize, needed: bool) -> Result<Option<Request>> {
        self.stages[at].resolved = needed;
        let stage = &self.stages[at];
        let stage_platform = stage.platform.clone().unwrap_or_else(|| self.target_platform.clone());
        let whole_stage = match stage.name.as_str() {
            "" => None,
            name => self.named_context(name, &stage_platform)?.map(|image| (name.to_string(), image)),
        };
        if is_scratch(&stage.base_name) && whole_stage.is_none() {
            self.use_scratch(at, stage_platform);
            return Ok(None);
        }
        let written = stage.base_name.clone();
        let parsed = Reference::parse(&written).map_err(|e| {
            Fault::new(format!("failed to parse stage name {}: {e}", crate::gofmt::quote(&written)))
        })?;
        if !needed {
            return Ok(None);
        }
        let replaced = match whole_stage {
            Some(found) => Some((found, true)),
            None => {
                let familiar = parsed.familiar();
                let familiar = familiar.strip_suffix(":latest").unwrap_or(&familiar).to_string();
                self.named_context(&familiar, &stage_platform)?.map(|image| ((familiar, image), false))
            }
        };
        if let Some(((context, image), whole_stage)) = replaced {
            let stage = &mut self.stages[at];
            if whole_stage {
                stage.commands.clear();
                stage.deps.clear();
                stage.steps = 1;
            }
            let Some(image) = image else {
                self.use_scratch(at, stage_platform);
                return Ok(None);
            };
            stage.base_name = image.to_string();
            let log_name = format!("[context {context}] load metadata for {image}");
            return Ok(Some(Request { reference: image.to_string(), platform: stage_platform, log_name }));
        }
        let reference = parsed.with_default_tag().to_string();
        self.stages[at].base_name = reference.clone();
        let prefix = if self.input.options.multi_platform {
            format!("[{} internal]", platform::format_all(&stage_platform))
        } else {
            "[internal]".to_string()
        };
        let log_name = format!("{prefix} load metadata for {reference}");
        Ok(Some(Request { reference, platform: stage_platform, log_name }))
    }

    fn use_scratch(&mut self, at: usize, on: pb::Platform) {
        let stage = &mut self.stages[at];
        stage.image = Image::scratch(&on);
        stage.platform = Some(on);
        stage.dispatched |= stage.implicit;
    }

    /// The image that a named context puts in the place of `name`; the inner `None` is scratch.
    fn named_context(&self, name: &str, for_platform: &pb::Platform) -> Result<Option<Option<Reference>>> {
        let contexts = &self.input.options.named_contexts;
        let specific = format!("{name}::{}", platform::format_all(&platform::normalized(for_platform)));
        let Some(value) = contexts.get(&specific).or_else(|| contexts.get(name)) else { return Ok(None) };
        let Some(image) = value.strip_prefix("docker-image://") else {
            return Err(Fault::new(format!(
                "unsupported: named context {name}={value} (only docker-image:// is)"
            )));
        };
        if image == "scratch" {
            return Ok(Some(None));
        }
        let parsed = Reference::parse(image)
            .map_err(|e| Fault::new(format!("invalid image of named context {name}: {e}")))?;
        Ok(Some(Some(parsed.with_default_tag())))
    }

    fn use_base(&mut self, at: usize, request: &Request, found: ResolvedImage) -> Result<()> {
        let ResolvedImage { digest, config, reference } = found;
        let parse = |text: &str| {
            Reference::parse(text).map_err(|e| Fault::new(format!("failed to parse ref {text}: {e}")))
        };
        let mut image: Image = serde_json::from_slice(&config)
            .map_err(|e| Fault::new(format!("failed to parse image config of {}: {e}", request.reference)))?;
        image.created = None;
        let mut name = parse(&reference)?.with_default_tag();
        if !digest.is_empty() && name.digest() != Some(digest.as_str()) {
            name = name
                .with_digest(&digest)
                .map_err(|e| Fault::new(format!("invalid digest of {reference}: {e}")))?;
        }
        let mut used = request.platform.clone();
        let stage = &self.stages[at];
        if stage.platform.is_none() && self.implicit_target && !runs_as(&used, &image) {
            let build = &self.input.build_platform;
            if runs_as(build, &image) {
                used = build.clone();
            }
        }
        let output = if image.has_no_layers() {
            None
        } else {
            let title = match request.log_name.strip_prefix("[context ").and_then(|r| r.split_once("] ")) {
                Some((context, _)) => format!("[context {context}] {name}"),
                None => self.step_name(at, &format!("FROM {name}"), false, Some(&used), &NoEnv),
            };
            let stage = &self.stages[at];
            let meta = Meta {
                command: (!stage.text.is_empty()).then(|| stage.text.clone()),
                lines: stage.lines,
                unnamed: stage.implicit,
                ..Meta::named(title, &[llb::caps::SOURCE_IMAGE])
            };
            Some(self.image_source(&name, &used, meta))
        };
        if let (Some(lines), true) = (self.stages[at].lines, !runs_as(&used, &image)) {
            let (actual, expected) =
                (platform::format_all(&platform::normalized(&image.platform())), platform::format_all(&used));
            let message = format!(
                "Base image {} was pulled with platform \"{actual}\", expected \"{expected}\" for current build",
                self.stages[at].base_written
            );
            self.lint.warn(lint::BASE_IMAGE_PLATFORM, lines, message);
        }
        let stage = &mut self.stages[at];
        stage.base_name = name.to_string();
        stage.base_config = Some(config);
        stage.image = image;
        stage.platform = Some(used);
        stage.fs.output = output;
        stage.dispatched |= stage.implicit;
        Ok(())
    }

    fn image_source(&mut self, name: &Reference, on: &pb::Platform, mut meta: Meta) -> Out {
        let mut attrs = BTreeMap::new();
        let mode = self.input.options.resolve_mode;
        if mode != ResolveMode::Default {
            attrs.insert("image.resolvemode".to_string(), mode.as_str().to_string());
            if mode == ResolveMode::Pull {
                meta.caps.push(llb::caps::SOURCE_IMAGE_RESOLVE_MODE);
            }
        }
        let op = pb::op::Op::Source(pb::SourceOp { identifier: format!("docker-image://{name}"), attrs });
        self.graph.add(op, Some(on), Vec::new(), meta)
    }

    /// Takes over what the base stage has, before and after the base's own instructions.
    pub(crate) fn inherit(&mut self, at: usize) {
        let Some(base) = self.stages[at].base else { return };
        let from = self.stages[base].clone();
        let stage = &mut self.stages[at];
        stage.fs = from.fs;
        stage.platform = from.platform;
        stage.image = from.image;
        stage.image.config.on_build.clear();
        stage.base_config = from.base_config;
        stage.workdir_set = from.workdir_set;
        stage.build_args = from.build_args;
    }

    /// Puts the ONBUILD triggers of the base before the stage's own instructions. True if they read
    /// from stages that were not linked before.
    fn take_triggers(&mut self, at: usize) -> Result<bool> {
        self.inherit(at);
        if std::mem::replace(&mut self.stages[at].triggers_taken, true) {
            return Ok(false);
        }
        let mut triggers = std::mem::take(&mut self.stages[at].image.config.on_build);
        if let Some(base) = self.stages[at].base {
            triggers.extend(self.stages[base].commands.iter().filter_map(|c| match &c.instruction.kind {
                Kind::Onbuild(text) => Some(text.clone()),
                _ => None,
            }));
        }
        let mut commands = Vec::with_capacity(triggers.len());
        let mut linked = false;
        for trigger in &triggers {
            let line = source::read_trigger(trigger).map_err(|f| Fault::new(f.message))?;
            let mut instruction = instruction::parse(&line, '\\').map_err(|f| Fault::new(f.message))?;
            if let (Some(lines), Some(start)) = (self.stages[at].lines, self.stages[at].start) {
                (instruction.lines, instruction.start) = (lines, start);
            }
            let mut command = Command { instruction, sources: Vec::new(), triggered: true };
            self.link_command(at, &mut command)?;
            linked |= !command.sources.is_empty();
            commands.push(command);
        }
        let stage = &mut self.stages[at];
        stage.steps += commands.len();
        commands.append(&mut stage.commands);
        stage.commands = commands;
        if linked {
            self.check_cycles()?;
        }
        Ok(linked)
    }

    /// `[platform stage i/n] text`: the name of the stage's next step.
    pub(crate) fn step_name(
        &mut self,
        at: usize,
        text: &str,
        triggered: bool,
        on: Option<&pb::Platform>,
        env: &dyn Env,
    ) -> String {
        let multi = self.input.options.multi_platform;
        step_name(&mut self.stages[at], text, triggered, on.filter(|_| multi), env)
    }
}

/// See [`Compiler::step_name`]; `on` is the platform if it is shown.
pub(crate) fn step_name(
    stage: &mut Stage,
    text: &str,
    triggered: bool,
    on: Option<&pb::Platform>,
    env: &dyn Env,
) -> String {
    if stage.steps == 0 {
        return text.to_string();
    }
    stage.step += 1;
    let mut out = String::from("[");
    if let Some(on) = on {
        out.push_str(&platform::format_all(on));
        out.push_str(&cross_target(on, env));
        out.push(' ');
    }
    if !stage.display.is_empty() {
        out.push_str(&stage.display);
        out.push(' ');
    }
    let width = stage.steps.to_string().len();
    out.push_str(&format!("{:width$}/{}] ", stage.step, stage.steps));
    if triggered {
        out.push_str("ONBUILD ");
    }
    out.push_str(text);
    out
}

/// `->arch` where a step that runs on one platform builds for another.
fn cross_target(on: &pb::Platform, env: &dyn Env) -> String {
    let parsed = env.get("TARGETPLATFORM").and_then(|p| platform::parse(p).ok());
    let target = match parsed {
        Some(p) => p,
        None => {
            let part = |name: &str| env.get(name).map(str::to_string);
            let (os, arch, variant) = (part("TARGETOS"), part("TARGETARCH"), part("TARGETVARIANT"));
            if os.is_none() && arch.is_none() && variant.is_none() {
                return String::new();
            }
            let or = |value: Option<String>, default: &str| {
                value.filter(|v| !v.is_empty()).unwrap_or(default.to_string())
            };
            platform::normalized(&pb::Platform {
                os: or(os, &on.os),
                architecture: or(arch, &on.architecture),
                variant: variant.unwrap_or_default(),
                ..Default::default()
            })
        }
    };
    if target.os != on.os {
        return format!("->{}", platform::format_all(&target));
    }
    if target.architecture == on.architecture {
        return String::new();
    }
    let variant = if target.variant.is_empty() { String::new() } else { format!("/{}", target.variant) };
    format!("->{}{variant}", target.architecture)
}

fn runs_as(platform: &pb::Platform, image: &Image) -> bool {
    platform.os == image.os && platform.architecture == image.architecture
}

/// Whether the instruction counts among the numbered steps.
fn is_step(kind: &Kind) -> bool {
    matches!(kind, Kind::Add(_) | Kind::Copy(_) | Kind::Run(_) | Kind::Workdir(_))
}

/// Adds the instruction's place to an error.
pub(crate) fn locate(fault: Fault, instruction: &Instruction) -> Fault {
    fault.within(instruction.lines).at(instruction.start)
}

/// Stages by lower-case name.
pub(crate) type ByName = HashMap<String, usize>;
