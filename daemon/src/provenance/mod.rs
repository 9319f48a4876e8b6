//! Provenance: what a result was built from and how, as a SLSA predicate. Made from the definitions that the
//! build solved and from what its sources turned out to be; it never changes a build.

mod offered;
mod options;
mod predicate;
mod sources;
mod steps;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use kiln_cache::Ref;
use kiln_proto::llb::{self, Loaded};
use kiln_solver::explain::VertexExplanation;
use kiln_worker::export::{Attestation, Steps};
use serde_json::{Map, Value};
use tonic::Code;

pub(crate) use offered::claims as offered;
pub(crate) use options::{Mode, Options, check};

use crate::error::BuildError;
use crate::gateway::{Asked, Bridge, BuildResult, LazyRef, Refs};
use predicate::Facts;
use sources::Sources;

/// The platform of a result that is not one of several.
const SINGLE: &str = "";

/// What is claimed of one platform's result.
pub(crate) struct Claim {
    /// Platform id; empty if there is one result only.
    pub(crate) platform: String,
    /// For the exporters.
    pub(crate) attestation: Attestation,
    /// For the history, which keeps all that is known; nothing of what frontends claim.
    pub(crate) full: Option<Value>,
}

/// Claims about all results of a build; those of the builds that are `running` may be its inputs.
///
/// # Errors
/// A definition can't be read, which was read before.
pub(crate) fn claims(
    bridge: &Bridge,
    result: &BuildResult,
    solved: &Solved,
    build: &Build<'_>,
    running: &[Arc<Bridge>],
) -> Result<Vec<Claim>, BuildError> {
    let results: Vec<(&str, Option<&LazyRef>)> = match &result.refs {
        Refs::Single(reference) => vec![(SINGLE, reference.as_deref())],
        Refs::Map(refs) => refs.iter().map(|(id, reference)| (id.as_str(), reference.as_deref())).collect(),
    };
    let named: Vec<&str> = result.refs.all().into_iter().map(|reference| reference.id()).collect();
    let nothing = Sources::new(&solved.explained);
    let running = running.iter().filter(|other| !std::ptr::eq(Arc::as_ptr(other), bridge));
    let others = running.flat_map(|other| other.all_asked());
    let all_asked: Vec<Arc<Asked>> = bridge.all_asked().into_iter().chain(others).collect();
    let custom = build.environment.map(environment).unwrap_or_default();
    let mut claims = Vec::new();
    for (platform, reference) in results {
        let loaded = reference.map(load).transpose()?.unwrap_or_default();
        let asked = bridge.asked(reference);
        let mut sources = nothing.clone();
        // What a frontend read on its way: the Dockerfile, a context's ignore file.
        let read = asked.as_ref().map_or_else(|| bridge.built_by_itself(), |asked| asked.read.clone());
        for other in read.iter().filter(|other| !named.contains(&other.id())) {
            sources.add(&load(other)?, bridge);
        }
        sources.add(&loaded, bridge);
        if build.options.complete_materials && !sources.complete() {
            return Err(BuildError::build("provenance materials are incomplete"));
        }
        let facts = Facts {
            options: build.options,
            request: asked.as_ref().map(|asked| &asked.request),
            root: bridge.root(),
            asked: &all_asked,
            sources: &sources,
            loaded: &loaded,
            custom: &custom,
            started: build.started,
            invocation: build.id,
            compatibility: build.compatibility,
        };
        let full = predicate::make(&facts, Mode::Max);
        let predicate = match build.options.mode {
            Mode::Max => full.clone(),
            Mode::Min => predicate::make(&facts, Mode::Min),
        };
        claims.push(Claim {
            platform: platform.to_owned(),
            attestation: Attestation {
                predicate_type: build.options.version.predicate_type().to_owned(),
                predicate,
                subjects: Vec::new(),
                file: build.options.filename.clone(),
                inline_only: build.options.inline_only,
                steps: (build.options.mode == Mode::Max).then(|| Steps {
                    place: build.options.version.metadata(),
                    results: steps::results(&loaded, &solved.made),
                }),
            },
            full: Some(full),
        });
    }
    Ok(claims)
}

/// What came of the build's definitions.
pub(crate) struct Solved {
    /// What was decided about each vertex.
    pub(crate) explained: Vec<VertexExplanation>,
    /// Outputs by vertex.
    pub(crate) made: HashMap<Arc<str>, Vec<Ref>>,
}

/// A build as its provenance sees it.
pub(crate) struct Build<'a> {
    pub(crate) options: &'a Options,
    pub(crate) id: &'a str,
    pub(crate) started: SystemTime,
    /// The version of the results' form that the client asked for; 0 is the current one.
    pub(crate) compatibility: i64,
    /// Directory with what the administrator adds.
    pub(crate) environment: Option<&'a Path>,
}

fn load(reference: &LazyRef) -> Result<Loaded, BuildError> {
    llb::load(reference.definition()).map_err(|error| BuildError::new(Code::Internal, error.to_string()))
}

/// The fields that all JSON files of a directory have together. What can't be read is left out: it is no
/// build's fault.
fn environment(directory: &Path) -> Map<String, Value> {
    let mut all = Map::new();
    let mut files: Vec<_> = match std::fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => return all,
    };
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "json")) {
        let read = std::fs::read(file).map_err(|error| error.to_string());
        let parsed = read.and_then(|bytes| {
            serde_json::from_slice::<Map<String, Value>>(&bytes).map_err(|error| error.to_string())
        });
        match parsed {
            Ok(fields) => all.extend(fields),
            Err(error) => tracing::warn!(file = %file.display(), %error, "not in provenance"),
        }
    }
    all
}
