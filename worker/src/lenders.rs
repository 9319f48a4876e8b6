//! Credentials for work that no single build owns, such as hashing a shared base image: those of the
//! builds that are under way. A build's credentials are forgotten with it.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures::future::BoxFuture;

use crate::registry::{BasicAuth, Credentials, Token, TokenRequest};

/// The builds under way.
#[derive(Default)]
pub(crate) struct Lenders {
    builds: Mutex<Vec<Weak<dyn Credentials>>>,
}

impl Lenders {
    /// Notes a build's credentials for as long as it holds them.
    pub(crate) fn add(&self, credentials: &Arc<dyn Credentials>) {
        let mut builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
        builds.retain(|build| build.strong_count() > 0);
        builds.push(Arc::downgrade(credentials));
    }

    /// The credentials of all builds under way, the latest first.
    pub(crate) fn current(&self) -> Lent {
        let builds = self.builds.lock().unwrap_or_else(PoisonError::into_inner);
        Lent { lenders: builds.iter().rev().filter_map(Weak::upgrade).collect() }
    }
}

/// Asks one build after the other.
pub(crate) struct Lent {
    lenders: Vec<Arc<dyn Credentials>>,
}

impl Credentials for Lent {
    fn identity(&self) -> String {
        self.lenders.iter().map(|lender| lender.identity()).collect::<Vec<_>>().join("+")
    }

    fn basic<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<Option<BasicAuth>, String>> {
        Box::pin(async move {
            let mut failure = None;
            for lender in &self.lenders {
                match lender.basic(host).await {
                    Ok(Some(found)) => return Ok(Some(found)),
                    Ok(None) => {}
                    Err(err) => failure = Some(err),
                }
            }
            failure.map_or(Ok(None), Err)
        })
    }

    fn token<'a>(&'a self, request: &'a TokenRequest) -> BoxFuture<'a, Result<Option<Token>, String>> {
        Box::pin(async move {
            let mut failure = None;
            for lender in &self.lenders {
                match lender.token(request).await {
                    Ok(Some(found)) => return Ok(Some(found)),
                    Ok(None) => {}
                    Err(err) => failure = Some(err),
                }
            }
            failure.map_or(Ok(None), Err)
        })
    }
}
