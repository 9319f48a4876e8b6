//! `containerd.services.content.v1.Content`, read-only: blobs of images and of the build history.
//! Clients read records' logs and errors through it.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use kiln_cache::Filter;
use kiln_proto::content::content_server::Content;
use kiln_proto::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse,
    StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteContentRequest, WriteContentResponse,
};
use tonic::{Request, Response, Status, Streaming};

use super::blocking;
use crate::daemon::Daemon;
use crate::error::BuildError;

/// Bytes in one message.
const CHUNK: usize = 1 << 20;
/// Blobs that one message lists.
const LISTED: usize = 100;

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

fn not_found(digest: &str) -> BuildError {
    BuildError::new(tonic::Code::NotFound, format!("content {digest}: not found"))
}

fn blob(daemon: &Daemon, digest: &str) -> Result<Blob, BuildError> {
    if let Some(bytes) = daemon.history.content(digest)? {
        return Ok(Blob::Bytes(bytes));
    }
    match daemon.engine.open_blob(digest)? {
        Some((file, size)) => Ok(Blob::File(file, size)),
        None => Err(not_found(digest)),
    }
}

fn info(daemon: &Daemon, digest: &str) -> Result<Option<Info>, BuildError> {
    let size = |size: u64| i64::try_from(size).unwrap_or(i64::MAX);
    if let Some(bytes) = daemon.history.content(digest)? {
        let size = size(bytes.len() as u64);
        return Ok(Some(Info { digest: digest.to_owned(), size, ..Info::default() }));
    }
    Ok(daemon.engine.blob_info(digest)?.map(|blob| Info {
        digest: blob.digest,
        size: size(blob.size),
        created_at: Some(blob.created.into()),
        // A blob never changes.
        updated_at: Some(blob.created.into()),
        labels: blob.labels.into_iter().collect(),
    }))
}

/// A field of a blob by its name in filters.
fn field(info: &Info, name: &str) -> Option<String> {
    match name.strip_prefix("labels.") {
        Some(label) => info.labels.get(label).cloned(),
        None => Some(info.digest.clone()),
    }
}

/// What clients may ask a list to be restricted by.
fn filter(filters: &[String]) -> Result<Filter, Status> {
    let filter = Filter::parse(filters).map_err(|error| Status::invalid_argument(error.to_string()))?;
    if let Some(field) = filter.fields().find(|name| *name != "digest" && !name.starts_with("labels.")) {
        return Err(BuildError::unsupported(format_args!("content filter on {field:?}")).into());
    }
    Ok(filter)
}

#[tonic::async_trait]
impl Content for ContentService {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let (daemon, digest) = (self.0.clone(), request.into_inner().digest);
        let found = blocking(move || info(&daemon, &digest)?.ok_or_else(|| not_found(&digest))).await?;
        Ok(Response::new(InfoResponse { info: Some(found) }))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let request = request.into_inner();
        let (daemon, digest) = (self.0.clone(), request.digest.clone());
        let blob = Arc::new(blocking(move || blob(&daemon, &digest)).await?);
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
            let data = blocking(move || {
                let read = reader.read_at(from, length);
                read.map_err(|error| BuildError::new(tonic::Code::Internal, error.to_string()))
            })
            .await?;
            let message = ReadContentResponse { offset: i64::try_from(offset).unwrap_or(i64::MAX), data };
            Ok(Some((message, (blob, offset + length as u64))))
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn list(&self, request: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        let filter = Arc::new(filter(&request.into_inner().filters)?);
        let daemon = self.0.clone();
        daemon.history.settled().await;
        let digests = blocking(move || {
            let mut all = daemon.engine.blobs()?;
            all.extend(daemon.history.contents()?);
            all.sort_unstable();
            all.dedup();
            Ok(all)
        })
        .await?;
        let daemon = self.0.clone();
        let pages = stream::try_unfold(digests.into_iter(), move |mut digests| {
            let (daemon, filter) = (daemon.clone(), filter.clone());
            async move {
                let page = blocking(move || {
                    let mut infos = Vec::new();
                    while infos.len() < LISTED
                        && let Some(digest) = digests.next()
                    {
                        // One that has gone meanwhile is not listed.
                        let found = info(&daemon, &digest)?;
                        infos.extend(found.filter(|info| filter.holds(&|name| field(info, name))));
                    }
                    Ok((infos, digests))
                });
                let (info, digests) = page.await?;
                Ok((!info.is_empty()).then_some((ListContentResponse { info }, digests)))
            }
        });
        Ok(Response::new(pages.boxed()))
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
