//! Where the files of a result came from.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kiln_proto::llb::Loaded;
use kiln_proto::pb;
use kiln_proto::reference::Reference;
use kiln_solver::explain::VertexExplanation;
use kiln_worker::export::package_url;
use serde_json::{Value, json};

use crate::gateway::Bridge;

/// Something that was read, by where it came from and what it was.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Material {
    /// Images come first, then git, then http.
    kind: Kind,
    pub(super) uri: String,
    /// Algorithm and hex digits.
    pub(super) digest: Option<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Image,
    Git,
    Http,
}

impl Material {
    pub(super) fn json(&self) -> Value {
        let mut value = json!({"uri": self.uri});
        if let Some(digest) = self.digests() {
            value["digest"] = digest;
        }
        value
    }

    pub(super) fn digests(&self) -> Option<Value> {
        self.digest.as_ref().map(|(algorithm, hex)| json!({algorithm: hex}))
    }
}

/// What definitions take in.
#[derive(Clone)]
pub(super) struct Sources<'a> {
    explained: &'a [VertexExplanation],
    places: std::sync::Arc<HashMap<&'a str, usize>>,
    pub(super) materials: BTreeSet<Material>,
    /// Names of clients' directories.
    pub(super) locals: BTreeSet<String>,
    /// Ids, and whether the step does without.
    pub(super) secrets: BTreeMap<String, bool>,
    pub(super) ssh: BTreeMap<String, bool>,
    /// A step could reach the network, and so what nobody knows of.
    pub(super) network: bool,
    /// A source whose content is not known by a digest.
    pub(super) unknown: bool,
}

/// The digest `algorithm:hex` in two parts.
fn split(digest: &str) -> Option<(String, String)> {
    digest.split_once(':').map(|(algorithm, hex)| (algorithm.to_owned(), hex.to_owned()))
}

impl<'a> Sources<'a> {
    /// Nothing yet; `explained` knows what the build's sources turned out to be.
    pub(super) fn new(explained: &'a [VertexExplanation]) -> Self {
        let places = explained.iter().enumerate().map(|(at, vertex)| (&*vertex.vertex, at)).collect();
        Self {
            explained,
            places: std::sync::Arc::new(places),
            materials: BTreeSet::new(),
            locals: BTreeSet::new(),
            secrets: BTreeMap::new(),
            ssh: BTreeMap::new(),
            network: false,
            unknown: false,
        }
    }

    /// Adds what a definition takes in.
    pub(super) fn add(&mut self, loaded: &Loaded, bridge: &Bridge) {
        use pb::op::Op;
        for vertex in &loaded.vertices {
            match &vertex.op.op {
                Some(Op::Source(source)) => {
                    self.source(&vertex.digest, source, vertex.op.platform.as_ref(), bridge);
                }
                Some(Op::Exec(exec)) => self.exec(exec),
                _ => {}
            }
        }
    }

    fn exec(&mut self, exec: &pb::ExecOp) {
        self.network |= exec.network != pb::NetMode::None as i32;
        let note = |into: &mut BTreeMap<String, bool>, id: &str, optional: bool| {
            // Where one step needs it, the build does.
            let known = into.entry(id.to_owned()).or_insert(true);
            *known &= optional;
        };
        for mount in &exec.mounts {
            if let Some(secret) = &mount.secret_opt {
                note(&mut self.secrets, &secret.id, secret.optional);
            }
            if let Some(ssh) = &mount.ssh_opt {
                let id = if ssh.id.is_empty() { "default" } else { &ssh.id };
                note(&mut self.ssh, id, ssh.optional);
            }
        }
        for secret in &exec.secretenv {
            note(&mut self.secrets, &secret.id, secret.optional);
        }
    }

    /// A part of what a vertex was found to depend on.
    fn part(&self, vertex: &str, names: &[&str]) -> Option<String> {
        let parts = self.explained[*self.places.get(vertex)?].map.as_ref()?.parts.list();
        names.iter().find_map(|name| Some(parts.iter().find(|(part, _)| part == name)?.1.clone()))
    }

