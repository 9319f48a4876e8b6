//! The stages of a Dockerfile: names, dependencies, what they inherit. Base images and what
//! instructions do are elsewhere.

use std::collections::{BTreeSet, HashMap};

use kiln_proto::{pb, platform};

use crate::compile::{Compiler, is_scratch};
use crate::error::{Fault, Lines, Pos, Result};
use crate::expand::{EnvList, Lexer, NoEnv};
use crate::graph::Out;
use crate::image::Image;
use crate::instruction::{self, Instruction, Kind};
use crate::outline::Uses;
use crate::suggest::{nearest, with_suggestion};
use crate::{lint, parse, source};

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
    pub(crate) resolved: bool,
    triggers_taken: bool,
    pub(crate) image: Image,
    pub(crate) base_config: Option<Vec<u8>>,
    pub(crate) fs: FileSystem,
    pub(crate) build_args: Vec<(String, Option<String>)>,
    pub(crate) uses: Uses,
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
        let mut uses = Uses::default();
        uses.read(base.matched);
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
            uses.read(expanded.matched);
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
            uses,
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
        let replaced = !stage.name.is_empty() && self.is_context(&stage.name, &on)?;
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

    pub(crate) fn reachable(&self, targets: &[usize]) -> BTreeSet<usize> {
        let mut seen = BTreeSet::new();
        let mut todo = targets.to_vec();
        while let Some(at) = todo.pop() {
            if seen.insert(at) {
                todo.extend(self.stages[at].base);
                todo.extend(self.stages[at].deps.iter().map(|(dep, _)| *dep));
            }
        }
        seen
    }

    /// Takes over what the base stage has, before and after the base's own instructions.
    pub(crate) fn inherit(&mut self, at: usize) {
        let Some(base) = self.stages[at].base else { return };
        let from = &self.stages[base];
        let (fs, platform, mut image) = (from.fs.clone(), from.platform.clone(), from.image.clone());
        let (base_config, workdir_set, build_args) =
            (from.base_config.clone(), from.workdir_set, from.build_args.clone());
        image.config.on_build.clear();
        let stage = &mut self.stages[at];
        (stage.fs, stage.platform, stage.image) = (fs, platform, image);
        (stage.base_config, stage.workdir_set, stage.build_args) = (base_config, workdir_set, build_args);
    }

    /// Puts the ONBUILD triggers of the base before the stage's own instructions. True if they read
    /// from stages that were not linked before.
    pub(crate) fn take_triggers(&mut self, at: usize) -> Result<bool> {
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
            let mut instruction = parse::parse(&line, '\\').map_err(|f| Fault::new(f.message))?;
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
