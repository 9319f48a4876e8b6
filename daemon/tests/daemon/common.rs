//! A daemon on a socket of its own, and clients for it.

use std::path::PathBuf;

use hyper_util::rt::TokioIo;
use kiln_daemon::{Config, DaemonError};
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::control::{SolveRequest, SolveResponse, StatusRequest, StatusResponse};
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::{llb, pb};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// A running daemon.
pub(crate) struct Daemon {
    pub(crate) dir: TempDir,
    pub(crate) config: Config,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<(), DaemonError>>>,
}

impl Daemon {
    /// Starts one with an empty store.
    pub(crate) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// Starts one whose configuration `change` adjusts.
    pub(crate) async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut config = Config {
            root: dir.path().join("root"),
            addresses: vec![format!("unix://{}", dir.path().join("kilnd.sock").display())],
            ..Config::default()
        };
        change(&mut config);
        let mut daemon = Self { dir, config, stop: CancellationToken::new(), task: None };
        daemon.restart().await;
        daemon
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("kilnd.sock")
    }

    /// Starts it again after [`Daemon::stop`].
    pub(crate) async fn restart(&mut self) {
        self.stop = CancellationToken::new();
        self.task = Some(tokio::spawn(kiln_daemon::serve(self.config.clone(), self.stop.clone())));
        while UnixStream::connect(self.socket()).await.is_err() {
            let task = self.task.as_ref().expect("started");
            assert!(!task.is_finished(), "the daemon did not start");
            tokio::task::yield_now().await;
        }
    }

    /// Stops it in good order.
    pub(crate) async fn stop(&mut self) {
        self.stop.cancel();
        let task = self.task.take().expect("running");
        task.await.expect("the daemon's task").expect("the daemon ended well");
        assert!(!self.socket().exists(), "the socket was left behind");
    }

    /// Waits until it ended by itself.
    pub(crate) async fn ended(&mut self) {
        let task = self.task.take().expect("running");
        task.await.expect("the daemon's task").expect("the daemon ended well");
    }

    pub(crate) async fn channel(&self) -> Channel {
        let socket = self.socket();
        Endpoint::from_static("http://localhost")
            .connect_with_connector(tower::service_fn(move |_: http::Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .expect("the daemon listens")
    }

    pub(crate) async fn control(&self) -> ControlClient<Channel> {
        ControlClient::new(self.channel().await).max_decoding_message_size(16 << 20)
    }

    pub(crate) async fn gateway(&self) -> LlbBridgeClient<Channel> {
        LlbBridgeClient::new(self.channel().await).max_decoding_message_size(16 << 20)
    }

    /// Builds a definition; gives the response and the whole status stream.
    pub(crate) async fn build(
        &self,
        request: SolveRequest,
    ) -> (Result<SolveResponse, Status>, Vec<StatusResponse>) {
        let mut control = self.control().await;
        let mut watcher = self.control().await;
        let id = request.r#ref.clone();
        let status = tokio::spawn(async move {
            let stream = watcher.status(StatusRequest { r#ref: id }).await;
            let Ok(stream) = stream else { return Vec::new() };
            let mut stream = stream.into_inner();
            let mut all = Vec::new();
            while let Ok(Some(message)) = stream.message().await {
                all.push(message);
            }
            all
        });
        let response = control.solve(request).await.map(tonic::Response::into_inner);
        (response, status.await.expect("status task"))
    }
}

/// A request to build a definition.
pub(crate) fn request(id: &str, definition: pb::Definition) -> SolveRequest {
    SolveRequest { r#ref: id.into(), definition: Some(definition), ..SolveRequest::default() }
}

/// A gateway call for a build.
pub(crate) fn for_build<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("buildkit-controlapi-buildid", id.parse().expect("a header"));
    request
}

/// A file of the given text on scratch, and the vertex that makes it.
pub(crate) fn file(path: &str, text: &str) -> (pb::Definition, String) {
    chain(&[(path, text)])
}

/// One vertex for each file, each on top of the one before; the digest is the last one's.
pub(crate) fn chain(files: &[(&str, &str)]) -> (pb::Definition, String) {
    let mut builder = llb::Builder::new();
    let mut last: Option<pb::Input> = None;
    for (path, text) in files {
        let action = pb::FileAction {
            input: if last.is_some() { 0 } else { -1 },
            secondary_input: -1,
            output: 0,
            action: Some(pb::file_action::Action::Mkfile(Box::new(pb::FileActionMkFile {
                path: (*path).into(),
                mode: 0o644,
                data: text.as_bytes().to_vec(),
                timestamp: -1,
                ..pb::FileActionMkFile::default()
            }))),
        };
        let op = pb::Op {
            inputs: last.take().into_iter().collect(),
            op: Some(pb::op::Op::File(pb::FileOp { actions: vec![action] })),
            ..pb::Op::default()
        };
        let digest = builder.add(&op, pb::OpMetadata::default());
        last = Some(pb::Input { digest, index: 0 });
    }
    let last = last.expect("at least one file");
    (builder.finish(&last), last.digest)
}
