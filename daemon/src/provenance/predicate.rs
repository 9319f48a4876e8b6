//! The predicates themselves: SLSA version 1, and version 0.2 with the same content.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use kiln_proto::llb::Loaded;
use kiln_proto::platform;
use serde_json::{Map, Value, json};

use super::options::{Mode, Options, Version};
use super::sources::{Sources, redacted};
use super::steps;
use crate::frontends::DOCKERFILE;
use crate::gateway::{Asked, FrontendRequest};
use crate::workers::DOCKERFILE_VERSION;

const BUILD_TYPE_1: &str =
    "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
const BUILD_TYPE_02: &str = "https://mobyproject.org/buildkit@v1";
/// A frontend may give back what it was given: there need be no first maker.
const DEPTH: usize = 8;
/// Attributes that say something about the machine, not the result.
const OF_THE_HOST: [&str; 4] = ["cgroup-parent", "image-resolve-mode", "platform", "cache-imports"];

/// What there is to tell.
pub(super) struct Facts<'a> {
    pub(super) options: &'a Options,
    /// What a frontend was asked for; `None` if the client made the definition.
    pub(super) request: Option<&'a FrontendRequest>,
    pub(super) sources: &'a Sources<'a>,
    pub(super) loaded: &'a Loaded,
    /// What the client asked of the build itself.
    pub(super) root: &'a FrontendRequest,
    /// What all frontends were asked whose results may be inputs.
    pub(super) asked: &'a [Arc<Asked>],
    /// The version of the results' form that the client asked for; 0 is the current one.
    pub(super) compatibility: i64,
    /// What the administrator adds.
    pub(super) custom: &'a Map<String, Value>,
    pub(super) started: SystemTime,
    pub(super) invocation: &'a str,
}

/// What a build was asked for, as predicates tell it.
#[derive(Default)]
struct Invocation {
    uri: String,
    digest: Option<Value>,
    path: String,
    request: Map<String, Value>,
    vcs: Map<String, Value>,
    complete: bool,
}

impl Invocation {
    /// Where the build's instructions came from; `path` is how a version calls their file.
    fn source(&self, path: &str) -> Value {
        let mut source = Map::new();
        if !self.uri.is_empty() {
            source.insert("uri".into(), self.uri.clone().into());
        }
        source.extend(self.digest.clone().map(|digest| ("digest".to_owned(), digest)));
        if !self.path.is_empty() {
            source.insert(path.into(), self.path.clone().into());
        }
        source.into()
    }
}

fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).unwrap_or_default().to_string()
}

fn invocation(facts: &Facts<'_>, mode: Mode) -> Invocation {
    let mut asked = facts.request.map(|request| read(request, facts, mode, DEPTH)).unwrap_or_default();
    if facts.compatibility != 0 {
        asked.request.insert("compatibilityVersion".into(), facts.compatibility.into());
    }
    if mode == Mode::Max {
        for (name, ids) in [("secrets", &facts.sources.secrets), ("ssh", &facts.sources.ssh)] {
            let ids: Vec<Value> = ids
                .iter()
                .map(|(id, optional)| match optional {
                    true => json!({"id": id, "optional": true}),
                    false => json!({"id": id}),
                })
                .collect();
            if !ids.is_empty() {
                asked.request.insert(name.into(), ids.into());
            }
        }
    }
    let locals: Vec<Value> = facts.sources.locals.iter().map(|name| json!({"name": name})).collect();
    if !locals.is_empty() {
        asked.request.insert("locals".into(), locals.into());
    }
    if facts.request.is_some() && facts.root.name.is_empty() {
        // A client drove the build, and asked a frontend for this on its way.
        let root = read(facts.root, facts, mode, DEPTH);
        if !root.request.is_empty() && root.request.get("args") != asked.request.get("args") {
            let source = root.source("path");
            asked.request.insert("root".into(), json!({"configSource": source, "request": root.request}));
        }
    }
    asked
}

