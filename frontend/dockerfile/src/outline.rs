//! What a target can be given: the build arguments, secrets and ssh agents that it and the stages below it use.

use std::collections::{BTreeMap, BTreeSet};

use crate::compile::{Compiler, read};
use crate::error::{Lines, Result};
use crate::expand::{Env as _, Lexer};
use crate::instruction::{ArgDef, Instruction, Kind};
use crate::{CompileError, CompileInput, ImageResolver, Outline, OutlineArg, OutlineNeed};

/// A declared argument.
#[derive(Debug, Clone)]
struct Declared {
    arg: OutlineArg,
    /// The arguments that its default names.
    reads: BTreeSet<String>,
}

/// What one stage uses.
#[derive(Debug, Clone, Default)]
pub(crate) struct Uses {
    declared: BTreeMap<String, Declared>,
    /// Names of arguments, also of those that are declared before the first FROM.
    args: BTreeSet<String>,
    secrets: BTreeMap<String, OutlineNeed>,
    ssh: BTreeMap<String, OutlineNeed>,
}

impl Uses {
    /// Arguments that the FROM names.
    pub(crate) fn read(&mut self, names: impl IntoIterator<Item = String>) {
        self.args.extend(names);
    }

    /// An ARG of the stage. Without a value of its own it stands for that of the file.
    pub(crate) fn arg(&mut self, i: &Instruction, arg: &ArgDef, value: Option<&str>, of_file: bool) {
        self.args.insert(arg.key.clone());
        if !of_file {
            let arg = declaration(i, &arg.key, value);
            self.declared.insert(arg.name.clone(), Declared { arg, reads: BTreeSet::new() });
        }
    }

    /// A secret; the first mount of it counts.
    pub(crate) fn secret(&mut self, id: &str, required: bool, lines: Lines) {
        need(&mut self.secrets, id, required, lines);
    }

    /// An ssh agent.
    pub(crate) fn ssh(&mut self, id: &str, required: bool, lines: Lines) {
        need(&mut self.ssh, if id.is_empty() { "default" } else { id }, required, lines);
    }
}

fn need(needs: &mut BTreeMap<String, OutlineNeed>, id: &str, required: bool, lines: Lines) {
    let need = || OutlineNeed { name: id.to_owned(), required, lines: (lines.start, lines.end) };
    needs.entry(id.to_owned()).or_insert_with(need);
}

fn declaration(i: &Instruction, name: &str, value: Option<&str>) -> OutlineArg {
    let description = i.comments.iter().find_map(|comment| comment.strip_prefix(name)?.strip_prefix(' '));
    OutlineArg {
        name: name.to_owned(),
        value: value.unwrap_or_default().to_owned(),
        description: description.unwrap_or_default().to_owned(),
        lines: (i.lines.start, i.lines.end),
    }
}

/// What can be given to the target that the options name, for the first platform that they name.
///
/// # Errors
/// The file does not compile.
pub async fn outline(
    input: CompileInput<'_>,
    resolver: &dyn ImageResolver,
) -> std::result::Result<Outline, CompileError> {
    outline_of(&input, resolver).await.map_err(|fault| fault.into_error(input.filename))
}

async fn outline_of(input: &CompileInput<'_>, resolver: &dyn ImageResolver) -> Result<Outline> {
    let (source, instructions) = read(input.dockerfile)?;
    let mut compiler = Compiler::new(input, &source, &instructions, input.options.platforms.first())?;
    let globals = compiler.file_args(&instructions)?;
    let (target, needed) = compiler.run_stages(&instructions, resolver, false).await?;
    let mut args: BTreeMap<String, OutlineArg> = BTreeMap::new();
    let mut out = Outline { name: compiler.stages[target].name.clone(), ..Outline::default() };
    // The target's own words count before those of what it is made of.
    for at in std::iter::once(target).chain(needed.into_iter().filter(|at| *at != target)) {
        let uses = &compiler.stages[at].uses;
        let known = |name: &String| uses.declared.get(name).or_else(|| globals.get(name));
        let mut open: Vec<String> = uses.args.iter().cloned().collect();
        let mut seen = BTreeSet::new();
        while let Some(name) = open.pop() {
            if let Some(declared) = known(&name).filter(|_| seen.insert(name.clone())) {
                open.extend(declared.reads.iter().cloned());
                args.entry(name).or_insert_with(|| declared.arg.clone());
            }
        }
        for (all, own) in [(&mut out.secrets, &uses.secrets), (&mut out.ssh, &uses.ssh)] {
            let new: Vec<_> =
                own.values().filter(|need| all.iter().all(|other| other.name != need.name)).collect();
            let new: Vec<OutlineNeed> = new.into_iter().cloned().collect();
            all.extend(new);
        }
    }
    out.args = args.into_values().collect();
    out.args.sort_by_key(|arg| arg.lines.0);
    out.secrets.sort_by_key(|need| need.lines.0);
    out.ssh.sort_by_key(|need| need.lines.0);
    out.description = instructions
        .iter()
        .filter_map(|i| match &i.kind {
            Kind::From(from) if from.name == out.name => Some(declaration(i, &from.name, None).description),
            _ => None,
        })
        .next()
        .filter(|_| !out.name.is_empty())
        .unwrap_or_default();
    Ok(out)
}

impl Compiler<'_> {
    /// The ARGs before the first FROM.
    fn file_args(&self, instructions: &[Instruction]) -> Result<BTreeMap<String, Declared>> {
        let mut all: BTreeMap<String, Declared> = BTreeMap::new();
        let declarations = instructions.iter().map_while(|i| match &i.kind {
            Kind::Arg(args) => Some((i, args)),
            _ => None,
        });
        for (i, args) in declarations {
            for ArgDef { key, value } in args {
                let mut reads = BTreeSet::new();
                if let Some(default) = value.as_ref().filter(|_| !self.build_args.contains_key(key)) {
                    reads = Lexer::new(self.escape).expand(default, &self.global_args)?.matched;
                    // One that adds to its former value reads what that read.
                    if reads.remove(key)
                        && let Some(former) = all.get(key)
                    {
                        reads.extend(former.reads.iter().cloned());
                    }
                }
                let arg = declaration(i, key, self.global_args.get(key));
                all.insert(key.clone(), Declared { arg, reads });
            }
        }
        Ok(all)
    }
}
