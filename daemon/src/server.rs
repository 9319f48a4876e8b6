//! Listening sockets: unix and TCP, plain or TLS, own or handed over, and the count of open connections by which an
//! idle daemon is known.

use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use rustix::net::AddressFamily;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::server::Connected;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};

use crate::activation::ServiceManager;
use crate::config::{Config, TlsFiles};
use crate::daemon::DaemonError;

/// How long an idle daemon still answers those who found its socket just before it went.
const FAREWELL: Duration = Duration::from_millis(100);

/// How long a daemon that seems to answer is given to be gone.
const LAST_MOMENT: Duration = Duration::from_millis(300);

/// A configured address.
pub(crate) enum Listener {
    Unix { address: String, path: PathBuf },
    Tcp { address: String, host: String },
    Inherited { address: String, socket: OwnedFd },
}

/// The configured addresses, understood.
pub(crate) fn parse(config: &Config, manager: &mut ServiceManager) -> Result<Vec<Listener>, DaemonError> {
    config.addresses.iter().map(|address| parse_one(address, manager)).collect()
}

fn parse_one(address: &str, manager: &mut ServiceManager) -> Result<Listener, DaemonError> {
    let wrong =
        |message: &str| DaemonError::Address { address: address.to_owned(), message: message.to_owned() };
    match address.split_once("://") {
        Some(("unix", path)) if path.starts_with('/') => {
            Ok(Listener::Unix { address: address.to_owned(), path: path.into() })
        }
        Some(("unix", _)) => Err(wrong("the path of a unix socket must be absolute")),
        Some(("tcp", host)) if host.rsplit_once(':').is_some() => {
            Ok(Listener::Tcp { address: address.to_owned(), host: host.to_owned() })
        }
        Some(("tcp", _)) => Err(wrong("host:port expected")),
        Some(("fd", "")) => match manager.socket() {
            Some(socket) => Ok(Listener::Inherited { address: address.to_owned(), socket }),
            None => Err(wrong("no socket was handed over (LISTEN_FDS)")),
        },
        Some(("fd", _)) => Err(wrong("unsupported: choosing among the sockets that were handed over")),
        Some((scheme, _)) => Err(wrong(&format!("unsupported: addresses of kind {scheme}"))),
        None => Err(wrong("an address starts with unix://, tcp:// or fd://")),
    }
}

impl Listener {
    /// Fails early and clearly where another daemon answers.
    pub(crate) async fn refuse_if_running(&self) -> Result<(), DaemonError> {
        let Self::Unix { path, .. } = self else { return Ok(()) };
        let start = Instant::now();
        // Of a process that was killed the socket may answer for a moment.
        while UnixStream::connect(path).await.is_ok() {
            if start.elapsed() > LAST_MOMENT {
                return Err(DaemonError::Running { path: path.clone() });
            }
            tokio::time::sleep(LAST_MOMENT / 10).await;
        }
        Ok(())
    }

    /// Starts to listen.
    pub(crate) async fn bind(self, config: &Config) -> Result<Bound, DaemonError> {
        match self {
            Self::Unix { address, path } => {
                let (socket, file) = bind_unix(&path, config)
                    .map_err(|source| DaemonError::Listen { address: address.clone(), source })?;
                Ok(Bound::Unix { address, socket, file: Some(file) })
            }
            Self::Tcp { address, host } => {
                let tls = config.tls.as_ref().map(read_tls).transpose()?;
                if tls.is_none() && !is_loopback(&host) {
                    warn_of_plain_text(&address);
                }
                let socket = TcpListener::bind(&host)
                    .await
                    .map_err(|source| DaemonError::Listen { address: address.clone(), source })?;
                Ok(Bound::Tcp { address, socket, tls })
            }
            Self::Inherited { address, socket } => {
                inherit(socket, &address, config).map_err(|source| DaemonError::Listen { address, source })?
            }
        }
    }
}

/// Takes over a socket that listens already.
fn inherit(socket: OwnedFd, address: &str, config: &Config) -> std::io::Result<Result<Bound, DaemonError>> {
    let address = address.to_owned();
    match rustix::net::sockopt::socket_domain(&socket)? {
        AddressFamily::UNIX => {
            let socket = std::os::unix::net::UnixListener::from(socket);
            socket.set_nonblocking(true)?;
            Ok(Ok(Bound::Unix { address, socket: UnixListener::from_std(socket)?, file: None }))
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            let socket = std::net::TcpListener::from(socket);
            socket.set_nonblocking(true)?;
            if config.tls.is_none() && !socket.local_addr()?.ip().is_loopback() {
                warn_of_plain_text(&address);
            }
            let tls = config.tls.as_ref().map(read_tls).transpose();
            let socket = TcpListener::from_std(socket)?;
            Ok(tls.map(|tls| Bound::Tcp { address, socket, tls }))
        }
        _ => Err(std::io::Error::other("neither a unix nor a TCP socket was handed over")),
    }
}

fn warn_of_plain_text(address: &str) {
    tracing::warn!(address, "TLS is not enabled: anyone who reaches this address has root here");
}

