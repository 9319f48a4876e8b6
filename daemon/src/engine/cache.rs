//! Caches elsewhere: what clients ask for, checked before a build starts; reading them for the solver, and writing
//! what a build can tell.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kiln_cache::Ref;
use kiln_proto::control;
use kiln_proto::reference::Reference;
use kiln_solver::export::ExportVertex;
use kiln_solver::progress::VertexProgress;
use kiln_worker::export::Exporter;
use kiln_worker::image::{Access, BlobOptions, ClientStore};
use kiln_worker::remotecache::{Form, Mode, Place, collect, read, write};
use tonic::Code;

use super::EngineBuild;
use super::export::failed;
use crate::error::BuildError;
use crate::gateway::{CacheEntry, text_digest};

/// What a cache can be told of one result and of all that it was made from.
pub(crate) type CacheSource = Vec<ExportVertex<Ref>>;

/// The caches that a build is to be written to.
#[derive(Debug, Default)]
pub(crate) struct CachePlan {
    /// Into the configs of images.
    pub(crate) inline: bool,
    /// Elsewhere.
    pub(crate) remote: Vec<PlannedCache>,
}

/// One cache to be written.
#[derive(Debug)]
pub(crate) struct PlannedCache {
    target: Target,
    mode: Mode,
    form: Form,
    options: BlobOptions,
    /// A failure does not fail the build.
    pub(crate) ignore_error: bool,
}

#[derive(Debug)]
enum Target {
    Registry { reference: Reference, insecure: bool },
    Local { dest: String },
}

fn invalid(text: impl Into<String>) -> BuildError {
    BuildError::new(Code::InvalidArgument, text)
}

type Attrs = HashMap<String, String>;

fn boolean(attrs: &Attrs, key: &str) -> Result<Option<bool>, BuildError> {
    match attrs.get(key).map(String::as_str) {
        None => Ok(None),
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
        Some(other) => Err(invalid(format!("failed to parse {key}: invalid value {other:?}"))),
    }
}

fn reference(attrs: &BTreeMap<&str, &str>) -> Result<Reference, BuildError> {
    let text = attrs.get("ref").copied().unwrap_or_default();
    let reference = Reference::parse(text);
    Ok(reference
        .map_err(|error| invalid(format!("failed to parse ref {text:?}: {error}")))?
        .with_default_tag())
}

fn view<'a>(attrs: impl IntoIterator<Item = (&'a String, &'a String)>) -> BTreeMap<&'a str, &'a str> {
    attrs.into_iter().map(|(key, value)| (key.as_str(), value.as_str())).collect()
}

impl CachePlan {
    /// Checks the caches of a request.
    ///
    /// # Errors
    /// One comes twice, is not known, or its attributes make no sense or ask for what is not there.
    pub(crate) fn new(entries: &[control::CacheOptionsEntry]) -> Result<Self, BuildError> {
        let mut plan = Self::default();
        let mut seen: Vec<(String, BTreeMap<&str, &str>)> = Vec::new();
        for entry in entries {
            let kind = entry.r#type.as_str();
            if kind == "inline" {
                plan.inline = true;
                continue;
            }
            let attrs = view(&entry.attrs);
            let identity = match attrs.get("ref").filter(|_| kind == "registry") {
                Some(reference) => (kind.to_owned(), BTreeMap::from([("ref", *reference)])),
                None => (kind.to_owned(), attrs.clone()),
            };
            if seen.contains(&identity) {
                let text = format!("duplicate cache exports [{kind} {:?}]", identity.1);
                return Err(invalid(text));
            }
            seen.push(identity);
            plan.remote.push(PlannedCache::new(kind, &entry.attrs)?);
        }
        Ok(plan)
    }

    /// True if nothing is to be written.
    pub(crate) fn is_empty(&self) -> bool {
        !self.inline && self.remote.is_empty()
    }
}

impl PlannedCache {
    fn new(kind: &str, attrs: &Attrs) -> Result<Self, BuildError> {
        let all = view(attrs);
        let target = match kind {
            "registry" => {
                let insecure = boolean(attrs, "registry.insecure")?.unwrap_or_default();
                Target::Registry { reference: reference(&all)?, insecure }
            }
            "local" => match all.get("dest").copied().unwrap_or_default() {
                "" => return Err(invalid("local cache exporter requires dest")),
                dest => Target::Local { dest: dest.to_owned() },
            },
            "gha" | "s3" | "azblob" => {
                return Err(BuildError::unsupported(format_args!("cache export of type {kind}")));
            }
            other => return Err(invalid(format!("unknown cache exporter: {other:?}"))),
        };
        let oci_types = boolean(attrs, "oci-mediatypes")?.unwrap_or(true);
        let image_manifest = boolean(attrs, "image-manifest")?.unwrap_or(oci_types);
        if image_manifest && !oci_types {
            return Err(invalid(
                "invalid configuration for remote cache, OCI mediatypes are required for image-manifest cache format",
            ));
        }
        let mode = match all.get("mode").copied() {
            Some("max") => Mode::Max,
            Some("min") | None => Mode::Min,
            Some(other) => {
                tracing::debug!(mode = other, "unsupported cache export mode: taken for min");
                Mode::Min
            }
        };
        // They mean the same as for images.
        let forms = ["compression", "compression-level", "force-compression"];
        let forms = attrs.iter().filter(|(key, _)| forms.contains(&key.as_str()));
        let options = Exporter::new("oci", forms).map_err(failed)?.attributes().blob_options();
        let options = BlobOptions { docker_types: !oci_types, ..options };
        let ignore_error = boolean(attrs, "ignore-error").ok().flatten().unwrap_or_default();
        Ok(Self { target, mode, form: Form { oci_types, image_manifest }, options, ignore_error })
    }

