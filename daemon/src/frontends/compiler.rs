//! The Dockerfile compiler as the frontend uses it: its input from the request, images through the
//! build, its errors in the daemon's form.

use futures::future::BoxFuture;
use kiln_dockerfile::{
    CompileError, CompileInput, Compiled, ContextSource, ImageResolver, LintReport, LintWarning,
    NamedContext, Options, Outline, ResolveError, ResolveMode, ResolvedImage, SyntaxDirective, TargetInfo,
};
use kiln_proto::{pb, platform};
use tonic::Code;

use super::contexts::Contexts;
use crate::error::{BuildError, frontend_detail, source_detail};
use crate::gateway::image_source;

/// Frontend images whose language is the one that is built in, without tag.
const BUILTIN: &[&str] = &[
    "dockerfile.v0",
    "docker/dockerfile",
    "docker/dockerfile-upstream",
    "docker.io/docker/dockerfile",
    "docker.io/docker/dockerfile-upstream",
];

/// Whether a frontend image is the built-in frontend under another name. One that is named by its digest is nothing but
/// that image.
pub(super) fn is_builtin(source: &str) -> bool {
    let name = match source.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => name,
        _ => source,
    };
    BUILTIN.contains(&name)
}

/// What is compiled of a request.
pub(super) struct Job<'a> {
    /// The file, which was read with `file.definition`.
    pub(super) file: &'a pb::SourceInfo,
    pub(super) options: &'a Options,
    pub(super) contexts: Contexts<'a>,
    /// Of the build context.
    pub(super) ignore_patterns: Option<Vec<String>>,
    pub(super) context: ContextSource,
}

/// A frontend that is to be asked in place of this one.
pub(super) struct Other {
    /// Its image.
    pub(super) image: String,
    /// The image with its arguments.
    pub(super) command: String,
    /// Where the file names it, unless the request does.
    ranges: Option<Vec<pb::Range>>,
}

impl Other {
    /// What a file or its request names, unless it is this frontend.
    pub(super) fn of(options: &Options, file: &pb::SourceInfo) -> Option<Self> {
        let (command, ranges) = match options.build_args.get("BUILDKIT_SYNTAX") {
            Some(command) if !command.trim().is_empty() => (command.trim().to_owned(), None),
            _ => {
                let SyntaxDirective { value, ranges } = kiln_dockerfile::syntax_directive(&file.data)?;
                (value, Some(ranges))
            }
        };
        let image = command.split_whitespace().next().filter(|image| !is_builtin(image))?.to_owned();
        Some(Self { image, command, ranges })
    }

    /// Its error, with where it was named if it has no place of its own.
    pub(super) fn explain(&self, error: BuildError, file: &pb::SourceInfo) -> BuildError {
        match &self.ranges {
            _ if error.code == Code::Cancelled || error.is_located() => error,
            Some(ranges) => located(error, file, ranges),
            None => error.context(format_args!("failed with BUILDKIT_SYNTAX = {}", self.command)),
        }
    }
}

impl<'a> Job<'a> {
    fn input(&self) -> CompileInput<'a> {
        CompileInput {
            dockerfile: &self.file.data,
            filename: &self.file.filename,
            options: self.options,
            ignore_patterns: self.ignore_patterns.clone(),
            context: self.context.clone(),
            build_platform: platform::normalized(&platform::host()),
            dockerfile_definition: self.file.definition.clone(),
        }
    }

    /// Compiles the file. What the checks find goes to `warn`, whether it compiles or not.
    pub(super) async fn compile(&self, warn: impl Fn(&[LintWarning])) -> Result<Compiled, BuildError> {
        let compiled = kiln_dockerfile::compile(self.input(), &Resolver(self.contexts)).await;
        warn(compiled.as_ref().map_or_else(|error| &error.warnings, |compiled| &compiled.warnings));
        compiled.map_err(|error| explain(error, self.file))
    }

    /// What can be given to the target.
    pub(super) async fn outline(&self) -> Result<Outline, BuildError> {
        let outline = kiln_dockerfile::outline(self.input(), &Resolver(self.contexts)).await;
        outline.map_err(|error| explain(error, self.file))
    }

    /// Checks the file, without what follows from it.
    pub(super) async fn lint(&self) -> LintReport {
        kiln_dockerfile::lint(self.input(), &Resolver(self.contexts)).await
    }
}

/// The stages of a file.
pub(super) fn targets(file: &pb::SourceInfo) -> Result<Vec<TargetInfo>, BuildError> {
    kiln_dockerfile::targets(&file.data, &file.filename).map_err(|error| explain(error, file))
}

/// An error of the compiler, with the lines of the Dockerfile that it is about.
fn explain(error: CompileError, file: &pb::SourceInfo) -> BuildError {
    let CompileError { message, ranges, cause, .. } = error;
    let cause = cause.and_then(|cause| cause.downcast::<BuildError>().ok());
    let mut error = match cause {
        Some(cause) => BuildError { message, ..*cause },
        None => BuildError::build(message),
    };
    if error.code == Code::Cancelled {
        return error;
    }
    error = error.with(frontend_detail(super::DOCKERFILE, ""));
    located(error, file, &ranges)
}

/// Adds the lines that an error is about, if it is about any.
fn located(error: BuildError, file: &pb::SourceInfo, ranges: &[pb::Range]) -> BuildError {
    if ranges.is_empty() { error } else { error.with(source_detail(file, ranges)) }
}

/// Images and named contexts as the build finds them.
struct Resolver<'a>(Contexts<'a>);

impl ImageResolver for Resolver<'_> {
    fn resolve<'a>(
        &'a self,
        reference: &'a str,
        platform: &'a pb::Platform,
        mode: ResolveMode,
        log_name: &'a str,
    ) -> BoxFuture<'a, Result<ResolvedImage, ResolveError>> {
        Box::pin(async move {
            match self
                .0
                .bridge
                .resolve_image(image_source(reference), platform, mode.as_str(), log_name, &[])
                .await
            {
                Ok((reference, image)) => {
                    Ok(ResolvedImage { digest: image.digest, config: image.config, reference })
                }
                Err(error) => Err(error
                    .context(format_args!("failed to resolve source metadata for {reference}"))
                    .into()),
            }
        })
    }

    fn context<'a>(
        &'a self,
        key: &'a str,
        value: &'a str,
        platform: &'a pb::Platform,
    ) -> BoxFuture<'a, Result<NamedContext, ResolveError>> {
        Box::pin(async move { self.0.named(key, value, platform).await.map_err(Into::into) })
    }
}

#[cfg(test)]
mod tests {
    use super::is_builtin;

    #[test]
    fn builtin_frontends() {
        for name in ["dockerfile.v0", "docker/dockerfile:1", "docker.io/docker/dockerfile:1.7-labs"] {
            assert!(is_builtin(name), "{name}");
        }
        for name in [
            "tonistiigi/dockerfile:1",
            "localhost:5000/docker/dockerfile",
            "docker/dockerfile-x",
            "docker/dockerfile:1@sha256:00",
        ] {
            assert!(!is_builtin(name), "{name}");
        }
    }
}
