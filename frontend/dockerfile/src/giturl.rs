//! Git repositories as ADD and build contexts name them: `git@host:path`, `ssh://`, `git://`, `https://….git`, with
//! `#ref:subdir` or a query.

use std::collections::{BTreeMap, HashMap, HashSet};

use kiln_proto::{llb, pattern, pb};

use crate::gofmt;

/// A git repository and what of it is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct GitUrl {
    /// What git is given.
    pub(crate) remote: String,
    host: String,
    path: String,
    reference: String,
    subdir: String,
    pub(crate) ssh: bool,
    pub(crate) checksum: String,
    pub(crate) keep_git_dir: Option<bool>,
    pub(crate) submodules: Option<bool>,
    pub(crate) mtime: String,
    pub(crate) fetch_by_commit: bool,
}

/// A build context that is a git repository: its source operation and the metadata of the vertex. `None` if the text
/// names none. `attrs` are the frontend's: what they ask for, the text may ask for by itself.
///
/// # Errors
/// What is wrong with the text.
pub fn git_context(
    text: &str,
    attrs: &HashMap<String, String>,
) -> Result<Option<(pb::Op, pb::OpMetadata)>, String> {
    let Some(mut git) = GitUrl::parse_context(text)? else { return Ok(None) };
    let arg = |name: &str| attrs.get(&format!("build-arg:{name}")).map_or("", String::as_str);
    if gofmt::parse_bool(arg("BUILDKIT_CONTEXT_KEEP_GIT_DIR")) == Some(true) {
        git.keep_git_dir = Some(true);
    }
    if git.mtime.is_empty() && !arg("SOURCE_DATE_EPOCH").is_empty() {
        git.mtime = "commit".to_owned();
    }
    let (source, caps) = git.source();
    let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
    let title = format!("[internal] load git source {text}");
    let metadata = pb::OpMetadata {
        description: [(llb::CUSTOM_NAME.to_owned(), title)].into(),
        caps: caps.into_iter().map(|cap| (cap.to_owned(), true)).collect(),
        ..pb::OpMetadata::default()
    };
    Ok(Some((op, metadata)))
}

/// The address of the git repository that a text names, without what of it is wanted; `None` if it names none.
pub fn git_remote(text: &str) -> Option<String> {
    GitUrl::parse(text).ok().flatten().map(|git| git.remote)
}

impl GitUrl {
    /// `None` if the text names no repository; an error if it does, wrongly.
    pub(crate) fn parse(text: &str) -> Result<Option<Self>, String> {
        let named = |scheme: &str, path: &str| !scheme.starts_with("http") || path.ends_with(".git");
        Self::parse_if(text, &named)
    }

    /// The same for a build context, which may also be `github.com/…`: ADD takes that for a file.
    fn parse_context(text: &str) -> Result<Option<Self>, String> {
        match text.starts_with("github.com/") {
            true => Self::parse_if(&format!("https://{text}"), &|_, _| true),
            false => Self::parse(text),
        }
    }

