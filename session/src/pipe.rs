//! A byte stream made of `BytesMessage`s, for carrying one HTTP/2 connection inside a gRPC stream.
//! Message boundaries carry no meaning in either direction.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use futures::Stream;
use kiln_proto::control::BytesMessage;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard, PollSender};
use tonic::Status;
use tonic::transport::server::Connected;

/// Largest piece put into one message; far below every peer's limit.
const CHUNK: usize = 256 << 10;
/// Messages that may wait for the outer connection.
const QUEUE: usize = 16;

type Incoming = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;

/// Both directions of the tunnel as one reader and writer. Ends when `closed` is cancelled, and cancels it when
/// the peer ends the stream or the pipe is dropped.
pub(crate) struct Pipe {
    incoming: Incoming,
    buffered: Bytes,
    outgoing: PollSender<BytesMessage>,
    _closed: DropGuard,
    cancelled: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Joins an incoming message stream with a queue of outgoing ones, which the caller sends on.
pub(crate) fn pipe<S>(incoming: S, closed: CancellationToken) -> (Pipe, mpsc::Receiver<BytesMessage>)
where
    S: Stream<Item = Result<BytesMessage, Status>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(QUEUE);
    let pipe = Pipe {
        incoming: Box::pin(incoming),
        buffered: Bytes::new(),
        outgoing: PollSender::new(sender),
        cancelled: Box::pin(closed.clone().cancelled_owned()),
        _closed: closed.drop_guard(),
    };
    (pipe, receiver)
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "session closed")
}

impl AsyncRead for Pipe {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.buffered.is_empty() {
            if this.cancelled.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            match ready!(this.incoming.as_mut().poll_next(cx)) {
                Some(Ok(message)) => this.buffered = message.data,
                Some(Err(status)) => return Poll::Ready(Err(io::Error::other(status))),
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = this.buffered.len().min(buf.remaining());
        buf.put_slice(&this.buffered[..count]);
        this.buffered.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.outgoing.poll_reserve(cx)).map_err(|_| gone())?;
        let count = buf.len().min(CHUNK);
        let message = BytesMessage { data: Bytes::copy_from_slice(&buf[..count]) };
        this.outgoing.send_item(message).map_err(|_| gone())?;
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().outgoing.close();
        Poll::Ready(Ok(()))
    }
}

impl Connected for Pipe {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}
