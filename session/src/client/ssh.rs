//! Serves `SSH`: each call is one connection to an ssh agent's socket on the client.

use std::collections::HashMap;
use std::path::PathBuf;

use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_proto::sshforward::ssh_server::{Ssh, SshServer};
use kiln_proto::sshforward::{BytesMessage, CheckAgentRequest, CheckAgentResponse};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio_util::io::ReaderStream;
use tonic::{Request, Response, Status, Streaming};

use crate::headers;

const CHUNK: usize = 32 << 10;

/// An agent to forward to.
#[derive(Debug, Clone)]
pub struct Agent {
    /// The name that builds use; `default` if they give none.
    pub id: String,
    /// Its socket.
    pub socket: PathBuf,
}

pub(super) fn service(agents: Vec<Agent>) -> SshServer<Agents> {
    SshServer::new(Agents { agents: agents.into_iter().map(|agent| (agent.id, agent.socket)).collect() })
}

pub(super) struct Agents {
    agents: HashMap<String, PathBuf>,
}

impl Agents {
    fn socket(&self, id: &str) -> Result<&PathBuf, Status> {
        let id = if id.is_empty() { "default" } else { id };
        self.agents.get(id).ok_or_else(|| Status::not_found(format!("unset ssh forward key {id}")))
    }
}

#[tonic::async_trait]
impl Ssh for Agents {
    async fn check_agent(
        &self,
        request: Request<CheckAgentRequest>,
    ) -> Result<Response<CheckAgentResponse>, Status> {
        self.socket(&request.into_inner().id)?;
        Ok(Response::new(CheckAgentResponse {}))
    }

    type ForwardAgentStream = BoxStream<'static, Result<BytesMessage, Status>>;

    async fn forward_agent(
        &self,
        request: Request<Streaming<BytesMessage>>,
    ) -> Result<Response<Self::ForwardAgentStream>, Status> {
        let socket = self.socket(headers::get(request.metadata(), headers::SSH_ID))?;
        let stream = UnixStream::connect(socket).await;
        let stream =
            stream.map_err(|error| Status::unknown(format!("connect to {}: {error}", socket.display())))?;
        let (reader, mut writer) = stream.into_split();
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                if writer.write_all(&message.data).await.is_err() {
                    return;
                }
            }
            let _ = writer.shutdown().await;
        });
        let answers = ReaderStream::with_capacity(reader, CHUNK).map(|chunk| {
            chunk.map(|data| BytesMessage { data }).map_err(|error| Status::unknown(error.to_string()))
        });
        Ok(Response::new(answers.boxed()))
    }
}
