//! The order of a compilation: read the file, find out which stages are needed and what their bases
//! are, run the instructions of each, put the result together. One pass for each target platform.

use std::collections::{BTreeMap, BTreeSet};

use kiln_proto::pattern::PatternMatcher;
use kiln_proto::reference::Reference;
use kiln_proto::{pb, platform};

use crate::context::{self, Directory};
use crate::error::{Fault, Lines, Result};
use crate::expand::{Env, EnvList, Lexer};
use crate::gofmt;
use crate::graph::{Graph, Out};
use crate::image::Image;
use crate::instruction::{self, Instruction, Kind};
use crate::lint::{self, Linter};
use crate::parse;
use crate::source::{self, Source};
use crate::stage::{ByName, Stage, locate};
use crate::{
    CompileError, CompileInput, Compiled, CompiledTarget, ImageResolver, LintReport, LintWarning, TargetInfo,
};

/// The state of one pass.
pub(crate) struct Compiler<'a> {
    pub(crate) input: &'a CompileInput<'a>,
    pub(crate) escape: char,
    pub(crate) graph: Graph,
    pub(crate) lint: Linter,
    pub(crate) stages: Vec<Stage>,
    pub(crate) by_name: ByName,
    /// Predefined arguments and those declared before the first FROM.
    pub(crate) global_args: EnvList,
    /// Names declared before the first FROM, with or without a value.
    pub(crate) declared_args: BTreeSet<String>,
    pub(crate) build_args: BTreeMap<String, String>,
    pub(crate) target_platform: pb::Platform,
    /// No platform was asked for: the base image may decide.
    pub(crate) implicit_target: bool,
    /// `SOURCE_DATE_EPOCH`, seconds.
    pub(crate) epoch: Option<i64>,
    /// The build context; `None` if it is empty.
    pub(crate) context: Option<Out>,
    /// The client's directories among the contexts.
    pub(crate) directories: Vec<Directory>,
    pub(crate) ignore: Option<PatternMatcher>,
}

/// Whether a base name is the empty image.
pub(crate) fn is_scratch(name: &str) -> bool {
    name == "scratch"
}

/// Compiles a Dockerfile for every platform that the options name.
pub async fn compile(
    input: CompileInput<'_>,
    resolver: &dyn ImageResolver,
) -> Result<Compiled, CompileError> {
    let mut warnings = Vec::new();
    match compile_all(&input, resolver, &mut warnings).await {
        Ok(targets) => Ok(Compiled { targets, warnings }),
        Err(fault) => Err(CompileError { warnings, ..fault.into_error(input.filename) }),
    }
}

/// Checks a Dockerfile for the first platform that the options name. Without a target, all stages are checked.
pub async fn lint(input: CompileInput<'_>, resolver: &dyn ImageResolver) -> LintReport {
    let mut warnings = Vec::new();
    let outcome = lint_all(&input, resolver, &mut warnings).await;
    LintReport { warnings, error: outcome.err().map(|f| f.into_error(input.filename)) }
}

async fn lint_all(
    input: &CompileInput<'_>,
    resolver: &dyn ImageResolver,
    warnings: &mut Vec<LintWarning>,
) -> Result<()> {
    let (source, instructions) = read(input.dockerfile)?;
    let mut compiler = Compiler::new(input, &source, &instructions, input.options.platforms.first())?;
    let every = input.options.target.is_empty();
    let outcome = compiler.run_stages(&instructions, resolver, every).await;
    *warnings = std::mem::take(&mut compiler.lint.warnings);
    outcome.map(drop)
}

/// The stages of a Dockerfile, in order.
///
/// # Errors
/// The file cannot be read.
pub fn targets(dockerfile: &[u8], filename: &str) -> Result<Vec<TargetInfo>, CompileError> {
    let (_, instructions) = read(dockerfile).map_err(|f| f.into_error(filename))?;
    let stages = instructions.into_iter().filter_map(|i| match i.kind {
        Kind::From(from) => Some((i.comments, i.lines, from)),
        _ => None,
    });
    let target = |(comments, lines, from): (Vec<String>, Lines, instruction::From)| TargetInfo {
        description: comments
            .iter()
            .filter_map(|comment| comment.strip_prefix(&from.name)?.strip_prefix(' '))
            .find(|_| !from.name.is_empty())
            .unwrap_or_default()
            .to_owned(),
        name: from.name,
        base: from.base,
        platform: from.platform,
        lines: (lines.start, lines.end),
    };
    Ok(stages.map(target).collect())
}

