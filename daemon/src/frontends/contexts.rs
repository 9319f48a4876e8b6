//! Where the frontend's files come from: directories of the client, and definitions that came with
//! the request. Named contexts that are no images are found here, too; `remote` knows what is at URLs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_dockerfile::{ContextSource, NamedContext};
use kiln_proto::reference::Reference;
use kiln_proto::{llb, pattern, pb};
use serde_json::json;

use super::remote;
use crate::engine::files;
use crate::error::BuildError;
use crate::gateway::{Bridge, FrontendRequest, LazyRef};
use crate::policy::LAYOUT;

/// Keeps files of a context out of the build.
const IGNORE_FILE: &str = ".dockerignore";

/// The contexts of a request.
#[derive(Clone, Copy)]
pub(super) struct Contexts<'a> {
    pub(super) bridge: &'a Arc<Bridge>,
    pub(super) request: &'a FrontendRequest,
    /// All that was taken into the build to be read.
    pub(super) read: &'a Mutex<Vec<Arc<LazyRef>>>,
}

/// Some files of a client's directory.
pub(super) struct Fetched {
    /// `None` if there are none.
    pub(super) reference: Option<Arc<LazyRef>>,
    pub(super) definition: pb::Definition,
    /// Digest of the vertex that fetched them.
    pub(super) vertex: String,
}

