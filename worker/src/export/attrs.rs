//! Attributes of exporters, read once and strictly.

use std::collections::BTreeMap;

use kiln_proto::reference::Reference;

use super::ExportError;
use super::annotations::{Annotation, parse_annotation};
use crate::image::BlobOptions;
use crate::layer::Compression;

/// Which exporter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An image, pushed or not.
    Image,
    /// An OCI layout in a tar.
    Oci,
    /// The same with what `docker load` needs.
    Docker,
    /// Files into a client's directory.
    Local,
    /// Files as a tar.
    Tar,
}

/// Checked attributes.
#[derive(Debug, Clone)]
pub struct Attributes {
    /// Which exporter.
    pub kind: Kind,
    /// Names of the image, as given.
    pub names: Vec<String>,
    /// Push after export.
    pub push: bool,
    /// Push without a tag.
    pub push_by_digest: bool,
    /// Plain HTTP or unchecked certificates are fine.
    pub insecure: bool,
    /// Also name the image by its digest.
    pub name_canonical: bool,
    /// Further name: this prefix with the digest.
    pub dangling_prefix: Option<String>,
    /// The further name is only for images without a name.
    pub dangling_empty_only: bool,
    /// OCI rather than Docker media types.
    pub oci_types: bool,
    /// Into the client's content store rather than as an archive.
    pub into_store: bool,
    /// Form of new layers.
    pub compression: Compression,
    /// Its level.
    pub level: Option<i32>,
    /// Layers in another form are converted.
    pub force: bool,
    /// Times in configs get no later than this: seconds since the epoch.
    pub epoch: Option<i64>,
    /// Also times of files in new layers.
    pub rewrite_timestamp: bool,
    /// Annotations.
    pub(super) annotations: Vec<Annotation>,
    /// Each platform in a directory of its own; `None`: if there are several.
    pub platform_split: Option<bool>,
    /// Put before the names of attestations' files.
    pub attestation_prefix: String,
    /// Attestations of a single image that are inline-only are attached, too.
    pub attestation_inline: bool,
    /// Attestations are artifacts with a subject.
    pub oci_artifact: bool,
    /// Local only: what is not in the result is deleted.
    pub mirror: bool,
    /// Further result metadata that came as attributes.
    pub metadata: BTreeMap<String, Vec<u8>>,
    epoch_given: bool,
}

fn wrong(text: impl Into<String>) -> ExportError {
    ExportError::Attribute(text.into())
}

fn boolean(key: &str, value: &str, empty: bool) -> Result<bool, ExportError> {
    match value {
        "" if empty => Ok(true),
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(wrong(format!("non-bool value {value:?} specified for {key}"))),
    }
}

fn epoch(value: &str) -> Result<Option<i64>, ExportError> {
    if value.is_empty() {
        return Ok(None);
    }
    let seconds = value.parse().map_err(|_| wrong(format!("invalid SOURCE_DATE_EPOCH: {value:?}")))?;
    Ok(Some(seconds))
}

impl Attributes {
    /// In what form layers are wanted.
    pub fn blob_options(&self) -> BlobOptions {
        BlobOptions {
            compression: self.compression,
            level: self.level,
            force: self.force,
            clamp: self.epoch.filter(|_| self.rewrite_timestamp),
            docker_types: !self.oci_types,
        }
    }

    pub(super) fn parse<'a>(
        kind: &str,
        attributes: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<Self, ExportError> {
        let kind = match kind {
            "image" => Kind::Image,
            "oci" => Kind::Oci,
            "docker" => Kind::Docker,
            "local" => Kind::Local,
            "tar" => Kind::Tar,
            other => return Err(wrong(format!("exporter {other:?} could not be found"))),
        };
        let mut out = Self {
            kind,
            names: Vec::new(),
            push: false,
            push_by_digest: false,
            insecure: false,
            name_canonical: false,
            dangling_prefix: None,
            dangling_empty_only: false,
            oci_types: true,
            into_store: false,
            compression: Compression::Gzip,
            level: None,
            force: false,
            epoch: None,
            rewrite_timestamp: false,
            annotations: Vec::new(),
            platform_split: None,
            attestation_prefix: String::new(),
            attestation_inline: kind == Kind::Image,
            oci_artifact: true,
            mirror: false,
            metadata: BTreeMap::new(),
            epoch_given: false,
        };
        let mut sorted: Vec<_> = attributes.into_iter().collect();
        sorted.sort();
        for (key, value) in sorted {
            if key == "source-date-epoch" {
                (out.epoch, out.epoch_given) = (epoch(value)?, true);
                continue;
            }
            match kind {
                Kind::Local | Kind::Tar => out.tree_attribute(key, value)?,
                _ => out.image_attribute(key, value)?,
            }
        }
        out.check()?;
        Ok(out)
    }

