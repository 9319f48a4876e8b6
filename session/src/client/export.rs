//! Serves `FileSend`: the daemon hands over what exporters made. One gRPC path carries two protocols, so the codec is
//! chosen by the exporter that the call names: byte chunks for files, packets for directories.

use std::convert::Infallible;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_proto::filesync::BytesMessage;
use kiln_proto::fsutil::Packet;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::files::status;
use crate::fsutil::{self, Ownership, ReceiveMode, ReceiveOptions};
use crate::headers;

/// A writable file or stream.
pub type Output = Pin<Box<dyn AsyncWrite + Send>>;

/// Where an exporter's output goes.
pub enum ExportTarget {
    /// Into a file or stream, opened when the output comes.
    Bytes(Box<dyn FnOnce() -> std::io::Result<Output> + Send>),
    /// Into a directory, which is made if it is missing.
    Dir {
        /// The directory.
        path: PathBuf,
        /// Make it equal to the output: what is not in the output is deleted.
        mirror: bool,
    },
}

enum Slot {
    None,
    /// Taken by the one call that fills it.
    Bytes(Mutex<Option<ExportTarget>>),
    Dir {
        path: PathBuf,
        mirror: bool,
    },
}

/// The service; see the module.
#[derive(Clone)]
pub(super) struct FileSend {
    slots: Arc<[Slot]>,
}

impl FileSend {
    pub(super) fn new(targets: Vec<Option<ExportTarget>>) -> Self {
        let slot = |target| match target {
            None => Slot::None,
            Some(ExportTarget::Dir { path, mirror }) => Slot::Dir { path, mirror },
            Some(bytes) => Slot::Bytes(Mutex::new(Some(bytes))),
        };
        Self { slots: targets.into_iter().map(slot).collect() }
    }

    fn index(request: &http::Request<Body>) -> usize {
        let value = request.headers().get(headers::EXPORTER_ID).and_then(|value| value.to_str().ok());
        value.and_then(|value| value.parse().ok()).unwrap_or_default()
    }
}

impl NamedService for FileSend {
    const NAME: &'static str = "moby.filesync.v1.FileSend";
}

impl tower::Service<http::Request<Body>> for FileSend {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let slots = self.slots.clone();
        Box::pin(async move {
            if request.uri().path() != "/moby.filesync.v1.FileSend/DiffCopy" {
                return Ok(Status::unimplemented("no such method").into_http());
            }
            let index = Self::index(&request);
            Ok(match slots.get(index) {
                Some(Slot::Dir { path, mirror }) => {
                    let service = IntoDir { path: path.clone(), mirror: *mirror };
                    Grpc::new(ProstCodec::<Packet, Packet>::default()).streaming(service, request).await
                }
                Some(Slot::Bytes(target)) => {
                    let target = target.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let service = IntoBytes { target };
                    Grpc::new(ProstCodec::<BytesMessage, BytesMessage>::default())
                        .streaming(service, request)
                        .await
                }
                Some(Slot::None) | None => {
                    Status::not_found(format!("no target for the output of exporter {index}")).into_http()
                }
            })
        })
    }
}

struct IntoBytes {
    target: Option<ExportTarget>,
}

impl StreamingService<BytesMessage> for IntoBytes {
    type Response = BytesMessage;
    type ResponseStream = BoxStream<'static, Result<BytesMessage, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<BytesMessage>>) -> Self::Future {
        let target = self.target.take();
        Box::pin(async move {
            let Some(ExportTarget::Bytes(open)) = target else {
                return Err(Status::failed_precondition("the output was already taken"));
            };
            let failed = |error: std::io::Error| Status::unknown(format!("write output: {error}"));
            let mut output = open().map_err(failed)?;
            let mut incoming = request.into_inner();
            while let Some(message) = incoming.message().await? {
                output.write_all(&message.data).await.map_err(failed)?;
            }
            // Shutting standard output down does not wait for what was written.
            output.flush().await.map_err(failed)?;
            output.shutdown().await.map_err(failed)?;
            Ok(Response::new(futures::stream::empty().boxed()))
        })
    }
}

struct IntoDir {
    path: PathBuf,
    mirror: bool,
}

impl StreamingService<Packet> for IntoDir {
    type Response = Packet;
    type ResponseStream = BoxStream<'static, Result<Packet, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Packet>>) -> Self::Future {
        let (path, mirror) = (self.path.clone(), self.mirror);
        Box::pin(async move {
            let complete = headers::get(request.metadata(), headers::EXPORTER_MULTI_PLATFORM) == "1";
            if mirror && !complete {
                return Err(Status::failed_precondition(
                    "the daemon cannot mirror a directory: it sends no complete listing",
                ));
            }
            std::fs::create_dir_all(&path)
                .map_err(|error| Status::unknown(format!("make directory {}: {error}", path.display())))?;
            let mode = if mirror { ReceiveMode::MirrorAll } else { ReceiveMode::Merge };
            let options = ReceiveOptions { mode, ownership: Ownership::Ignore, ..Default::default() };
            let incoming = request.into_inner().boxed();
            let (packets, receiver) = mpsc::unbounded_channel();
            let result = tokio::spawn(async move {
                fsutil::receive(&path, options, incoming, packets).await.map(drop).map_err(status)
            });
            let end = futures::stream::once(result).filter_map(|result| {
                std::future::ready(match result {
                    Ok(Ok(())) => None,
                    Ok(Err(status)) => Some(Err(status)),
                    Err(error) => Some(Err(Status::internal(format!("transfer task failed: {error}")))),
                })
            });
            Ok(Response::new(UnboundedReceiverStream::new(receiver).map(Ok).chain(end).boxed()))
        })
    }
}