    fn parse_if(text: &str, named: &dyn Fn(&str, &str) -> bool) -> Result<Option<Self>, String> {
        let (url, fragment) = text.split_once('#').unwrap_or((text, ""));
        let (bare, query) = url.split_once('?').unwrap_or((url, ""));
        let mut git = match bare.split_once("://") {
            Some((scheme @ ("ssh" | "git" | "http" | "https"), rest)) => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                if !named(scheme, path) {
                    return Ok(None);
                }
                let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
                Self { host: host.into(), path: path.into(), ssh: scheme == "ssh", ..Self::default() }
            }
            Some(_) => return Ok(None),
            None => match bare.split_once('@').and_then(|(user, rest)| Some((user, rest.split_once(':')?))) {
                Some((user, (host, path))) if is_word(user) && !host.is_empty() && !host.contains('/') => {
                    Self { host: host.into(), path: path.into(), ssh: true, ..Self::default() }
                }
                _ => return Ok(None),
            },
        };
        git.remote = bare.to_string();
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        git.reference = reference.to_string();
        git.subdir = subdir.to_string();
        git.read_query(query)?;
        git.subdir = pattern::clean(&format!("/{}", git.subdir)).trim_start_matches('/').to_string();
        Ok(Some(git))
    }

    fn read_query(&mut self, query: &str) -> Result<(), String> {
        let mut seen = HashSet::new();
        for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let value = value.into_owned();
            if !seen.insert(key.to_string()) {
                return Err(format!("query {} has multiple values", gofmt::quote(&key)));
            }
            let flag = || {
                if value.is_empty() { Some(true) } else { gofmt::parse_bool(&value) }
                    .ok_or_else(|| format!("invalid {key} value: {}", gofmt::quote(&value)))
            };
            match &*key {
                "keep-git-dir" => self.keep_git_dir = Some(flag()?),
                "submodules" => self.submodules = Some(flag()?),
                "fetch-by-commit" => self.fetch_by_commit = flag()?,
                "ref" | "tag" | "branch" | "subdir" | "checksum" | "commit" | "mtime" if value.is_empty() => {
                    return Err(format!("query {} has no value", gofmt::quote(&key)));
                }
                "ref" => settle("ref", &mut self.reference, value)?,
                "tag" => settle("ref", &mut self.reference, under("refs/tags/", &value))?,
                "branch" => settle("ref", &mut self.reference, under("refs/heads/", &value))?,
                "subdir" => settle("subdir", &mut self.subdir, value)?,
                "checksum" | "commit" => self.checksum = value,
                "mtime" if value == "checkout" || value == "commit" => self.mtime = value,
                "mtime" => {
                    let value = gofmt::quote(&value);
                    return Err(format!("invalid mtime value: {value} (must be \"checkout\" or \"commit\")"));
                }
                _ => return Err(format!("unexpected query {}", gofmt::quote(&key))),
            }
        }
        Ok(())
    }

    /// The source operation, and what a daemon must be able to do for it.
    pub(crate) fn source(&self) -> (pb::SourceOp, Vec<&'static str>) {
        let mut attrs = BTreeMap::new();
        let mut caps = vec![llb::caps::SOURCE_GIT, llb::caps::SOURCE_GIT_FULL_URL];
        let mut set = |key: &str, value: &str, cap: Option<&'static str>| {
            attrs.insert(key.to_string(), value.to_string());
            caps.extend(cap);
        };
        set("git.fullurl", &self.remote, None);
        set("git.authtokensecret", "GIT_AUTH_TOKEN", None);
        set("git.authheadersecret", "GIT_AUTH_HEADER", None);
        if self.ssh {
            set("git.mountsshsock", "default", Some(llb::caps::SOURCE_GIT_MOUNT_SSH_SOCK));
        }
        if self.keep_git_dir == Some(true) {
            set("git.keepgitdir", "true", Some(llb::caps::SOURCE_GIT_KEEP_DIR));
        }
        if !self.checksum.is_empty() {
            set("git.checksum", &self.checksum, Some(llb::caps::SOURCE_GIT_CHECKSUM));
        }
        if self.submodules == Some(false) {
            set("git.skipsubmodules", "true", Some(llb::caps::SOURCE_GIT_SKIP_SUBMODULES));
        }
        if !self.mtime.is_empty() {
            set("git.mtime", &self.mtime, Some(llb::caps::SOURCE_GIT_MTIME));
        }
        if self.fetch_by_commit {
            set("git.fetchbycommit", "true", Some(llb::caps::SOURCE_GIT_FETCH_BY_COMMIT));
        }
        (pb::SourceOp { identifier: self.identifier(), attrs }, caps)
    }

    /// The identifier of the source operation: the same for every protocol.
    pub(crate) fn identifier(&self) -> String {
        let mut out = format!("git://{}{}", self.host, pattern::clean(&format!("/{}", self.path)));
        if !self.reference.is_empty() || !self.subdir.is_empty() {
            out.push('#');
            out.push_str(&self.reference);
        }
        if !self.subdir.is_empty() {
            out.push(':');
            out.push_str(&self.subdir);
        }
        out
    }
}