    /// What progress streams call it.
    pub(crate) fn title(&self) -> &'static str {
        match &self.target {
            Target::Registry { .. } => "exporting cache to registry",
            Target::Local { .. } => "exporting cache to client directory",
        }
    }
}

/// How a cache to be imported is called.
pub(crate) fn import_id(entry: &CacheEntry) -> String {
    match entry.attrs.get("ref").filter(|_| entry.kind == "registry") {
        Some(reference) => reference.clone(),
        None => {
            let text: String = entry.attrs.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
            let digest = text_digest(&text);
            format!("{}:{}", entry.kind, digest.trim_start_matches("sha256:"))
        }
    }
}

impl EngineBuild {
    /// Has the solver look into a cache.
    ///
    /// # Errors
    /// It is not there, can't be had, or makes no sense.
    pub(crate) async fn import(
        &self,
        entry: &CacheEntry,
        progress: &VertexProgress,
    ) -> Result<(), BuildError> {
        let attrs = view(&entry.attrs);
        let place = match entry.kind.as_str() {
            "registry" => {
                let insecure =
                    attrs.get("registry.insecure").is_some_and(|value| *value == "true" || *value == "1");
                Place::Registry { reference: reference(&attrs)?, insecure }
            }
            "local" => {
                let given = |key: &str| attrs.get(key).copied().filter(|value| !value.is_empty());
                let digest = given("digest");
                let digest =
                    digest.ok_or_else(|| invalid("local cache importer requires explicit digest"))?;
                let store = given("src").ok_or_else(|| invalid("local cache importer requires src"))?;
                self.local(store, Some(digest.to_owned())).await?
            }
            "gha" | "s3" | "azblob" | "inline" => {
                return Err(BuildError::unsupported(format_args!("cache import of type {}", entry.kind)));
            }
            other => return Err(invalid(format!("unknown cache importer: {other}"))),
        };
        let worker = self.worker.worker();
        let credentials = self.worker.credentials().clone();
        let access = Access { credentials, progress: Some(progress.clone()) };
        let caches = read(worker.images(), &place, &access).await;
        for cache in caches.map_err(|error| BuildError::build(error.to_string()))? {
            self.build.import(Arc::new(cache));
        }
        Ok(())
    }

    /// A content store of the client.
    async fn local(&self, store: &str, digest: Option<String>) -> Result<Place, BuildError> {
        if self.session.is_empty() {
            return Err(BuildError::build("local cache exporter/importer requires session"));
        }
        let store = ClientStore::new(self.attached().await?, format!("local:{store}"));
        Ok(Place::Client { store, digest })
    }

    /// Writes what can be told of results; gives the entries of the response.
    ///
    /// # Errors
    /// What could not be written.
    pub(crate) async fn export_cache(
        &self,
        planned: &PlannedCache,
        sources: &[CacheSource],
        progress: &VertexProgress,
    ) -> Result<BTreeMap<String, String>, BuildError> {
        let context = self.export_context(progress);
        let place = match &planned.target {
            Target::Registry { reference, insecure } => {
                Place::Registry { reference: reference.clone(), insecure: *insecure }
            }
            Target::Local { dest } => self.local(dest, None).await?,
        };
        let preparing = progress.status("preparing build cache for export", "", 0);
        let collected = collect(&context, sources, planned.mode, planned.options).await.map_err(failed)?;
        preparing.done();
        let sending = progress.status("sending cache export", "", 0);
        let response = write(&context, &place, planned.form, &collected).await.map_err(failed)?;
        sending.done();
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, attrs: &[(&str, &str)]) -> control::CacheOptionsEntry {
        let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        control::CacheOptionsEntry { r#type: kind.to_owned(), attrs }
    }

    fn refused(entries: &[control::CacheOptionsEntry]) -> String {
        CachePlan::new(entries).expect_err("refused").message
    }

    #[test]
    fn plans() {
        let registry = |attrs: &[(&str, &str)]| {
            let attrs: Vec<_> = [("ref", "example.com/a")].iter().chain(attrs).copied().collect();
            entry("registry", &attrs)
        };
        let plan =
            CachePlan::new(&[entry("inline", &[]), entry("inline", &[]), registry(&[("mode", "max")])]);
        let plan = plan.expect("a second inline is dropped");
        assert!(plan.inline && plan.remote.len() == 1);
        assert_eq!(plan.remote[0].mode, Mode::Max);
        assert_eq!(plan.remote[0].form, Form { oci_types: true, image_manifest: true });
        let plan = CachePlan::new(&[registry(&[("oci-mediatypes", "false")])]).expect("valid");
        assert_eq!(plan.remote[0].form, Form { oci_types: false, image_manifest: false });
        assert!(
            refused(&[registry(&[]), registry(&[("mode", "max")])]).starts_with("duplicate cache exports [")
        );
        let both = registry(&[("oci-mediatypes", "false"), ("image-manifest", "true")]);
        assert!(refused(&[both]).contains("OCI mediatypes are required"));
        assert_eq!(refused(&[entry("s3", &[])]), "unsupported: cache export of type s3");
        assert_eq!(refused(&[entry("x", &[])]), "unknown cache exporter: \"x\"");
        assert_eq!(refused(&[entry("local", &[])]), "local cache exporter requires dest");
        assert!(refused(&[entry("registry", &[])]).contains("ref"));
        assert!(refused(&[registry(&[("compression", "lzw")])]).contains("lzw"));
    }
}
