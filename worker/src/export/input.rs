//! What a build hands to its exporters.

use std::collections::BTreeMap;

use kiln_cache::Ref;
use kiln_proto::{pb, platform};
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
}

#[derive(Deserialize)]
struct RefsPlatforms {
    #[serde(rename = "Platforms", default)]
    platforms: Vec<RefPlatform>,
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
    ExportTarget { config, base_config, id, platform, result, attestations: Vec::new() }
}

fn platforms(metadata: &BTreeMap<String, Vec<u8>>) -> Result<Vec<(String, pb::Platform)>, ExportError> {
    let Some(json) = metadata.get(PLATFORMS) else { return Ok(Vec::new()) };
    let parsed: RefsPlatforms = serde_json::from_slice(json)
        .map_err(|e| ExportError::Input(format!("malformed {PLATFORMS}: {e}")))?;
    Ok(parsed
        .platforms
        .into_iter()
        .map(|entry| {
            let plain = pb::Platform {
                os: entry.platform.os,
                architecture: entry.platform.architecture,
                variant: entry.platform.variant,
                os_version: entry.platform.os_version,
                os_features: Vec::new(),
            };
            (entry.id, platform::normalized(&plain))
        })
        .collect())
}
