//! The exporters of a request: one step of progress for each, their answers merged into the
//! response.

use std::collections::HashMap;
use std::sync::Arc;

use kiln_proto::control::{Exporter, SolveRequest};
use kiln_proto::{pb, platform};
use serde_json::Value;

use crate::engine::{EngineBuild, ExportJob, ExportTarget};
use crate::error::BuildError;
use crate::gateway::{BuildResult, LazyRef, Refs, text_digest};
use crate::jobs::Job;
use crate::progress::Step;

/// What the progress calls an exporter.
fn title(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "image" => "exporting to image",
        "oci" => "exporting to oci image format",
        "docker" => "exporting to docker image format",
        "local" => "exporting to client directory",
        "tar" => "exporting to client tarball",
        _ => return None,
    })
}

/// Refuses exporters that do not exist, before anything is built for them.
pub(super) fn check(exporters: &[Exporter]) -> Result<(), BuildError> {
    match exporters.iter().find(|exporter| title(&exporter.r#type).is_none()) {
        Some(exporter) => Err(BuildError::build(format!("exporter {:?} could not be found", exporter.r#type))),
        None => Ok(()),
    }
}

/// Runs all exporters of a request, one after the other.
pub(super) async fn run(
    build: &Arc<EngineBuild>,
    job: &Job,
    request: &SolveRequest,
    result: &BuildResult,
    response: &mut HashMap<String, String>,
) -> Result<(), BuildError> {
    if request.exporters.is_empty() {
        return Ok(());
    }
    let targets = targets(result).await?;
    for (index, exporter) in request.exporters.iter().enumerate() {
        let name = title(&exporter.r#type).unwrap_or_default();
        let digest = text_digest(&format!("{}-export-{index}", request.session));
        let step = Step::start(job.progress.clone(), &digest, name);
        let export = ExportJob {
            index,
            kind: &exporter.r#type,
            attrs: &exporter.attrs,
            targets: &targets,
            is_map: matches!(result.refs, Refs::Map(_)),
            metadata: &result.metadata,
        };
        let answer = build.export(export, step.progress()).await;
        step.end(answer.as_ref().err().map(|error| error.message.as_str()));
        response.extend(answer?);
    }
    Ok(())
}

/// The file systems with what is known of them, built.
async fn targets(result: &BuildResult) -> Result<Vec<ExportTarget>, BuildError> {
    let listed = platforms(result)?;
    let meta = |key: &str, id: &str| match &result.refs {
        Refs::Single(_) => result.metadata.get(key).cloned(),
        Refs::Map(_) => result.metadata.get(&format!("{key}/{id}")).cloned(),
    };
    let mut targets = Vec::new();
    for (id, platform, reference) in arrange(result, listed)? {
        targets.push(ExportTarget {
            config: meta("containerimage.config", &id),
            base_config: meta("containerimage.base.config", &id),
            epoch: meta("source.date.epoch", &id),
            result: match reference {
                Some(reference) => reference.get().await?,
                None => None,
            },
            id,
            platform,
        });
    }
    Ok(targets)
}

type Arranged = Vec<(String, Option<pb::Platform>, Option<Arc<LazyRef>>)>;

/// References in the order of the platform list.
fn arrange(result: &BuildResult, listed: Vec<(String, pb::Platform)>) -> Result<Arranged, BuildError> {
    match &result.refs {
        Refs::Single(reference) => {
            let (id, platform) = match listed.into_iter().next() {
                Some((id, platform)) => (id, Some(platform)),
                None => (String::new(), None),
            };
            Ok(vec![(id, platform, reference.clone())])
        }
        Refs::Map(refs) => {
            if listed.len() != refs.len() {
                return Err(BuildError::build("number of platforms does not match the number of references"));
            }
            listed
                .into_iter()
                .map(|(id, platform)| match refs.get(&id) {
                    Some(reference) => Ok((id, Some(platform), reference.clone())),
                    None => Err(BuildError::build(format!("failed to find ref for ID {id}"))),
                })
                .collect()
        }
    }
}

/// The list that frontends leave under `refs.platforms`.
fn platforms(result: &BuildResult) -> Result<Vec<(String, pb::Platform)>, BuildError> {
    let Some(bytes) = result.metadata.get("refs.platforms") else { return Ok(Vec::new()) };
    let malformed = || BuildError::build("failed to parse platforms passed to the exporter");
    let value: Value = serde_json::from_slice(bytes).map_err(|_| malformed())?;
    let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let list = value["Platforms"].as_array().ok_or_else(malformed)?;
    list.iter()
        .map(|entry| {
            let platform = &entry["Platform"];
            let mut platform = pb::Platform {
                architecture: text(platform, "architecture"),
                os: text(platform, "os"),
                variant: text(platform, "variant"),
                os_version: text(platform, "os.version"),
                os_features: platform["os.features"]
                    .as_array()
                    .map(|list| list.iter().filter_map(|f| f.as_str().map(str::to_owned)).collect())
                    .unwrap_or_default(),
            };
            platform::normalize(&mut platform);
            let id = text(entry, "ID");
            if id.is_empty() { Err(malformed()) } else { Ok((id, platform)) }
        })
        .collect()
}
