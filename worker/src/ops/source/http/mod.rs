//! The http and https sources: a URL's content as the only file of a snapshot.
//!
//! The key is what came, not where from: the content must be here, or be promised by a checksum, before it is known.
//! A file that was fetched earlier is fetched again only if the server does not confirm it by its entity tag. What a
//! server answers is asked once in a build: what a policy was shown is what is built.

mod metadata;
mod names;
pub(super) mod notes;
mod save;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use dashmap::DashMap;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use kiln_cache::Ref;
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError};
use kiln_solver::progress::VertexProgress;
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_DISPOSITION, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_NONE_MATCH, LAST_MODIFIED, USER_AGENT,
};
use reqwest::{Method, Response, StatusCode};
use tokio::sync::OnceCell;
use url::Url;

use crate::ops::keys::KeyBuilder;
use crate::ops::{BuildContext, SessionGroup};
use crate::registry::http::{self, IDLE};
use crate::worker::Worker;
use notes::Note;
use save::Body;

/// Secrets that hold what a host is to be sent: the whole header, or a token.
const HEADER_SECRET: &str = "HTTP_AUTH_HEADER_";
const TOKEN_SECRET: &str = "HTTP_AUTH_TOKEN_";
/// Host name that stands for the client, which uploads what it was given on its standard input.
const CLIENT: &str = "buildkit-session";
/// Headers that a definition may set; others are left out, as BuildKit does.
const HEADERS: [&str; 2] = ["accept", "user-agent"];
/// Some servers answer by what asks; they know BuildKit.
const USER_AGENT_VALUE: &str = concat!("kiln/", env!("CARGO_PKG_VERSION"), " (buildkit/v0.31)");
const DEFAULT_MODE: u32 = 0o600;

pub(super) struct HttpSource {
    worker: Arc<Worker>,
    sessions: SessionGroup,
    url: Url,
    checksum: Option<String>,
    name: String,
    mode: u32,
    uid: u32,
    gid: u32,
    auth_secret: String,
    headers: BTreeMap<String, String>,
    resolved: Arc<OnceCell<Resolved>>,
}

/// What URLs stand for in one build: once asked, the answer stays.
#[derive(Clone, Default)]
pub struct HttpAnswers(Arc<DashMap<String, Arc<OnceCell<Resolved>>>>);

/// What the URL's content is.
pub(crate) struct Resolved {
    digest: String,
    name: String,
    modified: Option<u64>,
    /// Absent while it is only promised.
    file: Option<Ref>,
}

/// A number as Go reads literals: decimal, or by its prefix octal, hexadecimal or binary.
fn number(op: &pb::SourceOp, attr: &str) -> Result<Option<u32>, OpError> {
    let Some(text) = op.attrs.get(attr).filter(|text| !text.is_empty()) else { return Ok(None) };
    let lower = text.to_ascii_lowercase();
    let prefixes = [("0x", 16), ("0b", 2), ("0o", 8), ("0", 8)];
    let (digits, radix) = prefixes
        .into_iter()
        .find_map(|(prefix, radix)| Some((lower.strip_prefix(prefix)?, radix)))
        .filter(|(digits, _)| !digits.is_empty())
        .unwrap_or((&lower, 10));
    let parsed = u32::from_str_radix(digits, radix);
    parsed.map(Some).map_err(|err| OpError::new(format!("invalid {attr} {text:?}: {err}")))
}

/// An entity tag without the mark that it is weak: what it compares by.
fn entity_tag(response: &Response) -> Option<String> {
    let tag = response.headers().get(ETAG)?.to_str().ok()?;
    Some(tag.strip_prefix("W/").unwrap_or(tag).to_owned()).filter(|tag| !tag.is_empty())
}

