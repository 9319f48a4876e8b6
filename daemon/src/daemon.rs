//! Start to end of a daemon: opens the engine, listens, stops on a signal or when idle, and leaves
//! nothing behind.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_proto::types;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::activation::ServiceManager;
use crate::config::{Config, LogLevel};
use crate::engine::{Engine, EngineError, TEAR_DOWN};
use crate::explain::Explanations;
use crate::history::History;
use crate::jobs::Jobs;
use crate::server::{Activity, Listener};
use crate::traces::Traces;
use crate::{server, services, workers};

/// How long connections may take to end once the daemon stops.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a predecessor that has lost its socket may take to say that it leaves.
const NOTICE: Duration = Duration::from_millis(500);
/// How long a daemon waits for a leaving predecessor to let go of the store.
const HANDOVER: Duration = DRAIN.saturating_add(TEAR_DOWN).saturating_add(Duration::from_secs(5));

/// Why a daemon did not start or ended badly.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The runtime cannot be set up.
    #[error("failed to start the async runtime: {0}")]
    Runtime(std::io::Error),
    /// The store, the worker or one of their parts cannot be opened.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An address is malformed or of an unknown kind.
    #[error("{address}: {message}")]
    Address {
        /// As configured.
        address: String,
        /// What is wrong with it.
        message: String,
    },
    /// An address cannot be listened on.
    #[error("failed to listen on {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Another daemon answers there.
    #[error("a daemon is already listening on {}", path.display())]
    Running {
        /// The socket.
        path: PathBuf,
    },
    /// TLS files cannot be used.
    #[error("tls: {0}")]
    Tls(String),
    /// A server failed while running.
    #[error("server failed: {0}")]
    Serve(String),
}

/// What the services share.
pub(crate) struct Daemon {
    pub(crate) config: Config,
    pub(crate) engine: Arc<Engine>,
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) history: Arc<History>,
    pub(crate) explanations: Arc<Explanations>,
    pub(crate) traces: Arc<Traces>,
    pub(crate) worker: Arc<types::WorkerRecord>,
    pub(crate) shutdown: CancellationToken,
}

/// Runs a daemon until a signal (`SIGTERM`, `SIGINT`) or its idle time ends it. Blocks; owns the
/// process's async runtime and, unless one is set, its log output (standard error).
///
/// # Errors
/// The daemon could not start, or a listener failed.
pub fn run(config: Config) -> Result<(), DaemonError> {
    init_log(config.log_level);
    config.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    let manager = ServiceManager::from_environment();
    kiln_worker::sandbox::raise_open_files();
    kiln_alloc::be_frugal();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(3))
        .build()
        .map_err(DaemonError::Runtime)?;
    let stop = CancellationToken::new();
    let outcome = runtime.block_on(async {
        tokio::spawn(watch_signals(stop.clone()));
        serve_for(manager, config, stop.clone()).await
    });
    // Blocking reads that nobody waits for must not hold the process up.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome
}

/// The first signal asks to stop, the second one does not ask.
async fn watch_signals(stop: CancellationToken) {
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals cannot be watched");
        return;
    };
    for asked in 0.. {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        if asked > 0 {
            tracing::warn!("second signal, leaving at once");
            std::process::exit(1);
        }
        stop.cancel();
        tracing::info!("stopping");
    }
}

fn init_log(level: LogLevel) {
    let default = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug,h2=info,hyper=info,tower=info",
        LogLevel::Trace => "trace,h2=info,hyper=info,tower=info",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("KILN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    // A log that nobody reads any longer must not stop the daemon's work, nor keep it from stopping.
    // Fails only if a subscriber is set already, which is then the one to use.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .try_init();
}

/// Runs a daemon within the caller's runtime until `stop` is cancelled or its idle time ends it.
///
/// # Errors
/// As [`run`].
pub async fn serve(config: Config, stop: CancellationToken) -> Result<(), DaemonError> {
    serve_for(ServiceManager::default(), config, stop).await
}

async fn serve_for(
    mut manager: ServiceManager,
    config: Config,
    stop: CancellationToken,
) -> Result<(), DaemonError> {
    let shutdown = stop.child_token();
    let listeners = server::parse(&config, &mut manager)?;
    for listener in &listeners {
        listener.refuse_if_running().await?;
    }
    let engine = open(&config).await?;
    let explanations = Explanations::new(engine.clone());
    let daemon = Arc::new(Daemon {
        jobs: Jobs::new(shutdown.clone()),
        history: History::new(engine.values(), explanations.clone(), config.history),
        explanations,
        traces: Arc::default(),
        worker: Arc::new(workers::record(&config, &engine)),
        engine,
        shutdown: shutdown.clone(),
        config,
    });
    let activity = Activity::new();
    let outcome = listen(&daemon, listeners, &manager, &activity).await;
    shutdown.cancel();
    daemon.history.settled().await;
    daemon.explanations.idle().await;
    daemon.history.finalize_all();
    let closed = daemon.engine.close().await;
    outcome.and(closed.map_err(DaemonError::from))
}

/// Opens the engine; a predecessor that is just leaving may hold the store for a moment.
async fn open(config: &Config) -> Result<Arc<Engine>, DaemonError> {
    let start = Instant::now();
    loop {
        let error = match Engine::open(config).await {
            Ok(engine) => return Ok(engine),
            Err(error) => error,
        };
        let patience = match error.locked() {
            Some(true) => HANDOVER,
            Some(false) => NOTICE,
            None => Duration::ZERO,
        };
        if start.elapsed() >= patience {
            return Err(error.into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn listen(
    daemon: &Arc<Daemon>,
    listeners: Vec<Listener>,
    manager: &ServiceManager,
    activity: &Activity,
) -> Result<(), DaemonError> {
    let mut bound = Vec::new();
    for listener in listeners {
        bound.push(listener.bind(&daemon.config).await?);
    }
    let routes = services::routes(daemon);
    let mut servers = tokio::task::JoinSet::new();
    for socket in bound {
        tracing::info!(address = socket.address(), root = %daemon.config.root.display(), "listening");
        servers.spawn(socket.serve(routes.clone(), activity.clone(), daemon.shutdown.clone()));
    }
    manager.notify("READY=1");
    let idle = async {
        match daemon.config.idle_exit {
            Some(limit) => activity.idle(limit).await,
            None => std::future::pending().await,
        }
    };
    let first = tokio::select! {
        first = servers.join_next() => first,
        () = idle => {
            tracing::info!("idle, leaving");
            None
        }
        () = daemon.shutdown.cancelled() => None,
    };
    manager.notify("STOPPING=1");
    daemon.engine.announce_close();
    daemon.shutdown.cancel();
    // Builds are being cancelled; sessions would keep their connections open.
    daemon.engine.sessions().close_all();
    let rest = async {
        let mut outcome = first.map_or(Ok(()), flatten);
        while let Some(server) = servers.join_next().await {
            outcome = outcome.and(flatten(server));
        }
        outcome
    };
    match tokio::time::timeout(DRAIN, rest).await {
        Ok(outcome) => outcome,
        Err(_) => {
            tracing::warn!("connections did not end in time");
            Ok(())
        }
    }
}

fn flatten(joined: Result<Result<(), DaemonError>, tokio::task::JoinError>) -> Result<(), DaemonError> {
    joined.unwrap_or_else(|error| Err(DaemonError::Serve(error.to_string())))
}
