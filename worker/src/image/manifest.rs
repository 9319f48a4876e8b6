//! What manifests, indexes and configs say.

use kiln_proto::pb;
use oci_spec::image::{ImageIndex, ImageManifest, Platform};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::ImageError;
use crate::registry::{INDEX_DOCKER, INDEX_OCI, MANIFEST_DOCKER, MANIFEST_OCI};

/// A manifest or an index.
pub(crate) enum Document {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

/// Reads a document by its media type; one without a media type is told by its fields.
pub(crate) fn parse(reference: &str, media_type: &str, bytes: &[u8]) -> Result<Document, ImageError> {
    let bad = |e: serde_json::Error| ImageError::image(reference, format!("malformed manifest: {e}"));
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    let index = match media_type {
        INDEX_OCI | INDEX_DOCKER => true,
        MANIFEST_OCI | MANIFEST_DOCKER => false,
        other => {
            let value: Value = serde_json::from_slice(bytes).map_err(bad)?;
            if value["manifests"].is_array() {
                true
            } else if value["config"].is_object() && value["layers"].is_array() {
                false
            } else if value["schemaVersion"] == 1 {
                return Err(ImageError::image(reference, "unsupported: image manifest schema 1"));
            } else {
                return Err(ImageError::image(reference, format!("unsupported: manifest of type {other:?}")));
            }
        }
    };
    Ok(if index {
        Document::Index(Box::new(serde_json::from_slice(bytes).map_err(bad)?))
    } else {
        Document::Manifest(Box::new(serde_json::from_slice(bytes).map_err(bad)?))
    })
}

/// The platform of a descriptor in LLB's form, normalised.
pub fn platform_of(platform: &Platform) -> pb::Platform {
    let plain = pb::Platform {
        os: platform.os().to_string(),
        architecture: platform.architecture().to_string(),
        variant: platform.variant().clone().unwrap_or_default(),
        os_version: platform.os_version().clone().unwrap_or_default(),
        os_features: platform.os_features().clone().unwrap_or_default(),
    };
    kiln_proto::platform::normalized(&plain)
}

/// Diff ids of an image config, bottom first.
pub fn diff_ids(config: &[u8]) -> Result<Vec<String>, serde_json::Error> {
    let value: Value = serde_json::from_slice(config)?;
    let ids = value["rootfs"]["diff_ids"].as_array();
    Ok(ids.into_iter().flatten().filter_map(|id| id.as_str().map(str::to_string)).collect())
}

/// Chain ids of layers with these diff ids, bottom first.
pub fn chain_ids(diff_ids: &[String]) -> Vec<String> {
    let mut chain: Vec<String> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => format!("sha256:{}", hex::encode(Sha256::digest(format!("{below} {diff_id}")))),
        };
        chain.push(next);
    }
    chain
}
