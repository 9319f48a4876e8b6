//! What an instruction can say: its arguments as types, variables not yet expanded.

use kiln_proto::pb;

use crate::error::{Lines, Pos};
use crate::source::Heredoc;

/// An instruction and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Instruction {
    pub(crate) kind: Kind,
    /// The keyword as written.
    pub(crate) keyword: String,
    /// The whole text.
    pub(crate) text: String,
    pub(crate) lines: Lines,
    pub(crate) start: Pos,
    pub(crate) comments: Vec<String>,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Add(Copy),
    Arg(Vec<ArgDef>),
    Cmd(CommandLine),
    Copy(Copy),
    Entrypoint(CommandLine),
    Env(Vec<KeyValue>),
    Expose(Vec<String>),
    From(From),
    Healthcheck(Health),
    Label(Vec<KeyValue>),
    Maintainer(String),
    Onbuild(String),
    Run(Run),
    Shell(Vec<String>),
    StopSignal(String),
    User(String),
    Volume(Vec<String>),
    Workdir(String),
}

#[derive(Debug, Clone)]
pub(crate) struct From {
    pub(crate) base: String,
    /// Lower-case; empty without `AS`.
    pub(crate) name: String,
    /// As written.
    pub(crate) written_name: String,
    /// `as` as written.
    pub(crate) keyword_as: String,
    pub(crate) platform: String,
}

#[derive(Debug, Clone)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: String,
    /// `KEY value` without an equals sign.
    pub(crate) legacy: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct ArgDef {
    pub(crate) key: String,
    pub(crate) value: Option<String>,
}

/// A command in exec (JSON) or shell form.
#[derive(Debug, Clone)]
pub(crate) struct CommandLine {
    /// In shell form: one text, or nothing.
    pub(crate) args: Vec<String>,
    pub(crate) shell: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) command: CommandLine,
    pub(crate) files: Vec<Heredoc>,
    /// `--mount` values, and for each the stage or image it reads from.
    pub(crate) mounts: Vec<(String, String)>,
    pub(crate) network: Option<pb::NetMode>,
    pub(crate) security: pb::SecurityMode,
    pub(crate) devices: Vec<pb::CdiDevice>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Copy {
    pub(crate) sources: Vec<String>,
    pub(crate) files: Vec<Heredoc>,
    pub(crate) dest: String,
    pub(crate) from: String,
    pub(crate) chown: String,
    pub(crate) chmod: String,
    pub(crate) link: bool,
    pub(crate) parents: bool,
    pub(crate) exclude: Vec<String>,
    pub(crate) keep_git_dir: Option<bool>,
    pub(crate) checksum: String,
    pub(crate) unpack: Option<bool>,
}

/// Times in nanoseconds, 0 to inherit.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    pub(crate) test: Vec<String>,
    pub(crate) interval: i64,
    pub(crate) timeout: i64,
    pub(crate) start_period: i64,
    pub(crate) start_interval: i64,
    pub(crate) retries: i64,
}
