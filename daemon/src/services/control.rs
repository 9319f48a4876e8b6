//! `moby.buildkit.v1.Control`: builds, their status, sessions, the worker, disk usage, history.

use std::pin::Pin;
use std::sync::Arc;

use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use kiln_cache::Filter;
use kiln_proto::control::control_server::Control;
use kiln_proto::control::{
    BuildHistoryEvent, BuildHistoryRequest, BytesMessage, DiskUsageRequest, DiskUsageResponse, InfoRequest,
    InfoResponse, ListWorkersRequest, ListWorkersResponse, PruneRequest, SolveRequest, SolveResponse,
    StatusRequest, StatusResponse, UpdateBuildHistoryRequest, UpdateBuildHistoryResponse, UsageRecord,
};
use kiln_proto::types;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tonic::metadata::MetadataValue;
use tonic::{Request, Response, Status, Streaming};

use super::blocking;
use crate::daemon::Daemon;
use crate::jobs::STATUS_WAIT;
use crate::traces::TraceParent;

/// Response header with the daemon's clock, by which clients correct theirs.
const CLOCK: &str = "buildkit-current-timestamp";

/// So many records that went wait for a slow client.
const PRUNED: usize = 64;

pub(super) struct ControlService(pub(super) Arc<Daemon>);

fn with_clock<T>(body: T) -> Response<T> {
    let mut response = Response::new(body);
    if let Ok(now) = MetadataValue::try_from(jiff::Timestamp::now().to_string()) {
        response.metadata_mut().insert(CLOCK, now);
    }
    response
}

/// A field of the worker record by its name in filters.
fn worker_field(record: &types::WorkerRecord, name: &str) -> Option<String> {
    match name {
        "id" => Some(record.id.clone()),
        _ => record.labels.get(name.strip_prefix("labels.")?).cloned(),
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    type PruneStream = BoxStream<'static, Result<UsageRecord, Status>>;
    type StatusStream = BoxStream<'static, Result<StatusResponse, Status>>;
    type SessionStream = Pin<Box<dyn Stream<Item = Result<BytesMessage, Status>> + Send>>;
    type ListenBuildHistoryStream = BoxStream<'static, Result<BuildHistoryEvent, Status>>;

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        let parent = TraceParent::of(request.metadata());
        let response = crate::build::solve(&self.0, request.into_inner(), parent).await?;
        Ok(Response::new(response))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<Self::StatusStream>, Status> {
        let id = request.into_inner().r#ref;
        let job = match self.0.jobs.get(&id) {
            Some(job) => job,
            None => {
                let (history, past) = (self.0.history.clone(), id.clone());
                if let Some(log) = blocking(move || history.replay(&past)).await? {
                    return Ok(with_clock(stream::iter(log.into_iter().map(Ok)).boxed()));
                }
                self.0.jobs.wait(&id, STATUS_WAIT).await?
            }
        };
        let messages = stream::unfold(job.progress.read(), |mut reader| async move {
            let messages = reader.next().await?;
            Some((stream::iter(messages.into_iter().map(Ok)), reader))
        });
        Ok(with_clock(messages.flatten().boxed()))
    }

    async fn session(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (metadata, _, incoming) = request.into_parts();
        let outgoing = self.0.engine.sessions().handle(&metadata, incoming)?;
        Ok(Response::new(Box::pin(outgoing)))
    }

    async fn list_workers(
        &self,
        request: Request<ListWorkersRequest>,
    ) -> Result<Response<ListWorkersResponse>, Status> {
        let filter = Filter::parse(&request.get_ref().filter)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let worker = &*self.0.worker;
        let record =
            if filter.holds(&|name| worker_field(worker, name)) { vec![worker.clone()] } else { Vec::new() };
        Ok(Response::new(ListWorkersResponse { record }))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse { buildkit_version: Some(crate::workers::version()) }))
    }

    async fn disk_usage(
        &self,
        request: Request<DiskUsageRequest>,
    ) -> Result<Response<DiskUsageResponse>, Status> {
        let (engine, request) = (self.0.engine.clone(), request.into_inner());
        let record = blocking(move || engine.usage(&request)).await?;
        Ok(Response::new(DiskUsageResponse { record }))
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Result<Response<Self::PruneStream>, Status> {
        let (engine, request) = (self.0.engine.clone(), request.into_inner());
        // What builds that have ended still hold would stay.
        self.0.history.settled().await;
        let (tell, told) = mpsc::channel(PRUNED);
        let pruning = blocking(move || {
            // Who no longer listens wanted it done all the same.
            engine.prune(&request, &mut |gone| drop(tell.blocking_send(gone)))
        });
        let pruning = tokio::spawn(pruning);
        let removed = stream::unfold(told, |mut told| async move { Some((Ok(told.recv().await?), told)) });
        let failed = stream::once(async move {
            let ended = pruning.await.map_err(|error| Status::internal(error.to_string()));
            ended.and_then(|ended| ended.map_err(Status::from)).err()
        });
        Ok(Response::new(removed.chain(failed.filter_map(async |error| error.map(Err))).boxed()))
    }

    async fn listen_build_history(
        &self,
        request: Request<BuildHistoryRequest>,
    ) -> Result<Response<Self::ListenBuildHistoryStream>, Status> {
        let request = request.into_inner();
        let (history, query) = (self.0.history.clone(), request.clone());
        history.settled().await;
        let (past, live) = blocking(move || history.listen(&query)).await?;
        let past = stream::iter(past.into_iter().map(Ok));
        let Some(live) = live else { return Ok(with_clock(past.boxed())) };
        let wanted = request.r#ref;
        let later = stream::unfold(live, |mut live| async move {
            match live.recv().await {
                Ok(event) => Some((Ok(event), live)),
                Err(RecvError::Lagged(_)) => {
                    Some((Err(Status::data_loss("listener of the build history fell behind")), live))
                }
                Err(RecvError::Closed) => None,
            }
        })
        .filter(move |event| {
            let other = event.as_ref().is_ok_and(|event| {
                !wanted.is_empty() && event.record.as_ref().is_none_or(|record| record.r#ref != wanted)
            });
            std::future::ready(!other)
        });
        let stream = past.chain(later).take_until(self.0.shutdown.clone().cancelled_owned());
        Ok(with_clock(stream.boxed()))
    }

    async fn update_build_history(
        &self,
        request: Request<UpdateBuildHistoryRequest>,
    ) -> Result<Response<UpdateBuildHistoryResponse>, Status> {
        let (history, request) = (self.0.history.clone(), request.into_inner());
        history.settled().await;
        blocking(move || history.update(&request)).await?;
        Ok(Response::new(UpdateBuildHistoryResponse {}))
    }
}