fn is_loopback(host: &str) -> bool {
    host.starts_with("127.") || host.starts_with("localhost:") || host.starts_with("[::1]")
}

fn read_tls(files: &TlsFiles) -> Result<ServerTlsConfig, DaemonError> {
    let read = |path: &Path| {
        std::fs::read(path).map_err(|error| DaemonError::Tls(format!("{}: {error}", path.display())))
    };
    let identity = Identity::from_pem(read(&files.cert)?, read(&files.key)?);
    let mut tls = ServerTlsConfig::new().identity(identity);
    if let Some(ca) = &files.client_ca {
        tls = tls.client_ca_root(Certificate::from_pem(read(ca)?));
    }
    Ok(tls)
}

/// Listens beside the path and moves the socket there, so that it is never found before it answers.
fn bind_unix(path: &Path, config: &Config) -> std::io::Result<(UnixListener, SocketFile)> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = UnixListener::bind(&beside)?;
    let mode = if config.socket_gid.is_some() { 0o660 } else { 0o600 };
    std::fs::set_permissions(&beside, std::fs::Permissions::from_mode(mode))?;
    if config.socket_uid.is_some() || config.socket_gid.is_some() {
        std::os::unix::fs::chown(&beside, config.socket_uid, config.socket_gid)?;
    }
    std::fs::rename(&beside, path)?;
    let meta = std::fs::symlink_metadata(path)?;
    Ok((socket, SocketFile { path: path.to_owned(), inode: (meta.dev(), meta.ino()) }))
}

/// The socket's name in the file system; removed when dropped, if it is still this daemon's.
pub(crate) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours =
            std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A listening socket.
pub(crate) enum Bound {
    Unix { address: String, socket: UnixListener, file: Option<SocketFile> },
    Tcp { address: String, socket: TcpListener, tls: Option<ServerTlsConfig> },
}

impl Bound {
    pub(crate) fn address(&self) -> &str {
        match self {
            Self::Unix { address, .. } | Self::Tcp { address, .. } => address,
        }
    }

    /// Serves until `shutdown`, and then until open calls have ended. The socket's name goes first.
    pub(crate) async fn serve(
        self,
        routes: Routes,
        activity: Activity,
        shutdown: CancellationToken,
    ) -> Result<(), DaemonError> {
        let failed = |error: tonic::transport::Error| DaemonError::Serve(chain(&error));
        let builder = Server::builder()
            .initial_stream_window_size(kiln_session::STREAM_WINDOW)
            .initial_connection_window_size(kiln_session::CONNECTION_WINDOW);
        match self {
            Self::Unix { socket, file, .. } => {
                let stop = leave(file, activity.clone(), shutdown);
                let incoming = activity.count(UnixListenerStream::new(socket));
                let mut builder = builder;
                let router = builder.add_routes(routes);
                router.serve_with_incoming_shutdown(incoming, stop).await.map_err(failed)
            }
            Self::Tcp { socket, tls, .. } => {
                let mut builder = match tls {
                    Some(tls) => builder.tls_config(tls).map_err(failed)?,
                    None => builder,
                };
                let incoming = activity.count(TcpListenerStream::new(socket));
                let router = builder.add_routes(routes);
                router
                    .serve_with_incoming_shutdown(incoming, shutdown.cancelled_owned())
                    .await
                    .map_err(failed)
            }
        }
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// Completes when the listener is to stop accepting. An idle daemon takes its socket's name away
/// first and then waits for those who had found it.
async fn leave(file: Option<SocketFile>, activity: Activity, shutdown: CancellationToken) {
    shutdown.cancelled().await;
    drop(file);
    if activity.left_idle() {
        tokio::time::sleep(FAREWELL).await;
    }
}

/// Counts open connections.
#[derive(Clone)]
pub(crate) struct Activity {
    open: watch::Sender<usize>,
    idle: CancellationToken,
}

impl Activity {
    pub(crate) fn new() -> Self {
        Self { open: watch::Sender::new(0), idle: CancellationToken::new() }
    }

    fn left_idle(&self) -> bool {
        self.idle.is_cancelled()
    }

    /// Completes when no connection was open for `limit`.
    pub(crate) async fn idle(&self, limit: Duration) {
        let mut open = self.open.subscribe();
        loop {
            // The sender lives in `self`: waiting cannot fail.
            if open.wait_for(|count| *count == 0).await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(limit) => {
                    self.idle.cancel();
                    return;
                }
                _ = open.wait_for(|count| *count > 0) => {}
            }
        }
    }

    fn count<S, T>(&self, incoming: S) -> impl Stream<Item = Result<Counted<T>, std::io::Error>> + use<S, T>
    where
        S: Stream<Item = Result<T, std::io::Error>>,
    {
        let open = self.open.clone();
        incoming.map(move |io| {
            let io = io?;
            open.send_modify(|count| *count += 1);
            Ok(Counted { io, open: open.clone() })
        })
    }
}

/// A connection that counts while it lives.
struct Counted<T> {
    io: T,
    open: watch::Sender<usize>,
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.open.send_modify(|count| *count -= 1);
    }
}

impl<T: Connected> Connected for Counted<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.io.connect_info()
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