impl Contexts<'_> {
    /// Takes a definition into the build whose files will be read.
    pub(super) async fn solve(&self, definition: pb::Definition) -> Result<Option<Arc<LazyRef>>, BuildError> {
        let reference = self.bridge.solve(definition).await?;
        self.read.lock().unwrap_or_else(PoisonError::into_inner).extend(reference.clone());
        Ok(reference)
    }

    /// The session that serves a directory.
    pub(super) fn session(&self, name: &str) -> String {
        match self.request.opts.get(&format!("local-sessionid:{name}")) {
            Some(id) => id.clone(),
            None => self.bridge.session().to_owned(),
        }
    }

    /// Fetches `wanted` of a client's directory; `title` is shown.
    pub(super) async fn fetch(
        &self,
        local: &str,
        wanted: &[String],
        hint: &str,
        title: &str,
    ) -> Result<Fetched, BuildError> {
        let attrs = [
            ("local.differ", "none".to_owned()),
            ("local.followpaths", json!(wanted).to_string()),
            ("local.session", self.session(local)),
            ("local.sharedkeyhint", hint.to_owned()),
        ];
        let (definition, vertex) = Self::local_source(local, attrs, title);
        let reference = self.solve(definition.clone()).await?;
        Ok(Fetched { reference, definition, vertex })
    }

    /// The definition of a client's directory, and its vertex, which is shown as `title`. Attributes without a value are
    /// left out: without a session it is whichever the build has.
    pub(super) fn local_source(
        local: &str,
        attrs: impl IntoIterator<Item = (&'static str, String)>,
        title: &str,
    ) -> (pb::Definition, String) {
        let attrs = attrs.into_iter().filter(|(_, value)| !value.is_empty());
        let op = pb::Op {
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: format!("local://{local}"),
                attrs: attrs.map(|(key, value)| (key.to_owned(), value)).collect(),
            })),
            ..pb::Op::default()
        };
        let mut builder = llb::Builder::new();
        let vertex = builder.add(&op, named(title));
        (builder.finish(&pb::Input { digest: vertex.clone(), index: 0 }), vertex)
    }

    /// The ignore file of a client's directory, if there is one.
    pub(super) async fn ignore_file(
        &self,
        local: &str,
        hint: &str,
        title: &str,
    ) -> Result<Option<Vec<u8>>, BuildError> {
        let hint = format!("{hint}-{IGNORE_FILE}");
        let title = format!("{title} load {IGNORE_FILE}");
        match self.fetch(local, &[IGNORE_FILE.to_owned()], &hint, &title).await?.reference {
            Some(reference) => {
                reference.read(|root| optional(files::read_file(root, IGNORE_FILE, 0, 0))).await
            }
            None => Ok(None),
        }
    }

    /// What the value of a named context stands for, unless it is an image of a registry.
    pub(super) async fn named(
        &self,
        key: &str,
        value: &str,
        platform: &pb::Platform,
    ) -> Result<NamedContext, BuildError> {
        let Some((kind, name)) = value.split_once(':') else {
            return Err(BuildError::build(format!("invalid context specifier {value} for {key}")));
        };
        if let Some(definition) = remote::source(key, value)? {
            return Ok(NamedContext {
                source: ContextSource::Definition(definition),
                ignore_patterns: None,
                config: None,
            });
        }
        match kind {
            "local" => self.named_directory(key, name).await,
            "input" => self.named_input(key, name),
            "git" => Err(BuildError::build(format!("invalid git context {value}"))),
            "oci-layout" => self.named_layout(key, name.trim_start_matches('/'), platform).await,
            _ => Err(BuildError::build(format!("unsupported context source {kind} for {key}"))),
        }
    }

    async fn named_directory(&self, key: &str, local: &str) -> Result<NamedContext, BuildError> {
        let hint = format!("context:{key}");
        let ignore = self.ignore_file(local, &hint, &format!("[context {key}]")).await?;
        let shared = self.request.opts.get(&format!("sharedkey:localdir:{key}"));
        Ok(NamedContext {
            source: ContextSource::Local {
                name: local.to_owned(),
                session: self.session(local),
                shared_key_hint: format!("{hint}-{}", shared.map_or("", String::as_str)),
            },
            ignore_patterns: ignore.map(|bytes| pattern::parse_ignore_file(&bytes)),
            config: None,
        })
    }

    /// `STORE[:TAG]@DIGEST`: an image in a content store of the client.
    async fn named_layout(
        &self,
        key: &str,
        image: &str,
        platform: &pb::Platform,
    ) -> Result<NamedContext, BuildError> {
        let invalid = |error: &dyn std::fmt::Display| {
            BuildError::build(format!("could not parse oci-layout reference {image:?}: {error}"))
        };
        let Some((store, digest)) = image.split_once('@') else {
            return Err(BuildError::build(format!("oci-layout reference {image:?} has no digest")));
        };
        let store = match store.rsplit_once(':') {
            Some((store, tag)) if !tag.contains('/') => store,
            _ => store,
        };
        // Shown in place of the store, whose name means nothing to people.
        let name = key.split("::").next().unwrap_or(key);
        let reference = Reference::parse(name).and_then(|reference| reference.with_digest(digest));
        let reference = reference.map_err(|error| invalid(&error))?;
        let attrs = [("oci.session", self.bridge.session()), ("oci.store", store)];
        let source = pb::SourceOp {
            identifier: format!("{LAYOUT}{reference}"),
            attrs: attrs.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        };
        let log_name = format!("[context {key}] load metadata for {reference}");
        let (_, found) = self.bridge.resolve_image(source.clone(), platform, "", &log_name, &[]).await?;
        let op = pb::Op {
            op: Some(pb::op::Op::Source(source)),
            platform: Some(platform.clone()),
            ..pb::Op::default()
        };
        let mut builder = llb::Builder::new();
        let digest = builder.add(&op, named(&format!("[context {key}] OCI load from client")));
        let definition = builder.finish(&pb::Input { digest, index: 0 });
        Ok(NamedContext {
            source: ContextSource::Definition(definition),
            ignore_patterns: None,
            config: Some(found.config),
        })
    }

    fn named_input(&self, key: &str, input: &str) -> Result<NamedContext, BuildError> {
        let Some(definition) = self.request.inputs.get(input) else {
            return Err(BuildError::build(format!("invalid input {input} for {key}")));
        };
        let mut config = None;
        if let Some(metadata) = self.request.opts.get(&format!("input-metadata:{input}")) {
            let invalid = |error: &dyn std::fmt::Display| {
                BuildError::build(format!("failed to parse input metadata {metadata}: {error}"))
            };
            let fields: HashMap<String, String> =
                serde_json::from_str(metadata).map_err(|error| invalid(&error))?;
            if let Some(encoded) = fields.get("containerimage.config") {
                config = Some(STANDARD.decode(encoded).map_err(|error| invalid(&error))?);
            }
        }
        Ok(NamedContext {
            source: ContextSource::Definition(definition.clone()),
            ignore_patterns: None,
            config,
        })
    }
}

/// Metadata of a vertex that is shown as `title`.
pub(super) fn named(title: &str) -> pb::OpMetadata {
    pb::OpMetadata {
        description: [(llb::CUSTOM_NAME.to_owned(), title.to_owned())].into(),
        ..pb::OpMetadata::default()
    }
}

pub(super) fn is_missing(error: &BuildError) -> bool {
    error.message.ends_with("no such file or directory")
}

/// `None` if the file is not there.
pub(super) fn optional(read: Result<Vec<u8>, BuildError>) -> Result<Option<Vec<u8>>, BuildError> {
    match read {
        Ok(data) => Ok(Some(data)),
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}
