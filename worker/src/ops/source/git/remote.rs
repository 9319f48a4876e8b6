//! Which repository, which part of it, and what git may use to reach it: as a definition says it.

use std::fmt::Display;

use kiln_proto::{pattern, pb};
use kiln_solver::op::OpError;

use crate::ops::source::flag;

/// Protocols that a repository may be reached by. Local paths and remote helpers are the daemon's, not a client's.
pub(super) const PROTOCOLS: [&str; 4] = ["git", "http", "https", "ssh"];
/// What this daemon does not do.
const UNSUPPORTED: [(&str, &str); 6] = [
    ("git.bundle", "bundles of git sources"),
    ("git.checkoutbundle", "bundles of git sources"),
    ("git.sig.pubkey", "signature verification of git sources"),
    ("git.sig.rejectexpired", "signature verification of git sources"),
    ("git.sig.requiresignedtag", "signature verification of git sources"),
    ("git.sig.ignoresignedtag", "signature verification of git sources"),
];

/// A git source as its operation describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    /// What git is given; may hold a password.
    pub(super) remote: String,
    /// A branch, a tag, any other ref or a commit; empty for the default branch.
    pub(super) reference: String,
    /// Directory of the repository that is the result; empty for all of it.
    pub(super) subdir: String,
    /// Digits, in lower case, with which the commit or tag has to begin.
    pub(super) checksum: String,
    /// The checksum is fetched, whatever the reference points to.
    pub(super) fetch_by_commit: bool,
    /// `.git` is part of the result.
    pub(super) keep_git_dir: bool,
    /// Directories of submodules are left empty.
    pub(super) skip_submodules: bool,
    /// Files are as old as the commit.
    pub(super) commit_times: bool,
    /// Ids of secrets; may be empty.
    pub(super) token_secret: String,
    pub(super) header_secret: String,
    /// Public keys of ssh servers; empty if any will do.
    pub(super) known_hosts: String,
    /// The client's ssh agent to ask; empty for none.
    pub(super) ssh_agent: String,
}

impl Wanted {
    /// Reads an operation; `identifier` is what follows its scheme.
    pub(super) fn parse(op: &pb::SourceOp, identifier: &str) -> Result<Self, OpError> {
        let attr = |key: &str| op.attrs.get(key).cloned().unwrap_or_default();
        let asked = |key: &str| op.attrs.get(key).is_some_and(|value| !value.is_empty() && value != "false");
        if let Some((_, what)) = UNSUPPORTED.iter().find(|(key, _)| asked(key)) {
            return Err(OpError::new(format!("unsupported: {what}")));
        }
        let (url, fragment) = identifier.split_once('#').unwrap_or((identifier, ""));
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let full = attr("git.fullurl");
        let remote = match full.is_empty() {
            true => absolute(url.split_once('?').map_or(url, |(url, _)| url)),
            false => absolute(&full),
        };
        check(&remote)?;
        if reference.starts_with('-') || reference.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(OpError::new(format!("invalid git ref {reference:?}")));
        }
        let checksum = attr("git.checksum");
        if !checksum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let what = format!("invalid checksum {checksum} for Git URL, expected hex commit hash");
            return Err(OpError::new(what));
        }
        let commit_times = match attr("git.mtime").as_str() {
            "" | "checkout" => false,
            "commit" => true,
            other => return Err(OpError::new(format!("invalid git.mtime {other:?}"))),
        };
        Ok(Self {
            remote,
            reference: reference.to_owned(),
            subdir: pattern::clean(&format!("/{subdir}")).trim_start_matches('/').to_owned(),
            checksum: checksum.to_ascii_lowercase(),
            fetch_by_commit: flag(op, "git.fetchbycommit"),
            keep_git_dir: flag(op, "git.keepgitdir"),
            skip_submodules: flag(op, "git.skipsubmodules"),
            commit_times,
            token_secret: attr("git.authtokensecret"),
            header_secret: attr("git.authheadersecret"),
            known_hosts: attr("git.knownsshhosts"),
            ssh_agent: attr("git.mountsshsock"),
        })
    }

    /// The remote as messages show it: without what may be secret.
    pub(super) fn shown(&self) -> String {
        let Some(Parts { scheme, user, rest }) = parts(&self.remote) else { return self.remote.clone() };
        // Tokens are given as user names, too; ssh's are none.
        let user = user.split_once(':').map_or(user, |(name, _)| name);
        match user.is_empty() || scheme.starts_with("http") {
            true => format!("{scheme}://{rest}"),
            false => format!("{scheme}://{user}@{rest}"),
        }
    }

    /// A text of git's without what may be secret.
    pub(super) fn scrub(&self, text: &str) -> String {
        let text = text.replace(&self.remote, &self.shown());
        match parts(&self.remote) {
            Some(parts) if !parts.user.is_empty() && self.shown() != self.remote => {
                text.replace(&format!("{}@", parts.user), "")
            }
            _ => text,
        }
    }

    /// An error of `doing` something with the remote.
    pub(super) fn failed(&self, doing: &str, err: impl Display) -> OpError {
        OpError::new(self.scrub(&format!("failed to {doing} remote {}: {err}", self.shown())))
    }

    /// Host and port, by which secrets are named.
    pub(super) fn host(&self) -> &str {
        parts(&self.remote).and_then(|parts| parts.rest.split('/').next()).unwrap_or_default()
    }

    /// The reference is a commit (or an annotated tag) by its name.
    pub(super) fn is_commit(&self) -> bool {
        is_object(&self.reference)
    }
}

