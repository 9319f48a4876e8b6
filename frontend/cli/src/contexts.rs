//! `--build-context NAME=VALUE`: directories, images, git repositories and files that a Dockerfile can refer to by name.

use std::path::PathBuf;

use kiln_proto::reference::Reference;
use kiln_session::client::SharedDir;

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
        if value.contains("://") && !path.exists() {
            return Err(CliError::usage(format!(
                "unsupported: --build-context {flag:?} (give a directory, docker-image://NAME or a URL)"
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
            Kind::Directory(path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                let base = path.file_name().map(|base| base.to_string_lossy().into_owned());
                let hint = (format!("sharedkey:localdir:{}", self.name), base.unwrap_or_default());
                vec![(key, format!("local:{}", self.local())), hint]
            }
        }
    }

    /// The directory to share, if it is one.
    pub(crate) fn shared(&self) -> Option<SharedDir> {
        match &self.kind {
            Kind::Remote(_) => None,
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
            ("x=oci-layout:///layout", "unsupported: --build-context"),
        ] {
            let error = one(flag).expect_err(flag).to_string();
            assert!(error.contains(want), "{flag}: {error}");
        }
    }
}
