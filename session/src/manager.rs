//! The daemon's table of attached sessions, and the daemon's end of each tunnel: a gRPC client over the byte
//! stream of a `Control.Session` call, watched by health checks.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dashmap::DashMap;
use futures::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use kiln_proto::control::BytesMessage;
use kiln_proto::health::HealthCheckRequest;
use kiln_proto::health::health_client::HealthClient;
use tokio::sync::Notify;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::error::SessionError;
use crate::headers;
use crate::pipe::{Pipe, pipe};
use crate::session::Session;

/// How long a build waits for its session to attach: the calls of one client arrive in any order.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(15);
/// Consecutive failed health checks that end a session.
const HEALTH_FAILURES: u32 = 2;

/// All sessions attached to this daemon.
#[derive(Default)]
pub struct SessionManager {
    sessions: DashMap<String, Arc<Session>>,
    attached: Notify,
}

impl SessionManager {
    /// An empty table.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Serves one `Control.Session` call: attaches the session that `metadata` describes and returns the stream to
    /// answer with. The session stays attached until the client ends `incoming`, the returned stream is dropped, or
    /// its health checks fail. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `InvalidArgument` if the metadata carries no session id.
    pub fn handle<S>(
        self: &Arc<Self>,
        metadata: &MetadataMap,
        incoming: S,
    ) -> Result<impl Stream<Item = Result<BytesMessage, Status>> + Send + use<S>, Status>
    where
        S: Stream<Item = Result<BytesMessage, Status>> + Send + 'static,
    {
        let id = headers::get(metadata, headers::SESSION_ID).to_owned();
        if id.is_empty() {
            return Err(Status::invalid_argument("session id is missing"));
        }
        let methods: HashSet<String> = metadata
            .get_all(headers::SESSION_METHOD)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .map(str::to_ascii_lowercase)
            .collect();
        let closed = CancellationToken::new();
        let (pipe, outgoing) = pipe(incoming, closed.clone());
        let channel = connect(pipe)?;
        let session = Arc::new(Session::new(
            id.clone(),
            headers::get(metadata, headers::SESSION_NAME).to_owned(),
            headers::get(metadata, headers::SESSION_SHARED_KEY).to_owned(),
            methods,
            channel.clone(),
            closed.clone(),
        ));
        tracing::debug!(session = id, "attached");
        self.sessions.insert(id.clone(), session.clone());
        self.attached.notify_waiters();

        let timeout = headers::get(metadata, headers::SESSION_HEALTH_TIMEOUT).parse().ok();
        let timeout = timeout.map_or(HEALTH_TIMEOUT, |ms: u64| Duration::from_millis(ms.max(1000)));
        let manager = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = closed.cancelled() => {}
                () = unhealthy(channel, timeout) => {
                    tracing::warn!(session = id, "closed: health checks failed");
                    closed.cancel();
                }
            }
            manager.sessions.remove_if(&id, |_, current| Arc::ptr_eq(current, &session));
        });
        Ok(ReceiverStream::new(outgoing).map(Ok))
    }

    /// The session with this id (anything before a first `:` is ignored), waiting up to 5 s for it to attach.
    ///
    /// # Errors
    /// [`SessionError::NotFound`] if it did not.
    pub async fn get(&self, id: &str) -> Result<Arc<Session>, SessionError> {
        let id = id.split_once(':').map_or(id, |(_, id)| id);
        let wait = async {
            loop {
                let attached = self.attached.notified();
                tokio::pin!(attached);
                attached.as_mut().enable();
                if let Some(session) = self.try_get(id) {
                    return session;
                }
                attached.await;
            }
        };
        let found = tokio::time::timeout(ATTACH_TIMEOUT, wait).await;
        found.map_err(|_| SessionError::NotFound { id: id.to_owned() })
    }

    /// The session with this id, if it is attached now.
    pub fn try_get(&self, id: &str) -> Option<Arc<Session>> {
        let session = self.sessions.get(id)?.clone();
        (!session.is_closed()).then_some(session)
    }

    /// How many sessions are attached.
    pub fn len(&self) -> usize {
        self.sessions.len()
    }

    /// Whether no session is attached.
    pub fn is_empty(&self) -> bool {
        self.sessions.is_empty()
    }

    /// Ends every session, e.g. because the daemon stops.
    pub fn close_all(&self) {
        for entry in &self.sessions {
            entry.value().close();
        }
    }
}

/// A channel over the one connection that `pipe` is; it cannot reconnect.
fn connect(pipe: Pipe) -> Result<Channel, Status> {
    let mut once = Some(pipe);
    let connector = tower::service_fn(move |_: http::Uri| {
        let pipe = once.take();
        async move {
            pipe.map(TokioIo::new)
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "session closed"))
        }
    });
    let endpoint =
        Endpoint::try_from("http://localhost").map_err(|error| Status::internal(error.to_string()))?;
    let endpoint = endpoint
        .initial_stream_window_size(crate::STREAM_WINDOW)
        .initial_connection_window_size(crate::CONNECTION_WINDOW)
        .buffer_size(1024_usize);
    Ok(endpoint.connect_with_connector_lazy(connector))
}

/// Returns when the client no longer answers. The first check goes out at once, because peers drop a connection on
/// which the HTTP/2 preface does not come.
async fn unhealthy(channel: Channel, timeout: Duration) {
    let mut client = HealthClient::new(channel);
    let mut last = Duration::ZERO;
    let mut failures = 0;
    loop {
        let begin = Instant::now();
        let allowed = timeout.max(last.mul_f32(1.5));
        let answer = tokio::time::timeout(allowed, client.check(HealthCheckRequest::default())).await;
        last = begin.elapsed();
        match answer {
            Ok(Ok(_)) => failures = 0,
            // Whoever answers is alive, whatever it answers.
            Ok(Err(status)) if matches!(status.code(), Code::Unimplemented | Code::NotFound) => failures = 0,
            Ok(Err(status)) => {
                tracing::debug!(%status, "health check failed");
                failures += 1;
            }
            Err(_) => failures += 1,
        }
        if failures >= HEALTH_FAILURES {
            return;
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}