/// What one request says, and `depth` generations of those that made its inputs.
fn read(request: &FrontendRequest, facts: &Facts<'_>, mode: Mode, depth: usize) -> Invocation {
    let opts = request.opts.clone();
    let context = ["contextkey", "input:context"]
        .iter()
        .find_map(|key| opts.get(*key).filter(|value| !value.is_empty()).map(|value| (*key, value.clone())))
        .map_or(
            "context".to_owned(),
            |(key, value)| if key == "contextkey" { value } else { key.to_owned() },
        );
    let mut args: BTreeMap<String, String> = opts
        .into_iter()
        .filter(|(key, _)| !OF_THE_HOST.contains(&key.as_str()) && !key.starts_with("attest:"))
        .collect();
    let (mut uri, mut digest) = (String::new(), None);
    if let Some(url) = args.remove(&context).filter(|url| !url.is_empty()) {
        uri = redacted(&url);
        digest = facts.sources.find(&url).and_then(super::sources::Material::digests);
    }
    let path = args.remove("filename").unwrap_or_default();
    let mut vcs = Map::new();
    args.retain(|key, value| {
        if key.starts_with("context:") {
            *value = redacted(value);
        }
        let Some(name) = key.strip_prefix("vcs:") else { return true };
        if !value.is_empty() {
            vcs.insert(name.to_owned(), redacted(value).into());
        }
        false
    });
    let frontend = request.name.as_str();
    let mut complete = !frontend.is_empty();
    if mode == Mode::Min {
        args.retain(|key, _| {
            let kept = !key.starts_with("build-arg:") && !key.starts_with("label:");
            complete &= kept;
            kept
        });
    }
    let mut asked = Map::new();
    if !frontend.is_empty() {
        asked.insert("frontend".into(), frontend.into());
    }
    if !args.is_empty() {
        asked.insert("args".into(), json!(args));
    }
    let mut inputs = BTreeMap::new();
    for (name, definition) in request.inputs.iter().filter(|_| depth > 0) {
        let Some(maker) = facts.asked.iter().find(|asked| asked.gave(definition)) else { continue };
        let maker = read(&maker.request, facts, mode, depth - 1);
        complete &= maker.complete;
        inputs.insert(name, json!({"configSource": maker.source("path"), "request": maker.request}));
    }
    if !inputs.is_empty() {
        asked.insert("inputs".into(), json!(inputs));
    }
    Invocation { uri, digest, path, request: asked, vcs, complete }
}

/// A predicate of the version that the options name.
pub(super) fn make(facts: &Facts<'_>, mode: Mode) -> Value {
    let invocation = invocation(facts, mode);
    let (complete, network) = (facts.sources.complete(), facts.sources.network);
    let host = platform::format(&platform::host());
    let config = (mode == Mode::Max).then(|| steps::config(facts.loaded)).flatten();
    let mut metadata = Map::new();
    if !invocation.vcs.is_empty() {
        metadata.insert("vcs".into(), invocation.vcs.clone().into());
    }
    if mode == Mode::Max
        && let Some(source) = steps::source_map(facts.loaded)
    {
        metadata.insert("source".into(), source);
    }
    let materials: Vec<Value> = facts.sources.materials.iter().map(super::sources::Material::json).collect();
    let (started, finished) = (rfc3339(facts.started), rfc3339(SystemTime::now()));
    let is_dockerfile = facts.request.is_some_and(|request| request.name == DOCKERFILE);
    let language = is_dockerfile.then(|| ("dockerfileVersion".to_owned(), DOCKERFILE_VERSION.into()));
    let hermetic = complete && !network;
    match facts.options.version {
        Version::V1 => {
            let mut internal = Map::new();
            internal.extend(config.map(|config| ("buildConfig".to_owned(), config)));
            internal.insert("builderPlatform".into(), host.into());
            internal.extend(language);
            internal.extend(facts.custom.clone());
            let mut run = json!({
                "invocationId": facts.invocation,
                "startedOn": started,
                "finishedOn": finished,
                "buildkit_metadata": metadata,
            });
            if hermetic {
                run["buildkit_hermetic"] = true.into();
            }
            run["buildkit_completeness"] =
                json!({"request": invocation.complete, "resolvedDependencies": complete});
            if facts.options.reproducible {
                run["buildkit_reproducible"] = true.into();
            }
            let mut definition = json!({
                "buildType": BUILD_TYPE_1,
                "externalParameters": {"configSource": invocation.source("path"), "request": invocation.request},
                "internalParameters": internal,
            });
            if !materials.is_empty() {
                definition["resolvedDependencies"] = materials.into();
            }
            json!({
                "buildDefinition": definition,
                "runDetails": {"builder": {"id": facts.options.builder_id}, "metadata": run},
            })
        }
        Version::V02 => {
            let mut environment = Map::new();
            environment.insert("platform".into(), host.into());
            environment.extend(language);
            environment.extend(facts.custom.clone());
            let mut out = json!({
                "builder": {"id": facts.options.builder_id},
                "buildType": BUILD_TYPE_02,
            });
            if !materials.is_empty() {
                out["materials"] = materials.into();
            }
            out["invocation"] = json!({
                "configSource": invocation.source("entryPoint"),
                "parameters": invocation.request,
                "environment": environment,
            });
            if let Some(config) = config {
                out["buildConfig"] = config;
            }
            out["metadata"] = json!({
                "buildInvocationID": facts.invocation,
                "buildStartedOn": started,
                "buildFinishedOn": finished,
                "completeness": {
                    "parameters": invocation.complete, "environment": true, "materials": complete,
                },
                "reproducible": facts.options.reproducible,
                "https://mobyproject.org/buildkit@v1#metadata": metadata,
            });
            if hermetic {
                out["metadata"]["https://mobyproject.org/buildkit@v1#hermetic"] = true.into();
            }
            out
        }
    }
}
