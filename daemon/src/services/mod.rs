//! The gRPC services on the daemon's socket, except the gateway. They translate between messages
//! and the parts that do the work; no state of their own.

mod content;
mod control;
pub(crate) mod small;

use std::sync::Arc;

use kiln_proto::content::content_server::ContentServer;
use kiln_proto::control::control_server::ControlServer;
use kiln_proto::explain::explain_server::ExplainServer;
use kiln_proto::gateway::llb_bridge_server::LlbBridgeServer;
use kiln_proto::health::health_server::HealthServer;
use kiln_proto::otlp::collector::trace::v1::trace_service_server::TraceServiceServer;
use tonic::Code;
use tonic::service::Routes;
use tonic_reflection::server::Builder;

use crate::daemon::Daemon;
use crate::error::BuildError;
use crate::gateway::GatewayService;

/// Largest message in either direction.
pub(crate) const MAX_MESSAGE: usize = 16 << 20;

/// All services of one daemon.
pub(crate) fn routes(daemon: &Arc<Daemon>) -> Routes {
    let gateway = GatewayService::Builds(daemon.jobs.clone());
    let routes = Routes::new(
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
    );
    described(routes)
}

/// With reflection: what the services and their messages are called, for clients that do not know them.
fn described(routes: Routes) -> Routes {
    let builder = || Builder::configure().register_encoded_file_descriptor_set(kiln_proto::DESCRIPTORS);
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(current), Ok(former)) => routes.add_service(current).add_service(former),
        (Err(error), _) | (_, Err(error)) => {
            tracing::error!(%error, "services can't be described to clients");
            routes
        }
    }
}

/// Runs work that touches the disk where blocking does no harm.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BuildError> + Send + 'static,
) -> Result<T, BuildError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
}
