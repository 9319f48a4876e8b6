//! The frontends inside the daemon, by name.

mod compiler;
mod contexts;
mod dockerfile;
mod remote;
mod subrequests;

use std::sync::Arc;

use crate::error::{BuildError, frontend_cap_detail};
use crate::gateway::{Bridge, BuildResult, FrontendRequest};

/// Name of the Dockerfile frontend.
pub(crate) const DOCKERFILE: &str = "dockerfile.v0";

/// What clients may require of a frontend.
const CAPS: &[&str] = &[
    "moby.buildkit.frontend.contexts",
    "moby.buildkit.frontend.gitquerystring",
    "moby.buildkit.frontend.inputs",
    "moby.buildkit.frontend.subrequests",
];

/// Runs the frontend that `request` names, which then has the name of the one that answers.
///
/// # Errors
/// The frontend is not known, lacks what the client requires, or failed.
pub(crate) async fn run(
    bridge: &Arc<Bridge>,
    request: &mut FrontendRequest,
) -> Result<BuildResult, BuildError> {
    if request.name == "gateway.v0" {
        let source = request.opts.get("source").cloned().unwrap_or_default();
        if source.is_empty() {
            return Err(BuildError::build("no source specified for gateway"));
        }
        if !compiler::is_builtin(&source) {
            return Err(BuildError::unsupported(format_args!("frontend image {source}")));
        }
        request.opts.remove("source");
        request.name = DOCKERFILE.to_owned();
    }
    if request.name != DOCKERFILE {
        return Err(BuildError::build(format!("invalid frontend: {}", request.name)));
    }
    let required = request.opts.get("frontend.caps").cloned().unwrap_or_default();
    for cap in required.split(',').filter(|cap| !cap.is_empty()) {
        let cap = cap.split('+').next().unwrap_or(cap);
        if !CAPS.contains(&cap) {
            return Err(BuildError::unsupported(format_args!("frontend capability {cap}"))
                .with(frontend_cap_detail(cap)));
        }
    }
    dockerfile::run(bridge, request).await
}
