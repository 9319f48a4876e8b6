//! Helpers: directories from lists of entries, transfers between two of them, and a daemon that serves sessions only.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::BoxStream;
use hyper_util::rt::TokioIo;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::control::control_server::{Control, ControlServer};
use kiln_proto::control::*;
use kiln_session::SessionManager;
use kiln_session::fsutil::{self, ReceiveOptions, Received, Selection, SendSummary, Subtree, TransferError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// Writes a file with its parents.
pub(crate) fn write(root: &Path, path: &str, content: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, content).unwrap();
}

/// A path as text; escaped if it is none.
fn shown(path: &Path) -> String {
    path.to_str().map_or_else(|| path.as_os_str().as_bytes().escape_ascii().to_string(), str::to_owned)
}

/// Everything below a directory: path to "type mode size-or-target mtime".
pub(crate) fn listing(root: &Path) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let kind = meta.file_type();
            let what = if kind.is_dir() {
                dirs.push(path.clone());
                "dir".to_owned()
            } else if kind.is_symlink() {
                format!("link {}", shown(&path.read_link().unwrap()))
            } else if kind.is_file() {
                format!("file {:?}", String::from_utf8_lossy(&std::fs::read(&path).unwrap()))
            } else if kind.is_fifo() {
                "fifo".to_owned()
            } else {
                format!("device {}", meta.rdev())
            };
            let mode = meta.permissions().mode() & 0o7777;
            let name = shown(path.strip_prefix(root).unwrap());
            all.insert(name, format!("{what} {mode:o} {}.{}", meta.mtime(), meta.mtime_nsec()));
        }
    }
    all
}

/// Only the paths of [`listing`].
pub(crate) fn paths(root: &Path) -> Vec<String> {
    listing(root).into_keys().collect()
}

/// The selection with these patterns.
pub(crate) fn select(include: &[&str], exclude: &[&str], follow: &[&str]) -> Selection {
    let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect();
    Selection { include: owned(include), exclude: owned(exclude), follow: owned(follow) }
}

/// Sends `from` to `to` in this process.
pub(crate) async fn transfer(
    from: &Path,
    selection: Selection,
    to: &Path,
    options: ReceiveOptions,
) -> (Result<SendSummary, TransferError>, Result<Received, TransferError>) {
    let tree = Subtree { selection, ..Subtree::open(from).unwrap() };
    let (packets, outgoing) = mpsc::channel(fsutil::SEND_QUEUE);
    let (requests, incoming) = mpsc::unbounded_channel();
    let send =
        fsutil::send(vec![tree], UnboundedReceiverStream::new(incoming).map(Ok).boxed(), packets, None);
    let receive = fsutil::receive(to, options, ReceiverStream::new(outgoing).map(Ok).boxed(), requests);
    tokio::join!(send, receive)
}

/// A daemon that knows nothing but sessions.
struct SessionsOnly(Arc<SessionManager>);

fn no<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("sessions only"))
}

#[tonic::async_trait]
impl Control for SessionsOnly {
    type PruneStream = BoxStream<'static, Result<UsageRecord, Status>>;
    type StatusStream = BoxStream<'static, Result<StatusResponse, Status>>;
    type SessionStream = BoxStream<'static, Result<BytesMessage, Status>>;
    type ListenBuildHistoryStream = BoxStream<'static, Result<BuildHistoryEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (metadata, _, incoming) = request.into_parts();
        Ok(Response::new(self.0.handle(&metadata, incoming)?.boxed()))
    }
    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        no()
    }
    async fn prune(&self, _: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        no()
    }
    async fn solve(&self, _: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        no()
    }
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        no()
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
        no()
    }
    async fn update_build_history(
        &self,
        _: Request<UpdateBuildHistoryRequest>,
    ) -> Result<Response<UpdateBuildHistoryResponse>, Status> {
        no()
    }
}

/// A daemon's session table and a client connected to it.
pub(crate) async fn daemon() -> (Arc<SessionManager>, ControlClient<Channel>) {
    let manager = SessionManager::new();
    let service = ControlServer::new(SessionsOnly(manager.clone()));
    let (client, server) = tokio::io::duplex(1 << 20);
    let connections = futures::stream::once(std::future::ready(Ok::<_, std::io::Error>(server)));
    let connections = connections.chain(futures::stream::pending());
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(connections));
    let mut client = Some(client);
    let connector = tower::service_fn(move |_: http::Uri| {
        let client = client.take();
        async move { client.map(TokioIo::new).ok_or(std::io::Error::other("connected already")) }
    });
    let channel = Endpoint::from_static("http://localhost").connect_with_connector(connector).await.unwrap();
    (manager, ControlClient::new(channel))
}
