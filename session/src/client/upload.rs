//! Serves `Upload`: one stream of bytes, which is what the command line got on its standard input.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use kiln_proto::upload::BytesMessage;
use kiln_proto::upload::upload_server::{Upload, UploadServer};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::headers;

/// Size of a message.
const CHUNK: usize = 1 << 20;

/// What is read, once.
type Source = Box<dyn Read + Send>;

pub(super) fn service(path: &str, source: Source) -> UploadServer<Once> {
    UploadServer::new(Once { path: path.to_owned(), source: Mutex::new(Some(source)) })
}

pub(super) struct Once {
    path: String,
    source: Mutex<Option<Source>>,
}

#[tonic::async_trait]
impl Upload for Once {
    type PullStream = ReceiverStream<Result<BytesMessage, Status>>;

    async fn pull(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let path = request.metadata().get(headers::UPLOAD_PATH).and_then(|path| path.to_str().ok());
        let path = path.unwrap_or_default().trim_start_matches('/');
        let source = Some(()).filter(|()| path == self.path);
        let source = source.and_then(|()| self.source.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(mut source) = source else { return Err(Status::not_found(format!("no upload {path}"))) };
        let (sender, receiver) = tokio::sync::mpsc::channel(2);
        tokio::task::spawn_blocking(move || {
            loop {
                let mut data = Vec::with_capacity(CHUNK);
                let message = match source.by_ref().take(CHUNK as u64).read_to_end(&mut data) {
                    Ok(0) => break,
                    Ok(_) => Ok(BytesMessage { data: Bytes::from(data) }),
                    Err(error) => Err(Status::unknown(format!("read upload: {error}"))),
                };
                let failed = message.is_err();
                // A daemon that wants no more has closed the stream.
                if sender.blocking_send(message).is_err() || failed {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
