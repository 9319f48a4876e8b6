//! COPY and ADD: a file operation with one action for each source.

use std::collections::BTreeMap;

use kiln_proto::{llb, pattern, pb};

use crate::compile::Compiler;
use crate::dispatch::{absolute, owner};
use crate::error::{Fault, Result};
use crate::expand::Lexer;
use crate::giturl::GitUrl;
use crate::gofmt;
use crate::graph::{Meta, Out, input_index};
use crate::instruction::{Copy, Instruction};
use crate::lint;
use crate::stage::{Command, Stage};

/// How a copy sets permission bits.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Mode {
    Keep,
    Bits(i32),
    Symbolic(String),
}

/// One source of a copy: where it comes from, and what is particular about it.
struct Source {
    from: Option<Out>,
    action: pb::FileActionCopy,
}

impl Compiler<'_> {
    pub(crate) fn copy(
        &mut self,
        stage: &mut Stage,
        command: &Command,
        copy: &Copy,
        add: bool,
    ) -> Result<()> {
        let i = &command.instruction;
        let copy = self.expand_copy(stage, i, copy)?;
        let tree = match command.sources.first() {
            None => self.context,
            Some(&source) if self.stages[source].dispatched => self.stages[source].fs.output,
            Some(_) => {
                let message = format!(
                    "cannot copy from stage {}, it needs to be defined before current stage {}",
                    gofmt::quote(&copy.from),
                    gofmt::quote(&stage.display)
                );
                return Err(message.into());
            }
        };
        let local = command.sources.is_empty();
        let mode = parse_mode(&copy.chmod)?;
        check_checksum(&copy, add)?;
        let dest = destination(&stage.fs.cwd, &copy.dest);
        let name = self.command_name(stage, command, Lexer::new(self.escape), &i.text);

        let mut sources = Vec::new();
        for source in &copy.sources {
            let made = if let Some(git) = GitUrl::parse(source).map_err(Fault::new)? {
                if !add {
                    return Err("source can't be a git ref for COPY".into());
                }
                self.git_source(&git, &copy, &name, i)?
            } else if is_http(source) {
                if !add {
                    return Err("source can't be a URL for COPY".into());
                }
                self.http_source(source, &copy, &name, i)?
            } else {
                if local {
                    self.lint_ignored(source, add, i);
                }
                self.reads(tree, absolute("/", source));
                Source { from: tree, action: path_action(source, &copy, add) }
            };
            sources.push(made);
        }
        for file in &copy.files {
            let mut data = file.body();
            if file.expand {
                let lexer = Lexer { ignore_quotes: true, ..Lexer::new('\\') };
                data = self.expand_with(lexer, stage, i, &data)?;
            }
            let from = self.inline_file(&file.name, data.into_bytes(), 0o644);
            let action = pb::FileActionCopy {
                src: absolute("/", &file.name),
                create_dest_path: true,
                ..Default::default()
            };
            sources.push(Source { from: Some(from), action });
        }
        let created_by = history(&copy, add);
        let meta = Meta {
            command: None,
            ignore_cache: stage.ignore_cache,
            lines: Some(i.lines),
            ..Meta::named(name.clone(), &[llb::caps::FILE_BASE])
        };
        let base = stage.fs.output;
        let onto = if copy.link && mode == Mode::Keep { None } else { base };
        if copy.link && onto.is_none() && base.is_some() {
            let title = name
                .split_once("] ")
                .map_or_else(|| format!("LINK {name}"), |(number, text)| format!("{number}] LINK {text}"));
            let group =
                |weak| pb::ProgressGroup { id: llb::digest(name.as_bytes()), name: name.clone(), weak };
            let layer_meta = Meta { group: Some(group(true)), ..meta.clone() };
            let layer = self.file_op(None, sources, &dest, &mode, &copy, layer_meta);
            let inputs: Vec<Out> = base.into_iter().chain([layer]).collect();
            let merge = pb::MergeOp {
                inputs: (0..inputs.len() as i64).map(|input| pb::MergeInput { input }).collect(),
            };
            let meta =
                Meta { name: title, group: Some(group(false)), caps: vec![llb::caps::MERGE_OP], ..meta };
            stage.fs.output = Some(self.graph.add(pb::op::Op::Merge(merge), None, inputs, meta));
        } else {
            stage.fs.output = Some(self.file_op(onto, sources, &dest, &mode, &copy, meta));
        }
        self.record(stage, created_by, true);
        Ok(())
    }

    fn expand_copy(&mut self, stage: &Stage, i: &Instruction, copy: &Copy) -> Result<Copy> {
        let mut out = copy.clone();
        for text in [&mut out.chown, &mut out.chmod, &mut out.checksum, &mut out.dest]
            .into_iter()
            .chain(&mut out.sources)
        {
            *text = self.expand(stage, i, text)?;
        }
        Ok(out)
    }

    fn file_op(
        &mut self,
        base: Option<Out>,
        sources: Vec<Source>,
        dest: &str,
        mode: &Mode,
        copy: &Copy,
        mut meta: Meta,
    ) -> Out {
        let mut inputs = Vec::new();
        let base = input_index(&mut inputs, base);
        let indexed: Vec<(i64, pb::FileActionCopy)> =
            sources.into_iter().map(|s| (input_index(&mut inputs, s.from), s.action)).collect();
        let count = inputs.len() as i64;
        let last = indexed.len().saturating_sub(1);
        if !copy.exclude.is_empty() || copy.parents {
            meta.caps.push(llb::caps::FILE_COPY_INCLUDE_EXCLUDE_PATTERNS);
        }
        if indexed.iter().any(|(_, a)| !a.required_paths.is_empty()) {
            meta.caps.push(llb::caps::FILE_COPY_REQUIRED_PATHS);
        }
        if matches!(mode, Mode::Symbolic(_)) {
            meta.caps.push(llb::caps::FILE_COPY_MODE_STRING);
        }
        let actions = indexed.into_iter().enumerate().map(|(n, (source, mut action))| {
            action.dest = dest.to_string();
            action.owner = owner(&copy.chown, base);
            action.exclude_patterns.clone_from(&copy.exclude);
            action.timestamp = -1;
            match mode {
                Mode::Keep => action.mode = -1,
                Mode::Bits(bits) => action.mode = *bits,
                Mode::Symbolic(text) => action.mode_str.clone_from(text),
            }
            pb::FileAction {
                // Each action works on what the one before it made.
                input: if n == 0 { base } else { count + n as i64 - 1 },
                secondary_input: source,
                output: if n == last { 0 } else { llb::EMPTY },
                action: Some(pb::file_action::Action::Copy(action.into())),
            }
        });
        let op = pb::op::Op::File(pb::FileOp { actions: actions.collect() });
        self.graph.add(op, None, inputs, meta)
    }

    fn http_source(&mut self, url: &str, copy: &Copy, name: &str, i: &Instruction) -> Result<Source> {
        let path = url::Url::parse(url).map(|u| u.path().to_string()).unwrap_or_default();
        let file = match path.trim_end_matches('/').rsplit('/').next() {
            None | Some("") => "__unnamed__".to_string(),
            Some(last) => last.to_string(),
        };
        let mut attrs = BTreeMap::from([("http.filename".to_string(), file.clone())]);
        let mut caps = vec![llb::caps::SOURCE_HTTP];
        if !copy.checksum.is_empty() {
            kiln_proto::reference::check_digest(&copy.checksum).map_err(|e| Fault::new(e.to_string()))?;
            attrs.insert("http.checksum".into(), copy.checksum.clone());
            caps.push(llb::caps::SOURCE_HTTP_CHECKSUM);
        }
        let op = pb::op::Op::Source(pb::SourceOp { identifier: url.to_string(), attrs });
        let command = format!("{{{} {} []}}", copy.dest, gofmt::slice(&copy.sources));
        let meta = Meta { command: Some(command), lines: Some(i.lines), ..Meta::named(name, &caps) };
        let from = self.graph.add(op, None, Vec::new(), meta);
        let action = pb::FileActionCopy {
            src: absolute("/", &file),
            create_dest_path: true,
            attempt_unpack_docker_compatibility: copy.unpack == Some(true),
            ..Default::default()
        };
        Ok(Source { from: Some(from), action })
    }

    fn git_source(&mut self, git: &GitUrl, copy: &Copy, name: &str, i: &Instruction) -> Result<Source> {
        if let (Some(flag), Some(query)) = (copy.keep_git_dir, git.keep_git_dir)
            && flag != query
        {
            return Err("inconsistent keep-git-dir configuration".into());
        }
        let checksum = match (copy.checksum.as_str(), git.checksum.as_str()) {
            (flag, query) if !flag.is_empty() && !query.is_empty() && flag != query => {
                return Err(Fault::new(format!(
                    "checksum mismatch {} != {}",
                    gofmt::quote(flag),
                    gofmt::quote(query)
                )));
            }
            ("", query) => query,
            (flag, _) => flag,
        };
        let mut git = git.clone();
        git.checksum = checksum.to_owned();
        git.keep_git_dir = git.keep_git_dir.or(copy.keep_git_dir);
        let (source, caps) = git.source();
        let op = pb::op::Op::Source(source);
        let from =
            self.graph.add(op, None, Vec::new(), Meta { lines: Some(i.lines), ..Meta::named(name, &caps) });
        let action = pb::FileActionCopy { src: "/".into(), create_dest_path: true, ..Default::default() };
        Ok(Source { from: Some(from), action })
    }

    fn lint_ignored(&mut self, source: &str, add: bool, i: &Instruction) {
        let Some(ignore) = self.ignore.as_ref().filter(|m| !m.has_exclusions()) else { return };
        let path = pattern::clean(source);
        let root = matches!(path.as_str(), "." | "/");
        if root && !ignore.patterns().any(|(p, negated)| !negated && matches!(p, "*" | "**" | "**/*")) {
            return;
        }
        if ignore.matches(path.trim_start_matches('/')) {
            let verb = if add { "Add" } else { "Copy" };
            let quoted = gofmt::quote(&path);
            let message = format!("Attempting to {verb} file {quoted} that is excluded by .dockerignore");
            self.lint.warn(lint::COPY_IGNORED, i.lines, message);
        }
    }
}

