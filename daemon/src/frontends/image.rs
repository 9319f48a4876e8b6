//! `gateway.v0`: frontends that are images. A program of the image runs in a container and speaks the gateway's protocol
//! over its standard streams; what it returns is the result.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_cache::Ref;
use kiln_dockerfile::ContextSource;
use kiln_proto::reference::Reference;
use kiln_proto::{llb, pb, platform};
use kiln_worker::ops::{ContainerRequest, Process, ProcessSpec};
use prost::Message;
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe::Receiver;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::contexts::Contexts;
use crate::engine::op_error;
use crate::error::{BuildError, frontend_cap_detail};
use crate::gateway::{Bridge, BuildResult, FrontendRequest, LazyRef, image_source, stdio};

/// Where a frontend finds the definition of its own image.
const METADATA_DIR: &str = "/run/config/buildkit/metadata";
const METADATA_FILE: &str = "frontend.bin";
/// Label of an image: what its frontend can do.
const CAPS_LABEL: &str = "moby.buildkit.frontend.caps";
/// Label of an image: its frontend needs no network.
const NO_NETWORK_LABEL: &str = "moby.buildkit.frontend.network.none";
/// What is needed of a frontend that is given definitions.
const INPUTS_CAP: &str = "moby.buildkit.frontend.inputs";
/// How long a program may go on when it has closed its connection.
const FAREWELL: Duration = Duration::from_secs(10);
/// Last lines of its log that the error of a program shows.
const SHOWN_LINES: usize = 8;
/// Longer lines of a log are cut.
const LINE: u64 = 1000;
/// How long the last lines are waited for.
const DRAIN: Duration = Duration::from_secs(1);

/// Runs the frontend whose image is `source`.
///
/// # Errors
/// It can't be had, lacks what is required, or failed.
pub(super) async fn run(
    bridge: &Arc<Bridge>,
    request: &FrontendRequest,
    source: &str,
) -> Result<BuildResult, BuildError> {
    let read = Mutex::default();
    let image = Image::find(Contexts { bridge, request, read: &read }, source).await?;
    image.check_caps(request)?;
    let cancel = bridge.cancel().child_token();
    // Whoever gives up on the frontend ends its calls.
    let _ended = cancel.clone().drop_guard();
    let (gateway, mut returned) = bridge.nested(request.inputs.clone(), cancel, &[])?;
    let ended = image.run(&gateway, request).await;
    gateway.release_containers().await;
    // What the frontend says of its failure goes before what its end says, and that before its success.
    let mut result = match (returned.try_recv(), ended) {
        (Ok(Err(error)), _) | (_, Err(error)) => return Err(error),
        (Ok(Ok(result)), Ok(())) => result,
        (Err(_), Ok(())) => return Err(BuildError::build("no result for incomplete build")),
    };
    let given: Vec<String> = result.refs.all().iter().map(|given| given.id().to_owned()).collect();
    result.read = read.into_inner().unwrap_or_else(PoisonError::into_inner);
    result
        .read
        .extend(gateway.built_by_itself().into_iter().filter(|read| !given.contains(&read.id().to_owned())));
    Ok(result)
}

/// A frontend's image.
struct Image {
    source: String,
    reference: Arc<LazyRef>,
    config: ImageConfig,
}

/// What of an image's configuration says how to run it.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ImageConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    #[serde(default)]
    working_dir: String,
    labels: Option<BTreeMap<String, String>>,
}

impl ImageConfig {
    fn parse(source: &str, config: &[u8]) -> Result<Self, BuildError> {
        #[derive(Deserialize)]
        struct Whole {
            config: Option<ImageConfig>,
        }
        let whole: Whole = serde_json::from_slice(config).map_err(|error| {
            BuildError::build(format!("failed to parse image config of {source}: {error}"))
        })?;
        Ok(whole.config.unwrap_or_default())
    }

    fn label(&self, name: &str) -> &str {
        self.labels.as_ref().and_then(|labels| labels.get(name)).map(String::as_str).unwrap_or_default()
    }
}

/// Names of capabilities in a list.
fn caps(list: &str) -> impl Iterator<Item = &str> {
    let name = |cap: &'_ str| cap.split('+').next().map(str::trim).unwrap_or_default().len();
    list.split(',').map(str::trim).map(move |cap| &cap[..name(cap)]).filter(|cap| !cap.is_empty())
}

