//! Registry credentials from the Docker configuration file and its credential helpers, for the daemon to ask for. The
//! daemon itself never reads that file.

use docker_credential::{CredentialRetrievalError, DockerCredential};
use kiln_proto::filesync::auth_server::Auth;
use kiln_proto::filesync::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
    GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
};
use tonic::{Request, Response, Status};

/// Serves what `docker login` stored.
pub(crate) struct DockerConfig;

/// Under what the configuration file knows Docker Hub.
const DOCKER_HUB: &str = "https://index.docker.io/v1/";

/// The keys under which a host's credentials may be stored, in the order of trying.
fn keys(host: &str) -> Vec<String> {
    if matches!(host, "registry-1.docker.io" | "docker.io" | "index.docker.io") {
        return vec![DOCKER_HUB.into(), "docker.io".into(), "registry-1.docker.io".into()];
    }
    vec![host.into(), format!("https://{host}"), format!("http://{host}"), format!("https://{host}/v1/")]
}

fn look_up(host: &str) -> Result<CredentialsResponse, Status> {
    for key in keys(host) {
        match docker_credential::get_credential(&key) {
            Ok(DockerCredential::UsernamePassword(username, secret))
                if secret.is_empty() && username.is_empty() => {}
            Ok(DockerCredential::UsernamePassword(username, secret)) => {
                return Ok(CredentialsResponse { username, secret });
            }
            Ok(DockerCredential::IdentityToken(secret)) => {
                return Ok(CredentialsResponse { username: String::new(), secret });
            }
            Err(
                CredentialRetrievalError::NoCredentialConfigured
                | CredentialRetrievalError::ConfigNotFound
                | CredentialRetrievalError::ConfigReadError,
            ) => {}
            // Helpers answer like this when they know nothing of the host, which is no failure.
            Err(CredentialRetrievalError::HelperFailure { stdout, stderr, .. })
                if format!("{stdout}{stderr}").contains("credentials not found") => {}
            Err(error) => return Err(Status::unknown(format!("docker configuration: {error}"))),
        }
    }
    Ok(CredentialsResponse::default())
}

#[tonic::async_trait]
impl Auth for DockerConfig {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        let host = request.into_inner().host;
        let found = tokio::task::spawn_blocking(move || look_up(&host)).await;
        found.unwrap_or_else(|error| Err(Status::internal(error.to_string()))).map(Response::new)
    }

    async fn fetch_token(
        &self,
        _: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the daemon"))
    }

    /// Unavailable tells the daemon to ask for credentials and fetch tokens itself.
    async fn get_token_authority(
        &self,
        _: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("tokens are fetched by the daemon"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("tokens are fetched by the daemon"))
    }
}
