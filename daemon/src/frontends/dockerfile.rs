//! `dockerfile.v0`: fetches the Dockerfile and its ignore file from the client, has them compiled,
//! and hands what comes out to the build. The language itself is in `kiln-dockerfile`, which
//! `compiler` calls.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_dockerfile::{Compiled, ContextSource, LintWarning, Options};
use kiln_proto::{pattern, pb, platform};
use kiln_solver::progress::{Event, ProgressSink, VertexWarning};
use serde_json::json;
use tonic::Code;

use super::compiler;
use super::contexts::{Contexts, Fetched, is_missing, optional};
use super::remote::{self, Remote};
use super::subrequests::{self, Subrequest};
use crate::engine::files;
use crate::error::BuildError;
use crate::gateway::{Bridge, BuildResult, FrontendRequest, Refs};

/// Local directory that holds the Dockerfile, unless `dockerfilekey` says otherwise.
const DOCKERFILE_LOCAL: &str = "dockerfile";
/// Local directory that is the build context, unless `contextkey` says otherwise.
const CONTEXT_LOCAL: &str = "context";
/// How a file named the frontend; set for those that were.
const COMMAND: &str = "cmdline";

/// Runs the frontend.
pub(super) async fn run(bridge: &Arc<Bridge>, request: &FrontendRequest) -> Result<BuildResult, BuildError> {
    let subrequest = request.opts.get("requestid").filter(|id| !id.is_empty());
    let subrequest = subrequest.map(|id| Subrequest::parse(id)).transpose()?;
    if subrequest == Some(Subrequest::Describe) {
        return Ok(subrequests::describe());
    }
    let read = Mutex::default();
    let mut result = compiled(Contexts { bridge, request, read: &read }, subrequest).await?;
    result.read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(result)
}

async fn compiled(contexts: Contexts<'_>, subrequest: Option<Subrequest>) -> Result<BuildResult, BuildError> {
    let Contexts { bridge, request, .. } = contexts;
    let context_key = request.opts.get("contextkey").map_or(CONTEXT_LOCAL, String::as_str);
    let options = Options::from_attrs(&request.opts)
        .map_err(|error| BuildError::new(Code::InvalidArgument, error.to_string()))?;
    let subdir = request.opts.get("contextsubdir").map_or("", String::as_str);
    let remote = match request.opts.get(context_key) {
        Some(url) => Some(remote::fetch(contexts, url, subdir).await?),
        None => None,
    };
    let mut file = dockerfile(contexts, remote.as_ref()).await?;
    if !request.opts.contains_key(COMMAND)
        && let Some(other) = compiler::Other::of(&options, &file.info)
    {
        return forward(contexts, &other).await.map_err(|error| other.explain(error, &file.info));
    }
    if subrequest == Some(Subrequest::Targets) {
        return Ok(subrequests::targets(&file.info, &compiler::targets(&file.info)?));
    }
    let given = remote.as_ref().map(|remote| &remote.definition).or(request.inputs.get(context_key));
    if remote.is_none() && given.is_some() && !subdir.is_empty() {
        return Err(BuildError::unsupported("contextsubdir of a definition"));
    }
    let ignore = match (file.ignore.take(), given) {
        (Some(own), _) => Some(own),
        (None, Some(_)) => None,
        (None, None) => contexts.ignore_file(context_key, context_key, "[internal]").await?,
    };
    let context = match given {
        Some(definition) => ContextSource::Definition(definition.clone()),
        None => ContextSource::Local {
            name: context_key.to_owned(),
            session: contexts.session(context_key),
            shared_key_hint: context_key.to_owned(),
        },
    };
    let job = compiler::Job {
        file: &file.info,
        options: &options,
        contexts,
        ignore_patterns: ignore.map(|bytes| pattern::parse_ignore_file(&bytes)),
        context,
    };
    if subrequest == Some(Subrequest::Lint) {
        return Ok(subrequests::lint(&file.info, &job.lint().await));
    }
    if subrequest == Some(Subrequest::Outline) {
        return Ok(subrequests::outline(&file.info, &job.outline().await?));
    }
    let compiled = job.compile(|warnings| warn(bridge, &file, warnings)).await?;
    result(bridge, &options, compiled).await
}

/// Has another frontend answer.
async fn forward(contexts: Contexts<'_>, other: &compiler::Other) -> Result<BuildResult, BuildError> {
    let Contexts { bridge, request, read } = contexts;
    let mut opts = request.opts.clone();
    opts.insert(COMMAND.to_owned(), other.command.clone());
    opts.insert("source".to_owned(), other.image.clone());
    let forwarded = FrontendRequest { name: super::GATEWAY.to_owned(), opts, inputs: request.inputs.clone() };
    let result = bridge.run_frontend(forwarded).await?;
    read.lock().unwrap_or_else(PoisonError::into_inner).extend(result.read.iter().cloned());
    Ok(result)
}

/// The Dockerfile as it came from the client.
struct Dockerfile {
    /// Its path within its directory, its text, and how it was fetched.
    info: pb::SourceInfo,
    /// Its own ignore file, which goes before the context's.
    ignore: Option<Vec<u8>>,
    /// The vertex that fetched it; warnings are shown there.
    vertex: String,
}

