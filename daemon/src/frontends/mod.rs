//! The frontends inside the daemon, by name.

mod compiler;
mod contexts;
mod dockerfile;
mod image;
mod remote;
mod subrequests;

use std::sync::Arc;

use kiln_proto::reference::Reference;

use crate::config::FrontendConfig;
use crate::error::{BuildError, frontend_cap_detail};
use crate::gateway::{Bridge, BuildResult, FrontendRequest};

/// Name of the Dockerfile frontend.
pub(crate) const DOCKERFILE: &str = "dockerfile.v0";

/// Name of the frontend that runs images.
const GATEWAY: &str = "gateway.v0";

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
    let allowed = bridge.frontends();
    if request.name == GATEWAY && allowed.gateway {
        if request.opts.contains_key("gateway-devel") {
            return Err(BuildError::build("development gateway is no longer supported"));
        }
        let source = request.opts.get("source").cloned().unwrap_or_default();
        if source.is_empty() {
            return Err(BuildError::build("no source specified for gateway"));
        }
        check_repository(allowed, &source)?;
        if !compiler::is_builtin(&source) {
            return image::run(bridge, request, &source).await;
        }
        request.opts.remove("source");
        request.name = DOCKERFILE.to_owned();
    }
    if request.name != DOCKERFILE || !allowed.dockerfile {
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

/// Refuses an image that the configuration does not allow as a frontend.
fn check_repository(allowed: &FrontendConfig, source: &str) -> Result<(), BuildError> {
    if allowed.allowed_repositories.is_empty() {
        return Ok(());
    }
    let reference = Reference::parse(source)
        .map_err(|error| BuildError::build(format!("failed to parse frontend image {source:?}: {error}")))?;
    match allowed.allowed_repositories.contains(&reference.name()) {
        true => Ok(()),
        false => Err(BuildError::build(format!("'{source}' is not an allowed gateway source"))),
    }
}
