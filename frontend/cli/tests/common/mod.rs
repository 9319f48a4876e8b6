//! A daemon that does what a test says, on a socket of its own, and the command line run against it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use kiln_proto::control::control_server::{Control, ControlServer};
use kiln_proto::control::*;
use kiln_session::SessionManager;
use tokio::sync::{broadcast, oneshot};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

type Solved = Result<SolveResponse, Status>;
/// What a test has the daemon do for a solve.
pub(crate) type Script =
    Arc<dyn Fn(SolveRequest, Arc<SessionManager>, Progress) -> BoxFuture<'static, Solved> + Send + Sync>;

/// Sends status messages of the one build there is.
#[derive(Clone)]
pub(crate) struct Progress(broadcast::Sender<StatusResponse>);

impl Progress {
    pub(crate) fn send(&self, message: StatusResponse) {
        // Fails only when nobody listens.
        let _ = self.0.send(message);
    }
}

/// The scripted daemon. Stops with its runtime when dropped.
pub(crate) struct Daemon {
    dir: tempfile::TempDir,
    runtime: Option<tokio::runtime::Runtime>,
    /// Resolves when a solve was dropped before it ended.
    pub(crate) dropped: Arc<Mutex<Option<oneshot::Receiver<()>>>>,
}

impl Daemon {
    /// Listens; each solve runs `script`.
    pub(crate) fn start<F>(
        script: impl Fn(SolveRequest, Arc<SessionManager>, Progress) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Solved> + Send + 'static,
    {
        let dir = tempfile::tempdir().unwrap();
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (gone, dropped) = oneshot::channel();
        let (progress, _) = broadcast::channel(1024);
        let service = Service {
            sessions: SessionManager::new(),
            script: Arc::new(move |request, sessions, progress| {
                Box::pin(script(request, sessions, progress))
            }),
            progress: Mutex::new((Some(progress.clone()), Some(progress.subscribe()))),
            gone: Mutex::new(Some(gone)),
        };
        let socket = dir.path().join("kilnd.sock");
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::bind(&socket).unwrap();
            let server = Server::builder().add_service(ControlServer::new(service));
            tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        });
        Self { dir, runtime: Some(runtime), dropped: Arc::new(Mutex::new(Some(dropped))) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `kiln ARGS…` against this daemon.
    pub(crate) fn kiln(&self, args: &[&str]) -> Command {
        let mut command = kiln(args);
        command
            .env("KILN_HOST", format!("unix://{}", self.path("kilnd.sock").display()))
            .env("HOME", self.dir.path());
        command
    }

    /// Runs `kiln ARGS…` to its end.
    pub(crate) fn run(&self, args: &[&str]) -> (i32, String, String) {
        ended(self.kiln(args).output().unwrap())
    }

    /// An empty directory with a Dockerfile.
    pub(crate) fn context(&self) -> String {
        let path = self.path("context");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("Dockerfile"), "FROM scratch\n").unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Ends every connection at once, as a killed daemon does.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Waits until the solve was dropped.
    pub(crate) fn wait_dropped(&self) {
        let dropped = self.dropped.lock().unwrap().take().unwrap();
        dropped.blocking_recv().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// `kiln ARGS…`, cut off from this process's environment where it matters.
pub(crate) fn kiln(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(args).stdin(Stdio::null());
    for name in
        ["KILN_HOST", "KILN_ROOT", "KILN_CONFIG", "KILN_IDLE_TIMEOUT", "BUILDKIT_PROGRESS", "DOCKER_CONFIG"]
    {
        command.env_remove(name);
    }
    command
}

/// Exit code, standard output, standard error.
pub(crate) fn ended(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// A vertex that runs, or ran.
pub(crate) fn vertex(digest: &str, completed: bool) -> Vertex {
    let at = |nanos| Some(prost_types::Timestamp { seconds: 1000, nanos });
    Vertex {
        digest: digest.into(),
        name: format!("[{digest}] step"),
        started: at(0),
        completed: if completed { at(100_000_000) } else { None },
        ..Default::default()
    }
}

/// A message with these vertices.
pub(crate) fn vertices(vertexes: Vec<Vertex>) -> StatusResponse {
    StatusResponse { vertexes, ..Default::default() }
}

/// A message with output of a vertex.
pub(crate) fn log(digest: &str, text: &str) -> StatusResponse {
    let timestamp = Some(prost_types::Timestamp { seconds: 1000, nanos: 50_000_000 });
    let log = VertexLog { vertex: digest.into(), timestamp, stream: 1, msg: text.into() };
    StatusResponse { logs: vec![log], ..Default::default() }
}

type Messages = broadcast::Receiver<StatusResponse>;

struct Service {
    sessions: Arc<SessionManager>,
    script: Script,
    /// The solve drops the sender at its end; the receiver waits for a status call, however late.
    progress: Mutex<(Option<broadcast::Sender<StatusResponse>>, Option<Messages>)>,
    gone: Mutex<Option<oneshot::Sender<()>>>,
}

/// Tells when it is dropped without having been disarmed.
struct Watch(Option<oneshot::Sender<()>>);

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(gone) = self.0.take() {
            let _ = gone.send(());
        }
    }
}

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not scripted"))
}

#[tonic::async_trait]
impl Control for Service {
    type PruneStream = BoxStream<'static, Result<UsageRecord, Status>>;
    type StatusStream = BoxStream<'static, Result<StatusResponse, Status>>;
    type SessionStream = BoxStream<'static, Result<BytesMessage, Status>>;
    type ListenBuildHistoryStream = BoxStream<'static, Result<BuildHistoryEvent, Status>>;

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        let sender = self.progress.lock().unwrap().0.clone();
        let progress = Progress(sender.unwrap_or_else(|| broadcast::channel(1).0));
        let mut watch = Watch(self.gone.lock().unwrap().take());
        let answer = (self.script)(request.into_inner(), self.sessions.clone(), progress).await;
        watch.0 = None;
        // The stream ends with the build.
        self.progress.lock().unwrap().0 = None;
        answer.map(Response::new)
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        let receiver = {
            let mut progress = self.progress.lock().unwrap();
            let next = progress.0.as_ref().map(broadcast::Sender::subscribe);
            std::mem::replace(&mut progress.1, next)
        };
        let Some(receiver) = receiver else { return Err(Status::not_found("no such job")) };
        let stream = futures::stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.ok().map(|message| (Ok(message), receiver))
        });
        Ok(Response::new(stream.boxed()))
    }

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (metadata, _, incoming) = request.into_parts();
        Ok(Response::new(self.sessions.handle(&metadata, incoming)?.boxed()))
    }

    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        let record = UsageRecord { id: "abc".into(), size: 2_000_000, ..Default::default() };
        Ok(Response::new(DiskUsageResponse { record: vec![record] }))
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        let request = request.into_inner();
        let description = format!("{} {} {:?}", request.all, request.keep_duration, request.filter);
        let record = UsageRecord { id: "gone".into(), size: 5, description, ..Default::default() };
        Ok(Response::new(futures::stream::iter([Ok(record)]).boxed()))
    }

    async fn list_workers(
        &self,
        _: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        no()
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        no()
    }

    async fn listen_build_history(
        &self,
        _: Request<BuildHistoryRequest>,
    ) -> Result<Response<Self::ListenBuildHistoryStream>, Status> {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        let builds = [("taken", at(2)), ("running", None), ("again", at(3)), ("ended\u{1b}[2J", at(4))];
        let events = builds.map(|(id, completed_at)| {
            let record = BuildHistoryRecord {
                r#ref: id.into(),
                created_at: at(1),
                completed_at,
                ..Default::default()
            };
            Ok(BuildHistoryEvent { record: Some(record), ..Default::default() })
        });
        Ok(Response::new(futures::stream::iter(events).boxed()))
    }

    async fn update_build_history(
        &self,
        request: Request<UpdateBuildHistoryRequest>,
    ) -> Result<Response<UpdateBuildHistoryResponse>, Status> {
        match request.into_inner().r#ref.as_str() {
            "taken" => Err(Status::not_found("no such build taken")),
            "running" => Err(Status::internal("nobody should ask for this")),
            "again" => Err(Status::failed_precondition("build again is still running")),
            _ => Ok(Response::new(UpdateBuildHistoryResponse::default())),
        }
    }
}

/// Whether `path` holds exactly `content`.
#[track_caller]
pub(crate) fn assert_file(path: &Path, content: &str) {
    assert_eq!(std::fs::read_to_string(path).unwrap(), content, "{}", path.display());
}