    fn source(
        &mut self,
        vertex: &str,
        source: &pb::SourceOp,
        platform: Option<&pb::Platform>,
        bridge: &Bridge,
    ) {
        let Some((scheme, rest)) = source.identifier.split_once("://") else { return };
        let material = match scheme {
            "local" => {
                self.locals.insert(rest.to_owned());
                return;
            }
            "docker-image" | "oci-layout" => {
                let Ok(reference) = Reference::parse(rest) else { return };
                let digest = self.part(vertex, &["base image digest"]);
                let digest = digest.or(reference.digest().map(str::to_owned));
                let host = kiln_proto::platform::host();
                let platform = platform.unwrap_or(&host);
                let mut uri = package_url(&as_asked(reference, bridge), Some(platform));
                if scheme == "oci-layout" {
                    uri = uri.replacen("pkg:docker/", "pkg:oci/", 1);
                }
                Material { kind: Kind::Image, uri, digest: digest.as_deref().and_then(split) }
            }
            "git" => {
                let commit = self.part(vertex, &["commit", "object"]);
                let algorithm = |commit: &String| if commit.len() == 64 { "sha256" } else { "sha1" };
                let remote = source.attrs.get("git.fullurl").map_or(rest, String::as_str);
                let remote = remote.split('#').next().unwrap_or(remote);
                let reference = rest.split_once('#').map(|(_, reference)| reference).unwrap_or_default();
                let reference = reference.split(':').next().unwrap_or_default();
                let hash = if reference.is_empty() { "" } else { "#" };
                Material {
                    kind: Kind::Git,
                    uri: redacted(&format!("{remote}{hash}{reference}")),
                    digest: commit.map(|commit| (algorithm(&commit).to_owned(), commit)),
                }
            }
            "http" | "https" => Material {
                kind: Kind::Http,
                uri: redacted(&source.identifier),
                digest: self.part(vertex, &["content"]).as_deref().and_then(split),
            },
            _ => return,
        };
        self.unknown |= material.digest.is_none();
        self.materials.insert(material);
    }

    /// Nothing came from where it can't be looked up again.
    pub(super) fn complete(&self) -> bool {
        self.locals.is_empty() && !self.network && !self.unknown
    }

    /// What a URL was found to be.
    pub(super) fn find(&self, url: &str) -> Option<&Material> {
        let mut url = redacted(url);
        // A context may be a directory of a repository.
        let subdirectory = url.split_once('#').and_then(|(_, reference)| reference.split_once(':'));
        if let Some((_, subdirectory)) = subdirectory {
            url.truncate(url.len() - subdirectory.len() - 1);
        }
        self.materials.iter().find(|material| material.kind != Kind::Image && material.uri == url)
    }
}

/// A frontend pins the tags that it resolves; the user asked for the tag.
fn as_asked(reference: Reference, bridge: &Bridge) -> Reference {
    let (Some(tag), Some(digest)) = (reference.tag(), reference.digest()) else { return reference };
    let Ok(tagged) = reference.clone().without_tag_and_digest().with_tag(tag) else { return reference };
    match bridge.resolved(&tagged.to_string(), digest) {
        true => tagged,
        false => reference,
    }
}

/// A URL without what may be secret.
pub(super) fn redacted(url: &str) -> String {
    const MASK: &str = "xxxxx";
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let Some((user, host)) = rest[..end].rsplit_once('@') else { return url.to_owned() };
    let masked = match user.split_once(':') {
        Some(("", _)) => format!(":{MASK}"),
        Some(_) => format!("{MASK}:{MASK}"),
        None if user.is_empty() => String::new(),
        None => MASK.to_owned(),
    };
    format!("{scheme}://{masked}@{host}{}", &rest[end..])
}

#[cfg(test)]
mod tests {
    #[test]
    fn secrets_of_urls_are_masked() {
        let redacted = super::redacted;
        assert_eq!(redacted("https://u:p@h.invalid/r.git#b"), "https://xxxxx:xxxxx@h.invalid/r.git#b");
        assert_eq!(redacted("https://token@h/r"), "https://xxxxx@h/r");
        assert_eq!(redacted("https://h/r?mail=a@b"), "https://h/r?mail=a@b");
        assert_eq!(redacted("not a url"), "not a url");
    }
}
