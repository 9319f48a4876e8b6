//! File transfers between daemon and client: directories from the client, exports to it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http::uri::PathAndQuery;
use kiln_proto::filesync::BytesMessage;
use kiln_proto::filesync::file_send_client::FileSendClient;
use kiln_proto::filesync::file_sync_client::FileSyncClient;
use kiln_proto::fsutil::Packet;
use tokio::io::AsyncWrite;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnboundedReceiverStream};
use tokio_util::sync::PollSender;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

use crate::error::SessionError;
use crate::fsutil::{self, PacketStream, ReceiveOptions, Received, SendSummary, Subtree};
use crate::session::Session;
use crate::{MAX_MESSAGE_SIZE, headers};

const FILE_SYNC: &str = "/moby.filesync.v1.FileSync/DiffCopy";
const FILE_SEND: &str = "/moby.filesync.v1.FileSend/DiffCopy";

/// Largest piece of a tar put into one message; clients take at most 4 MiB.
const TAR_CHUNK: usize = 256 << 10;

/// Which part of which client directory is wanted.
#[derive(Debug, Clone, Default)]
pub struct FileSyncRequest {
    /// Name under which the client shares it: what follows `local://`.
    pub dir_name: String,
    /// Only what matches these (dockerignore-like) patterns; empty means all.
    pub include_patterns: Vec<String>,
    /// Nothing that matches these patterns, with `!` exceptions.
    pub exclude_patterns: Vec<String>,
    /// Paths, possibly with wildcards, whose symlink chains the client resolves and includes.
    pub follow_paths: Vec<String>,
}

impl Session {
    /// Brings the directory `dest` up to date with a client's directory; files change by rename only, so links to
    /// the former ones elsewhere keep their content. When the future is dropped, a blocking thread may go on for a
    /// moment: what must outlive it belongs into [`ReceiveOptions::guard`].
    ///
    /// # Errors
    /// [`SessionError::is_not_found`] if the client does not share that directory.
    pub async fn file_sync(
        &self,
        request: &FileSyncRequest,
        dest: &Path,
        options: ReceiveOptions,
    ) -> Result<Received, SessionError> {
        self.require(FILE_SYNC)?;
        let failed = |status| SessionError::call(format!("local directory {}", request.dir_name), status);
        let (packets, outgoing) = mpsc::unbounded_channel();
        let mut call = Request::new(UnboundedReceiverStream::new(outgoing));
        let map = call.metadata_mut();
        headers::put_list(map, headers::DIR_NAME, std::slice::from_ref(&request.dir_name)).map_err(failed)?;
        headers::put_list(map, headers::INCLUDE_PATTERNS, &request.include_patterns).map_err(failed)?;
        headers::put_list(map, headers::EXCLUDE_PATTERNS, &request.exclude_patterns).map_err(failed)?;
        headers::put_list(map, headers::FOLLOW_PATHS, &request.follow_paths).map_err(failed)?;
        let mut client = FileSyncClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        let answer = client.diff_copy(call).await.map_err(failed)?;
        let received = fsutil::receive(dest, options, answer.into_inner().boxed(), packets).await;
        received.map_err(|error| match error {
            fsutil::TransferError::Status(status) => failed(*status),
            other => other.into(),
        })
    }

    /// Sends directories to the client's local exporter number `exporter`. `mirror` announces that the transfer
    /// holds all platforms, which a client needs before it deletes what is not in it.
    ///
    /// # Errors
    /// [`SessionError::Unsupported`] if the client takes no exports; else what failed on either side.
    pub async fn file_send_dir(
        &self,
        exporter: usize,
        mirror: bool,
        trees: Vec<Subtree>,
        progress: Option<fsutil::Progress>,
    ) -> Result<SendSummary, SessionError> {
        self.require(FILE_SEND)?;
        let failed = |status| SessionError::call("export to client directory", status);
        let (packets, outgoing) = mpsc::channel(fsutil::SEND_QUEUE);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        headers::put(request.metadata_mut(), headers::EXPORTER_ID, &exporter.to_string()).map_err(failed)?;
        if mirror {
            headers::put(request.metadata_mut(), headers::EXPORTER_MULTI_PLATFORM, "1").map_err(failed)?;
        }
        let mut client = tonic::client::Grpc::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        // Clients answer only when they want a file, so the call is not awaited before the listing goes out.
        let call = async move {
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let codec = ProstCodec::<Packet, Packet>::default();
            let answer = client.streaming(request, PathAndQuery::from_static(FILE_SEND), codec).await?;
            Ok::<_, Status>(answer.into_inner())
        };
        let incoming: PacketStream = futures::stream::once(call).try_flatten().boxed();
        fsutil::send(trees, incoming, packets, progress).await.map_err(|error| match error {
            fsutil::TransferError::Status(status) => failed(*status),
            other => other.into(),
        })
    }

    /// Opens a byte stream to the client's exporter number `exporter`; `metadata` is the exporter's response so far.
    ///
    /// # Errors
    /// [`SessionError::Unsupported`] if the client takes no exports. Refusals of the client itself show in writes and
    /// in [`TarSender::finish`].
    pub fn file_send_tar(
        &self,
        exporter: usize,
        metadata: &BTreeMap<String, String>,
    ) -> Result<TarSender, SessionError> {
        self.require(FILE_SEND)?;
        let failed = |status| SessionError::call("export to client", status);
        let (sender, outgoing) = mpsc::channel(4);
        let mut request = Request::new(ReceiverStream::new(outgoing));
        headers::put(request.metadata_mut(), headers::EXPORTER_ID, &exporter.to_string()).map_err(failed)?;
        for (key, value) in metadata {
            let key = format!("{}{}", headers::EXPORTER_METADATA_PREFIX, key.to_ascii_lowercase());
            headers::put(request.metadata_mut(), &key, value).map_err(failed)?;
        }
        let mut client = FileSendClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE_SIZE);
        let call = tokio::spawn(async move {
            let mut answer = client.diff_copy(request).await?.into_inner();
            while answer.message().await?.is_some() {}
            Ok(())
        });
        Ok(TarSender { sender: PollSender::new(sender), call: AbortOnDrop(call) })
    }
}

struct AbortOnDrop(JoinHandle<Result<(), Status>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A byte stream into a client's exporter. Dropping it without [`TarSender::finish`] aborts the export.
pub struct TarSender {
    sender: PollSender<BytesMessage>,
    call: AbortOnDrop,
}

impl TarSender {
    /// Ends the stream and waits until the client has stored it.
    ///
    /// # Errors
    /// [`SessionError::Call`] with the client's answer; [`SessionError::is_already_exists`] if it had the target.
    pub async fn finish(mut self) -> Result<(), SessionError> {
        self.sender.close();
        let answer = (&mut self.call.0).await;
        let answer =
            answer.unwrap_or_else(|error| Err(Status::internal(format!("export task failed: {error}"))));
        answer.map_err(|status| SessionError::call("export to client", status))
    }
}

impl AsyncWrite for TarSender {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let gone = |_| io::Error::new(io::ErrorKind::BrokenPipe, "the client ended the export");
        let this = self.get_mut();
        ready!(this.sender.poll_reserve(cx)).map_err(gone)?;
        let count = buf.len().min(TAR_CHUNK);
        let message = BytesMessage { data: Bytes::copy_from_slice(&buf[..count]) };
        this.sender.send_item(message).map_err(gone)?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().sender.close();
        Poll::Ready(Ok(()))
    }
}
