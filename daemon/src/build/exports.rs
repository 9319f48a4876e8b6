//! The exporters of a request: one step of progress for each, their answers merged into the
//! response.

use std::collections::{BTreeMap, HashMap};

use crate::engine::{Built, EngineBuild, ExportSource, PlannedExport};
use crate::error::BuildError;
use crate::gateway::{BuildResult, LazyRef, Refs, text_digest};
use crate::jobs::Job;
use crate::progress::Step;
use crate::provenance::Claim;

/// Runs all exporters of a build, one after the other.
pub(super) async fn run(
    build: &EngineBuild,
    job: &Job,
    planned: &[PlannedExport],
    session: &str,
    result: &BuildResult,
    claims: &[Claim],
    response: &mut HashMap<String, String>,
) -> Result<(), BuildError> {
    if planned.is_empty() {
        return Ok(());
    }
    let source = ExportSource::new(built(&result.refs).await?, result.metadata.clone(), claims)?;
    for (index, export) in planned.iter().enumerate() {
        let digest = text_digest(&format!("{session}-export-{index}"));
        let step = Step::start(job.progress.clone(), &digest, export.title());
        let answer = build.export(export, &source, step.progress()).await;
        step.end(answer.as_ref().err().map(|error| error.message.as_str()));
        response.extend(answer?);
    }
    Ok(())
}

async fn built(refs: &Refs) -> Result<Built, BuildError> {
    let get = |reference: Option<std::sync::Arc<LazyRef>>| async move {
        match reference {
            Some(reference) => reference.get().await,
            None => Ok(None),
        }
    };
    match refs {
        Refs::Single(reference) => Ok(Built::Single(get(reference.clone()).await?)),
        Refs::Map(refs) => {
            let mut results = BTreeMap::new();
            for (name, reference) in refs {
                results.insert(name.clone(), get(reference.clone()).await?);
            }
            Ok(Built::Map(results))
        }
    }
}
