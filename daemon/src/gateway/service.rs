//! `moby.buildkit.v1.frontend.LLBBridge`. On the daemon's socket each call names its build by the metadata key
//! [`BUILD_ID`]; a frontend in a container has a connection of its own.

use std::future::Future;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kiln_proto::gateway::llb_bridge_server::LlbBridge;
use kiln_proto::gateway::{
    EvaluateRequest, EvaluateResponse, ExecMessage, FileRange, InputsRequest, InputsResponse,
    NewContainerRequest, NewContainerResponse, PingRequest, PongResponse, ReadDirRequest, ReadDirResponse,
    ReadFileRequest, ReadFileResponse, ReleaseContainerRequest, ReleaseContainerResponse,
    ResolveImageConfigRequest, ResolveImageConfigResponse, ResolveSourceMetaRequest,
    ResolveSourceMetaResponse, ReturnRequest, ReturnResponse, SolveRequest, SolveResponse, StatFileRequest,
    StatFileResponse, WarnRequest, WarnResponse,
};
use kiln_proto::{pb, platform, types};
use kiln_solver::progress::{Event, ProgressSink, VertexWarning};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Response, Status, Streaming};

use super::containers::no_container;
use super::source_meta::log_name;
use super::{Bridge, BuildResult, CacheEntry, FrontendRequest, Refs, caps, image_source, processes};
use crate::engine::{files, op_error};
use crate::error::BuildError;
use crate::jobs::{BRIDGE_WAIT, Jobs};
use crate::policy::LAYOUT;

/// Metadata key that names the build.
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) enum GatewayService {
    /// Of all builds.
    Builds(Arc<Jobs>),
    /// Of one frontend.
    Frontend(Arc<Bridge>),
}

impl GatewayService {
    async fn bridge(&self, metadata: &MetadataMap) -> Result<Arc<Bridge>, BuildError> {
        let jobs = match self {
            Self::Builds(jobs) => jobs,
            Self::Frontend(bridge) => return Ok(bridge.clone()),
        };
        let mut ids = metadata.get_all(BUILD_ID).iter();
        let id = match (ids.next(), ids.next()) {
            (Some(id), None) => id.to_str().unwrap_or_default(),
            _ => return Err(BuildError::new(Code::InvalidArgument, "no buildid found in context")),
        };
        jobs.wait_bridge(id, BRIDGE_WAIT).await
    }

    /// Runs one call; it fails as canceled when its build is stopped.
    async fn call<T, R, F, Fut>(&self, request: Request<T>, run: F) -> Result<Response<R>, Status>
    where
        F: FnOnce(Arc<Bridge>, T) -> Fut,
        Fut: Future<Output = Result<R, BuildError>>,
    {
        let bridge = self.bridge(request.metadata()).await?;
        let cancel = bridge.cancel().clone();
        let answer = tokio::select! {
            answer = run(bridge.clone(), request.into_inner()) => answer,
            () = cancel.cancelled() => Err(BuildError::canceled()),
        };
        Ok(Response::new(answer.map_err(|error| bridge.as_solve_error(error))?))
    }
}

#[tonic::async_trait]
impl LlbBridge for GatewayService {
    type ExecProcessStream = ReceiverStream<Result<ExecMessage, Status>>;

    async fn ping(&self, request: Request<PingRequest>) -> Result<Response<PongResponse>, Status> {
        let bridge = self.bridge(request.metadata()).await?;
        let worker = bridge.worker();
        Ok(Response::new(PongResponse {
            frontend_api_caps: caps::frontend(),
            llb_caps: caps::llb(),
            workers: vec![types::WorkerRecord {
                id: worker.id.clone(),
                labels: worker.labels.clone(),
                platforms: worker.platforms.clone(),
                ..types::WorkerRecord::default()
            }],
        }))
    }

