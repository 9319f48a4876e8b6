//! Names of images as Docker writes them: `alpine`, `ghcr.io/a/b:tag`, `name@sha256:…`. Parses and
//! normalises; never contacts a registry.

use std::fmt;
use std::str::FromStr;

const HUB: &str = "docker.io";
const LIBRARY: &str = "library/";
const MAX_NAME: usize = 255;

/// A normalised image name: always with a registry, `library/` added for Docker Hub's own images.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// The text does not follow the grammar.
    #[error("invalid reference format")]
    Format,
    /// Repository names are lower-case.
    #[error("invalid reference format: repository name ({0}) must be lowercase")]
    Uppercase(String),
    /// 64 hex digits are an image id, not a name.
    #[error("invalid repository name ({0}), cannot specify 64-byte hexadecimal strings")]
    Identifier(String),
    /// Longer than 255 characters.
    #[error("repository name must not be more than {MAX_NAME} characters")]
    TooLong,
    /// The part after `@` is no digest.
    #[error("invalid checksum digest format")]
    Digest,
}

impl Reference {
    /// Parses and normalises. Neither tag nor digest is added; see [`Reference::with_default_tag`].
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::Identifier(text.to_string()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                check_digest(digest)?;
                (rest, Some(digest.to_string()))
            }
            None => (text, None),
        };
        let (domain, remainder) = split_domain(rest);
        let (path, tag) = match remainder.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (remainder, None),
        };
        if path.chars().any(char::is_uppercase) {
            return Err(ReferenceError::Uppercase(path.to_string()));
        }
        let path =
            if domain == HUB && !path.contains('/') { format!("{LIBRARY}{path}") } else { path.to_string() };
        if !is_domain(domain) || !path.split('/').all(is_component) || tag.is_some_and(|t| !is_tag(t)) {
            return Err(ReferenceError::Format);
        }
        if domain.len() + 1 + path.len() > MAX_NAME {
            return Err(ReferenceError::TooLong);
        }
        Ok(Self { domain: domain.to_string(), path, tag: tag.map(str::to_string), digest })
    }

    /// The registry's name as in the reference, e.g. `docker.io` or `localhost:5000`.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The host to contact: [`Reference::domain`], except that Docker Hub answers elsewhere.
    pub fn registry_host(&self) -> &str {
        if self.domain == HUB { "registry-1.docker.io" } else { &self.domain }
    }

    /// The repository within the registry, e.g. `library/alpine`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Registry and repository, e.g. `docker.io/library/alpine`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The tag, if one is given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one is given.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// With `latest` as tag if there is neither tag nor digest.
    #[must_use]
    pub fn with_default_tag(mut self) -> Self {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some("latest".to_string());
        }
        self
    }

    /// The same name with this tag.
    pub fn with_tag(mut self, tag: &str) -> Result<Self, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Format);
        }
        self.tag = Some(tag.to_string());
        Ok(self)
    }

    /// The same name and tag with this digest.
    pub fn with_digest(mut self, digest: &str) -> Result<Self, ReferenceError> {
        check_digest(digest)?;
        self.digest = Some(digest.to_string());
        Ok(self)
    }

    /// Without tag and digest.
    #[must_use]
    pub fn without_tag_and_digest(mut self) -> Self {
        self.tag = None;
        self.digest = None;
        self
    }

    /// What a registry is asked for in `/v2/<path>/manifests/<…>`: the digest, else the tag, else `latest`.
    pub fn manifest_name(&self) -> &str {
        self.digest.as_deref().or(self.tag.as_deref()).unwrap_or("latest")
    }

    /// The name without what is implied: `docker.io/library/alpine` is `alpine`. No tag, no digest.
    pub fn familiar_name(&self) -> String {
        if self.domain != HUB {
            return self.name();
        }
        match self.path.strip_prefix(LIBRARY) {
            Some(rest) if !rest.contains('/') => rest.to_string(),
            _ => self.path.clone(),
        }
    }

    /// [`Reference::familiar_name`] with tag and digest.
    pub fn familiar(&self) -> String {
        self.with_suffixes(self.familiar_name())
    }

    fn with_suffixes(&self, mut out: String) -> String {
        if let Some(tag) = &self.tag {
            out.push(':');
            out.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            out.push('@');
            out.push_str(digest);
        }
        out
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.with_suffixes(self.name()))
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        Self::parse(text)
    }
}