/// Reads the Dockerfile, from the client's directory unless a definition or a remote context has it.
async fn dockerfile(contexts: Contexts<'_>, remote: Option<&Remote>) -> Result<Dockerfile, BuildError> {
    let request = contexts.request;
    let key = request.opts.get("dockerfilekey");
    let remote = remote.filter(|_| key.is_none());
    let named = request.opts.get("filename").filter(|name| !name.is_empty());
    let name = match (remote.and_then(|remote| remote.dockerfile), named) {
        (Some(name), _) => name.to_owned(),
        (None, Some(name)) => pattern::clean(name).trim_start_matches('/').to_owned(),
        (None, None) => "Dockerfile".to_owned(),
    };
    let own_ignore = format!("{name}.dockerignore");
    let lower = match name.rsplit_once('/') {
        None if name == "Dockerfile" => Some("dockerfile".to_owned()),
        Some((dir, "Dockerfile")) => Some(format!("{dir}/dockerfile")),
        _ => None,
    };
    let given = match remote {
        Some(remote) => Some(&remote.whole),
        None => request.inputs.get(DOCKERFILE_LOCAL).filter(|_| key.is_none()),
    };
    let fetched = match given {
        Some(definition) => Fetched {
            reference: contexts.solve(definition.clone()).await?,
            definition: definition.clone(),
            vertex: kiln_proto::llb::load(definition)
                .ok()
                .and_then(|loaded| Some(loaded.vertices[loaded.root?.0].digest.to_string()))
                .unwrap_or_default(),
        },
        None => {
            let mut wanted = vec![name.clone(), own_ignore.clone()];
            wanted.extend(lower.clone());
            let title = format!("[internal] load build definition from {name}");
            let local = key.map_or(DOCKERFILE_LOCAL, String::as_str);
            contexts.fetch(local, &wanted, DOCKERFILE_LOCAL, &title).await?
        }
    };
    let unread = |error: BuildError| error.context("failed to read dockerfile");
    let Some(reference) = fetched.reference else {
        return Err(unread(BuildError::build(format!("open {name}: no such file or directory"))));
    };
    let asked = name.clone();
    let read = reference.read(move |root| {
        let data = match (files::read_file(root, &asked, 0, 0), lower) {
            (Err(error), Some(lower)) if is_missing(&error) => {
                files::read_file(root, &lower, 0, 0).map_err(|_| error)?
            }
            (data, _) => data?,
        };
        Ok((data, optional(files::read_file(root, &own_ignore, 0, 0))?))
    });
    let (data, ignore) = read.await.map_err(unread)?;
    let info = pb::SourceInfo {
        filename: name,
        data,
        definition: Some(fetched.definition),
        language: "Dockerfile".into(),
    };
    Ok(Dockerfile { info, ignore, vertex: fetched.vertex })
}

fn warn(bridge: &Bridge, file: &Dockerfile, warnings: &[LintWarning]) {
    let position =
        |line: u32| Some(pb::Position { line: i32::try_from(line).unwrap_or(i32::MAX), character: 0 });
    for warning in warnings {
        bridge.progress().event(Event::Warning(VertexWarning {
            vertex: file.vertex.clone(),
            level: 1,
            short: warning.short(),
            detail: vec![warning.description.to_owned()],
            url: warning.url.clone(),
            info: Some(file.info.clone()),
            ranges: vec![pb::Range { start: position(warning.lines.0), end: position(warning.lines.1) }],
        }));
    }
}

/// Takes the compiled targets into the build. Their file systems are made on first use.
async fn result(
    bridge: &Arc<Bridge>,
    options: &Options,
    compiled: Compiled,
) -> Result<BuildResult, BuildError> {
    let map = options.multi_platform;
    let mut metadata = BTreeMap::new();
    let mut platforms = Vec::new();
    let mut refs = BTreeMap::new();
    let mut single = None;
    for target in compiled.targets {
        let reference = bridge.solve(target.definition.unwrap_or_default()).await?;
        let id = platform::format_all(&target.platform);
        let suffix = if map { format!("/{id}") } else { String::new() };
        metadata.insert(format!("containerimage.config{suffix}"), target.image_config);
        if let Some(base) = target.base_config {
            metadata.insert(format!("containerimage.base.config{suffix}"), base);
        }
        if let Some(epoch) = target.epoch {
            metadata.insert(format!("source.date.epoch{suffix}"), epoch.to_string().into_bytes());
        }
        platforms.push(json!({ "ID": id, "Platform": platform_json(&target.platform) }));
        refs.insert(id, reference.clone());
        single = reference;
    }
    metadata.insert("refs.platforms".into(), json!({ "Platforms": platforms }).to_string().into_bytes());
    let refs = if map { Refs::Map(refs) } else { Refs::Single(single) };
    Ok(BuildResult { refs, metadata, ..BuildResult::default() })
}

/// A platform in the form of the OCI specification.
pub(super) fn platform_json(platform: &pb::Platform) -> serde_json::Value {
    let mut value = json!({ "architecture": platform.architecture, "os": platform.os });
    if !platform.os_version.is_empty() {
        value["os.version"] = platform.os_version.as_str().into();
    }
    if !platform.os_features.is_empty() {
        value["os.features"] = json!(platform.os_features);
    }
    if !platform.variant.is_empty() {
        value["variant"] = platform.variant.as_str().into();
    }
    value
}
