//! What a reference stands for, out of what the remote lists.

use super::remote::{Wanted, is_object};

/// What is to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The full name of the ref, if it is one: `refs/heads/main`, or `HEAD` if the remote does not say which branch
    /// that is.
    pub name: Option<String>,
    /// What it points to: a commit or an annotated tag.
    pub object: String,
    /// The commit that an annotated tag stands for.
    pub tagged: Option<String>,
}

impl Resolved {
    /// What needs no question: a commit by its name.
    pub(super) fn unasked(wanted: &Wanted) -> Result<Option<Self>, String> {
        if wanted.is_commit() {
            let object = wanted.reference.clone();
            if !object.starts_with(&wanted.checksum) {
                return Err(mismatch(wanted, &object));
            }
            return Ok(Some(Self { name: None, object, tagged: None }));
        }
        if !wanted.fetch_by_commit {
            return Ok(None);
        }
        if !is_object(&wanted.checksum) {
            return Err(match wanted.checksum.as_str() {
                "" => "fetch-by-commit requires a checksum or a commit SHA ref".to_owned(),
                part => format!("fetch-by-commit requires a full commit SHA checksum, got {part:?}"),
            });
        }
        let name = match wanted.reference.as_str() {
            "" => None,
            full if full.starts_with("refs/") => Some(full.to_owned()),
            branch => Some(format!("refs/heads/{branch}")),
        };
        Ok(Some(Self { name, object: wanted.checksum.clone(), tagged: None }))
    }

    /// Which of the listed refs is meant. A branch goes before a tag.
    pub(super) fn find(wanted: &Wanted, listing: &str) -> Result<Self, String> {
        let lines = || listing.lines().filter_map(|line| line.split_once('\t'));
        let object = |name: &str| {
            lines()
                .find(|(object, listed)| *listed == name && is_object(object))
                .map(|(object, _)| object.to_owned())
        };
        let found = match wanted.reference.as_str() {
            "" => object("HEAD").map(|found| {
                let target = lines()
                    .find_map(|(target, name)| (name == "HEAD").then_some(target)?.strip_prefix("ref: "));
                (found, target.unwrap_or("HEAD").to_owned())
            }),
            given => ["refs/", "refs/heads/", "refs/tags/"].into_iter().find_map(|prefix| {
                let name = format!("{prefix}{}", given.strip_prefix(prefix).unwrap_or(given));
                Some((object(&name)?, name))
            }),
        };
        let Some((found, name)) = found else {
            return Err(match wanted.reference.as_str() {
                "" => "could not find default branch for repository".to_owned(),
                given => format!("repository does not contain ref {given}"),
            });
        };
        let tagged = object(&format!("{name}^{{}}"));
        let resolved = Self { name: Some(name), object: found, tagged };
        let matches = |object: &String| object.starts_with(&wanted.checksum);
        match matches(&resolved.object) || resolved.tagged.as_ref().is_some_and(matches) {
            true => Ok(resolved),
            false => Err(mismatch(
                wanted,
                &match &resolved.tagged {
                    Some(tagged) => format!("{} or {tagged}", resolved.object),
                    None => resolved.object.clone(),
                },
            )),
        }
    }

    /// The commit, as far as it is known.
    pub(super) fn commit(&self) -> &str {
        self.tagged.as_deref().unwrap_or(&self.object)
    }
}

fn mismatch(wanted: &Wanted, got: &str) -> String {
    format!("expected checksum to match {}, got {got}", wanted.checksum)
}

#[cfg(test)]
mod tests {
    use kiln_proto::pb;

    use super::*;

    fn wanted(reference: &str, checksum: &str) -> Wanted {
        let op = pb::SourceOp {
            identifier: String::new(),
            attrs: [("git.checksum".to_owned(), checksum.to_owned())].into(),
        };
        Wanted::parse(&op, &format!("host/a#{reference}")).expect("valid")
    }

    fn object(digit: char) -> String {
        digit.to_string().repeat(40)
    }

    fn find(reference: &str, checksum: &str) -> Result<(String, String), String> {
        let listing = [
            ("ref: refs/heads/main".to_owned(), "HEAD"),
            (object('1'), "HEAD"),
            (object('1'), "refs/heads/main"),
            (object('2'), "refs/heads/v1"),
            (object('3'), "refs/tags/v1"),
            (object('4'), "refs/tags/v1^{}"),
            (object('5'), "refs/tags/light"),
            (object('6'), "refs/pull/7/head"),
            (object('7'), "refs/heads/deep/main"),
        ];
        let listing: String = listing.iter().map(|(object, name)| format!("{object}\t{name}\n")).collect();
        let found = Resolved::find(&wanted(reference, checksum), &listing)?;
        Ok((found.name.clone().unwrap_or_default(), found.commit()[..1].to_owned()))
    }

    #[test]
    fn names_are_found_as_git_checkout_finds_them() {
        for (reference, name, commit) in [
            ("", "refs/heads/main", "1"),
            ("main", "refs/heads/main", "1"),
            ("v1", "refs/heads/v1", "2"),
            ("refs/tags/v1", "refs/tags/v1", "4"),
            ("tags/v1", "refs/tags/v1", "4"),
            ("light", "refs/tags/light", "5"),
            ("pull/7/head", "refs/pull/7/head", "6"),
            ("refs/pull/7/head", "refs/pull/7/head", "6"),
        ] {
            assert_eq!(find(reference, ""), Ok((name.to_owned(), commit.to_owned())), "{reference}");
        }
        assert_eq!(find("none", ""), Err("repository does not contain ref none".to_owned()));
        assert_eq!(
            Resolved::find(&wanted("", ""), ""),
            Err("could not find default branch for repository".to_owned())
        );
    }

    #[test]
    fn a_checksum_may_be_of_the_tag_or_of_the_commit() {
        for checksum in ["33", "444"] {
            assert!(find("refs/tags/v1", checksum).is_ok(), "{checksum}");
        }
        let failed = find("refs/tags/v1", "5").expect_err("another commit");
        assert_eq!(failed, format!("expected checksum to match 5, got {} or {}", object('3'), object('4')));
        let unasked = |reference: &str, checksum: &str| Resolved::unasked(&wanted(reference, checksum));
        assert_eq!(unasked("main", ""), Ok(None));
        assert!(unasked(&object('a'), "aa").is_ok_and(|found| found.is_some()));
        assert!(unasked(&object('a'), "b").is_err());
    }
}
