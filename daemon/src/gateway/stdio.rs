//! The gateway over the standard streams of a frontend that runs in a container.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::StreamExt;
use kiln_proto::gateway::llb_bridge_server::LlbBridgeServer;
use kiln_proto::health::health_server::HealthServer;
use tokio::io::{AsyncRead, AsyncWrite, Join, ReadBuf};
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::{Bridge, GatewayService};
use crate::services::{MAX_MESSAGE, small::HealthService};

/// Serves `bridge` to a process that reads `stdin` and writes `stdout`, as long as the future is polled. `closed` is
/// cancelled when the connection is over.
///
/// # Errors
/// It could not be begun.
pub(crate) async fn serve(
    bridge: Arc<Bridge>,
    stdin: Sender,
    stdout: Receiver,
    closed: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let health = HealthServer::new(HealthService(bridge.cancel().clone()));
    let gateway = LlbBridgeServer::new(GatewayService::Frontend(bridge))
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let connection = Connection { io: tokio::io::join(stdout, stdin), _closed: closed.drop_guard() };
    // There is one connection, and never another one.
    let incoming = futures::stream::iter([Ok::<_, io::Error>(connection)]).chain(futures::stream::pending());
    Server::builder().add_service(gateway).add_service(health).serve_with_incoming(incoming).await
}

/// Both pipes as one.
struct Connection {
    io: Join<Receiver, Sender>,
    _closed: DropGuard,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
