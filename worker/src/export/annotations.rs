//! Annotations: keys `annotation[-TYPE][\[PLATFORM\]].NAME`, from exporter attributes and result metadata.

use std::collections::BTreeMap;

use kiln_proto::{pb, platform};

use super::ExportError;

/// Where an annotation goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Manifest,
    ManifestDescriptor,
    Index,
    IndexDescriptor,
}

/// One annotation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Annotation {
    place: Place,
    platform: Option<pb::Platform>,
    name: String,
    value: String,
}

impl Annotation {
    pub(super) fn is_manifest(&self) -> bool {
        self.place == Place::Manifest
    }

    pub(super) fn same_key(&self, other: &Self) -> bool {
        (self.place, &self.platform, &self.name) == (other.place, &other.platform, &other.name)
    }
}

/// Reads a key; `None` if it is none of an annotation.
pub(super) fn parse_annotation(key: &str, value: &str) -> Result<Option<Annotation>, ExportError> {
    let Some(rest) = key.strip_prefix("annotation") else { return Ok(None) };
    let Some(end) = rest.find(['[', '.']) else { return Ok(None) };
    let place = match &rest[..end] {
        "" | "-manifest" => Place::Manifest,
        "-manifest-descriptor" => Place::ManifestDescriptor,
        "-index" => Place::Index,
        "-index-descriptor" => Place::IndexDescriptor,
        other if other.starts_with('-') => {
            return Err(ExportError::Attribute(format!("unrecognized annotation type {:?}", &other[1..])));
        }
        _ => return Ok(None),
    };
    let rest = &rest[end..];
    let bad = || ExportError::Attribute(format!("malformed annotation key {key:?}"));
    let (platform, rest) = match rest.strip_prefix('[') {
        Some(rest) => {
            let (text, rest) = rest.split_once(']').ok_or_else(bad)?;
            let parsed = platform::parse(text)
                .map_err(|e| ExportError::Attribute(format!("annotation key {key:?}: {e}")))?;
            (Some(parsed), rest)
        }
        None => (None, rest),
    };
    let name = rest.strip_prefix('.').filter(|name| !name.is_empty()).ok_or_else(bad)?;
    if platform.is_some() && matches!(place, Place::Index | Place::IndexDescriptor) {
        return Err(ExportError::Attribute(format!("annotation key {key:?}: an index has no platform")));
    }
    Ok(Some(Annotation { place, platform, name: name.to_string(), value: value.to_string() }))
}

/// The annotations of one place, for one platform.
pub(super) fn annotations_at(
    all: &[Annotation],
    place: Place,
    wanted: Option<&pb::Platform>,
) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    // Those for all platforms first: those for this one overwrite them.
    for specific in [false, true] {
        for annotation in all.iter().filter(|a| a.place == place && a.platform.is_some() == specific) {
            let fits = match (&annotation.platform, wanted) {
                (None, _) => true,
                (Some(given), Some(wanted)) => platform::same(given, wanted),
                (Some(_), None) => false,
            };
            if fits {
                found.insert(annotation.name.clone(), annotation.value.clone());
            }
        }
    }
    found
}

/// Refuses annotations that have no place in this result.
pub(super) fn check(
    all: &[Annotation],
    is_index: bool,
    platforms: &[pb::Platform],
) -> Result<(), ExportError> {
    for annotation in all {
        if !is_index && matches!(annotation.place, Place::Index | Place::IndexDescriptor) {
            return Err(ExportError::Attribute(
                "index annotations not supported for single platform export".to_string(),
            ));
        }
        if let Some(platform) = &annotation.platform
            && !platforms.iter().any(|known| platform::same(known, platform))
        {
            return Err(ExportError::Attribute(format!(
                "annotation for platform {}, which is not part of the result",
                platform::format(platform)
            )));
        }
    }
    Ok(())
}