fn header<'a>(response: &'a Response, name: &HeaderName) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// A date of HTTP in seconds since 1970. Some servers give the zone that is meant its other name.
fn seconds(date: &str) -> Option<u64> {
    let date = date.strip_suffix("UTC").map_or(Cow::from(date), |date| format!("{date}GMT").into());
    let time = httpdate::parse_http_date(&date).ok()?;
    Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

impl HttpSource {
    pub(super) fn new(
        worker: Arc<Worker>,
        context: &BuildContext,
        op: &pb::SourceOp,
    ) -> Result<Self, OpError> {
        let url = Url::parse(&op.identifier)
            .map_err(|err| OpError::new(format!("invalid URL {:?}: {err}", op.identifier)))?;
        if ["http.sig.pubkey", "http.sig.signature"].iter().any(|attr| op.attrs.contains_key(*attr)) {
            return Err(OpError::new("unsupported: signature verification of http sources"));
        }
        let attr = |key: &str| op.attrs.get(key).cloned().unwrap_or_default();
        let checksum = Some(attr("http.checksum")).filter(|checksum| !checksum.is_empty());
        if let Some(checksum) = &checksum {
            kiln_proto::reference::check_digest(checksum).map_err(|err| OpError::new(err.to_string()))?;
            if !checksum.starts_with("sha256:") {
                return Err(OpError::new(format!("unsupported: http checksum {checksum}")));
            }
        }
        let headers = op.attrs.iter().filter_map(|(name, value)| {
            let name = name.strip_prefix("http.header.")?.to_ascii_lowercase();
            HEADERS.contains(&name.as_str()).then(|| (name, value.clone()))
        });
        let mut source = Self {
            worker,
            sessions: context.sessions.clone(),
            checksum,
            name: attr("http.filename"),
            mode: number(op, "http.perm")?.filter(|mode| *mode != 0).unwrap_or(DEFAULT_MODE),
            uid: number(op, "http.uid")?.unwrap_or(0),
            gid: number(op, "http.gid")?.unwrap_or(0),
            auth_secret: attr("http.authheadersecret"),
            headers: headers.collect(),
            url,
            resolved: Arc::default(),
        };
        let key = format!("{} {}", source.request_key(), source.checksum.as_deref().unwrap_or_default());
        source.resolved = context.http.0.entry(key).or_default().value().clone();
        Ok(source)
    }

    /// The URL as messages show it: without what may be secret.
    fn shown(&self) -> String {
        let mut url = self.url.clone();
        // Only URLs without a host refuse.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_query(None);
        url.set_fragment(None);
        url.to_string()
    }

    fn failed(&self, err: impl std::fmt::Display) -> OpError {
        OpError::new(format!("{}: {err}", self.shown()))
    }

    /// All that decides what a server answers, and how the file looks.
    fn request_key(&self) -> String {
        let mut key = KeyBuilder::new("kiln.http.request.v1");
        key.part("url", self.url.as_str());
        self.describe(&mut key);
        key.part("name", &self.name);
        key.finish(Vec::new(), false).digest.to_hex().to_string()
    }

    fn describe(&self, key: &mut KeyBuilder<'_>) {
        key.part("mode", format!("{:o}", self.mode));
        key.part("owner", format!("{}:{}", self.uid, self.gid));
        key.part("secret", &self.auth_secret);
        for (name, value) in &self.headers {
            key.part(format!("header {name}"), value);
        }
    }

    async fn request_headers(&self) -> Result<HeaderMap, OpError> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
        for (name, value) in &self.headers {
            let name = HeaderName::try_from(name).map_err(|err| self.failed(err))?;
            let value = HeaderValue::try_from(value)
                .map_err(|_| self.failed(format!("invalid value of header {name}")))?;
            headers.insert(name, value);
        }
        if let Some(value) = self.authorization().await? {
            headers.insert(AUTHORIZATION, value);
        }
        Ok(headers)
    }

    /// From the secret that the definition names, else from one for the host if the client has it.
    async fn authorization(&self) -> Result<Option<HeaderValue>, OpError> {
        let secret = |id: String| async move {
            let found = self.sessions.secret(&id).await?;
            Ok::<_, OpError>(found.map(|value| (id, value)))
        };
        let found = if self.auth_secret.is_empty() {
            let host = self.url.host_str().unwrap_or_default();
            match secret(format!("{TOKEN_SECRET}{host}")).await {
                Ok(Some((id, token))) => Some((id, [b"Bearer ", &token[..]].concat())),
                // A client without secrets says so by an error.
                _ => secret(format!("{HEADER_SECRET}{host}")).await.unwrap_or_default(),
            }
        } else {
            let id = &self.auth_secret;
            let failed = |why: &str| self.failed(format!("failed to retrieve HTTP auth secret {id}: {why}"));
            let found = secret(id.clone()).await.map_err(|err| failed(&err.message))?;
            Some(found.ok_or_else(|| failed("not found"))?)
        };
        let Some((id, value)) = found else { return Ok(None) };
        let mut value = HeaderValue::from_bytes(value.trim_ascii_end())
            .map_err(|_| self.failed(format!("secret {id} can't be sent as a header")))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn send(&self, method: Method, headers: &HeaderMap) -> Result<Response, OpError> {
        let client = self.worker.web.for_url(&self.url).map_err(|err| self.failed(err))?;
        let sending = client.request(method, self.url.clone()).headers(headers.clone()).send();
        match tokio::time::timeout(IDLE, sending).await {
            Ok(answer) => answer.map_err(|err| self.failed(http::chain(err))),
            Err(_) => Err(self.failed(format!("no answer for {} s", IDLE.as_secs()))),
        }
    }

    async fn resolve(&self, progress: &VertexProgress) -> Result<&Resolved, OpError> {
        let resolve = || async {
            if self.url.host_str() == Some(CLIENT) {
                return self.upload(progress).await;
            }
            match &self.checksum {
                Some(checksum) => Ok(Resolved {
                    digest: checksum.clone(),
                    name: names::file_name(&self.url, &self.name, None),
                    modified: None,
                    file: None,
                }),
                None => self.revalidate(progress).await,
            }
        };
        self.resolved.get_or_try_init(resolve).await
    }

    /// The file of an earlier build if the server confirms it, else the file as it is now.
    async fn revalidate(&self, progress: &VertexProgress) -> Result<Resolved, OpError> {
        let mut headers = self.request_headers().await?;
        let store = self.worker.store();
        let known = notes::load(store, &self.request_key()).map_err(|err| self.failed(err))?;
        let Some((note, snapshot)) = known else {
            return self.receive(progress, self.send(Method::GET, &headers).await?).await;
        };
        let tag = HeaderValue::try_from(&note.etag).map_err(|err| self.failed(err))?;
        headers.insert(IF_NONE_MATCH, tag);
        let same = |answer: &Response| match (answer.status(), entity_tag(answer)) {
            (StatusCode::NOT_MODIFIED, None) => true,
            (StatusCode::OK | StatusCode::NOT_MODIFIED, Some(tag)) => tag == note.etag,
            _ => false,
        };
        // Some servers send tags and don't compare them, so they are compared here, before a body is sent.
        let mut confirmed = self.send(Method::HEAD, &headers).await.is_ok_and(|answer| same(&answer));
        if !confirmed {
            let answer = self.send(Method::GET, &headers).await?;
            if answer.status() != StatusCode::NOT_MODIFIED {
                return self.receive(progress, answer).await;
            }
            confirmed = same(&answer);
        }
        if !confirmed {
            return Err(self.failed("the server confirms a content that it was not asked for"));
        }
        let Note { digest, name, modified, .. } = note;
        Ok(Resolved { digest, name, modified, file: Some(Some(snapshot)) })
    }

    /// The file as it is now.
    async fn fetch(&self, progress: &VertexProgress) -> Result<Resolved, OpError> {
        let headers = self.request_headers().await?;
        self.receive(progress, self.send(Method::GET, &headers).await?).await
    }

    /// What the client sends. It can do so once.
    async fn upload(&self, progress: &VertexProgress) -> Result<Resolved, OpError> {
        let mut refused = self.failed("the client uploads nothing");
        for session in self.sessions.attached(None).await? {
            match session.upload(CLIENT, self.url.path()).await {
                Ok(stream) => {
                    let name = names::file_name(&self.url, &self.name, None);
                    let stream = stream.map_err(|status| status.message().to_owned()).boxed();
                    return self.store(progress, Body::Upload(stream), name, None, 0).await;
                }
                Err(err) => refused = self.failed(err),
            }
        }
        Err(refused)
    }

    /// Stores the file and remembers how to ask whether it changed.
    async fn receive(&self, progress: &VertexProgress, response: Response) -> Result<Resolved, OpError> {
        if !response.status().is_success() {
            return Err(self.failed(format!("invalid response status {}", response.status().as_u16())));
        }
        let name = names::file_name(&self.url, &self.name, header(&response, &CONTENT_DISPOSITION));
        let modified = header(&response, &LAST_MODIFIED).and_then(seconds);
        let etag = entity_tag(&response);
        let size = response.content_length().and_then(|size| i64::try_from(size).ok()).unwrap_or(0);
        let resolved = self.store(progress, Body::Answer(response), name, modified, size).await?;
        if let (Some(etag), Some(file)) = (etag, &resolved.file) {
            let Resolved { digest, name, .. } = &resolved;
            let note = Note { etag, digest: digest.clone(), name: name.clone(), modified };
            let saved = notes::save(self.worker.store(), &self.request_key(), &note, file);
            saved.map_err(|err| self.failed(err))?;
        }
        Ok(resolved)
    }

    async fn store(
        &self,
        progress: &VertexProgress,
        body: Body,
        name: String,
        modified: Option<u64>,
        size: i64,
    ) -> Result<Resolved, OpError> {
        let status = progress.status(&name, "downloading", size);
        let saved = save::receive(&self.worker, body, &name, status).await;
        let saved = saved.map_err(|err| self.failed(err))?;
        let digest = saved.digest.clone();
        if let Some(expected) = self.checksum.as_ref().filter(|expected| **expected != digest) {
            return Err(self.failed(format!("digest mismatch {digest}: {expected}")));
        }
        let attributes = save::Attributes {
            name: name.clone(),
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            // Without a date it is the same each time.
            modified: modified.unwrap_or(0),
        };
        let description = format!("http url {}", self.shown());
        let file = save::commit(&self.worker, saved, attributes, description).await;
        let file = file.map_err(|err| self.failed(err))?;
        Ok(Resolved { digest, name, modified, file: Some(file) })
    }
}

impl Op<Ref> for HttpSource {
    fn cache_map<'a>(&'a self, ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        Box::pin(async move {
            let resolved = self.resolve(&ctx.progress).await?;
            let mut key = KeyBuilder::new("kiln.http.v1");
            key.part("content", &resolved.digest);
            key.part("name", &resolved.name);
            if let Some(modified) = resolved.modified {
                key.part("modified", modified.to_string());
            }
            self.describe(&mut key);
            key.note("url", self.shown());
            Ok(key.finish(Vec::new(), true))
        })
    }

    fn execute<'a>(
        &'a self,
        ctx: &'a OpContext,
        _inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            let resolved = self.resolve(&ctx.progress).await?;
            if let Some(file) = &resolved.file {
                return Ok(vec![file.clone()]);
            }
            Ok(vec![self.fetch(&ctx.progress).await?.file.flatten()])
        })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_have_three_forms() {
        for date in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 UTC",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(seconds(date), Some(784_111_777), "{date}");
        }
        assert_eq!(seconds("yesterday"), None);
    }

    #[test]
    fn numbers_are_read_as_go_reads_them() {
        let read = |text: &str| {
            let attrs = [("http.perm".to_owned(), text.to_owned())].into();
            number(&pb::SourceOp { identifier: String::new(), attrs }, "http.perm").ok().flatten()
        };
        for (text, value) in [
            ("0644", Some(0o644)),
            ("0o741", Some(0o741)),
            ("420", Some(420)),
            ("0x1f", Some(31)),
            ("0", Some(0)),
        ] {
            assert_eq!(read(text), value, "{text}");
        }
        assert_eq!(read("rw"), None);
        assert_eq!(read("-1"), None);
    }
}
