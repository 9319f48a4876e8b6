//! Which entries of a directory take part in a transfer: include and exclude patterns. Pure, apart from resolving
//! follow-paths, which looks into the directory.

use std::os::fd::BorrowedFd;

use kiln_proto::pattern::{self, MatchInfo, PatternMatcher};

use super::{TransferError, follow};

/// What to send of a directory, in the terms of the wire.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only what matches; empty means everything (unless follow-paths are given).
    pub include: Vec<String>,
    /// Nothing that matches, with `!` exceptions.
    pub exclude: Vec<String>,
    /// Paths whose symlink chains are resolved within the directory and included.
    pub follow: Vec<String>,
}

/// A compiled selection.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    include: Option<PatternMatcher>,
    exclude: Option<PatternMatcher>,
}

/// What the patterns said of a directory, needed to judge its entries.
#[derive(Debug, Clone, Default)]
pub(super) struct Verdicts {
    include: Option<MatchInfo>,
    exclude: Option<MatchInfo>,
}

/// What to do with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// It takes part.
    Take,
    /// A directory that takes part only if something below it does.
    Descend,
    /// Neither it nor anything below it takes part.
    Skip,
}

impl Filter {
    /// Compiles a selection; follow-paths are resolved beneath `root`.
    pub(super) fn new(selection: &Selection, root: BorrowedFd<'_>) -> Result<Self, TransferError> {
        let mut include = selection.include.clone();
        let mut everything = include.is_empty() && selection.follow.is_empty();
        if !selection.follow.is_empty() {
            match follow::resolve(root, &selection.follow)? {
                Some(paths) => include.extend(paths),
                None => everything = true,
            }
        }
        let compiled = |patterns: &[String]| -> Result<_, TransferError> {
            let matcher = PatternMatcher::new(patterns)?;
            Ok((!matcher.is_empty()).then_some(matcher))
        };
        Ok(Self {
            include: if everything { None } else { compiled(&include)? },
            exclude: compiled(&selection.exclude)?,
        })
    }

    /// Judges an entry by its path and what was said of its parent (`None` at the top).
    pub(super) fn decide(
        &self,
        path: &[u8],
        is_dir: bool,
        parent: Option<&Verdicts>,
    ) -> (Decision, Verdicts) {
        let mut verdicts = Verdicts::default();
        if self.include.is_none() && self.exclude.is_none() {
            return (Decision::Take, verdicts);
        }
        let path = &*pattern::text(path);
        let mut take = true;
        if let Some(include) = &self.include {
            let (matched, info) = include.matches_below(path, parent.and_then(|p| p.include.as_ref()));
            verdicts.include = Some(info);
            if !matched {
                if !is_dir || !include.may_match_below(path) {
                    return (Decision::Skip, verdicts);
                }
                take = false;
            }
        }
        if let Some(exclude) = &self.exclude {
            let (matched, info) = exclude.matches_below(path, parent.and_then(|p| p.exclude.as_ref()));
            verdicts.exclude = Some(info);
            if matched {
                if !is_dir || !exclude.may_reinclude_below(path) {
                    return (Decision::Skip, verdicts);
                }
                take = false;
            }
        }
        (if take { Decision::Take } else { Decision::Descend }, verdicts)
    }
}
