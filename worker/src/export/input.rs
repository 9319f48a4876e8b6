//! What a build hands to its exporters.

use std::collections::BTreeMap;

use kiln_cache::Ref;
use kiln_proto::{pb, platform};
use kiln_solver::export::ExportVertex;
use serde::Deserialize;

use super::{Attestation, ExportError};

/// A result: one file system, or one for each platform.
#[derive(Debug, Clone, Default)]
pub struct ExportInput {
    /// The file systems, in the order of `refs.platforms`.
    pub targets: Vec<ExportTarget>,
    /// The result came as a map of platforms, even if of one.
    pub is_map: bool,
    /// Metadata of the result.
    pub metadata: BTreeMap<String, Vec<u8>>,
}

/// One platform's part.
#[derive(Debug, Clone)]
pub struct ExportTarget {
    /// Platform id as in `refs.platforms`; empty for a single result without it.
    pub id: String,
    /// The platform, if the result says so.
    pub platform: Option<pb::Platform>,
    /// Its file system.
    pub result: Ref,
    /// Its image config.
    pub config: Option<Vec<u8>>,
    /// Config of the image that it was built on.
    pub base_config: Option<Vec<u8>>,
    /// What is claimed of it.
    pub attestations: Vec<Attestation>,
    /// What its image tells builders who use it as a cache, if that is wanted.
    pub cache: Option<Vec<ExportVertex<Ref>>>,
}

#[derive(Deserialize)]
struct RefsPlatforms {
    #[serde(rename = "Platforms")]
    platforms: Option<Vec<RefPlatform>>,
}

#[derive(Deserialize)]
struct RefPlatform {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Platform")]
    platform: JsonPlatform,
}

#[derive(Deserialize)]
struct JsonPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
    #[serde(default, rename = "os.version")]
    os_version: String,
}

const PLATFORMS: &str = "refs.platforms";
const CONFIG: &str = "containerimage.config";
const BASE_CONFIG: &str = "containerimage.base.config";

impl ExportInput {
    /// A result of one file system.
    pub fn single(result: Ref, metadata: BTreeMap<String, Vec<u8>>) -> Result<Self, ExportError> {
        let described = platforms(&metadata)?;
        let (id, platform) = match described.into_iter().next() {
            Some((id, platform)) => (id, Some(platform)),
            None => (String::new(), None),
        };
        let target = target(id, platform, result, &metadata);
        Ok(Self { targets: vec![target], is_map: false, metadata })
    }

    /// A result of one file system for each platform id.
    pub fn map(
        mut refs: BTreeMap<String, Ref>,
        metadata: BTreeMap<String, Vec<u8>>,
    ) -> Result<Self, ExportError> {
        let described = platforms(&metadata)?;
        if described.is_empty() {
            return Err(ExportError::Input(
                "unable to export multiple refs, missing platforms mapping".to_string(),
            ));
        }
        let mut targets = Vec::new();
        for (id, platform) in described {
            let result = refs
                .remove(&id)
                .ok_or_else(|| ExportError::Input(format!("failed to find ref for ID {id}")))?;
            targets.push(target(id, Some(platform), result, &metadata));
        }
        if let Some(id) = refs.keys().next() {
            return Err(ExportError::Input(format!("result for {id} has no entry in {PLATFORMS}")));
        }
        Ok(Self { targets, is_map: true, metadata })
    }
}

fn target(
    id: String,
    platform: Option<pb::Platform>,
    result: Ref,
    metadata: &BTreeMap<String, Vec<u8>>,
) -> ExportTarget {
    let get = |key: &str| metadata.get(&format!("{key}/{id}")).or_else(|| metadata.get(key)).cloned();
    let (config, base_config) = (get(CONFIG), get(BASE_CONFIG));
    ExportTarget { config, base_config, id, platform, result, attestations: Vec::new(), cache: None }
}

fn platforms(metadata: &BTreeMap<String, Vec<u8>>) -> Result<Vec<(String, pb::Platform)>, ExportError> {
    let Some(json) = metadata.get(PLATFORMS) else { return Ok(Vec::new()) };
    let invalid = |text: String| ExportError::Input(format!("{text} ({PLATFORMS})"));
    let parsed: Option<RefsPlatforms> =
        serde_json::from_slice(json).map_err(|e| invalid(format!("malformed platforms: {e}")))?;
    let entries = parsed.and_then(|parsed| parsed.platforms).unwrap_or_default();
    if entries.is_empty() {
        return Err(invalid("invalid empty platforms index for exporter".to_string()));
    }
    let entries = entries.into_iter().map(|RefPlatform { id, platform: stated }| {
        if id.is_empty() {
            return Err(invalid("invalid empty platform key for exporter".to_string()));
        }
        if stated.os.is_empty() || stated.architecture.is_empty() {
            return Err(invalid(format!("invalid platform value of {id:?}: it needs os and architecture")));
        }
        let plain = pb::Platform {
            os: stated.os,
            architecture: stated.architecture,
            variant: stated.variant,
            os_version: stated.os_version,
            os_features: Vec::new(),
        };
        Ok((id, platform::normalized(&plain)))
    });
    entries.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_that_name_nothing_are_refused() {
        let refused = |json: &str| {
            let metadata = BTreeMap::from([(PLATFORMS.to_string(), json.as_bytes().to_vec())]);
            ExportInput::single(None, metadata).err().map(|error| error.to_string()).unwrap_or_default()
        };
        for empty in ["null", "{}", r#"{"Platforms":null}"#, r#"{"Platforms":[]}"#] {
            assert!(refused(empty).starts_with("invalid empty platforms index for exporter"), "{empty}");
        }
        let entry = |id: &str| format!(r#"{{"Platforms":[{{"ID":"{id}","Platform":{{"os":"linux"}}}}]}}"#);
        assert!(refused(&entry("")).starts_with("invalid empty platform key for exporter"));
        assert!(refused(&entry("foo")).starts_with("invalid platform value of \"foo\""));
        assert!(refused("[").starts_with("malformed platforms"));
    }
}
