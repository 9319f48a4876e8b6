//! Serves `Content`: directories in the form of an image layout, whose blobs the daemon reads and adds to.

use std::io;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_proto::content::content_server::{Content, ContentServer};
use kiln_proto::content::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse,
    StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::{headers, id};

/// Size of a message.
const CHUNK: usize = 1 << 20;

/// A directory in the form of an image layout, offered under a name.
#[derive(Debug, Clone)]
pub struct ContentDir {
    /// What the daemon asks for, e.g. `export`.
    pub name: String,
    /// The directory; it is made when something is written.
    pub path: PathBuf,
}

pub(super) fn service(dirs: Vec<ContentDir>) -> ContentServer<Layouts> {
    ContentServer::new(Layouts { dirs })
}

pub(super) struct Layouts {
    dirs: Vec<ContentDir>,
}

impl Layouts {
    fn dir(&self, metadata: &MetadataMap) -> Result<&Path, Status> {
        let name = headers::get(metadata, headers::STORE_ID);
        let found = self.dirs.iter().find(|dir| dir.name == name);
        found
            .map(|dir| dir.path.as_path())
            .ok_or_else(|| Status::not_found(format!("no content store {name:?}")))
    }
}

/// The file of a blob.
fn blob(dir: &Path, digest: &str) -> Result<PathBuf, Status> {
    let hex = digest.strip_prefix("sha256:");
    let hex = hex
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')));
    let hex = hex.ok_or_else(|| Status::invalid_argument(format!("invalid digest {digest:?}")))?;
    Ok(dir.join("blobs/sha256").join(hex))
}

fn failed(path: &Path, error: &io::Error) -> Status {
    let text = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::NotFound => Status::not_found(text),
        _ => Status::unknown(text),
    }
}

fn no<T>(what: &str) -> Result<T, Status> {
    Err(Status::unimplemented(format!("unsupported: content {what}")))
}

#[tonic::async_trait]
impl Content for Layouts {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let digest = &request.get_ref().digest;
        let path = blob(self.dir(request.metadata())?, digest)?;
        let meta = tokio::fs::metadata(&path).await.map_err(|error| failed(&path, &error))?;
        let size = i64::try_from(meta.len()).unwrap_or(i64::MAX);
        let info = Info { digest: digest.clone(), size, ..Info::default() };
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let dir = self.dir(request.metadata())?;
        let wanted = request.get_ref();
        let path = blob(dir, &wanted.digest)?;
        let start = u64::try_from(wanted.offset).map_err(|_| Status::out_of_range("negative offset"))?;
        // No size, or a negative one, is all there is.
        let limit = u64::try_from(wanted.size).ok().filter(|size| *size > 0).unwrap_or(u64::MAX);
        let mut file = tokio::fs::File::open(&path).await.map_err(|error| failed(&path, &error))?;
        file.seek(io::SeekFrom::Start(start)).await.map_err(|error| failed(&path, &error))?;
        let pieces = futures::stream::try_unfold((file.take(limit), start), move |(mut file, offset)| {
            let path = path.clone();
            async move {
                let mut data = Vec::with_capacity(CHUNK);
                let piece = (&mut file).take(CHUNK as u64).read_to_end(&mut data).await;
                let length = piece.map_err(|error| failed(&path, &error))?;
                if length == 0 {
                    return Ok(None);
                }
                let answer = ReadContentResponse { offset: i64::try_from(offset).unwrap_or(i64::MAX), data };
                Ok(Some((answer, (file, offset + length as u64))))
            }
        });
        Ok(Response::new(pieces.boxed()))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let dir = self.dir(request.metadata())?.to_owned();
        let mut incoming = request.into_inner();
        let first = incoming.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("nothing to write"))?;
        let path = blob(&dir, &first.expected)?;
        if tokio::fs::try_exists(&path).await.map_err(|error| failed(&path, &error))? {
            return Err(Status::already_exists(format!("content {}: already exists", first.expected)));
        }
        let mut writing = Writing::start(path).await?;
        let (answers, receiver) = mpsc::channel(2);
        tokio::spawn(async move {
            let mut next = Some(first);
            while let Some(message) = next {
                let answer = writing.take(message).await;
                let ended = answer.is_err();
                if answers.send(answer).await.is_err() || ended {
                    return;
                }
                next = match incoming.message().await {
                    Ok(message) => message,
                    Err(_) => return,
                };
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver).boxed()))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        // What is not committed goes with the call that writes it.
        Ok(Response::new(()))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        no("update")
    }

    async fn list(&self, _: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        no("list")
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        no("delete")
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        no("status")
    }

    async fn list_statuses(
        &self,
        _: Request<ListStatusesRequest>,
    ) -> Result<Response<ListStatusesResponse>, Status> {
        no("status")
    }
}

/// A blob that takes its name only once it is whole.
struct Writing {
    path: PathBuf,
    temporary: PathBuf,
    file: tokio::fs::File,
    hasher: Sha256,
    offset: i64,
}

impl Writing {
    async fn start(path: PathBuf) -> Result<Self, Status> {
        let temporary = path.with_extension(id::new_id());
        if let Some(dir) = path.parent() {
            tokio::fs::create_dir_all(dir).await.map_err(|error| failed(dir, &error))?;
        }
        let file =
            tokio::fs::File::create_new(&temporary).await.map_err(|error| failed(&temporary, &error))?;
        Ok(Self { path, temporary, file, hasher: Sha256::new(), offset: 0 })
    }

    async fn take(&mut self, message: WriteContentRequest) -> Result<WriteContentResponse, Status> {
        if !message.data.is_empty() {
            if message.offset != self.offset {
                return Err(Status::out_of_range(format!("{} follows, not {}", self.offset, message.offset)));
            }
            self.file.write_all(&message.data).await.map_err(|error| failed(&self.temporary, &error))?;
            self.hasher.update(&message.data);
            self.offset += i64::try_from(message.data.len()).unwrap_or(i64::MAX);
        }
        let mut digest = String::new();
        if message.action == WriteAction::Commit as i32 {
            digest = self.commit(&message).await?;
        }
        Ok(WriteContentResponse {
            action: message.action,
            offset: self.offset,
            total: message.total,
            digest,
            ..WriteContentResponse::default()
        })
    }

    async fn commit(&mut self, message: &WriteContentRequest) -> Result<String, Status> {
        let digest = format!("sha256:{}", hex(&self.hasher.clone().finalize()));
        if digest != message.expected || message.total > 0 && message.total != self.offset {
            return Err(Status::failed_precondition(format!(
                "{} bytes with digest {digest} came for {}",
                self.offset, message.expected
            )));
        }
        let moved = async {
            self.file.flush().await?;
            tokio::fs::rename(&self.temporary, &self.path).await
        };
        moved.await.map_err(|error| failed(&self.path, &error))?;
        Ok(digest)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        // After a commit, nothing has this name.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