    fn tree_attribute(&mut self, key: &str, value: &str) -> Result<(), ExportError> {
        match key {
            "platform-split" => self.platform_split = Some(boolean(key, value, false)?),
            "mode" if self.kind == Kind::Local => match value {
                "" | "copy" => self.mirror = false,
                "delete" => self.mirror = true,
                other => return Err(wrong(format!("invalid mode {other:?} for local exporter"))),
            },
            "attestation-prefix" => self.attestation_prefix = value.to_string(),
            // As other builders: what is meant for another exporter does no harm.
            _ => {}
        }
        Ok(())
    }

    fn image_attribute(&mut self, key: &str, value: &str) -> Result<(), ExportError> {
        let image_only = self.kind == Kind::Image;
        match key {
            "name" => {
                self.names =
                    value.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::to_string).collect();
            }
            "push" if image_only => self.push = boolean(key, value, true)?,
            "push-by-digest" if image_only => self.push_by_digest = boolean(key, value, true)?,
            "registry.insecure" if image_only => self.insecure = boolean(key, value, true)?,
            "name-canonical" if image_only => self.name_canonical = boolean(key, value, true)?,
            "dangling-name-prefix" if image_only => self.dangling_prefix = Some(value.to_string()),
            "danging-name-empty-only" | "dangling-name-empty-only" if image_only => {
                self.dangling_empty_only = boolean(key, value, true)?;
            }
            // Layers are in the snapshot store anyway, and there is no image store beside it.
            "store" | "unpack" if image_only => {
                boolean(key, value, true)?;
            }
            "tar" if !image_only => self.into_store = !boolean(key, value, true)?,
            "dest" if !image_only => {}
            "oci-mediatypes" => self.oci_types = boolean(key, value, false)?,
            "oci-artifact" => self.oci_artifact = boolean(key, value, false)?,
            "attestation-inline" => self.attestation_inline = boolean(key, value, false)?,
            "compression" => {
                self.compression = match value {
                    "gzip" => Compression::Gzip,
                    "zstd" => Compression::Zstd,
                    "uncompressed" => Compression::Uncompressed,
                    "estargz" => return Err(wrong("unsupported: compression estargz")),
                    other => return Err(wrong(format!("unsupported: compression type {other:?}"))),
                };
            }
            "compression-level" => {
                let level =
                    value.parse().map_err(|_| wrong(format!("non-int value {value} specified for {key}")))?;
                self.level = Some(level);
            }
            "force-compression" => self.force = boolean(key, value, false)?,
            "prefer-nondist-layers" => {
                if boolean(key, value, false)? {
                    return Err(wrong("unsupported: exporter attribute prefer-nondist-layers=true"));
                }
            }
            "rewrite-timestamp" => self.rewrite_timestamp = boolean(key, value, false)?,
            "buildinfo" | "buildinfo-attrs" => {}
            _ => {
                if let Some(annotation) = parse_annotation(key, value)? {
                    self.annotations.push(annotation);
                } else {
                    self.metadata.insert(key.to_string(), value.as_bytes().to_vec());
                }
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ExportError> {
        if let Some(level) = self.level
            && self.compression != Compression::Uncompressed
            && !self.compression.levels().contains(&level)
        {
            return Err(wrong(format!(
                "invalid compression level {level} for {}",
                self.compression.as_str()
            )));
        }
        if !self.oci_types && self.annotations.iter().any(|annotation| !annotation.is_manifest()) {
            return Err(wrong("oci-mediatypes=false allows only annotations of manifests"));
        }
        if self.push && self.names.is_empty() {
            return Err(wrong("can't push: the image has no name"));
        }
        if self.push && self.push_by_digest {
            let tagged = |name: &&String| Reference::parse(name).is_ok_and(|name| name.tag().is_some());
            if let Some(name) = self.names.iter().find(tagged) {
                return Err(wrong(format!("can't push tagged ref {name} by digest")));
            }
        }
        if self.rewrite_timestamp && self.epoch_given && self.epoch.is_none() {
            return Err(wrong("rewrite-timestamp needs source-date-epoch"));
        }
        Ok(())
    }

    /// With what the result's metadata says where the attributes are silent.
    pub(super) fn with_metadata(&self, metadata: &BTreeMap<String, Vec<u8>>) -> Result<Self, ExportError> {
        let mut out = self.clone();
        let text = |key: &str| metadata.get(key).map(|value| String::from_utf8_lossy(value).into_owned());
        if !out.epoch_given
            && let Some(value) = text("source.date.epoch")
        {
            out.epoch = epoch(&value)?;
        }
        if out.names.iter().any(|name| name == "*") {
            out.names = text("image.name").unwrap_or_default().split(',').map(str::to_string).collect();
            out.names.retain(|name| !name.is_empty());
        }
        for (key, value) in metadata {
            if let Some(annotation) = parse_annotation(key, &String::from_utf8_lossy(value))? {
                // What was asked for at the command line wins.
                if !out.annotations.iter().any(|given| given.same_key(&annotation)) {
                    out.annotations.push(annotation);
                }
            }
        }
        out.check()?;
        Ok(out)
    }
}