/// The copy of a path of the context or of a stage.
fn path_action(source: &str, copy: &Copy, add: bool) -> pb::FileActionCopy {
    let mut action = pb::FileActionCopy {
        follow_symlink: true,
        dir_copy_contents: true,
        attempt_unpack_docker_compatibility: copy.unpack.unwrap_or(add),
        create_dest_path: true,
        allow_wildcard: true,
        allow_empty_wildcard: true,
        ..Default::default()
    };
    let mut src = source;
    if copy.parents {
        // What stands before `/./` is where the kept part of the path begins.
        let kept = match source.split_once("/./") {
            Some((pivot, kept)) => {
                src = pivot;
                kept
            }
            None => {
                src = "/";
                source
            }
        };
        let kept = absolute("/", kept);
        if !pattern::has_wildcard(src) && !pattern::has_wildcard(&kept) {
            action.required_paths = vec![absolute("/", &format!("{src}/{kept}"))];
        }
        action.include_patterns = vec![kept.trim_start_matches('/').to_string()];
    }
    action.src = absolute("/", src);
    action
}

/// The destination as an absolute path; a trailing slash or `/.` still tells that it is a directory.
fn destination(cwd: &str, dest: &str) -> String {
    let dest = if matches!(dest, "" | ".") { "./" } else { dest };
    let mut out = absolute(cwd, dest);
    if dest.ends_with('/') && !out.ends_with('/') {
        out.push('/');
    } else if dest.ends_with("/.") {
        if out != "/" {
            out.push('/');
        }
        out.push('.');
    }
    out
}