impl Image {
    /// An image by the name of a context, or of its own.
    async fn find(contexts: Contexts<'_>, source: &str) -> Result<Self, BuildError> {
        let invalid = |error: &dyn std::fmt::Display| {
            BuildError::build(format!("failed to parse frontend image {source:?}: {error}"))
        };
        let reference = Reference::parse(source).map_err(|error| invalid(&error))?.with_default_tag();
        let Some((key, value)) = named(contexts.request, &reference) else {
            return Self::pull(contexts, source, &reference).await;
        };
        if let Some(image) = value.strip_prefix("docker-image://") {
            let reference = Reference::parse(image).map_err(|error| invalid(&error))?.with_default_tag();
            return Self::pull(contexts, source, &reference).await;
        }
        let context = contexts.named(&key, &value, &platform::normalized(&platform::host())).await?;
        let definition = match context.source {
            ContextSource::Definition(definition) => definition,
            ContextSource::Local { name, session, shared_key_hint } => {
                let attrs = [
                    ("local.session", session),
                    ("local.sharedkeyhint", shared_key_hint),
                    ("local.excludepatterns", json!(context.ignore_patterns.unwrap_or_default()).to_string()),
                ];
                Contexts::local_source(&name, attrs, &format!("[context {key}] load from client")).0
            }
        };
        let config = match &context.config {
            Some(config) => ImageConfig::parse(source, config)?,
            None => ImageConfig::default(),
        };
        Self::build(contexts, source, definition, config).await
    }

    async fn pull(contexts: Contexts<'_>, source: &str, reference: &Reference) -> Result<Self, BuildError> {
        let name = reference.to_string();
        let platform = platform::normalized(&platform::host());
        let log_name = format!("resolve image config for docker-image://{name}");
        let found = contexts.bridge.resolve_image(image_source(&name), &platform, "", &log_name, &[]).await;
        let (name, image) = found
            .map_err(|error| error.context(format_args!("failed to resolve source metadata for {name}")))?;
        let invalid = |error| BuildError::build(format!("failed to parse frontend image {name:?}: {error}"));
        let pinned = Reference::parse(&name).and_then(|reference| reference.with_digest(&image.digest));
        let pinned = pinned.map_err(invalid)?;
        let op = pb::Op {
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: format!("docker-image://{pinned}"),
                attrs: [("image.recordtype".to_owned(), "frontend".to_owned())].into(),
            })),
            platform: Some(platform),
            ..pb::Op::default()
        };
        let mut builder = llb::Builder::new();
        let vertex = builder.add(&op, super::contexts::named(&format!("docker-image://{pinned}")));
        let definition = builder.finish(&pb::Input { digest: vertex, index: 0 });
        let config = ImageConfig::parse(source, &image.config)?;
        Self::build(contexts, source, definition, config).await
    }

    async fn build(
        contexts: Contexts<'_>,
        source: &str,
        definition: pb::Definition,
        config: ImageConfig,
    ) -> Result<Self, BuildError> {
        let reference = contexts.solve(definition).await?;
        let reference =
            reference.ok_or_else(|| BuildError::build(format!("frontend image {source} is empty")))?;
        Ok(Self { source: source.to_owned(), reference, config })
    }

    /// Refuses a request that its frontend could not serve.
    fn check_caps(&self, request: &FrontendRequest) -> Result<(), BuildError> {
        let able: BTreeSet<&str> = caps(self.config.label(CAPS_LABEL)).collect();
        let asked = request.opts.get("frontend.caps").map(String::as_str).unwrap_or_default();
        let inputs = (!request.inputs.is_empty()).then_some(INPUTS_CAP);
        match caps(asked).chain(inputs).find(|cap| !able.contains(cap)) {
            Some(cap) => Err(BuildError::new(
                Code::Unimplemented,
                format!("unsupported: frontend capability {cap} (of frontend image {})", self.source),
            )
            .with(frontend_cap_detail(cap))),
            None => Ok(()),
        }
    }

    /// Runs the program until it ends.
    async fn run(&self, gateway: &Arc<Bridge>, request: &FrontendRequest) -> Result<(), BuildError> {
        let definition = self.reference.definition().encode_to_vec();
        let metadata = gateway.engine().hold_file(METADATA_FILE, definition).await?;
        let root: Ref = self.reference.get().await?;
        let no_network =
            matches!(self.config.label(NO_NETWORK_LABEL), "1" | "t" | "T" | "true" | "TRUE" | "True");
        let mount =
            |dest: &str, readonly| pb::Mount { dest: dest.to_owned(), readonly, ..pb::Mount::default() };
        let container = gateway.engine().container(ContainerRequest {
            mounts: vec![mount("/", false), mount(METADATA_DIR, true)],
            inputs: vec![root, metadata],
            network: if no_network { pb::NetMode::None } else { pb::NetMode::Unset },
            ..ContainerRequest::default()
        });
        let container = container.await?;
        let meta = pb::Meta {
            args: self.config.entrypoint.clone().unwrap_or_else(|| vec!["/run".to_owned()]),
            env: self.environment(gateway, request),
            cwd: match self.config.working_dir.as_str() {
                "" => "/".to_owned(),
                dir => dir.to_owned(),
            },
            ..pb::Meta::default()
        };
        let process =
            container.start(ProcessSpec { meta, fds: vec![0, 1, 2], ..ProcessSpec::default() }).await;
        let ended = self.attend(gateway, process).await;
        // How its process ended is known.
        let _ = container.release().await;
        ended
    }

    fn environment(&self, gateway: &Bridge, request: &FrontendRequest) -> Vec<String> {
        let mut env = self.config.env.clone().unwrap_or_default();
        let opts: BTreeMap<_, _> = request.opts.iter().collect();
        let opts = opts.into_iter().enumerate();
        env.extend(
            opts.map(|(number, (key, value))| format!("BUILDKIT_FRONTEND_OPT_{number}={key}={value}")),
        );
        env.push(format!("BUILDKIT_SESSION_ID={}", gateway.session()));
        let worker = gateway.worker();
        let platforms: Vec<_> = worker.platforms.iter().map(super::dockerfile::platform_json).collect();
        let workers = json!([{ "ID": worker.id, "Labels": worker.labels, "Platforms": platforms }]);
        env.push(format!("BUILDKIT_WORKERS={workers}"));
        env.push("BUILDKIT_EXPORTEDPRODUCT=".to_owned());
        env
    }

    /// Serves the gateway to the program until it ends.
    async fn attend(&self, gateway: &Arc<Bridge>, mut process: Process) -> Result<(), BuildError> {
        let mut output = |fd: u32| {
            let place = process.outputs.iter().position(|(number, _)| *number == fd)?;
            Some(process.outputs.swap_remove(place).1)
        };
        let (stdin, stdout, stderr) = (process.stdin.take(), output(1), output(2));
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            // It did not start.
            return process.wait().await.map_err(|error| self.failed(op_error(error), &[]));
        };
        let closed = CancellationToken::new();
        let serving = stdio::serve(gateway.clone(), stdin, stdout, closed.clone());
        let lines = Arc::default();
        let log = tokio::spawn(follow(self.source.clone(), stderr, Arc::clone(&lines)));
        let given_up = async {
            closed.cancelled().await;
            tokio::time::sleep(FAREWELL).await;
        };
        let ended = tokio::select! {
            ended = process.wait() => ended.map_err(op_error),
            served = serving => Err(BuildError::build(format!("its connection failed: {served:?}"))),
            () = given_up => Err(BuildError::build("it closed its connection and did not end")),
        };
        let Err(error) = ended else { return Ok(()) };
        // What it wrote last may be on its way.
        let _ = tokio::time::timeout(DRAIN, log).await;
        let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        Err(self.failed(error, &lines))
    }

    fn failed(&self, error: BuildError, lines: &[String]) -> BuildError {
        let error = error.context(format_args!("frontend image {}", self.source));
        match lines {
            [] => error,
            lines => BuildError { message: format!("{}: {}", error.message, lines.join("\n")), ..error },
        }
    }
}