/// Checks `algorithm:hex` as images carry it (sha256, sha384, sha512).
pub fn check_digest(digest: &str) -> Result<(), ReferenceError> {
    let (algorithm, value) = digest.split_once(':').ok_or(ReferenceError::Format)?;
    let len = match algorithm {
        "sha256" => 64,
        "sha384" => 96,
        "sha512" => 128,
        _ => return Err(ReferenceError::Digest),
    };
    if value.len() == len && value.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        Ok(())
    } else {
        Err(ReferenceError::Digest)
    }
}

/// The first component is a registry if it looks like a host: a dot, a port, upper case or `localhost`.
fn split_domain(text: &str) -> (&str, &str) {
    match text.split_once('/') {
        Some(("index.docker.io", rest)) => (HUB, rest),
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.chars().any(char::is_uppercase) =>
        {
            (first, rest)
        }
        _ => (HUB, text),
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((host, after)) => {
                if host.is_empty() || !host.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
                    return false;
                }
                ("ipv6", if after.is_empty() { None } else { after.strip_prefix(':').or(Some("")) })
            }
            None => return false,
        },
        None => match domain.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (domain, None),
        },
    };
    let label = |l: &str| {
        !l.is_empty()
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    host.split('.').all(label) && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
}

/// Lower-case letters and digits, joined by one `.`, one or two `_`, or any number of `-`.
fn is_component(component: &str) -> bool {
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let (Some(&first), Some(&last)) = (bytes.first(), bytes.last()) else {
        return false;
    };
    if !alnum(first) || !alnum(last) {
        return false;
    }
    bytes.split(|&b| alnum(b)).filter(|run| !run.is_empty()).all(|run| match run {
        b"." | b"_" | b"__" => true,
        run => run.iter().all(|&b| b == b'-'),
    })
}

fn is_tag(tag: &str) -> bool {
    let mut bytes = tag.bytes();
    tag.len() <= 128
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_normalised_and_made_familiar_again() {
        for (given, full, familiar) in [
            ("alpine", "docker.io/library/alpine", "alpine"),
            ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
            ("docker.io/alpine", "docker.io/library/alpine", "alpine"),
            ("index.docker.io/a/b", "docker.io/a/b", "a/b"),
            ("localhost/a", "localhost/a", "localhost/a"),
            ("localhost:5000/a:b", "localhost:5000/a:b", "localhost:5000/a:b"),
            ("127.0.0.1:5000/x/y", "127.0.0.1:5000/x/y", "127.0.0.1:5000/x/y"),
            ("[::1]:5000/x", "[::1]:5000/x", "[::1]:5000/x"),
            ("ghcr.io/a__b/c--d.e", "ghcr.io/a__b/c--d.e", "ghcr.io/a__b/c--d.e"),
        ] {
            let r = Reference::parse(given).unwrap_or_else(|e| panic!("{given}: {e}"));
            assert_eq!(r.to_string(), full);
            assert_eq!(r.familiar(), familiar);
        }
        let r = Reference::parse(&format!("alpine:x@{DIGEST}")).expect("parses");
        assert_eq!((r.tag(), r.digest(), r.manifest_name()), (Some("x"), Some(DIGEST), DIGEST));
        assert_eq!(r.registry_host(), "registry-1.docker.io");
        assert_eq!(
            Reference::parse("a").expect("parses").with_default_tag().to_string(),
            "docker.io/library/a:latest"
        );
    }

    #[test]
    fn malformed_names_are_refused() {
        for (given, error) in [
            ("Alpine", "invalid reference format: repository name (Alpine) must be lowercase"),
            ("", "invalid reference format"),
            ("a:", "invalid reference format"),
            ("a//b", "invalid reference format"),
            ("-a", "invalid reference format"),
            ("a___b", "invalid reference format"),
            ("a@sha256:12", "invalid checksum digest format"),
            ("a b", "invalid reference format"),
            ("../x", "invalid reference format"),
        ] {
            assert_eq!(Reference::parse(given).map_err(|e| e.to_string()), Err(error.to_string()), "{given}");
        }
        assert!(Reference::parse(&"a".repeat(64)).is_err());
        assert!(Reference::parse(&format!("x.io/{}", "a".repeat(300))).is_err());
    }
}
