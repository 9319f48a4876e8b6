//! Blobs of a client's content stores: image layouts that it offers under names.

use bytes::BytesMut;
use kiln_proto::content::content_client::ContentClient;
use kiln_proto::content::{
    ReadContentRequest, ReadContentResponse, WriteAction, WriteContentRequest, WriteContentResponse,
};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

use crate::error::SessionError;
use crate::session::Session;
use crate::{MAX_MESSAGE_SIZE, headers};

const READ: &str = "/containerd.services.content.v1.Content/Read";
const WRITE: &str = "/containerd.services.content.v1.Content/Write";
/// Bytes of a blob put into one message; clients take at most 4 MiB.
const CHUNK: usize = 1 << 20;

/// A blob about to be written.
#[derive(Debug, Clone, Copy)]
pub struct NewBlob<'a> {
    /// Names the writing of it; a client refuses two at once.
    pub reference: &'a str,
    /// What it must hash to.
    pub digest: &'a str,
    /// Its size in bytes.
    pub size: u64,
}

impl NewBlob<'_> {
    fn message(&self, action: WriteAction, offset: u64, data: Vec<u8>) -> WriteContentRequest {
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        WriteContentRequest {
            action: action as i32,
            r#ref: self.reference.to_owned(),
            total: signed(self.size),
            expected: self.digest.to_owned(),
            offset: signed(offset),
            data,
            ..WriteContentRequest::default()
        }
    }
}

/// A blob that a client sends. Nobody has checked it against its digest.
pub struct BlobReader {
    digest: String,
    answers: Streaming<ReadContentResponse>,
}

impl BlobReader {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// [`SessionError::is_not_found`] if there is no such blob; else what failed on either side.
    pub async fn chunk(&mut self) -> Result<Option<Vec<u8>>, SessionError> {
        let answer = self.answers.message().await.map_err(|status| unread(&self.digest, status))?;
        Ok(answer.map(|answer| answer.data))
    }
}

fn unread(digest: &str, status: Status) -> SessionError {
    SessionError::call(format!("read {digest} from the client's content store"), status)
}

impl Session {
    /// Writes a blob into the client's content store `store`. What it has already is not sent.
    ///
    /// # Errors
    /// [`SessionError::is_not_found`] if the client offers no such store; else what failed on either side.
    pub async fn write_blob(
        &self,
        store: &str,
        blob: NewBlob<'_>,
        content: impl AsyncRead + Unpin + Send,
    ) -> Result<(), SessionError> {
        self.require(WRITE)?;
        match self.try_write_blob(store, blob, content).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            other => other.map_err(|status| {
                SessionError::call(format!("write {} into the client's content store", blob.digest), status)
            }),
        }
    }

    /// Starts reading a blob of the client's content store `store`.
    ///
    /// # Errors
    /// [`SessionError::is_not_found`] if the client offers no such store; else what failed on either side.
    pub async fn read_blob(&self, store: &str, digest: &str) -> Result<BlobReader, SessionError> {
        self.require(READ)?;
        let mut request = Request::new(ReadContentRequest { digest: digest.to_owned(), offset: 0, size: 0 });
        let answers = match headers::put(request.metadata_mut(), headers::STORE_ID, store) {
            Ok(_) => {
                let client = ContentClient::new(self.channel());
                client.max_decoding_message_size(MAX_MESSAGE_SIZE).read(request).await
            }
            Err(status) => Err(status),
        };
        let answers = answers.map_err(|status| unread(digest, status))?.into_inner();
        Ok(BlobReader { digest: digest.to_owned(), answers })
    }

    async fn try_write_blob(
        &self,
        store: &str,
        blob: NewBlob<'_>,
        mut content: impl AsyncRead + Unpin + Send,
    ) -> Result<(), Status> {
        let unread = |error: std::io::Error| Status::internal(format!("read blob: {error}"));
        let (messages, outgoing) = mpsc::channel(1);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        headers::put(request.metadata_mut(), headers::STORE_ID, store)?;
        // A client answers, even with headers, only once it has been asked something.
        send(&messages, blob.message(WriteAction::Stat, 0, Vec::new())).await?;
        let mut client = ContentClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        let mut answers = client.write(request).await?.into_inner();
        // An earlier writing that broke off is gone on with.
        let mut offset = u64::try_from(answer(&mut answers).await?.offset).unwrap_or(0);
        tokio::io::copy(&mut (&mut content).take(offset), &mut tokio::io::sink()).await.map_err(unread)?;
        loop {
            let mut data = BytesMut::with_capacity(CHUNK);
            while data.len() < CHUNK && content.read_buf(&mut data).await.map_err(unread)? > 0 {}
            if data.is_empty() {
                break;
            }
            let length = data.len() as u64;
            send(&messages, blob.message(WriteAction::Write, offset, data.into())).await?;
            answer(&mut answers).await?;
            offset += length;
        }
        send(&messages, blob.message(WriteAction::Commit, offset, Vec::new())).await?;
        answer(&mut answers).await?;
        Ok(())
    }
}

async fn send(
    messages: &mpsc::Sender<WriteContentRequest>,
    message: WriteContentRequest,
) -> Result<(), Status> {
    messages.send(message).await.map_err(|_| Status::unavailable("the client ended the writing of a blob"))
}

async fn answer(answers: &mut Streaming<WriteContentResponse>) -> Result<WriteContentResponse, Status> {
    let answer = answers.message().await?;
    answer.ok_or_else(|| Status::unavailable("the client ended the writing of a blob"))
}
