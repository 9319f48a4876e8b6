//! References that frontends hold: a definition, and what came of building it, once somebody asked.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kiln_cache::Ref;
use kiln_proto::{gateway, pb};
use tokio::sync::OnceCell;

use crate::engine::{CacheSource, EngineBuild, Target};
use crate::error::BuildError;

/// Something that can be built, and is, at most once.
pub(crate) struct LazyRef {
    id: String,
    target: Target,
    build: Arc<EngineBuild>,
    result: OnceCell<Result<Ref, BuildError>>,
}

impl LazyRef {
    pub(super) fn new(target: Target, build: Arc<EngineBuild>) -> Arc<Self> {
        Arc::new(Self { id: kiln_session::new_id(), target, build, result: OnceCell::new() })
    }

    /// Names it within its build.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What it is made from.
    pub(crate) fn definition(&self) -> &pb::Definition {
        self.target.definition()
    }

    /// What a cache elsewhere can be told of it and of all that it was made from.
    pub(crate) async fn describe(&self) -> CacheSource {
        self.target.describe().await
    }

    /// Builds it, unless that has been done. A failure is remembered; being dropped is not.
    pub(crate) async fn get(&self) -> Result<Ref, BuildError> {
        self.result.get_or_init(|| self.target.result()).await.clone()
    }

    /// Whether it has been built.
    pub(crate) fn is_built(&self) -> bool {
        matches!(self.result.get(), Some(Ok(_)))
    }

    /// Builds it and reads in its root directory, on a thread where blocking does no harm.
    pub(crate) async fn read<T, F>(&self, read: F) -> Result<T, BuildError>
    where
        T: Send + 'static,
        F: FnOnce(BorrowedFd<'_>) -> Result<T, BuildError> + Send + 'static,
    {
        let result = self.get().await?;
        self.build.read(result, read).await
    }
}

/// A claim of a frontend about its result.
#[derive(Clone)]
pub(crate) struct Offered {
    /// Where the file is.
    pub(crate) reference: Option<Arc<LazyRef>>,
    pub(crate) wire: gateway::Attestation,
}

/// What a frontend returned.
#[derive(Clone)]
pub(crate) struct BuildResult {
    /// The file systems.
    pub(crate) refs: Refs,
    /// Image configs and whatever else exporters and clients read.
    pub(crate) metadata: BTreeMap<String, Vec<u8>>,
    /// What it claims of them, by platform.
    pub(crate) attestations: BTreeMap<String, Vec<Offered>>,
    /// What the frontend read on its way.
    pub(crate) read: Vec<Arc<LazyRef>>,
}

impl Default for BuildResult {
    fn default() -> Self {
        Self {
            refs: Refs::Single(None),
            metadata: BTreeMap::new(),
            attestations: BTreeMap::new(),
            read: Vec::new(),
        }
    }
}

/// One file system, or one for each platform; `None` is scratch.
#[derive(Clone)]
pub(crate) enum Refs {
    /// One.
    Single(Option<Arc<LazyRef>>),
    /// By platform.
    Map(BTreeMap<String, Option<Arc<LazyRef>>>),
}

impl Refs {
    /// All references that are not scratch.
    pub(crate) fn all(&self) -> Vec<&Arc<LazyRef>> {
        match self {
            Self::Single(reference) => reference.iter().collect(),
            Self::Map(refs) => refs.values().flatten().collect(),
        }
    }

    /// Builds all of them, at the same time.
    pub(crate) async fn evaluate(&self) -> Result<(), BuildError> {
        futures::future::try_join_all(self.all().into_iter().map(|reference| reference.get())).await?;
        Ok(())
    }
}
