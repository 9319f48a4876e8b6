//! Health, explanations of builds, and the traces that clients send.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use kiln_proto::explain::explain_server::Explain;
use kiln_proto::explain::{ExplainRequest, Explanation};
use kiln_proto::health::health_check_response::ServingStatus;
use kiln_proto::health::health_server::Health;
use kiln_proto::health::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use kiln_proto::otlp::collector::trace::v1::trace_service_server::TraceService as Trace;
use kiln_proto::otlp::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use super::blocking;
use crate::daemon::Daemon;
use crate::error::BuildError;

/// Serves until the token is cancelled.
pub(crate) struct HealthService(pub(crate) CancellationToken);

impl HealthService {
    fn now(&self) -> HealthCheckResponse {
        let status = if self.0.is_cancelled() { ServingStatus::NotServing } else { ServingStatus::Serving };
        HealthCheckResponse { status: status as i32 }
    }
}

#[tonic::async_trait]
impl Health for HealthService {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if !request.get_ref().service.is_empty() {
            return Err(Status::not_found("unknown service"));
        }
        Ok(Response::new(self.now()))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Ok(Response::new(HealthListResponse { statuses: [(String::new(), self.now())].into() }))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let known = request.get_ref().service.is_empty();
        let first = if known {
            self.now()
        } else {
            HealthCheckResponse { status: ServingStatus::ServiceUnknown as i32 }
        };
        let shutdown = self.0.clone();
        let rest = futures::stream::once(async move {
            shutdown.cancelled_owned().await;
            Ok(HealthCheckResponse { status: ServingStatus::NotServing as i32 })
        });
        let stream = futures::stream::iter([Ok(first)]);
        Ok(Response::new(Box::pin(futures::StreamExt::chain(stream, rest))))
    }
}

/// Says why steps were not cached.
pub(super) struct ExplainService(pub(super) Arc<Daemon>);

#[tonic::async_trait]
impl Explain for ExplainService {
    /// Of the empty ref: of the build that ended last.
    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<Explanation>, Status> {
        let (daemon, mut id) = (&self.0, request.into_inner().r#ref);
        if id.is_empty() {
            let history = daemon.history.clone();
            history.settled().await;
            let last = blocking(move || history.last()).await?;
            id = last.ok_or_else(|| Status::not_found("no build is remembered"))?;
        }
        let error = match daemon.explanations.get(&id).await {
            Ok(explanation) => return Ok(Response::new(explanation)),
            Err(error) => error,
        };
        let (history, known) = (daemon.history.clone(), id.clone());
        let known = blocking(move || history.record(&known)).await?.is_some();
        if known && error.code == Code::NotFound {
            let text = format!("{}: the daemon was killed before it was stored", error.message);
            return Err(BuildError::new(Code::NotFound, text).into());
        }
        Err(error.into())
    }
}

/// Takes the spans that clients report.
pub(super) struct TraceService(pub(super) Arc<Daemon>);

#[tonic::async_trait]
impl Trace for TraceService {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.traces.add(request.get_ref());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
