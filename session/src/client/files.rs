//! Serves `FileSync`: the daemon reads directories that were shared by name.

use std::collections::HashMap;
use std::path::PathBuf;

use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_proto::filesync::file_sync_server::{FileSync, FileSyncServer};
use kiln_proto::fsutil::Packet;
use tokio::sync::mpsc;
use tonic::{Request, Response, Status, Streaming};

use super::outgoing;
use crate::fsutil::{self, Selection, Subtree, TransferError};
use crate::headers;

/// A directory that the daemon may read.
#[derive(Debug, Clone)]
pub struct SharedDir {
    /// The name after `local://`.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
}

pub(super) fn service(dirs: Vec<SharedDir>) -> FileSyncServer<Files> {
    FileSyncServer::new(Files { dirs: dirs.into_iter().map(|dir| (dir.name, dir.path)).collect() })
}

pub(super) struct Files {
    dirs: HashMap<String, PathBuf>,
}

#[tonic::async_trait]
impl FileSync for Files {
    type DiffCopyStream = BoxStream<'static, Result<Packet, Status>>;
    type TarStreamStream = BoxStream<'static, Result<Packet, Status>>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let map = request.metadata();
        let name = headers::get_list(map, headers::DIR_NAME)?.into_iter().next().unwrap_or_default();
        let path = self.dirs.get(&name).cloned();
        let path = path.ok_or_else(|| Status::not_found(format!("no access allowed to dir {name:?}")))?;
        let selection = Selection {
            include: headers::get_list(map, headers::INCLUDE_PATTERNS)?,
            exclude: headers::get_list(map, headers::EXCLUDE_PATTERNS)?,
            follow: headers::get_list(map, headers::FOLLOW_PATHS)?,
        };
        let incoming = request.into_inner().boxed();
        let (packets, receiver) = mpsc::channel(fsutil::SEND_QUEUE);
        let result = tokio::spawn(async move {
            let tree = Subtree::open(&path).map_err(status)?;
            let tree = Subtree { selection, reset_ids: true, ..tree };
            fsutil::send(vec![tree], incoming, packets, None).await.map(drop).map_err(status)
        });
        Ok(Response::new(outgoing(receiver, result)))
    }

    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented("file transfer as a tar stream"))
    }
}

pub(super) fn status(error: TransferError) -> Status {
    match error {
        TransferError::Status(status) => *status,
        other => Status::unknown(other.to_string()),
    }
}
