//! What frontends and policies ask about a source before it is used.

use kiln_proto::gateway::{
    ResolveSourceGitResponse, ResolveSourceImageResponse, ResolveSourceMetaRequest, ResolveSourceMetaResponse,
};
use kiln_proto::policy::Policy;
use kiln_proto::{pb, platform};
use tonic::Code;

use super::Bridge;
use crate::engine::{GitObjects, ResolvedGit};
use crate::error::BuildError;
use crate::policy::{IMAGE, LAYOUT};

impl Bridge {
    /// What there is to know about a source, whatever the policy says of it.
    ///
    /// # Errors
    /// It cannot be looked up, or not in this way.
    pub(crate) async fn source_meta(
        &self,
        request: ResolveSourceMetaRequest,
    ) -> Result<ResolveSourceMetaResponse, BuildError> {
        let Some(source) = request.source else {
            return Err(BuildError::new(Code::InvalidArgument, "source is not set"));
        };
        let log_name = log_name(&request.log_name, &source.identifier);
        if source.identifier.starts_with("git://") {
            let objects = request.git.is_some_and(|git| git.return_object);
            let git = Some(git_response(self.resolve_git(&source, objects, &log_name).await?));
            return Ok(ResolveSourceMetaResponse { git, source: Some(source), image: None, http: None });
        }
        if ["http://", "https://"].iter().any(|scheme| source.identifier.starts_with(scheme)) {
            let checksum = request.http.and_then(|http| http.checksum_request);
            let http = Some(self.resolve_http(&source, checksum, &log_name).await?);
            return Ok(ResolveSourceMetaResponse { http, source: Some(source), image: None, git: None });
        }
        if ![IMAGE, LAYOUT].iter().any(|scheme| source.identifier.starts_with(scheme)) {
            return Err(BuildError::unsupported(format_args!("resolving {}", source.identifier)));
        }
        let image = request.image.unwrap_or_default();
        if image.attestation_chain || !image.resolve_attestations.is_empty() {
            return Err(BuildError::unsupported("resolving attestations"));
        }
        let platform = request.platform.unwrap_or_else(platform::host);
        let found = self.find_image(&source, &platform, &request.resolve_mode, &log_name).await?;
        Ok(ResolveSourceMetaResponse {
            image: Some(ResolveSourceImageResponse {
                digest: found.digest,
                config: if image.no_config { Vec::new() } else { found.config },
                attestation_chain: None,
            }),
            source: Some(source),
            git: None,
            http: None,
        })
    }

    /// The source that the policy has in place of one, and after it the rules `further`; for answers about it.
    ///
    /// # Errors
    /// It is not allowed.
    pub(crate) async fn allowed(
        &self,
        source: pb::SourceOp,
        platform: &pb::Platform,
        further: &[Policy],
    ) -> Result<pb::SourceOp, BuildError> {
        let policy = self.policy.with(further)?;
        if policy.is_empty() {
            return Ok(source);
        }
        let allowed = policy.evaluate(self, &source, Some(platform)).await;
        allowed.map_err(|error| error.context("could not resolve image due to policy"))
    }
}

fn git_response((resolved, objects): (ResolvedGit, Option<GitObjects>)) -> ResolveSourceGitResponse {
    let GitObjects { commit, commit_name, tag } = objects.unwrap_or_default();
    let tagged = if tag.is_some() { Some(commit_name) } else { resolved.tagged };
    ResolveSourceGitResponse {
        r#ref: resolved.name.unwrap_or_else(|| resolved.object.clone()),
        checksum: resolved.object,
        commit_checksum: tagged.unwrap_or_default(),
        commit_object: commit,
        tag_object: tag.unwrap_or_default(),
    }
}

/// What the step of a look-up is called.
pub(super) fn log_name(asked: &str, identifier: &str) -> String {
    if asked.is_empty() { format!("resolve image config for {identifier}") } else { asked.to_owned() }
}