    async fn solve(&self, request: Request<SolveRequest>) -> Result<Response<SolveResponse>, Status> {
        self.call(request, |bridge, request| async move {
            bridge.import(CacheEntry::all(&request)).await;
            let result = if !request.frontend.is_empty() {
                if request.definition.is_some_and(|definition| !definition.def.is_empty()) {
                    return Err(BuildError::build(
                        "cannot solve with both Definition and Frontend specified",
                    ));
                }
                let frontend = FrontendRequest {
                    name: request.frontend,
                    opts: request.frontend_opt,
                    inputs: request.frontend_inputs,
                };
                match request.source_policies.as_slice() {
                    [] => bridge.run_frontend(frontend).await?,
                    further => {
                        let inputs = frontend.inputs.clone();
                        let (asked, _) = bridge.nested(inputs, bridge.cancel().clone(), further)?;
                        asked.run_frontend(frontend).await?
                    }
                }
            } else {
                let reference = bridge
                    .solve_under(request.definition.unwrap_or_default(), &request.source_policies)
                    .await?;
                BuildResult { refs: Refs::Single(reference), ..BuildResult::default() }
            };
            if request.evaluate {
                result.refs.evaluate().await?;
            }
            let encoded = bridge.encode_result(&result);
            if request.allow_result_return {
                return Ok(SolveResponse { r#ref: String::new(), result: Some(encoded) });
            }
            match &result.refs {
                Refs::Single(reference) => {
                    let id =
                        reference.as_ref().map(|reference| reference.id().to_owned()).unwrap_or_default();
                    Ok(SolveResponse { r#ref: id, result: None })
                }
                Refs::Map(_) => {
                    Err(BuildError::build("solve returned map result, which the caller cannot take"))
                }
            }
        })
        .await
    }

    async fn resolve_image_config(
        &self,
        request: Request<ResolveImageConfigRequest>,
    ) -> Result<Response<ResolveImageConfigResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let source = match request.resolver_type {
                0 => image_source(&request.r#ref),
                _ => pb::SourceOp {
                    identifier: format!("{LAYOUT}{}", request.r#ref),
                    attrs: [("oci.session", request.session_id), ("oci.store", request.store_id)]
                        .map(|(key, value)| (key.to_owned(), value))
                        .into(),
                },
            };
            let log_name = log_name(&request.log_name, &source.identifier);
            let platform = request.platform.unwrap_or_else(platform::host);
            let policies = &request.source_policies;
            let (reference, image) =
                bridge.resolve_image(source, &platform, &request.resolve_mode, &log_name, policies).await?;
            Ok(ResolveImageConfigResponse { digest: image.digest, config: image.config, r#ref: reference })
        })
        .await
    }

    async fn resolve_source_meta(
        &self,
        request: Request<ResolveSourceMetaRequest>,
    ) -> Result<Response<ResolveSourceMetaResponse>, Status> {
        self.call(request, |bridge, mut request| async move {
            let Some(source) = request.source.take() else {
                return Err(BuildError::new(Code::InvalidArgument, "source is not set"));
            };
            let platform = request.platform.clone().unwrap_or_else(platform::host);
            request.source = Some(bridge.allowed(source, &platform, &request.source_policies).await?);
            bridge.source_meta(request).await
        })
        .await
    }

    async fn read_file(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Result<Response<ReadFileResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let path = request.file_path;
            let Some(reference) = bridge.reference(&request.r#ref)? else {
                return Err(BuildError::build(format!("open {path}: no such file or directory")));
            };
            let (offset, length) = part(request.range)?;
            let data = reference.read(move |root| files::read_file(root, &path, offset, length)).await?;
            Ok(ReadFileResponse { data })
        })
        .await
    }

    async fn read_dir(&self, request: Request<ReadDirRequest>) -> Result<Response<ReadDirResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let (path, include) = (request.dir_path, request.include_pattern);
            let entries = match bridge.reference(&request.r#ref)? {
                Some(reference) => reference.read(move |root| files::read_dir(root, &path, &include)).await?,
                None if path.trim_matches('/').is_empty() => Vec::new(),
                None => return Err(BuildError::build(format!("open {path}: no such file or directory"))),
            };
            Ok(ReadDirResponse { entries })
        })
        .await
    }

