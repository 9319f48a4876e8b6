//! One connection to the daemon, made before any async runtime exists; starts a daemon where that is possible.

use std::io;
use std::os::unix::net::UnixStream;

use hyper_util::rt::TokioIo;
use kiln_proto::control::control_client::ControlClient;
use kiln_session::MAX_MESSAGE_SIZE;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::address::Address;
use crate::args;
use crate::error::CliError;
use crate::start;

/// A connected stream, not yet speaking anything.
pub(crate) enum Connection {
    Unix(UnixStream),
    Tcp(std::net::TcpStream, Option<Box<ClientTlsConfig>>),
}

/// Whether a command is worth starting a daemon for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    IfNeeded,
    Never,
}

/// Connects to the daemon that the flags name.
pub(crate) fn connect(flags: &args::Connection, start: Start) -> Result<Connection, CliError> {
    let address = Address::parse(flags.addr.as_deref())?;
    match &address {
        Address::Tcp(host) => match std::net::TcpStream::connect(host) {
            Ok(stream) => {
                // Without it small frames wait for acknowledgements; failing costs time only.
                let _ = stream.set_nodelay(true);
                Ok(Connection::Tcp(stream, flags.tls.client(host)?.map(Box::new)))
            }
            Err(error) => Err(unreachable(&address, &error)),
        },
        Address::Unix(path) => match UnixStream::connect(path) {
            Ok(stream) => Ok(Connection::Unix(stream)),
            Err(error) if start == Start::IfNeeded && !flags.existing && start::nobody_listens(&error) => {
                start::daemon(path, flags).map(Connection::Unix)
            }
            Err(error) => Err(unreachable(&address, &error)),
        },
    }
}

fn unreachable(address: &Address, error: &io::Error) -> CliError {
    CliError::Connect(format!("no daemon answers at {}: {error}", address.url()))
}

impl Connection {
    /// A gRPC channel over this connection; must be called within the runtime.
    pub(crate) fn channel(self) -> Result<Channel, CliError> {
        let broken = |error: io::Error| CliError::Connect(format!("connection to the daemon: {error}"));
        let scheme = match &self {
            Self::Tcp(_, Some(_)) => "https://localhost",
            _ => "http://localhost",
        };
        let endpoint = Endpoint::from_static(scheme)
            .initial_stream_window_size(kiln_session::STREAM_WINDOW)
            .initial_connection_window_size(kiln_session::CONNECTION_WINDOW);
        Ok(match self {
            Self::Unix(stream) => {
                stream.set_nonblocking(true).map_err(broken)?;
                once(&endpoint, tokio::net::UnixStream::from_std(stream).map_err(broken)?)
            }
            Self::Tcp(stream, tls) => {
                stream.set_nonblocking(true).map_err(broken)?;
                let endpoint = match tls {
                    Some(tls) => endpoint
                        .tls_config(*tls)
                        .map_err(|error| CliError::Connect(format!("tls: {}", chain(&error))))?,
                    None => endpoint,
                };
                once(&endpoint, tokio::net::TcpStream::from_std(stream).map_err(broken)?)
            }
        })
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

/// A channel over the one connection there is. It never reconnects: what was said to a daemon that went away is lost.
fn once<S>(endpoint: &Endpoint, stream: S) -> Channel
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
{
    let mut stream = Some(TokioIo::new(stream));
    endpoint.connect_with_connector_lazy(tower::service_fn(move |_: http::Uri| {
        let stream = stream.take();
        async move { stream.ok_or_else(|| io::Error::other("the connection to the daemon is lost")) }
    }))
}

/// The control API over a channel.
pub(crate) fn control(channel: Channel) -> ControlClient<Channel> {
    ControlClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_SIZE)
        .max_encoding_message_size(MAX_MESSAGE_SIZE)
}

/// A runtime for one command: everything that a client does fits one thread, apart from reading files.
pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    let built = tokio::runtime::Builder::new_current_thread().enable_all().build();
    built.map_err(|error| CliError::Connect(format!("failed to start the async runtime: {error}")))
}
