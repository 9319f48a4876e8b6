//! The limit of open files: the daemon takes all that it may have, what it runs keeps what it was started with.
//!
//! Programs that close every descriptor there could be crawl under a high limit, and those that use `select` break.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit before it was raised; none where there is nothing to restore.
static ORIGINAL: OnceLock<u64> = OnceLock::new();

/// Tells it to the helper.
pub(super) const VARIABLE: &str = "KILN_NOFILE";

/// Lets this process open as many files as its hard limit allows. Sandboxes that it opens an executor for afterwards
/// see the limit as it was.
pub fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current else { return };
    // With less than everything a daemon works as well, until it is a very busy one.
    if setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok() {
        let _ = ORIGINAL.set(soft);
    }
}

/// The soft limit that sandboxes get, if it is not this process's own.
pub(super) fn original() -> Option<u64> {
    ORIGINAL.get().copied()
}

/// In a process of the helper's: takes the raised limit back.
pub(super) fn restore() {
    let soft = std::env::var(VARIABLE).ok().and_then(|text| text.parse().ok());
    if let Some(soft) = soft {
        let limit = getrlimit(Resource::Nofile);
        // Lowering is always allowed.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(soft), ..limit });
    }
}
