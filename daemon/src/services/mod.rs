//! The gRPC services on the daemon's socket, except the gateway. They translate between messages
//! and the parts that do the work; no state of their own.

mod content;
mod control;
mod small;

use std::sync::Arc;

use kiln_proto::content::content_server::ContentServer;
use kiln_proto::control::control_server::ControlServer;
use kiln_proto::explain::explain_server::ExplainServer;
use kiln_proto::gateway::llb_bridge_server::LlbBridgeServer;
use kiln_proto::health::health_server::HealthServer;
use kiln_proto::otlp::collector::trace::v1::trace_service_server::TraceServiceServer;
use tonic::Code;
use tonic::service::Routes;

use crate::daemon::Daemon;
use crate::error::BuildError;
use crate::gateway::GatewayService;

/// Largest message in either direction.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// All services of one daemon.
pub(crate) fn routes(daemon: &Arc<Daemon>) -> Routes {
    let gateway = GatewayService::new(daemon.jobs.clone(), daemon.worker.clone());
    Routes::new(
        ControlServer::new(control::ControlService(daemon.clone()))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(
        LlbBridgeServer::new(gateway)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(ContentServer::new(content::ContentService(daemon.clone())))
    .add_service(
        ExplainServer::new(small::ExplainService(daemon.clone())).max_encoding_message_size(MAX_MESSAGE),
    )
    .add_service(HealthServer::new(small::HealthService(daemon.shutdown.clone())))
    .add_service(
        TraceServiceServer::new(small::TraceService(daemon.clone())).max_decoding_message_size(MAX_MESSAGE),
    )
}

/// Runs work that touches the disk where blocking does no harm.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
}