fn is_http(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

fn check_checksum(copy: &Copy, add: bool) -> Result<()> {
    if copy.checksum.is_empty() {
        return Ok(());
    }
    if !add {
        return Err("checksum can't be specified for COPY".into());
    }
    match copy.sources.as_slice() {
        [only] if is_http(only) || matches!(GitUrl::parse(only), Ok(Some(_))) => Ok(()),
        [_] => Err("checksum requires HTTP(S) or Git sources".into()),
        _ => Err("checksum can't be specified for multiple sources".into()),
    }
}

fn parse_mode(text: &str) -> Result<Mode> {
    if text.is_empty() {
        return Ok(Mode::Keep);
    }
    let invalid = || {
        Fault::new(format!(
            "invalid chmod parameter: '{text}'. it should be octal string and between 0 and 07777"
        ))
    };
    if let Ok(bits) = i32::from_str_radix(text, 8) {
        return if (0..=0o7777).contains(&bits) { Ok(Mode::Bits(bits)) } else { Err(invalid()) };
    }
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(invalid());
    }
    for clause in text.split(',') {
        let actions = clause.trim_start_matches(['u', 'g', 'o', 'a']);
        let known = |c: char| "+-=rwxXstugo".contains(c);
        if !actions.starts_with(['+', '-', '=']) || !actions.chars().all(known) {
            return Err(invalid());
        }
    }
    Ok(Mode::Symbolic(text.to_string()))
}

fn history(copy: &Copy, add: bool) -> String {
    let mut out = String::from(if add { "ADD" } else { "COPY" });
    if copy.parents {
        out.push_str(" --parents");
    }
    for (flag, value) in [("chown", &copy.chown), ("chmod", &copy.chmod)] {
        if !value.is_empty() {
            out.push_str(&format!(" --{flag}={value}"));
        }
    }
    for source in &copy.sources {
        out.push_str(&format!(" {source}"));
    }
    for file in &copy.files {
        out.push_str(&format!(" <<{}", file.name));
    }
    out.push_str(&format!(" {} # buildkit", copy.dest));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        for (cwd, dest, want) in [
            ("/w", "x", "/w/x"),
            ("/w", ".", "/w/"),
            ("/w", "./", "/w/"),
            ("/w", "x/", "/w/x/"),
            ("/w", "../y", "/y"),
            ("", "x", "/x"),
            ("/", ".", "/"),
            ("/w", "/a//b/../c/", "/a/c/"),
            ("/w", "/a/.", "/a/."),
            ("/w", "/.", "/."),
        ] {
            assert_eq!(destination(cwd, dest), want, "{cwd} {dest}");
        }
    }

    #[test]
    fn modes() {
        let mode = |text| parse_mode(text).map_err(|f| f.message);
        assert_eq!(mode("0755"), Ok(Mode::Bits(0o755)));
        assert_eq!(mode("u=rwX,go-w"), Ok(Mode::Symbolic("u=rwX,go-w".into())));
        for bad in ["99", "10000", "abc", "u", "u+q"] {
            let want = format!(
                "invalid chmod parameter: '{bad}'. it should be octal string and between 0 and 07777"
            );
            assert_eq!(mode(bad), Err(want));
        }
    }
}
