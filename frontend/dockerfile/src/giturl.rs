//! Git repositories as ADD names them: `git@host:path`, `ssh://`, `git://`, `https://….git`, with
//! `#ref:subdir` or a query.

use kiln_proto::pattern;

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
    pub(crate) fetch_by_commit: bool,
}

impl GitUrl {
    /// `None` if the text names no repository; an error if it does, wrongly.
    pub(crate) fn parse(text: &str) -> Result<Option<Self>, String> {
        let (url, fragment) = text.split_once('#').unwrap_or((text, ""));
        let (bare, query) = url.split_once('?').unwrap_or((url, ""));
        let mut git = match bare.split_once("://") {
            Some((scheme @ ("ssh" | "git" | "http" | "https"), rest)) => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                if scheme.starts_with("http") && !path.ends_with(".git") {
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
        for pair in query.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let flag = || {
                if value.is_empty() { Some(true) } else { gofmt::parse_bool(value) }
                    .ok_or_else(|| format!("invalid {key} value: {}", gofmt::quote(value)))
            };
            match key {
                "ref" | "tag" | "branch" | "subdir" if value.is_empty() => {
                    return Err(format!("query {} has no value", gofmt::quote(key)));
                }
                "ref" | "tag" | "branch" => {
                    let reference = match key {
                        "tag" => format!("refs/tags/{value}"),
                        "branch" => format!("refs/heads/{value}"),
                        _ => value.to_string(),
                    };
                    if !self.reference.is_empty() {
                        return Err("ref conflicts".into());
                    }
                    self.reference = reference;
                }
                "subdir" if self.subdir.is_empty() => self.subdir = value.to_string(),
                "subdir" => return Err("subdir conflicts".into()),
                "checksum" | "commit" => self.checksum = value.to_string(),
                "keep-git-dir" => self.keep_git_dir = Some(flag()?),
                "submodules" => self.submodules = Some(flag()?),
                "fetch-by-commit" => self.fetch_by_commit = flag()?,
                _ => return Err(format!("unexpected query {}", gofmt::quote(key))),
            }
        }
        Ok(())
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
}
