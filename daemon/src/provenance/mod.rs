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
use kiln_proto::control::SolveRequest;
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

/// Builds of more steps than this are recorded without their provenance: it would be larger than all else.
const MAX_RECORDED: usize = 10_000;

/// What is claimed of one platform's result.
pub(crate) struct Claim {
    /// Platform id; empty if there is one result only.
    pub(crate) platform: String,
    /// For the exporters.
    pub(crate) attestation: Attestation,
}

/// What came of the build's definitions.
pub(crate) struct Solved {
    /// What was decided about each vertex.
    pub(crate) explained: Vec<VertexExplanation>,
    /// Outputs by vertex.
    pub(crate) made: HashMap<Arc<str>, Vec<Ref>>,
}

/// A build whose results have a provenance. Holds its results.
pub(crate) struct Subject {
    bridge: Arc<Bridge>,
    /// By platform.
    results: Vec<(String, Option<Arc<LazyRef>>)>,
    /// What all frontends were asked whose results may be inputs.
    asked: Vec<Arc<Asked>>,
    started: SystemTime,
    invocation: String,
    /// The version of the results' form that the client asked for; 0 is the current one.
    compatibility: i64,
    /// What the administrator adds.
    custom: Map<String, Value>,
}

impl Subject {
    /// Of a build that began at `started`. The results of those that are `running` may be its inputs; `environment` is a
    /// directory with what the administrator adds.
    pub(crate) fn new(
        bridge: &Arc<Bridge>,
        result: &BuildResult,
        request: &SolveRequest,
        started: SystemTime,
        running: &[Arc<Bridge>],
        environment: Option<&Path>,
    ) -> Self {
        let results = match &result.refs {
            Refs::Single(reference) => vec![(SINGLE.to_owned(), reference.clone())],
            Refs::Map(refs) => refs.iter().map(|(id, reference)| (id.clone(), reference.clone())).collect(),
        };
        let others = running.iter().filter(|other| !Arc::ptr_eq(other, bridge));
        Self {
            bridge: bridge.clone(),
            results,
            asked: bridge.all_asked().into_iter().chain(others.flat_map(|other| other.all_asked())).collect(),
            started,
            invocation: request.r#ref.clone(),
            compatibility: request.compatibility_version,
            custom: environment.map(self::environment).unwrap_or_default(),
        }
    }

    /// Claims about all results.
    ///
    /// # Errors
    /// Materials are incomplete and must not be; or a definition can't be read, which was read before.
    pub(crate) fn claims(&self, options: &Options, solved: &Solved) -> Result<Vec<Claim>, BuildError> {
        let nothing = Sources::new(&solved.explained);
        let claim = |(platform, reference): &(String, Option<Arc<LazyRef>>)| {
            self.with_facts(options, &nothing, reference.as_deref(), |facts| {
                if options.complete_materials && !facts.sources.complete() {
                    return Err(BuildError::build("provenance materials are incomplete"));
                }
                let attestation = Attestation {
                    predicate_type: options.version.predicate_type().to_owned(),
                    predicate: predicate::make(facts, options.mode),
                    subjects: Vec::new(),
                    file: options.filename.clone(),
                    inline_only: options.inline_only,
                    steps: (options.mode == Mode::Max).then(|| Steps {
                        place: options.version.metadata(),
                        results: steps::results(facts.loaded, &solved.made),
                    }),
                };
                Ok(Claim { platform: platform.clone(), attestation })
            })
        };
        self.results.iter().map(claim).collect()
    }

    /// The predicates that the build's record keeps, all that is known, by platform. `builder` is the builder's id.
    ///
    /// # Errors
    /// A definition can't be read, which was read before.
    pub(crate) fn recorded(
        &self,
        builder: &str,
        explained: &[VertexExplanation],
    ) -> Result<Vec<(String, Value)>, BuildError> {
        let options = Options::recorded(builder);
        let nothing = Sources::new(explained);
        let mut all = Vec::new();
        for (platform, reference) in &self.results {
            let Some(reference) = reference else { continue };
            if reference.definition().def.len() > MAX_RECORDED {
                tracing::debug!(build = self.invocation, "too large for its provenance to be recorded");
                continue;
            }
            all.push(self.with_facts(&options, &nothing, Some(reference), |facts| {
                Ok((platform.clone(), predicate::make(facts, options.mode)))
            })?);
        }
        Ok(all)
    }

    fn with_facts<T>(
        &self,
        options: &Options,
        nothing: &Sources<'_>,
        reference: Option<&LazyRef>,
        make: impl FnOnce(&Facts<'_>) -> Result<T, BuildError>,
    ) -> Result<T, BuildError> {
        let bridge = self.bridge.as_ref();
        let loaded = reference.map(load).transpose()?.unwrap_or_default();
        let asked = bridge.asked(reference);
        let mut sources = nothing.clone();
        // What a frontend read on its way: the Dockerfile, a context's ignore file.
        let read = asked.as_ref().map_or_else(|| bridge.built_by_itself(), |asked| asked.read.clone());
        let is_result = |other: &LazyRef| {
            self.results
                .iter()
                .any(|(_, result)| result.as_ref().is_some_and(|result| result.id() == other.id()))
        };
        for other in read.iter().filter(|other| !is_result(other)) {
            sources.add(&load(other)?, bridge);
        }
        sources.add(&loaded, bridge);
        make(&Facts {
            options,
            request: asked.as_ref().map(|asked| &asked.request),
            root: bridge.root(),
            asked: &self.asked,
            sources: &sources,
            loaded: &loaded,
            custom: &self.custom,
            started: self.started,
            invocation: &self.invocation,
            compatibility: self.compatibility,
        })
    }
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
