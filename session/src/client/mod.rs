//! The client's end of a session: a gRPC server inside the byte stream of a `Control.Session` call, offering what the
//! command line chose to attach.

mod content;
mod export;
mod files;
mod secrets;
mod ssh;
mod upload;

use std::convert::Infallible;

use futures::StreamExt;
use kiln_proto::control::BytesMessage;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::filesync::auth_server::{Auth, AuthServer};
use kiln_proto::health::health_check_response::ServingStatus;
use kiln_proto::health::health_server::{Health, HealthServer};
use kiln_proto::health::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::service::RoutesBuilder;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

use crate::error::SessionError;
use crate::headers;
use crate::pipe::{Pipe, pipe};

pub use content::ContentDir;
pub use export::{ExportTarget, Output};
pub use files::SharedDir;
pub use secrets::Secret;
pub use ssh::Agent;

/// What a client offers to the daemon during a build.
#[derive(Default)]
pub struct Attachables {
    routes: RoutesBuilder,
    methods: Vec<&'static str>,
}

impl Attachables {
    /// Offers nothing but health checks.
    pub fn new() -> Self {
        let mut this = Self::default();
        this.routes.add_service(HealthServer::new(Healthy));
        this.methods.extend([
            "/grpc.health.v1.Health/Check",
            "/grpc.health.v1.Health/Watch",
            "/grpc.health.v1.Health/List",
        ]);
        this
    }