    async fn stat_file(
        &self,
        request: Request<StatFileRequest>,
    ) -> Result<Response<StatFileResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let path = request.path;
            let Some(reference) = bridge.reference(&request.r#ref)? else {
                return Err(BuildError::build(format!("lstat {path}: no such file or directory")));
            };
            let stat = reference.read(move |root| files::stat_file(root, &path)).await?;
            Ok(StatFileResponse { stat: Some(stat) })
        })
        .await
    }

    async fn evaluate(
        &self,
        request: Request<EvaluateRequest>,
    ) -> Result<Response<EvaluateResponse>, Status> {
        self.call(request, |bridge, request| async move {
            if let Some(reference) = bridge.reference(&request.r#ref)? {
                reference.get().await?;
            }
            Ok(EvaluateResponse {})
        })
        .await
    }

    async fn r#return(&self, request: Request<ReturnRequest>) -> Result<Response<ReturnResponse>, Status> {
        // Not through `call`: accepting a result ends the build, which would race with the answer.
        let bridge = self.bridge(request.metadata()).await?;
        bridge.accept(request.into_inner())?;
        Ok(Response::new(ReturnResponse {}))
    }

    async fn inputs(&self, request: Request<InputsRequest>) -> Result<Response<InputsResponse>, Status> {
        let bridge = self.bridge(request.metadata()).await?;
        Ok(Response::new(InputsResponse { definitions: bridge.inputs().clone() }))
    }

    async fn warn(&self, request: Request<WarnRequest>) -> Result<Response<WarnResponse>, Status> {
        let bridge = self.bridge(request.metadata()).await?;
        let warning = request.into_inner();
        if warning.ranges.iter().any(|range| range.start.is_none() || range.end.is_none()) {
            return Err(Status::invalid_argument("range without start or end"));
        }
        bridge.progress().event(Event::Warning(VertexWarning {
            vertex: warning.digest,
            level: if warning.level == 0 { 1 } else { warning.level },
            short: String::from_utf8_lossy(&warning.short).into_owned(),
            detail: warning.detail.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect(),
            url: warning.url,
            info: warning.info,
            ranges: warning.ranges,
        }));
        Ok(Response::new(WarnResponse {}))
    }

    async fn new_container(
        &self,
        request: Request<NewContainerRequest>,
    ) -> Result<Response<NewContainerResponse>, Status> {
        self.call(request, |bridge, request| async move {
            bridge.new_container(request).await?;
            Ok(NewContainerResponse {})
        })
        .await
    }

    async fn release_container(
        &self,
        request: Request<ReleaseContainerRequest>,
    ) -> Result<Response<ReleaseContainerResponse>, Status> {
        self.call(request, |bridge, request| async move {
            bridge.release_container(&request.container_id).await?;
            Ok(ReleaseContainerResponse {})
        })
        .await
    }

    async fn exec_process(
        &self,
        request: Request<Streaming<ExecMessage>>,
    ) -> Result<Response<Self::ExecProcessStream>, Status> {
        let bridge = self.bridge(request.metadata()).await?;
        let answers = processes::serve(bridge, request.into_inner());
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn read_file_container(
        &self,
        request: Request<ReadFileRequest>,
    ) -> Result<Response<ReadFileResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let (path, (offset, length)) = (request.file_path, part(request.range)?);
            let read = move |root: BorrowedFd<'_>| files::read_file(root, &path, offset, length);
            let data = in_mount(&bridge, &request.r#ref, request.mount_index, read).await?;
            Ok(ReadFileResponse { data })
        })
        .await
    }

    async fn read_dir_container(
        &self,
        request: Request<ReadDirRequest>,
    ) -> Result<Response<ReadDirResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let (path, include) = (request.dir_path, request.include_pattern);
            let read = move |root: BorrowedFd<'_>| files::read_dir(root, &path, &include);
            let entries = in_mount(&bridge, &request.r#ref, request.mount_index, read).await?;
            Ok(ReadDirResponse { entries })
        })
        .await
    }

    async fn stat_file_container(
        &self,
        request: Request<StatFileRequest>,
    ) -> Result<Response<StatFileResponse>, Status> {
        self.call(request, |bridge, request| async move {
            let path = request.path;
            let read = move |root: BorrowedFd<'_>| files::stat_file(root, &path);
            let stat = in_mount(&bridge, &request.r#ref, request.mount_index, read).await?;
            Ok(StatFileResponse { stat: Some(stat) })
        })
        .await
    }
}

/// Offset and length of a part of a file; without a length all of the rest.
fn part(range: Option<FileRange>) -> Result<(u64, u64), BuildError> {
    let range = range.unwrap_or_default();
    match (u64::try_from(range.offset), u64::try_from(range.length)) {
        (Ok(offset), Ok(length)) => Ok((offset, length)),
        _ => Err(BuildError::new(Code::InvalidArgument, "negative file range")),
    }
}

/// Reads in a mount of a container, on a thread where blocking does no harm.
async fn in_mount<T, F>(bridge: &Bridge, container: &str, mount: i32, read: F) -> Result<T, BuildError>
where
    T: Send + 'static,
    F: FnOnce(BorrowedFd<'_>) -> Result<T, BuildError> + Send + 'static,
{
    let Some(container) = bridge.container(container) else { return Err(no_container(container)) };
    let view = container.view(usize::try_from(mount).unwrap_or(usize::MAX)).await.map_err(op_error)?;
    tokio::task::spawn_blocking(move || read(view.fd()))
        .await
        .map_err(|error| BuildError::new(Code::Internal, format!("task failed: {error}")))?
}