/// The file's instructions.
pub(crate) fn read(dockerfile: &[u8]) -> Result<(Source, Vec<Instruction>)> {
    let source = source::read(dockerfile).map_err(parse_error)?;
    let instructions = source
        .lines
        .iter()
        .map(|line| parse::parse(line, source.escape).map_err(parse_error))
        .collect::<Result<_>>()?;
    Ok((source, instructions))
}

async fn compile_all(
    input: &CompileInput<'_>,
    resolver: &dyn ImageResolver,
    warnings: &mut Vec<LintWarning>,
) -> Result<Vec<CompiledTarget>> {
    let (source, instructions) = read(input.dockerfile)?;
    let mut platforms: Vec<Option<&pb::Platform>> = input.options.platforms.iter().map(Some).collect();
    if platforms.is_empty() {
        platforms.push(None);
    }
    let mut targets = Vec::new();
    for target in platforms {
        let mut compiler = Compiler::new(input, &source, &instructions, target)?;
        let result = compiler.run(&instructions, resolver).await;
        if targets.is_empty() {
            *warnings = std::mem::take(&mut compiler.lint.warnings);
        }
        targets.push(result?);
    }
    Ok(targets)
}

fn parse_error(mut fault: Fault) -> Fault {
    if let Some(line) = fault.lines.map(|l| l.start).or(fault.at.map(|p| p.line)) {
        fault = fault.context(format_args!("dockerfile parse error on line {line}"));
    }
    fault
}

impl<'a> Compiler<'a> {
    pub(crate) fn new(
        input: &'a CompileInput<'a>,
        source: &Source,
        instructions: &[Instruction],
        target: Option<&pb::Platform>,
    ) -> Result<Self> {
        let options = input.options;
        let check = options.check.as_deref().or(source.check.as_deref()).unwrap_or_default();
        let mut graph = Graph::default();
        let mut directories = Vec::new();
        let context = context::take(
            &mut graph,
            &mut directories,
            &input.context,
            input.ignore_patterns.as_deref(),
            "[internal] load build context".into(),
        )?;
        let ignore = match &input.ignore_patterns {
            Some(patterns) => {
                let matcher =
                    PatternMatcher::new(patterns).map_err(|e| Fault::new(format!(".dockerignore: {e}")))?;
                (!matcher.is_empty()).then_some(matcher)
            }
            None => None,
        };
        let mut compiler = Self {
            input,
            escape: source.escape,
            graph,
            lint: Linter::new(check)?,
            stages: Vec::new(),
            by_name: ByName::new(),
            global_args: EnvList::default(),
            declared_args: BTreeSet::new(),
            build_args: options.build_args.clone(),
            target_platform: target.unwrap_or(&input.build_platform).clone(),
            implicit_target: target.is_none(),
            epoch: None,
            context,
            directories,
            ignore,
        };
        for &line in &source.empty_continuations {
            compiler.lint.warn(
                lint::NO_EMPTY_CONTINUATION,
                Lines { start: line, end: line },
                "Empty continuation line",
            );
        }
        compiler.lint_names(instructions);
        compiler.predefine(instructions);
        compiler.lint_default_args(instructions);
        compiler.declare_globals(instructions)?;
        compiler.resolve_epoch()?;
        Ok(compiler)
    }

    async fn run(
        &mut self,
        instructions: &[Instruction],
        resolver: &dyn ImageResolver,
    ) -> Result<CompiledTarget> {
        let (target, needed) = self.run_stages(instructions, resolver, false).await?;
        self.reads(self.stages[target].fs.output, "/".into());
        self.fill_directories();
        self.result(target, &needed)
    }

    /// Runs the stages that the target needs, or `every` one. The answer is the target, and what was run.
    pub(crate) async fn run_stages(
        &mut self,
        instructions: &[Instruction],
        resolver: &dyn ImageResolver,
        every: bool,
    ) -> Result<(usize, BTreeSet<usize>)> {
        self.make_stages(instructions)?;
        let target = self.find_target()?;
        let wanted: Vec<usize> = if every { (0..self.stages.len()).collect() } else { vec![target] };
        self.link_stages()?;
        let needed = self.resolve_stages(&wanted, resolver).await?;
        for at in 0..self.stages.len() {
            if needed.contains(&at) && !self.stages[at].dispatched {
                self.run_stage(at)?;
            }
        }
        self.lint.finish()?;
        Ok((target, needed))
    }

