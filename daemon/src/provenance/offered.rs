//! What frontends claim of their results: in-toto predicates in files, or bundles of whole statements.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use kiln_proto::{gateway, gomode};
use kiln_worker::export::{Attestation, Subject};
use serde::Deserialize;
use serde_json::Value;

use super::Claim;
use crate::engine::files;
use crate::error::BuildError;
use crate::gateway::{BuildResult, Offered};

/// Made by the daemon only.
const PROVENANCE: &str = "https://slsa.dev/provenance/";

/// The claims of a frontend, read from the files that it names.
///
/// # Errors
/// A file is missing or not what it is said to be.
pub(crate) async fn claims(result: &BuildResult) -> Result<Vec<Claim>, BuildError> {
    let mut claims = Vec::new();
    for (platform, all) in &result.attestations {
        let mut made = Vec::new();
        for offered in all {
            made.extend(read(offered).await?);
        }
        // What others are told by comes first.
        made.sort_by_key(|(core, _)| !core);
        claims.extend(
            made.into_iter().map(|(_, attestation)| Claim { platform: platform.clone(), attestation }),
        );
    }
    Ok(claims)
}

/// The attestations of one claim, and whether each is the core of an SBOM.
async fn read(offered: &Offered) -> Result<Vec<(bool, Attestation)>, BuildError> {
    let wire = offered.wire.clone();
    let text = |key: &str| wire.metadata.get(key).map(|value| String::from_utf8_lossy(value).into_owned());
    let core = text("sbom-core").filter(|core| !core.is_empty());
    let inline_only = text("inline-only").is_some_and(|text| text == "true");
    let Some(reference) = &offered.reference else {
        return Err(BuildError::build(format!("attestation {}: no reference", wire.path)));
    };
    let bundle = wire.kind == gateway::AttestationKind::Bundle as i32;
    let path = wire.path.clone();
    let files = reference.read(move |root| match bundle {
        false => Ok(vec![(path.clone(), files::read_file(root, &path, 0, 0)?)]),
        true => {
            let mut files = Vec::new();
            for entry in files::read_dir(root, &path, "")? {
                let file = Path::new(&path).join(OsStr::from_bytes(&entry.path));
                let shown = file.display().to_string();
                if !gomode::is_regular(entry.mode) {
                    return Err(BuildError::build(format!("bundle entry {shown} is not a regular file")));
                }
                files.push((shown, files::read_file(root, &file, 0, 0)?));
            }
            Ok(files)
        }
    });
    let mut made = Vec::new();
    for (path, data) in files.await? {
        let wrong = |text: String| BuildError::build(format!("attestation {path}: {text}"));
        let (predicate_type, predicate, subjects) = if bundle {
            let statement: Statement =
                serde_json::from_slice(&data).map_err(|error| wrong(error.to_string()))?;
            if !wire.in_toto_predicate_type.is_empty()
                && statement.predicate_type != wire.in_toto_predicate_type
            {
                return Err(wrong(format!(
                    "bundle entry {} does not match required predicate type {}",
                    statement.predicate_type, wire.in_toto_predicate_type
                )));
            }
            let subjects = statement.subject.unwrap_or_default().into_iter();
            let subjects =
                subjects.map(|subject| Subject::Other { name: subject.name, digest: subject.digest });
            (statement.predicate_type, statement.predicate, subjects.collect())
        } else {
            let predicate = match data.is_empty() {
                true => Value::Null,
                false => serde_json::from_slice(&data).map_err(|error| wrong(error.to_string()))?,
            };
            let subjects = wire.in_toto_subjects.iter().map(subject).collect();
            (wire.in_toto_predicate_type.clone(), predicate, subjects)
        };
        if predicate_type.starts_with(PROVENANCE) {
            return Err(wrong(format!("{predicate_type} is not a frontend's to make")));
        }
        let file = path.rsplit('/').next().unwrap_or(&path).to_owned();
        let stem = file.split('.').next().unwrap_or(&file);
        let is_core = core.as_deref() == Some(stem);
        made.push((
            is_core,
            Attestation { predicate_type, predicate, subjects, file, inline_only, steps: None },
        ));
    }
    Ok(made)
}

fn subject(wire: &gateway::InTotoSubject) -> Subject {
    if wire.kind == gateway::InTotoSubjectKind::Self_ as i32 {
        return Subject::Itself;
    }
    let digest = wire.digest.iter().filter_map(|digest| digest.split_once(':'));
    Subject::Other {
        name: wire.name.clone(),
        digest: digest.map(|(algorithm, hex)| (algorithm.to_owned(), hex.into())).collect(),
    }
}

#[derive(Deserialize)]
struct Statement {
    #[serde(rename = "predicateType")]
    predicate_type: String,
    #[serde(default)]
    predicate: Value,
    subject: Option<Vec<StatementSubject>>,
}

#[derive(Deserialize)]
struct StatementSubject {
    #[serde(default)]
    name: String,
    #[serde(default)]
    digest: serde_json::Map<String, Value>,
}
