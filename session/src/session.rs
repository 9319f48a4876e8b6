//! One client's session as the daemon sees it: who it is, and the small calls into it (credentials, tokens,
//! secrets, ssh, uploads). File transfers are in `transfer.rs`.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use kiln_proto::exporter::exporter_client::ExporterClient;
use kiln_proto::exporter::{ExporterRequest, FinalizeExportRequest, FindExportersRequest};
use kiln_proto::filesync::auth_client::AuthClient;
use kiln_proto::filesync::{
    CredentialsRequest, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
    VerifyTokenAuthorityRequest,
};
use kiln_proto::secrets::GetSecretRequest;
use kiln_proto::secrets::secrets_client::SecretsClient;
use kiln_proto::sshforward::ssh_client::SshClient;
use kiln_proto::sshforward::{BytesMessage as SshMessage, CheckAgentRequest};
use kiln_proto::upload::BytesMessage as UploadMessage;
use kiln_proto::upload::upload_client::UploadClient;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio_util::io::ReaderStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::error::SessionError;
use crate::{MAX_MESSAGE_SIZE, headers};

/// Bound on each call about credentials, which may wait for a helper or a token server.
const AUTH_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);
/// Bytes of an ssh connection put into one message.
const SSH_CHUNK: usize = 32 << 10;

/// What a client knows for a registry host. An empty user name with a secret means an identity (refresh) token.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Credentials {
    /// The user name.
    pub username: String,
    /// The password or token.
    pub secret: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// An attached client. Calls fail once it is closed.
#[derive(Debug)]
pub struct Session {
    id: String,
    name: String,
    shared_key: String,
    methods: HashSet<String>,
    channel: Channel,
    closed: CancellationToken,
}

impl Session {
    pub(crate) fn new(
        id: String,
        name: String,
        shared_key: String,
        methods: HashSet<String>,
        channel: Channel,
        closed: CancellationToken,
    ) -> Self {
        Self { id, name, shared_key, methods, channel, closed }
    }

    /// The session's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The name that old clients send; empty otherwise.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names "the same directory on the same machine", so that transfers can be incremental; may be empty.
    pub fn shared_key(&self) -> &str {
        &self.shared_key
    }

    /// Whether the client announced this gRPC path, e.g. `/moby.filesync.v1.FileSync/DiffCopy` (case does not count).
    pub fn supports(&self, method: &str) -> bool {
        self.methods.contains(&method.to_ascii_lowercase())
    }

    /// The connection into the client, for services that have no method here.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Completes when the session is over.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Whether the session is over.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Ends the session; calls under way fail.
    pub fn close(&self) {
        self.closed.cancel();
    }

    pub(crate) fn require(&self, method: &str) -> Result<(), SessionError> {
        if self.supports(method) {
            Ok(())
        } else {
            Err(SessionError::Unsupported { method: method.to_owned() })
        }
    }

