//! A registry that misbehaves: it hands each request to a closure.

use crate::web::{WebAnswer, WebServer};

/// Status, content type and body of an answer.
pub type Answer = (u16, &'static str, Vec<u8>);

/// A server on loopback, gone when dropped.
pub struct FakeRegistry {
    /// `127.0.0.1:PORT`
    pub address: String,
    server: WebServer,
}

impl FakeRegistry {
    /// Answers every request by what `answer` says of its method and path.
    pub fn start(answer: impl Fn(&str, &str) -> Answer + Send + Sync + 'static) -> Self {
        let server = WebServer::start(move |request| {
            let (status, kind, body) = answer(&request.method, &request.path);
            let version = ("docker-distribution-api-version", "registry/2.0".to_owned());
            WebAnswer {
                status,
                headers: vec![("content-type", kind.to_owned()), version],
                body,
                length: None,
            }
        });
        Self { address: server.address.clone(), server }
    }

    /// How many requests came since this was asked last.
    pub fn requests(&self) -> usize {
        self.server.requests().len()
    }
}
