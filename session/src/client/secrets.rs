//! Serves `Secrets`: named secrets from files, or values that the caller already has.

use std::collections::HashMap;
use std::path::PathBuf;

use kiln_proto::secrets::secrets_server::{Secrets, SecretsServer};
use kiln_proto::secrets::{GetSecretRequest, GetSecretResponse};
use tonic::{Request, Response, Status};

/// Largest secret, in bytes; it travels in one message and lives in memory.
const MAX_SIZE: usize = 500 << 10;

/// One secret.
pub enum Secret {
    /// Read from a file each time it is asked for.
    File {
        /// Its id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// A value.
    Value {
        /// Its id.
        id: String,
        /// The bytes.
        value: Vec<u8>,
    },
}

pub(super) fn service(secrets: Vec<Secret>) -> SecretsServer<Store> {
    let key = |secret: Secret| match &secret {
        Secret::File { id, .. } | Secret::Value { id, .. } => (id.clone(), secret),
    };
    SecretsServer::new(Store { secrets: secrets.into_iter().map(key).collect() })
}

pub(super) struct Store {
    secrets: HashMap<String, Secret>,
}

#[tonic::async_trait]
impl Secrets for Store {
    async fn get_secret(
        &self,
        request: Request<GetSecretRequest>,
    ) -> Result<Response<GetSecretResponse>, Status> {
        let id = request.into_inner().id;
        let data = match self.secrets.get(&id) {
            None => return Err(Status::not_found(format!("secret {id}: not found"))),
            Some(Secret::Value { value, .. }) => value.clone(),
            Some(Secret::File { path, .. }) => tokio::fs::read(path).await.map_err(|error| {
                let text = format!("secret {id}: read {}: {error}", path.display());
                if error.kind() == std::io::ErrorKind::NotFound {
                    Status::not_found(text)
                } else {
                    Status::unknown(text)
                }
            })?,
        };
        if data.len() > MAX_SIZE {
            return Err(Status::invalid_argument(format!("secret {id} is larger than {MAX_SIZE} bytes")));
        }
        Ok(Response::new(GetSecretResponse { data }))
    }
}