/// Takes a value that may have been given before, in the fragment or under another key.
fn settle(what: &str, into: &mut String, value: String) -> Result<(), String> {
    if !into.is_empty() && *into != value {
        return Err(format!("{what} conflicts: {} vs {}", gofmt::quote(into), gofmt::quote(&value)));
    }
    *into = value;
    Ok(())
}

fn under(prefix: &str, name: &str) -> String {
    format!("{prefix}{}", name.strip_prefix(prefix).unwrap_or(name))
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories() {
        for (text, identifier) in [
            ("https://github.com/a/b.git", "git://github.com/a/b.git"),
            ("https://github.com/a/b.git#v1:sub/dir", "git://github.com/a/b.git#v1:sub/dir"),
            ("git@github.com:a/b.git#:sub", "git://github.com/a/b.git#:sub"),
            ("ssh://git@host:22/a", "git://host:22/a"),
            ("git://host/a?tag=v1&subdir=/x", "git://host/a#refs/tags/v1:x"),
        ] {
            let git = GitUrl::parse(text).expect("no error").unwrap_or_else(|| panic!("{text} is git"));
            assert_eq!(git.identifier(), identifier);
        }
        for text in ["a", "https://x/y.tar", "github.com/a/b", "a@b", "./x@y:z/", "ftp://a/b.git"] {
            assert_eq!(GitUrl::parse(text), Ok(None), "{text}");
        }
        assert!(GitUrl::parse("https://x/y.git?foo=1").is_err());
        let git =
            GitUrl::parse("https://x/y.git?submodules=false&keep-git-dir").expect("no error").expect("git");
        assert_eq!((git.submodules, git.keep_git_dir), (Some(false), Some(true)));
    }

    #[test]
    fn queries_and_fragments_must_agree() {
        let parse = |rest: &str| GitUrl::parse(&format!("https://x/y.git{rest}"));
        for (rest, error) in [
            ("?ref=a#b", "ref conflicts: \"b\" vs \"a\""),
            ("?tag=a&branch=a", "ref conflicts: \"refs/tags/a\" vs \"refs/heads/a\""),
            ("?subdir=a#:b", "subdir conflicts: \"b\" vs \"a\""),
            ("?ref=a&ref=a", "query \"ref\" has multiple values"),
            ("?commit", "query \"commit\" has no value"),
            ("?mtime=now", "invalid mtime value: \"now\" (must be \"checkout\" or \"commit\")"),
        ] {
            assert_eq!(parse(rest), Err(error.to_owned()), "{rest}");
        }
        let git = parse("?ref=a%2Fb&mtime=commit#a/b").expect("no error").expect("git");
        assert_eq!((git.reference.as_str(), git.mtime.as_str()), ("a/b", "commit"));
    }

    #[test]
    fn a_context_is_one_source() {
        let git = GitUrl::parse_context("github.com/a/b#main:c").expect("no error").expect("git");
        assert_eq!(
            (git.identifier(), &*git.remote),
            ("git://github.com/a/b#main:c".into(), "https://github.com/a/b")
        );
        let url = "https://x/y.git?mtime=checkout";
        let attrs = [("BUILDKIT_CONTEXT_KEEP_GIT_DIR", "1"), ("SOURCE_DATE_EPOCH", "0")];
        let attrs = attrs.map(|(name, value)| (format!("build-arg:{name}"), value.to_owned())).into();
        let (op, metadata) = git_context(url, &attrs).expect("no error").expect("git");
        let Some(pb::op::Op::Source(source)) = op.op else { panic!("no source") };
        assert_eq!(source.attrs["git.mtime"], "checkout");
        assert_eq!(metadata.description[llb::CUSTOM_NAME], format!("[internal] load git source {url}"));
        assert!(metadata.caps.contains_key("source.git.keepgitdir"));
        assert!(git_context("https://x/y.tar", &HashMap::new()).expect("no error").is_none());
    }
}
