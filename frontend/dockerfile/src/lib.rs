//! The Dockerfile compiler: text in, LLB out. Pure: configurations of base images come through
//! [`ImageResolver`], and nothing here reads files or the network.

mod base;
mod compile;
mod context;
mod copy;
mod dispatch;
mod error;
mod expand;
mod expose;
mod flags;
mod giturl;
mod gofmt;
mod graph;
mod image;
mod instruction;
mod lint;
mod mount;
mod options;
mod outline;
mod parse;
mod run;
mod source;
mod stage;
mod step;
mod suggest;

use futures::future::BoxFuture;
use kiln_proto::pb;

pub use compile::{compile, lint, targets};
pub use error::{CompileError, ResolveError};
pub use giturl::{git_context, git_remote};
pub use gofmt::{csv_fields, parse_bool};
pub use lint::LintWarning;
pub use options::{Options, OptionsError, ResolveMode};
pub use outline::outline;

/// Resolves names of images and named contexts to what they stand for.
pub trait ImageResolver: Send + Sync {
    /// The digest and configuration of the image `reference` (normalised, with a tag or digest) for
    /// `platform`. `log_name` is the progress vertex's name,
    /// e.g. `[internal] load metadata for docker.io/library/alpine:latest`. The error's text is
    /// shown after the name in the Dockerfile.
    fn resolve<'a>(
        &'a self,
        reference: &'a str,
        platform: &'a pb::Platform,
        mode: ResolveMode,
        log_name: &'a str,
    ) -> BoxFuture<'a, Result<ResolvedImage, ResolveError>>;

    /// What `value` stands for in [`Options::named_contexts`] for `platform`, where it is the value of `key`; never an
    /// image of a registry.
    fn context<'a>(
        &'a self,
        key: &'a str,
        value: &'a str,
        platform: &'a pb::Platform,
    ) -> BoxFuture<'a, Result<NamedContext, ResolveError>>;
}

/// An image as a resolver found it.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the manifest or index that the name stands for; empty if it has none.
    pub digest: String,
    /// The image configuration, JSON.
    pub config: Vec<u8>,
    /// The reference to use from now on (a policy may have changed it); usually the one asked for.
    pub reference: String,
}

/// Where COPY and ADD read from.
#[derive(Debug, Clone)]
pub enum ContextSource {
    /// A directory of the client.
    Local {
        /// The session's name for it, usually `context`.
        name: String,
        /// Id of the session that serves it.
        session: String,
        /// Part of the key of incremental transfers, usually the name.
        shared_key_hint: String,
    },
    /// The result of a definition (git, an unpacked archive, another build); an empty one is an empty directory.
    Definition(pb::Definition),
}

/// A named context that is no image of a registry.
#[derive(Debug, Clone)]
pub struct NamedContext {
    /// Its files.
    pub source: ContextSource,
    /// Patterns of its own `.dockerignore`.
    pub ignore_patterns: Option<Vec<String>>,
    /// The image configuration that goes with the files, JSON.
    pub config: Option<Vec<u8>>,
}

/// What is compiled.
#[derive(Debug, Clone)]
pub struct CompileInput<'a> {
    /// The file's bytes.
    pub dockerfile: &'a [u8],
    /// Its name, for messages and the source map.
    pub filename: &'a str,
    /// What the client asked for.
    pub options: &'a Options,
    /// Patterns of the context's `.dockerignore`, as [`kiln_proto::pattern::parse_ignore_file`] gives them.
    pub ignore_patterns: Option<Vec<String>>,
    /// The build context.
    pub context: ContextSource,
    /// The platform that steps run on where the file says nothing else, usually [`kiln_proto::platform::host`].
    pub build_platform: pb::Platform,
    /// The definition that the file was read with, for the source map.
    pub dockerfile_definition: Option<pb::Definition>,
}

/// A compiled Dockerfile.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// One for each platform, in the order of [`Options::platforms`].
    pub targets: Vec<CompiledTarget>,
    /// Findings for the first platform.
    pub warnings: Vec<LintWarning>,
}

/// The result for one platform.
#[derive(Debug, Clone)]
pub struct CompiledTarget {
    /// What the image is for.
    pub platform: pb::Platform,
    /// The file system; `None` for an empty one.
    pub definition: Option<pb::Definition>,
    /// The image configuration, JSON. Its `rootfs` still holds what the base image had, and
    /// `created` is missing: the exporter knows them.
    pub image_config: Vec<u8>,
    /// The base image's configuration as it was, if there is one.
    pub base_config: Option<Vec<u8>>,
    /// `SOURCE_DATE_EPOCH` in effect, seconds.
    pub epoch: Option<i64>,
    /// Some step of this result must not be taken from the cache.
    pub ignores_cache: bool,
}

/// Which frontend a file asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntaxDirective {
    /// The frontend's image; arguments may follow.
    pub value: String,
    /// Where the file says so.
    pub ranges: Vec<pb::Range>,
}

/// The file's `# syntax=` directive, if any.
pub fn syntax_directive(dockerfile: &[u8]) -> Option<SyntaxDirective> {
    let (value, line) = source::syntax(dockerfile)?;
    Some(SyntaxDirective { value, ranges: error::Lines { start: line, end: line }.ranges() })
}

/// What the checks find in a Dockerfile.
#[derive(Debug)]
pub struct LintReport {
    /// The findings.
    pub warnings: Vec<LintWarning>,
    /// Why the file does not compile, if it does not.
    pub error: Option<CompileError>,
}

/// What can be given to a target.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outline {
    /// The target's name; empty if it has none.
    pub name: String,
    /// The comment before its FROM that begins with its name, without that.
    pub description: String,
    /// Build arguments.
    pub args: Vec<OutlineArg>,
    /// Secrets.
    pub secrets: Vec<OutlineNeed>,
    /// Agents.
    pub ssh: Vec<OutlineNeed>,
}

/// A build argument that a target uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineArg {
    /// Its name.
    pub name: String,
    /// Its value in this build; empty if it has none.
    pub value: String,
    /// The comment before its ARG that begins with its name, without that.
    pub description: String,
    /// First and last line of its ARG, from 1.
    pub lines: (u32, u32),
}

/// A secret or an ssh agent that a target uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutlineNeed {
    /// Its id.
    pub name: String,
    /// The build fails without it.
    pub required: bool,
    /// First and last line of the instruction, from 1.
    pub lines: (u32, u32),
}

/// A stage that can be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetInfo {
    /// Its name; empty if it has none.
    pub name: String,
    /// The comment before it that begins with its name, without that.
    pub description: String,
    /// What it starts from, as written.
    pub base: String,
    /// Its platform, as written.
    pub platform: String,
    /// First and last line of its FROM, from 1.
    pub lines: (u32, u32),
}