/// Logs what a program writes, and keeps its last lines.
async fn follow(source: String, stderr: Receiver, last: Arc<Mutex<Vec<String>>>) {
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    while let Ok(1..) = (&mut reader).take(LINE).read_until(b'\n', &mut line).await {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        tracing::info!(frontend = source, "{text}");
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == SHOWN_LINES {
            last.remove(0);
        }
        last.push(text);
        line.clear();
    }
}

/// What a named context has in place of an image: its key and value.
fn named(request: &FrontendRequest, image: &Reference) -> Option<(String, String)> {
    let name = image.familiar();
    let name = name.strip_suffix(":latest").unwrap_or(&name);
    let host = platform::format_all(&platform::normalized(&platform::host()));
    let keys = [format!("{name}::{host}"), name.to_owned()];
    keys.into_iter().find_map(|key| {
        let value = request.opts.get(&format!("context:{key}"))?.clone();
        Some((key, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_capabilities() {
        let all: Vec<_> = caps("moby.a, moby.b+forward,,+x").collect();
        assert_eq!(all, ["moby.a", "moby.b"]);
    }

    #[test]
    fn contexts_in_place_of_images() {
        let opts =
            [("context:docker/dockerfile", "input:x"), ("context:localhost:5000/f:1", "docker-image://g")];
        let opts = opts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let request = FrontendRequest { opts, ..FrontendRequest::default() };
        let find = |image| named(&request, &Reference::parse(image).expect("valid").with_default_tag());
        assert_eq!(find("docker/dockerfile:latest").map(|found| found.1).as_deref(), Some("input:x"));
        assert_eq!(find("localhost:5000/f:1").map(|found| found.1).as_deref(), Some("docker-image://g"));
        assert_eq!(find("localhost:5000/f:2"), None);
    }
}