    fn auth(&self) -> AuthClient<Channel> {
        AuthClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE)
    }

    /// What the client wants a build's result to be written as, beyond what it asked for at the start: it may look at
    /// the result's metadata and at the names of its file systems. Nothing if it has no such service.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client failed.
    pub async fn find_exporters(
        &self,
        metadata: HashMap<String, Vec<u8>>,
        refs: Vec<String>,
    ) -> Result<Vec<ExporterRequest>, SessionError> {
        let mut client = ExporterClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        match client.find_exporters(FindExportersRequest { metadata, refs }).await {
            Ok(answer) => Ok(answer.into_inner().exporters),
            Err(status) if is_absent(&status) => Ok(Vec::new()),
            Err(status) => Err(SessionError::call("find exporters", status)),
        }
    }

    /// Tells the client what came of all exporters.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client failed.
    pub async fn finalize_export(&self, response: HashMap<String, String>) -> Result<(), SessionError> {
        let request = FinalizeExportRequest { exporter_response: response };
        match ExporterClient::new(self.channel()).finalize_export(request).await {
            Err(status) if !is_absent(&status) => Err(SessionError::call("finalize export", status)),
            _ => Ok(()),
        }
    }

    /// What the client knows for this registry host (`registry-1.docker.io` for Docker Hub); `None` means anonymous,
    /// also when the client has no such service.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client failed, e.g. its credential helper.
    pub async fn credentials(&self, host: &str) -> Result<Option<Credentials>, SessionError> {
        let request = CredentialsRequest { host: host.to_owned() };
        match timed(self.auth().credentials(request)).await {
            Ok(answer) if answer.username.is_empty() && answer.secret.is_empty() => Ok(None),
            Ok(answer) => Ok(Some(Credentials { username: answer.username, secret: answer.secret })),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(SessionError::call(format!("credentials for {host}"), status)),
        }
    }

    /// Has the client fetch a token from a token server, so that its password never reaches the daemon.
    ///
    /// # Errors
    /// [`SessionError::Call`]; `Unimplemented` if the client has no such service.
    pub async fn fetch_token(&self, request: FetchTokenRequest) -> Result<FetchTokenResponse, SessionError> {
        let call = format!("token for {}", request.host);
        timed(self.auth().fetch_token(request)).await.map_err(|status| SessionError::call(call, status))
    }

    /// The Ed25519 key under which this client's tokens for `host` may be shared; `None` if it wants none of it
    /// (then credentials and tokens are the daemon's affair).
    ///
    /// # Errors
    /// [`SessionError::Call`] on failures other than the service being absent or switched off.
    pub async fn token_authority(&self, host: &str, salt: &[u8]) -> Result<Option<Vec<u8>>, SessionError> {
        let request = GetTokenAuthorityRequest { host: host.to_owned(), salt: salt.to_vec() };
        match timed(self.auth().get_token_authority(request)).await {
            Ok(answer) if answer.public_key.is_empty() => Ok(None),
            Ok(answer) => Ok(Some(answer.public_key)),
            Err(status) if is_absent(&status) => Ok(None),
            Err(status) => Err(SessionError::call(format!("token authority for {host}"), status)),
        }
    }

    /// Has the client sign `payload`; the answer is a 64-byte Ed25519 signature followed by the payload.
    ///
    /// # Errors
    /// [`SessionError::Call`].
    pub async fn verify_token_authority(
        &self,
        host: &str,
        payload: Vec<u8>,
        salt: &[u8],
    ) -> Result<Vec<u8>, SessionError> {
        let request = VerifyTokenAuthorityRequest { host: host.to_owned(), payload, salt: salt.to_vec() };
        let answer = timed(self.auth().verify_token_authority(request)).await;
        answer
            .map(|a| a.signed)
            .map_err(|status| SessionError::call(format!("token authority for {host}"), status))
    }

    /// The secret with this id; `None` if the client has no such secret or no secrets at all.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client has it but could not read it.
    pub async fn get_secret(&self, id: &str) -> Result<Option<Vec<u8>>, SessionError> {
        let mut client = SecretsClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        let request = GetSecretRequest { id: id.to_owned(), ..Default::default() };
        match client.get_secret(request).await {
            Ok(answer) => Ok(Some(answer.into_inner().data)),
            Err(status) if matches!(status.code(), Code::NotFound | Code::Unimplemented) => Ok(None),
            Err(status) => Err(SessionError::call(format!("secret {id}"), status)),
        }
    }

    /// Whether the client forwards the ssh agent `id` (empty means `default`).
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client has the service but refuses.
    pub async fn ssh_check(&self, id: &str) -> Result<bool, SessionError> {
        let mut client = SshClient::new(self.channel());
        match client.check_agent(CheckAgentRequest { id: id.to_owned() }).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::Unimplemented => Ok(false),
            Err(status) => Err(SessionError::call(format!("ssh agent {id}"), status)),
        }
    }

    /// Carries one connection to the client's ssh agent `id` (empty means `default`) until either side ends it.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client refuses or the connection breaks.
    pub async fn ssh_forward<S>(&self, id: &str, stream: S) -> Result<(), SessionError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let failed = |status| SessionError::call(format!("ssh agent {id}"), status);
        let (reader, mut writer) = tokio::io::split(stream);
        let chunks = ReaderStream::with_capacity(reader, SSH_CHUNK);
        // A read error ends the direction, as the end of the stream does: the peer cannot tell them apart.
        let outgoing = chunks
            .take_while(|chunk| std::future::ready(chunk.is_ok()))
            .filter_map(|chunk| std::future::ready(chunk.ok().map(|data| SshMessage { data })));
        let mut request = Request::new(outgoing);
        let id = if id.is_empty() { "default" } else { id };
        headers::put(request.metadata_mut(), headers::SSH_ID, id).map_err(failed)?;
        let answer = SshClient::new(self.channel()).forward_agent(request).await.map_err(failed)?;
        let mut incoming = answer.into_inner();
        while let Some(message) = incoming.message().await.map_err(failed)? {
            if writer.write_all(&message.data).await.is_err() {
                break;
            }
        }
        let _ = writer.shutdown().await;
        Ok(())
    }

    /// The body that the client uploads for `http://<host>/<path>`, a tar context on its standard input.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the client knows no such path.
    pub async fn upload(
        &self,
        host: &str,
        path: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, Status>> + Send + 'static, SessionError> {
        let failed = |status| SessionError::call(format!("upload {path}"), status);
        // The request side stays silent but open: some clients end the upload when it is closed.
        let mut request = Request::new(futures::stream::pending::<UploadMessage>());
        headers::put(request.metadata_mut(), headers::UPLOAD_PATH, path).map_err(failed)?;
        headers::put(request.metadata_mut(), headers::UPLOAD_HOST, host).map_err(failed)?;
        let mut client = UploadClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        let answer = client.pull(request).await.map_err(failed)?;
        Ok(answer.into_inner().map_ok(|message| message.data))
    }
}

/// Whether a client has no service for a call.
fn is_absent(status: &Status) -> bool {
    matches!(status.code(), Code::Unimplemented | Code::Unavailable)
}

async fn timed<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    let answer = tokio::time::timeout(AUTH_TIMEOUT, call).await;
    answer
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("the client did not answer in time")))
        .map(tonic::Response::into_inner)
}
