//! The predicates themselves: SLSA version 1, and version 0.2 with the same content.

use std::collections::BTreeMap;
use std::time::SystemTime;

use kiln_proto::llb::Loaded;
use kiln_proto::platform;
use serde_json::{Map, Value, json};

use super::options::{Mode, Options, Version};
use super::sources::{Sources, redacted};
use super::steps;
use crate::gateway::FrontendRequest;

const BUILD_TYPE_1: &str =
    "https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md";
const BUILD_TYPE_02: &str = "https://mobyproject.org/buildkit@v1";
/// Attributes that say something about the machine, not the result.
const OF_THE_HOST: [&str; 4] = ["cgroup-parent", "image-resolve-mode", "platform", "cache-imports"];

/// What there is to tell.
pub(super) struct Facts<'a> {
    pub(super) options: &'a Options,
    /// What a frontend was asked for; `None` if the client made the definition.
    pub(super) request: Option<&'a FrontendRequest>,
    pub(super) sources: &'a Sources<'a>,
    pub(super) loaded: &'a Loaded,
    /// What the administrator adds.
    pub(super) custom: &'a Map<String, Value>,
    pub(super) started: SystemTime,
    pub(super) invocation: &'a str,
}

/// What a build was asked for, as predicates tell it.
struct Invocation {
    uri: String,
    digest: Option<Value>,
    path: String,
    request: Value,
    vcs: Map<String, Value>,
    complete: bool,
}

fn rfc3339(time: SystemTime) -> String {
    jiff::Timestamp::try_from(time).unwrap_or_default().to_string()
}

fn invocation(facts: &Facts<'_>, mode: Mode) -> Invocation {
    let opts = facts.request.map(|request| request.opts.clone()).unwrap_or_default();
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
    let frontend = facts.request.map(|request| request.name.as_str()).unwrap_or_default();
    let mut complete = !frontend.is_empty();
    if mode == Mode::Min {
        args.retain(|key, _| {
            let kept = !key.starts_with("build-arg:") && !key.starts_with("label:");
            complete &= kept;
            kept
        });
    }
    let mut request = Map::new();
    if !frontend.is_empty() {
        request.insert("frontend".into(), frontend.into());
    }
    if !args.is_empty() {
        request.insert("args".into(), json!(args));
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
                request.insert(name.into(), ids.into());
            }
        }
    }
    let locals: Vec<Value> = facts.sources.locals.iter().map(|name| json!({"name": name})).collect();
    if !locals.is_empty() {
        request.insert("locals".into(), locals.into());
    }
    Invocation { uri, digest, path, request: request.into(), vcs, complete }
}

/// A predicate of the version that the options name.
pub(super) fn make(facts: &Facts<'_>, mode: Mode) -> Value {
    let invocation = invocation(facts, mode);
    let (complete, network) = (facts.sources.complete(), facts.sources.network);
    let host = platform::format(&platform::host());
    let config = (mode == Mode::Max).then(|| steps::config(facts.loaded)).flatten();
    let mut metadata = Map::new();
    if !invocation.vcs.is_empty() {
        metadata.insert("vcs".into(), invocation.vcs.into());
    }
    if mode == Mode::Max
        && let Some(source) = steps::source_map(facts.loaded)
    {
        metadata.insert("source".into(), source);
    }
    let materials: Vec<Value> = facts.sources.materials.iter().map(super::sources::Material::json).collect();
    let (started, finished) = (rfc3339(facts.started), rfc3339(SystemTime::now()));
    let mut source = Map::new();
    if !invocation.uri.is_empty() {
        source.insert("uri".into(), invocation.uri.into());
    }
    source.extend(invocation.digest.map(|digest| ("digest".to_owned(), digest)));
    let path = Some(invocation.path).filter(|path| !path.is_empty());
    let hermetic = complete && !network;
    match facts.options.version {
        Version::V1 => {
            source.extend(path.map(|path| ("path".to_owned(), path.into())));
            let mut internal = Map::new();
            internal.extend(config.map(|config| ("buildConfig".to_owned(), config)));
            internal.insert("builderPlatform".into(), host.into());
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
                "externalParameters": {"configSource": source, "request": invocation.request},
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
            source.extend(path.map(|path| ("entryPoint".to_owned(), path.into())));
            let mut environment = Map::new();
            environment.insert("platform".into(), host.into());
            environment.extend(facts.custom.clone());
            let mut out = json!({
                "builder": {"id": facts.options.builder_id},
                "buildType": BUILD_TYPE_02,
            });
            if !materials.is_empty() {
                out["materials"] = materials.into();
            }
            out["invocation"] = json!({
                "configSource": source,
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
