//! `--build-context NAME=VALUE`: directories, images, git repositories and files that a Dockerfile can refer to by name.

use std::path::PathBuf;

use kiln_proto::reference::{Reference, check_digest};
use kiln_session::client::{ContentDir, SharedDir};
use kiln_session::new_id;

use crate::error::CliError;
use crate::inputs;

/// A named context.
#[derive(Debug)]
pub(crate) struct NamedContext {
    name: String,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// What the daemon fetches: an image, a git repository, a file.
    Remote(String),
    Directory(PathBuf),
    /// An image of a layout on disk, which the session calls `store`.
    Layout {
        store: String,
        path: PathBuf,
        tag: String,
        digest: String,
    },
}

/// Begins a flag's value that names an image of a layout on disk.
const LAYOUT: &str = "oci-layout://";

/// `DIR[:TAG][@DIGEST]`: the directory, the tag and the digest, which the layout's index may know.
fn layout(value: &str) -> Result<(PathBuf, String, String), CliError> {
    let (place, digest) = match value.split_once('@') {
        Some((place, digest)) => (place, Some(digest.to_owned())),
        None => (value, None),
    };
    let (dir, tag) = match place.rsplit_once(':') {
        Some((dir, tag)) if !tag.contains('/') => (dir, tag),
        _ => (place, "latest"),
    };
    let path = PathBuf::from(dir);
    inputs::directory(&path, "read image layout")?;
    let digest = match digest {
        Some(digest) => digest,
        None => crate::layout::tagged(&path, tag).ok_or_else(|| {
            CliError::usage(format!("{LAYOUT}{value}: the layout has no image with the tag {tag}"))
        })?,
    };
    check_digest(&digest).map_err(|error| CliError::usage(format!("{LAYOUT}{value}: {error}")))?;
    Ok((path, tag.to_owned(), digest))
}

/// Reads the flags.
pub(crate) fn parse(flags: &[String]) -> Result<Vec<NamedContext>, CliError> {
    flags.iter().map(|flag| NamedContext::parse(flag)).collect()
}

impl NamedContext {
    fn parse(flag: &str) -> Result<Self, CliError> {
        let invalid =
            |why: &dyn std::fmt::Display| CliError::usage(format!("invalid --build-context {flag:?}: {why}"));
        let (name, value) = flag.split_once('=').ok_or_else(|| invalid(&"expected NAME=VALUE"))?;
        // Looked up by the name that a user would write for an image.
        let parsed = Reference::parse(name).map_err(|error| invalid(&error))?;
        let familiar = parsed.familiar();
        let name = familiar.strip_suffix(":latest").unwrap_or(&familiar).to_owned();
        let path = PathBuf::from(value);
        let remote = !path.exists() && inputs::is_remote(value).map_err(|error| invalid(&error))?;
        if remote || value.starts_with("docker-image://") {
            return Ok(Self { name, kind: Kind::Remote(value.to_owned()) });
        }
        if let Some(value) = value.strip_prefix(LAYOUT) {
            let (path, tag, digest) = layout(value)?;
            return Ok(Self { name, kind: Kind::Layout { store: new_id(), path, tag, digest } });
        }
        if value.contains("://") && !path.exists() {
            return Err(CliError::usage(format!(
                "unsupported: --build-context {flag:?} (give a directory, docker-image://NAME, oci-layout://DIR:TAG or a URL)"
            )));
        }
        inputs::directory(&path, "read build context")?;
        Ok(Self { name, kind: Kind::Directory(path) })
    }

    /// What the session calls the directory; the main ones keep their names.
    fn local(&self) -> String {
        match self.name.as_str() {
            "context" | "dockerfile" => format!("_{}", self.name),
            name => name.to_owned(),
        }
    }

    /// The frontend's options.
    pub(crate) fn attrs(&self) -> Vec<(String, String)> {
        let key = format!("context:{}", self.name);
        match &self.kind {
            Kind::Remote(value) => vec![(key, value.clone())],
            Kind::Layout { store, tag, digest, .. } => {
                vec![(key, format!("{LAYOUT}{store}:{tag}@{digest}"))]
            }
            Kind::Directory(path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                let base = path.file_name().map(|base| base.to_string_lossy().into_owned());
                let hint = (format!("sharedkey:localdir:{}", self.name), base.unwrap_or_default());
                vec![(key, format!("local:{}", self.local())), hint]
            }
        }
    }

    /// The image layout to share, if it is one.
    pub(crate) fn store(&self) -> Option<ContentDir> {
        match &self.kind {
            Kind::Layout { store, path, .. } => {
                Some(ContentDir { name: format!("oci:{store}"), path: path.clone() })
            }
            Kind::Remote(_) | Kind::Directory(_) => None,
        }
    }

    /// The directory to share, if it is one.
    pub(crate) fn shared(&self) -> Option<SharedDir> {
        match &self.kind {
            Kind::Remote(_) | Kind::Layout { .. } => None,
            Kind::Directory(path) => Some(SharedDir { name: self.local(), path: path.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        let one = |flag: &str| NamedContext::parse(flag);
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().display();
        let found = one(&format!("docker.io/library/base:latest={path}")).expect("a directory");
        assert_eq!(found.attrs()[0], ("context:base".to_owned(), "local:base".to_owned()));
        assert_eq!(found.shared().expect("shared").path, dir.path());
        assert_eq!(one(&format!("context={path}")).expect("a directory").attrs()[0].1, "local:_context");
        let image = one("alpine=docker-image://alpine:3").expect("an image");
        assert_eq!(image.attrs(), [("context:alpine".to_owned(), "docker-image://alpine:3".to_owned())]);
        assert!(image.shared().is_none());
        let repository = one("x=https://example.org/x.git").expect("a repository");
        assert_eq!(repository.attrs(), [("context:x".to_owned(), "https://example.org/x.git".to_owned())]);
        for (flag, want) in [
            ("x", "expected NAME=VALUE"),
            ("X=/", "must be lowercase"),
            ("x=/nonexistent/directory", "/nonexistent/directory"),
            ("x=/dev/null", "is not a directory"),
            ("x=https://example.org/x.git?y=z", "unexpected query"),
            ("x=oci-layout:///nonexistent/layout", "/nonexistent/layout"),
            ("x=ipfs://layout", "unsupported: --build-context"),
        ] {
            let error = one(flag).expect_err(flag).to_string();
            assert!(error.contains(want), "{flag}: {error}");
        }
    }
}
