//! What this daemon offers to frontends and to the makers of definitions. What is not listed here,
//! clients do not send.

use kiln_proto::apicaps::ApiCap;
use kiln_proto::llb::caps as ids;

/// Calls and conventions of the gateway.
const FRONTEND: &[&str] = &[
    "frontend.caps",
    "frontend.inputs",
    "gateway.evaluate",
    "gateway.exec",
    "gateway.exec.extrahosts",
    "gateway.exec.filesystem",
    "gateway.exec.secretenv",
    "gateway.exec.signals",
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
    "source.metaresolver.http.checksumrequest",
    "statfile",
];

/// For clients that look for it; it has been replaced by `returnmap`.
const INLINE_RETURN: &str = "solve.inlinereturn";

/// Ids that the protocol knows and this daemon does not do, with all that begin with one of them.
const MISSING: &[&str] = &[
    ids::SOURCE_IMAGE_BLOB,
    ids::SOURCE_LOCAL_METADATA_TRANSFER,
    ids::SOURCE_GIT_SIGNATURE_VERIFY,
    ids::SOURCE_GIT_BUNDLE,
    ids::SOURCE_GIT_CHECKOUT_BUNDLE,
    ids::SOURCE_HTTP_SIGNATURE_VERIFY,
    ids::SOURCE_BUILD_OP_LLB_FILENAME,
    ids::EXEC_META_NETWORK_PROXY,
    ids::EXEC_META_CDI,
    ids::EXEC_META_SECURITY_DEVICES,
    ids::REMOTE_CACHE_GHA,
    ids::REMOTE_CACHE_S3,
    ids::REMOTE_CACHE_AZBLOB,
    ids::HISTORY_FILTER,
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
    let missing = |missing: &&str| {
        id.strip_prefix(*missing).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    ids::ALL.contains(&id) && !MISSING.iter().any(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        for id in [
            "source.image",
            "soruce.http.uidgid",
            "source.http.checksum",
            "source.git.subdir",
            "exec.mount.secret",
            "file.base",
            "mergeop",
            "exec.meta.security",
            "exporter.image.attestations",
        ] {
            assert!(supported(id), "{id}");
        }
        for id in ["source.git.bundle", "source.http.signatureverify", "cache.s3", "made.up"] {
            assert!(!supported(id), "{id}");
        }
        assert!(llb().is_sorted_by(|a, b| a.id < b.id));
        assert!(frontend().iter().any(|cap| cap.id == INLINE_RETURN && cap.deprecated));
    }
}
