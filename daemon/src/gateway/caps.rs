//! What this daemon offers to frontends and to the makers of definitions. What is not listed here,
//! clients do not send.

use kiln_proto::apicaps::ApiCap;
use kiln_proto::llb::caps as ids;

/// Calls and conventions of the gateway.
const FRONTEND: &[&str] = &[
    "frontend.caps",
    "frontend.inputs",
    "gateway.evaluate",
    "gateway.solve.evaluate",
    "gateway.solve.metadata",
    "gateway.warnings",
    "importcaches",
    "proto.refarray",
    "readdir",
    "readfile",
    "reference.output",
    "resolveimage",
    "resolveimage.resolvemode",
    "return",
    "returnmap",
    "solve.base",
    "source.metaresolver",
    "statfile",
];

/// For clients that look for it; it has been replaced by `returnmap`.
const INLINE_RETURN: &str = "solve.inlinereturn";

/// Ids that the protocol knows and this daemon does not do.
const MISSING: &[&str] = &[
    ids::SOURCE_IMAGE_BLOB,
    ids::SOURCE_OCI_LAYOUT,
    ids::SOURCE_LOCAL_METADATA_TRANSFER,
    ids::SOURCE_GIT,
    ids::SOURCE_HTTP,
    ids::SOURCE_BUILD_OP_LLB_FILENAME,
    ids::SOURCE_POLICY,
    ids::SOURCE_POLICY_SESSION,
];

fn cap(id: &str) -> ApiCap {
    ApiCap { id: id.to_owned(), enabled: true, deprecated: id == INLINE_RETURN, ..ApiCap::default() }
}

/// Of the gateway, by id.
pub(crate) fn frontend() -> Vec<ApiCap> {
    let mut caps: Vec<ApiCap> = FRONTEND.iter().copied().chain([INLINE_RETURN]).map(cap).collect();
    caps.sort_by(|a, b| a.id.cmp(&b.id));
    caps
}

/// Of definitions, by id.
pub(crate) fn llb() -> Vec<ApiCap> {
    let mut caps: Vec<ApiCap> = ids::ALL.iter().copied().filter(|id| supported(id)).map(cap).collect();
    caps.sort_by(|a, b| a.id.cmp(&b.id));
    caps
}

/// Whether definitions may use a capability.
pub(crate) fn supported(id: &str) -> bool {
    ids::ALL.contains(&id) && !MISSING.contains(&id)
}