    /// Offers a service that is none of those below, whose calls are `methods`.
    pub fn add<S>(&mut self, service: S, methods: &[&'static str])
    where
        S: tower::Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.routes.add_service(service);
        self.methods.extend(methods);
    }

    /// Shares directories under their names.
    pub fn share(&mut self, dirs: Vec<SharedDir>) {
        self.routes.add_service(files::service(dirs));
        self.methods.push("/moby.filesync.v1.FileSync/DiffCopy");
    }

    /// Takes the output of exporters; an exporter's target is at its index in the solve request.
    pub fn export(&mut self, targets: Vec<Option<ExportTarget>>) {
        self.routes.add_service(export::FileSend::new(targets));
        self.methods.push("/moby.filesync.v1.FileSend/DiffCopy");
    }

    /// Offers image layouts.
    pub fn content(&mut self, dirs: Vec<ContentDir>) {
        self.routes.add_service(content::service(dirs));
        self.methods.extend([
            "/containerd.services.content.v1.Content/Info",
            "/containerd.services.content.v1.Content/Read",
            "/containerd.services.content.v1.Content/Write",
            "/containerd.services.content.v1.Content/Abort",
        ]);
    }

    /// Answers for secrets.
    pub fn secrets(&mut self, secrets: Vec<Secret>) {
        self.routes.add_service(secrets::service(secrets));
        self.methods.push("/moby.buildkit.secrets.v1.Secrets/GetSecret");
    }

    /// Forwards connections to ssh agents.
    pub fn ssh(&mut self, agents: Vec<Agent>) {
        self.routes.add_service(ssh::service(agents));
        self.methods.extend(["/moby.sshforward.v1.SSH/CheckAgent", "/moby.sshforward.v1.SSH/ForwardAgent"]);
    }

    /// Sends what `source` gives to whom asks for `path`, once.
    pub fn upload(&mut self, path: &str, source: impl std::io::Read + Send + 'static) {
        self.routes.add_service(upload::service(path, Box::new(source)));
        self.methods.push("/moby.upload.v1.Upload/Pull");
    }

    /// Answers for registry credentials.
    pub fn auth(&mut self, auth: impl Auth) {
        self.routes.add_service(AuthServer::new(auth));
        self.methods.extend([
            "/moby.filesync.v1.Auth/Credentials",
            "/moby.filesync.v1.Auth/FetchToken",
            "/moby.filesync.v1.Auth/GetTokenAuthority",
            "/moby.filesync.v1.Auth/VerifyTokenAuthority",
        ]);
    }

    /// Opens the session `id` and serves it until [`ClientSession::close`] or until the daemon ends it.
    ///
    /// # Errors
    /// [`SessionError::Call`] if the daemon refuses the session.
    pub async fn attach(
        self,
        control: &mut ControlClient<Channel>,
        id: &str,
        shared_key: &str,
    ) -> Result<ClientSession, SessionError> {
        let failed = |status| SessionError::call("open session", status);
        let (incoming_sender, incoming) = tokio::sync::oneshot::channel::<tonic::Streaming<BytesMessage>>();
        // The server end exists before the call, so that bytes flow as soon as either side has some.
        let incoming =
            futures::stream::once(incoming).filter_map(|stream| std::future::ready(stream.ok())).flatten();
        let closed = CancellationToken::new();
        let (pipe, outgoing) = pipe(Box::pin(incoming), closed.clone());
        let mut request = Request::new(ReceiverStream::new(outgoing));
        headers::put(request.metadata_mut(), headers::SESSION_ID, id).map_err(failed)?;
        headers::put(request.metadata_mut(), headers::SESSION_SHARED_KEY, shared_key).map_err(failed)?;
        for method in &self.methods {
            headers::put(request.metadata_mut(), headers::SESSION_METHOD, method).map_err(failed)?;
        }
        let server = tokio::spawn(serve(self, pipe, closed.clone()));
        let answer = control.session(request).await.map_err(failed)?;
        let _ = incoming_sender.send(answer.into_inner());
        Ok(ClientSession { closed, server })
    }
}

async fn serve(attachables: Attachables, pipe: Pipe, closed: CancellationToken) {
    let connections = futures::stream::once(std::future::ready(Ok::<_, std::io::Error>(pipe)))
        .chain(futures::stream::pending());
    let server = Server::builder()
        .initial_stream_window_size(crate::STREAM_WINDOW)
        .initial_connection_window_size(crate::CONNECTION_WINDOW)
        .add_routes(attachables.routes.routes());
    if let Err(error) = server.serve_with_incoming_shutdown(connections, closed.cancelled_owned()).await {
        tracing::debug!(%error, "session ended");
    }
}

/// A session that is being served. Dropping it ends it.
pub struct ClientSession {
    closed: CancellationToken,
    server: JoinHandle<()>,
}

impl ClientSession {
    /// Completes when the session is over, from whichever side.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Ends the session.
    pub fn close(&self) {
        self.closed.cancel();
    }
}

impl Drop for ClientSession {
    fn drop(&mut self) {
        self.closed.cancel();
        self.server.abort();
    }
}

/// A client that can answer at all is healthy.
struct Healthy;

fn serving() -> HealthCheckResponse {
    HealthCheckResponse { status: ServingStatus::Serving.into() }
}

#[tonic::async_trait]
impl Health for Healthy {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(serving()))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Ok(Response::new(HealthListResponse { statuses: [(String::new(), serving())].into() }))
    }

    type WatchStream = futures::stream::BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let once = futures::stream::once(std::future::ready(Ok(serving())));
        Ok(Response::new(once.chain(futures::stream::pending()).boxed()))
    }
}

/// Packets or bytes that a handler produces while it reads the request.
fn outgoing<T: Send + 'static>(
    receiver: tokio::sync::mpsc::Receiver<T>,
    result: JoinHandle<Result<(), Status>>,
) -> futures::stream::BoxStream<'static, Result<T, Status>> {
    let end = futures::stream::once(result).filter_map(|result| {
        std::future::ready(match result {
            Ok(Ok(())) => None,
            Ok(Err(status)) => Some(Err(status)),
            Err(error) => Some(Err(Status::internal(format!("transfer task failed: {error}")))),
        })
    });
    ReceiverStream::new(receiver).map(Ok).chain(end).boxed()
}