    /// Variables that exist without being declared.
    fn predefine(&mut self, instructions: &[Instruction]) {
        let last = instructions.iter().rev().find_map(|i| match &i.kind {
            Kind::From(from) => Some(from.name.as_str()),
            _ => None,
        });
        let stage = match (self.input.options.target.as_str(), last) {
            ("", Some("") | None) => "default",
            ("", Some(last)) => last,
            (target, _) => target,
        };
        let (build, target) = (&self.input.build_platform, &self.target_platform);
        for (name, value) in [
            ("BUILDPLATFORM", platform::format(build).as_str()),
            ("BUILDOS", &build.os),
            ("BUILDOSVERSION", &build.os_version),
            ("BUILDARCH", &build.architecture),
            ("BUILDVARIANT", &build.variant),
            ("TARGETPLATFORM", &platform::format_all(target)),
            ("TARGETOS", &target.os),
            ("TARGETOSVERSION", &target.os_version),
            ("TARGETARCH", &target.architecture),
            ("TARGETVARIANT", &target.variant),
            ("TARGETSTAGE", stage),
        ] {
            let value = self.build_args.get(name).map_or(value, String::as_str);
            self.global_args.set(name, value);
        }
    }

    /// The ARGs before the first FROM.
    fn declare_globals(&mut self, instructions: &[Instruction]) -> Result<()> {
        let env = std::mem::take(&mut self.global_args);
        let (env, declared) = global_args(env, instructions, self.escape, &self.build_args)?;
        (self.global_args, self.declared_args) = (env, declared);
        Ok(())
    }

    fn resolve_epoch(&mut self) -> Result<()> {
        const NAME: &str = "SOURCE_DATE_EPOCH";
        let value = self.build_args.get(NAME).map(String::as_str).or_else(|| self.global_args.get(NAME));
        match value {
            None | Some("") => Ok(()),
            Some(text) => match text.parse::<i64>() {
                Ok(seconds) if jiff::Timestamp::from_second(seconds).is_ok() => {
                    self.epoch = Some(seconds);
                    Ok(())
                }
                _ => Err(Fault::new(format!("unsupported: {NAME}={text} (only a number of seconds is)"))),
            },
        }
    }

    /// The time of history entries and created directories, if it is fixed.
    pub(crate) fn epoch_text(&self) -> Option<String> {
        let epoch = jiff::Timestamp::from_second(self.epoch?).ok()?;
        Some(epoch.to_string())
    }

    fn result(&mut self, target: usize, needed: &BTreeSet<usize>) -> Result<CompiledTarget> {
        let ignores_cache = needed.iter().any(|&at| self.stages[at].ignore_cache);
        let stage = &self.stages[target];
        let mut image: Image = stage.image.clone();
        let labels = self.input.options.labels.iter().map(|(k, v)| (k.clone(), v.clone()));
        image.config.labels.extend(labels);
        let wanted = &self.target_platform;
        if !self.implicit_target {
            let same = wanted.os == image.os && wanted.architecture == image.architecture;
            image.os.clone_from(&wanted.os);
            image.architecture.clone_from(&wanted.architecture);
            if !wanted.variant.is_empty() || !same {
                image.variant.clone_from(&wanted.variant);
            }
            if !wanted.os_version.is_empty() || !same {
                image.os_version.clone_from(&wanted.os_version);
            }
            if !wanted.os_features.is_empty() {
                image.os_features.clone_from(&wanted.os_features);
            }
        }
        let normal = platform::normalized(&image.platform());
        (image.os, image.architecture, image.variant) =
            (normal.os.clone(), normal.architecture.clone(), normal.variant.clone());
        if image.rootfs.kind.is_empty() {
            image.rootfs.kind = "layers".into();
        }
        let info = pb::SourceInfo {
            filename: self.input.filename.to_string(),
            data: self.input.dockerfile.to_vec(),
            definition: self.input.dockerfile_definition.clone(),
            language: "Dockerfile".into(),
        };
        let image_config = serde_json::to_vec(&image)
            .map_err(|e| Fault::new(format!("failed to write image config: {e}")))?;
        Ok(CompiledTarget {
            platform: if self.implicit_target { normal } else { wanted.clone() },
            definition: stage.fs.output.map(|out| self.graph.definition(out, info)),
            image_config,
            base_config: stage.base_config.clone(),
            epoch: self.epoch,
            ignores_cache,
        })
    }

