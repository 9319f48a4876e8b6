//! The exporters of a request and the caches that it is to be written to: one step of progress for each, their answers
//! merged into the response.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::control::{Descriptor, SolveRequest};

use crate::engine::{Built, CachePlan, CacheSource, EngineBuild, ExportSource, PlannedExport};
use crate::error::BuildError;
use crate::gateway::{BuildResult, LazyRef, Refs, text_digest};
use crate::jobs::Job;
use crate::progress::Step;
use crate::provenance::Claim;

/// Entry of an exporter's answer: the image, as base64 of its OCI descriptor.
const DESCRIPTOR: &str = "containerimage.descriptor";

/// Runs all exporters of a build, one after the other, then writes the caches. Gives the images that were made.
pub(super) async fn run(
    build: &EngineBuild,
    job: &Job,
    (planned, caches): (&[PlannedExport], &CachePlan),
    request: &SolveRequest,
    result: &BuildResult,
    claims: &[Claim],
    response: &mut HashMap<String, String>,
) -> Result<Vec<Descriptor>, BuildError> {
    let mut images = Vec::new();
    let told = if caches.is_empty() { None } else { Some(described(&result.refs).await) };
    let session = &request.session;
    let built = built(&result.refs).await?;
    let found = match request.enable_session_exporter {
        true => build.find_exporters(planned.len(), &built, &result.metadata).await?,
        false => Vec::new(),
    };
    if !planned.is_empty() || !found.is_empty() {
        let inline = told.as_ref().filter(|_| caches.inline);
        let source = ExportSource::new(built, result.metadata.clone(), claims, inline)?;
        for (index, export) in planned.iter().chain(&found).enumerate() {
            let digest = text_digest(&format!("{session}-export-{index}"));
            let step = Step::start(job.progress.clone(), &digest, export.title());
            let answer = build.export(export, &source, step.progress()).await;
            step.end(answer.as_ref().err().map(|error| error.message.as_str()));
            let answer = answer?;
            if export.is_image() {
                images.extend(answer.get(DESCRIPTOR).and_then(|encoded| descriptor(encoded)));
            }
            response.extend(answer);
        }
    }
    let told: Vec<CacheSource> = told.into_iter().flat_map(BTreeMap::into_values).collect();
    for (index, cache) in caches.remote.iter().enumerate() {
        let digest = text_digest(&format!("{session}-cache-{index}"));
        let step = Step::start(job.progress.clone(), &digest, cache.title());
        let answer = build.export_cache(cache, &told, step.progress()).await;
        step.end(answer.as_ref().err().map(|error| error.message.as_str()));
        match answer {
            Ok(answer) => response.extend(answer),
            Err(error) if cache.ignore_error => {
                tracing::debug!(build = job.id, %error, "a cache was not written");
            }
            Err(error) => return Err(error),
        }
    }
    if request.enable_session_exporter {
        build.finalize_export(response).await?;
    }
    Ok(images)
}

/// The descriptor of an image as an exporter answers it.
fn descriptor(encoded: &str) -> Option<Descriptor> {
    let json = STANDARD.decode(encoded).ok()?;
    let oci: oci_spec::image::Descriptor = serde_json::from_slice(&json).ok()?;
    Some(Descriptor {
        media_type: oci.media_type().to_string(),
        digest: oci.digest().to_string(),
        size: i64::try_from(oci.size()).unwrap_or(i64::MAX),
        annotations: oci.annotations().clone().unwrap_or_default(),
    })
}

/// What caches are told of the results.
async fn described(refs: &Refs) -> BTreeMap<String, CacheSource> {
    let all: Vec<(String, Arc<LazyRef>)> = match refs {
        Refs::Single(reference) => reference.iter().map(|r| (String::new(), r.clone())).collect(),
        Refs::Map(refs) => refs.iter().filter_map(|(name, r)| Some((name.clone(), r.clone()?))).collect(),
    };
    let mut described = BTreeMap::new();
    for (name, reference) in all {
        described.insert(name, reference.describe().await);
    }
    described
}

async fn built(refs: &Refs) -> Result<Built, BuildError> {
    let get = |reference: Option<Arc<LazyRef>>| async move {
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