struct Parts<'a> {
    scheme: &'a str,
    /// May hold a password.
    user: &'a str,
    /// Host, port, path.
    rest: &'a str,
}

/// Of a URL; `None` for the form `user@host:path`.
fn parts(remote: &str) -> Option<Parts<'_>> {
    let (scheme, rest) = remote.split_once("://")?;
    let authority = rest.find('/').unwrap_or(rest.len());
    let (user, rest) = match rest[..authority].rfind('@') {
        Some(at) => (&rest[..at], &rest[at + 1..]),
        None => ("", rest),
    };
    Some(Parts { scheme, user, rest })
}

/// Without a protocol it is https.
fn absolute(remote: &str) -> String {
    match remote.contains("://") || is_scp(remote) {
        true => remote.to_owned(),
        false => format!("https://{remote}"),
    }
}

fn is_scp(remote: &str) -> bool {
    let word = |text: &str, more: &str| {
        text.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c) || more.contains(c))
    };
    let Some((user, (host, _))) =
        remote.split_once('@').and_then(|(user, rest)| Some((user, rest.split_once(':')?)))
    else {
        return false;
    };
    !user.is_empty() && !host.is_empty() && word(user, "") && word(host, ".") && !host.starts_with('-')
}

fn check(remote: &str) -> Result<(), OpError> {
    if remote.chars().any(char::is_control) {
        return Err(OpError::new("invalid git URL: it has control characters"));
    }
    let Some(Parts { scheme, rest, .. }) = parts(remote) else { return Ok(()) };
    if !PROTOCOLS.contains(&scheme.to_ascii_lowercase().as_str()) {
        return Err(OpError::new(format!(
            "invalid git URL: protocol {scheme} is not one of {}",
            PROTOCOLS.join(", ")
        )));
    }
    if rest.is_empty() || rest.starts_with(['/', '-']) {
        return Err(OpError::new("invalid git URL: it has no host"));
    }
    Ok(())
}

/// The name of an object, of either format.
pub(super) fn is_object(text: &str) -> bool {
    matches!(text.len(), 40 | 64) && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(identifier: &str, attrs: &[(&str, &str)]) -> Result<Wanted, OpError> {
        let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Wanted::parse(&pb::SourceOp { identifier: format!("git://{identifier}"), attrs }, identifier)
    }

    #[test]
    fn identifiers_name_a_remote_and_a_part_of_it() {
        for (identifier, remote, reference, subdir) in [
            ("host/a/b.git", "https://host/a/b.git", "", ""),
            ("host/a.git#main", "https://host/a.git", "main", ""),
            ("host/a.git#:x/../y/", "https://host/a.git", "", "y"),
            ("host/a.git#v1:../../x", "https://host/a.git", "v1", "x"),
            ("host/a.git?x=y#v1", "https://host/a.git", "v1", ""),
            ("git@host:a/b.git#main", "git@host:a/b.git", "main", ""),
            ("ssh://git@host:22/a", "ssh://git@host:22/a", "", ""),
        ] {
            let wanted = parse(identifier, &[]).expect(identifier);
            assert_eq!([&*wanted.remote, &*wanted.reference, &*wanted.subdir], [remote, reference, subdir]);
        }
        let full = |url| parse("host/a#v1", &[("git.fullurl", url)]).map(|wanted| wanted.remote);
        assert_eq!(full("git://127.0.0.1:9418/a").expect("git"), "git://127.0.0.1:9418/a");
        assert_eq!(full("other/a").expect("https"), "https://other/a");
    }

    #[test]
    fn only_protocols_of_the_network_are_taken() {
        for url in ["file:///etc", "ext::sh -c x", "https:///x", "ssh://-oProxyCommand=x/y", "https://a/\nb"]
        {
            let parsed = parse("host/a", &[("git.fullurl", url)]);
            // What has no protocol at all is a host's name.
            assert!(
                parsed.is_err() || parsed.is_ok_and(|wanted| wanted.remote.starts_with("https://ext::")),
                "{url}"
            );
        }
        assert!(parse("host/a#--upload-pack=x", &[]).is_err());
        assert!(parse("host/a", &[("git.checksum", "xyz")]).is_err());
        assert!(parse("host/a", &[("git.bundle", "docker-image+blob://x")]).is_err());
    }

    #[test]
    fn passwords_are_not_shown() {
        for (url, shown) in [
            ("https://token@host/a.git", "https://host/a.git"),
            ("https://user:hush@host:8/a@b.git", "https://host:8/a@b.git"),
            ("ssh://git:hush@host/a", "ssh://git@host/a"),
            ("git@host:a", "git@host:a"),
        ] {
            let wanted = parse("host/a", &[("git.fullurl", url)]).expect(url);
            assert_eq!(wanted.shown(), shown);
            assert_eq!(wanted.scrub(&format!("fatal: {url}/info: no")), format!("fatal: {shown}/info: no"));
        }
        let wanted = parse("host/a", &[("git.fullurl", "https://u:hush@host:8/a")]).expect("a URL");
        assert_eq!(wanted.scrub("https://u:hush@host:8/other"), "https://host:8/other");
        assert_eq!(wanted.host(), "host:8");
    }
}