    fn lint_names(&mut self, instructions: &[Instruction]) {
        let lower = |s: &str| s == s.to_lowercase();
        let upper = |s: &str| s == s.to_uppercase();
        let lowercase = instructions.iter().filter(|i| lower(&i.keyword)).count();
        let uppercase = instructions.iter().filter(|i| upper(&i.keyword)).count();
        let majority_lower = lowercase > uppercase;
        let mut names = BTreeSet::new();
        for i in instructions {
            let odd = if majority_lower { !lower(&i.keyword) } else { !upper(&i.keyword) };
            if odd {
                let wanted = if majority_lower { "lowercase" } else { "uppercase" };
                let message = format!(
                    "Command '{}' should match the case of the command majority ({wanted})",
                    i.keyword
                );
                self.lint.warn(lint::CONSISTENT_CASING, i.lines, message);
            }
            match &i.kind {
                Kind::Maintainer(_) => {
                    let message = "Maintainer instruction is deprecated in favor of using label";
                    self.lint.warn(lint::MAINTAINER, i.lines, message);
                }
                Kind::From(from) if !from.name.is_empty() => {
                    if !lower(&from.written_name) {
                        let message = format!("Stage name '{}' should be lowercase", from.written_name);
                        self.lint.warn(lint::STAGE_NAME_CASING, i.lines, message);
                    }
                    let consistent = (lower(&i.keyword) && lower(&from.keyword_as))
                        || (upper(&i.keyword) && upper(&from.keyword_as))
                        || (!lower(&i.keyword) && !upper(&i.keyword));
                    if !consistent {
                        let message = format!(
                            "'{}' and '{}' keywords' casing do not match",
                            from.keyword_as, i.keyword
                        );
                        self.lint.warn(lint::FROM_AS_CASING, i.lines, message);
                    }
                    let quoted = gofmt::quote(&from.name);
                    if matches!(from.name.as_str(), "scratch" | "context") {
                        let message =
                            format!("Stage name should not use the same name as reserved stage {quoted}");
                        self.lint.warn(lint::RESERVED_STAGE, i.lines, message);
                    }
                    if !names.insert(&from.name) {
                        let message = format!("Duplicate stage name {quoted}, stage names should be unique");
                        self.lint.warn(lint::DUPLICATE_STAGE, i.lines, message);
                    }
                    self.lint_description("FROM", &[from.name.as_str()], i);
                }
                Kind::Arg(args) => {
                    let keys: Vec<&str> = args.iter().map(|a| a.key.as_str()).collect();
                    self.lint_description("ARG", &keys, i);
                }
                _ => {}
            }
        }
    }

    fn lint_description(&mut self, keyword: &str, names: &[&str], i: &Instruction) {
        let Some(comment) = i.comments.last() else { return };
        if names.contains(&comment.split(' ').next().unwrap_or_default()) {
            return;
        }
        let example = if let [only] = names { only } else { "<arg_key>" };
        let message = format!("Comment for {keyword} should follow the format: `# {example} <description>`");
        self.lint.warn(lint::DEFINITION_DESCRIPTION, i.lines, message);
    }

    /// Warns of bases that are no names unless build arguments are given.
    fn lint_default_args(&mut self, instructions: &[Instruction]) {
        let Ok((env, _)) = global_args(self.global_args.clone(), instructions, self.escape, &BTreeMap::new())
        else {
            return;
        };
        for i in instructions {
            let Kind::From(from) = &i.kind else { continue };
            let Ok(base) = Lexer::new(self.escape).expand(&from.base, &env) else { return };
            if Reference::parse(&base.text).is_err() {
                let message = format!(
                    "Default value for ARG {} results in empty or invalid base image name",
                    from.base
                );
                self.lint.warn(lint::INVALID_DEFAULT_ARG, i.lines, message);
            }
        }
    }
}

/// `env` with the ARGs before the first FROM, and their names.
fn global_args(
    mut env: EnvList,
    instructions: &[Instruction],
    escape: char,
    given: &BTreeMap<String, String>,
) -> Result<(EnvList, BTreeSet<String>)> {
    let mut declared = BTreeSet::new();
    for instruction in instructions {
        let Kind::Arg(args) = &instruction.kind else { break };
        for arg in args {
            declared.insert(arg.key.clone());
            let value = match (given.get(&arg.key), &arg.value) {
                (Some(value), _) => value.clone(),
                (None, Some(default)) => {
                    let expanded = Lexer::new(escape).expand(default, &env);
                    expanded.map_err(|e| locate(Fault::new(e), instruction))?.text
                }
                (None, None) => continue,
            };
            env.set(&arg.key, &value);
        }
    }
    Ok((env, declared))
}
