//! `containerd.services.content.v1.Content`, read-only: blobs of images and of the build history,
//! by digest. Clients read records' logs and errors through it.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kiln_proto::content::content_server::Content;
use kiln_proto::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse,
    StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteContentRequest, WriteContentResponse,
};
use tonic::{Request, Response, Status, Streaming};

use crate::daemon::Daemon;
use crate::error::BuildError;

/// Bytes in one message.
const CHUNK: usize = 1 << 20;

pub(super) struct ContentService(pub(super) Arc<Daemon>);

fn read_only<T>() -> Result<Response<T>, Status> {
    Err(Status::failed_precondition("read-only content store"))
}

/// Where a blob's bytes are.
enum Blob {
    Bytes(Vec<u8>),
    File(std::fs::File, u64),
}

impl Blob {
    fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, size) => *size,
        }
    }

    fn read_at(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
                let end = start.saturating_add(length).min(bytes.len());
                Ok(bytes[start..end].to_vec())
            }
            Self::File(file, _) => {
                let mut data = vec![0; length];
                std::os::unix::fs::FileExt::read_exact_at(file, &mut data, offset)?;
                Ok(data)
            }
        }
    }
}

impl ContentService {
    async fn blob(&self, digest: &str) -> Result<Arc<Blob>, Status> {
        let (daemon, digest) = (self.0.clone(), digest.to_owned());
        let find = move || -> Result<Blob, BuildError> {
            if let Some(bytes) = daemon.history.content(&digest)? {
                return Ok(Blob::Bytes(bytes));
            }
            match daemon.engine.open_blob(&digest)? {
                Some((file, size)) => Ok(Blob::File(file, size)),
                None => Err(BuildError::new(tonic::Code::NotFound, format!("content {digest}: not found"))),
            }
        };
        let blob =
            tokio::task::spawn_blocking(find).await.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Arc::new(blob?))
    }
}

#[tonic::async_trait]
impl Content for ContentService {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let digest = request.into_inner().digest;
        let size = i64::try_from(self.blob(&digest).await?.size()).unwrap_or(i64::MAX);
        Ok(Response::new(InfoResponse { info: Some(Info { digest, size, ..Info::default() }) }))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let blob = self.blob(&request.digest).await?;
        let (Ok(offset), Ok(size)) = (u64::try_from(request.offset), u64::try_from(request.size)) else {
            return Err(Status::out_of_range("negative offset or size"));
        };
        if offset > blob.size() {
            return Err(Status::out_of_range("offset beyond the end"));
        }
        let end = if size == 0 { blob.size() } else { blob.size().min(offset.saturating_add(size)) };
        let chunks = stream::try_unfold((blob, offset), move |(blob, offset)| async move {
            if offset >= end {
                return Ok(None);
            }
            let length = usize::try_from(end - offset).unwrap_or(CHUNK).min(CHUNK);
            let (reader, from) = (blob.clone(), offset);
            let data = tokio::task::spawn_blocking(move || reader.read_at(from, length))
                .await
                .map_err(|error| Status::internal(error.to_string()))?
                .map_err(|error| Status::internal(error.to_string()))?;
            let message = ReadContentResponse { offset: i64::try_from(offset).unwrap_or(i64::MAX), data };
            Ok(Some((message, (blob, offset + length as u64))))
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn list(&self, _: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        Err(BuildError::unsupported("listing content").into())
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::not_found("no write is under way"))
    }

    async fn list_statuses(
        &self,
        _: Request<ListStatusesRequest>,
    ) -> Result<Response<ListStatusesResponse>, Status> {
        Ok(Response::new(ListStatusesResponse::default()))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        read_only()
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        read_only()
    }

    async fn write(
        &self,
        _: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        read_only()
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        read_only()
    }
}
