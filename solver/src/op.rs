//! The traits through which the solver sees operations and results. It never learns what a result
//! is: a worker implements [`Op`] and [`ResultStore`], tests implement them with counters.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
pub use kiln_cache::contenthash::{ContentPath, ContentQuery};
use kiln_proto::pb;

use crate::progress::VertexProgress;

/// An edge's or an operation's key: blake3 over what may change the result.
pub type Key = blake3::Hash;

/// How one input enters an operation's key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InputMap {
    /// Distinguishes uses of the same input that read different parts (for the definition key).
    pub selector: Option<String>,
    /// If set, the content key counts this input by the content that the query selects.
    pub content: Option<ContentQuery>,
}

/// What an operation's result depends on, beside its inputs.
#[derive(Debug, Clone)]
pub struct CacheMap {
    /// blake3 over everything in the operation that may change the result.
    pub digest: Key,
    /// For the inputs of the operation, in its order. Those that are missing at the end are read as a whole.
    pub inputs: Vec<InputMap>,
    /// False for a source that has no identity beyond this build (a client's directory): its
    /// definition key is never looked up or recorded, and its consumers are recognised by content.
    pub persistent: bool,
    /// What the digest was made of, for explanations.
    pub parts: Parts,
}

/// A value that a digest was made of: its name and what it is, e.g. `("env PATH", "/bin")`.
pub type Part = (String, String);

/// Takes the name of a part and what it is.
pub type Tell<'a> = dyn FnMut(&str, &str) + 'a;

type Teller = dyn Fn(&mut Tell<'_>) + Send + Sync;

/// The values that a digest was made of, worked out when somebody asks: most builds don't.
#[derive(Clone, Default)]
pub struct Parts(Option<Arc<Teller>>);

impl Parts {
    /// What `tell` tells, which is the same each time.
    pub fn new(tell: impl Fn(&mut Tell<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    /// Tells all of them, in their order.
    pub fn each(&self, tell: &mut Tell<'_>) {
        if let Some(parts) = &self.0 {
            parts(tell);
        }
    }

    /// All of them, in their order.
    pub fn list(&self) -> Vec<Part> {
        let mut list = Vec::new();
        self.each(&mut |name, value| list.push((name.to_owned(), value.to_owned())));
        list
    }
}

impl From<Vec<Part>> for Parts {
    fn from(parts: Vec<Part>) -> Self {
        Self::new(move |tell| parts.iter().for_each(|(name, value)| tell(name, value)))
    }
}

impl std::fmt::Debug for Parts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Parts").field(&self.list()).finish()
    }
}

/// What an operation has at hand while it resolves or runs.
#[derive(Clone)]
pub struct OpContext {
    /// Logs and statuses of this vertex; reaches every build that waits for it.
    pub progress: VertexProgress,
    /// The operation must not use a cached form of what is outside the solver (e.g. it asks the registry again).
    pub ignore_cache: bool,
}

/// Why an operation failed. Carries what clients need: the chain of texts and typed details.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct OpError {
    /// The text that the user sees, without the vertex's name.
    pub message: String,
    /// Exit code of the process, where one ran.
    pub exit_code: Option<i32>,
    /// Index of the failing action of a file operation.
    pub file_action: Option<usize>,
    /// Typed details (`Any`, wire: control-and-session "Error encoding") to hand on unchanged.
    pub details: Vec<prost_types::Any>,
    /// gRPC code, when not Unknown (2).
    pub code: Option<i32>,
}

impl OpError {
    /// An error that is only a text.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), exit_code: None, file_action: None, details: Vec::new(), code: None }
    }

    /// True if the failure says something about the client that the operation ran for, not about
    /// the operation: it was cancelled, or the other end went away.
    pub fn is_transient(&self) -> bool {
        const CANCELED: i32 = 1;
        const UNAVAILABLE: i32 = 14;
        matches!(self.code, Some(CANCELED | UNAVAILABLE))
    }
}

/// What is there to look into when a vertex failed. A handle to a result keeps that alive, as everywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remains<R> {
    /// Of an operation that ran.
    Run {
        /// What it was given, place by place.
        inputs: Vec<R>,
        /// What it had made of that until it failed, place by place.
        states: Vec<R>,
    },
    /// Its key could not be computed for want of what it reads.
    Key {
        /// Where that was not found.
        input: R,
        /// Which of the operation's inputs this is.
        index: usize,
    },
}

/// An operation that failed.
#[derive(Debug)]
pub struct Failure<R> {
    /// Why.
    pub error: OpError,
    /// What it left, if there is something to see.
    pub remains: Option<Arc<Remains<R>>>,
}

impl<R> Clone for Failure<R> {
    fn clone(&self) -> Self {
        Self { error: self.error.clone(), remains: self.remains.clone() }
    }
}

impl<R> From<OpError> for Failure<R> {
    fn from(error: OpError) -> Self {
        Self { error, remains: None }
    }
}

/// One operation of the graph, ready to be asked for its key and to run. Dropping a future that
/// one of these methods returned cancels the work; it must then leave no process, mount or
/// half record behind.
pub trait Op<R>: Send + Sync + 'static {
    /// What the result depends on, if the operation's bytes leave nothing open. May be called on any thread, and does
    /// not block.
    fn known_map(&self) -> Option<CacheMap> {
        None
    }

    /// Resolves what the operation's bytes leave open (tag to digest, branch to commit) and says
    /// what the result depends on. Called at most once per operation and build, and only if [`Self::known_map`] says
    /// nothing.
    fn cache_map<'a>(&'a self, _ctx: &'a OpContext) -> BoxFuture<'a, Result<CacheMap, OpError>> {
        let unknown = || OpError::new("the operation does not say what it depends on");
        std::future::ready(self.known_map().ok_or_else(unknown)).boxed()
    }

    /// Runs the operation. `inputs` has one result per input edge; the answer has one for each output.
    fn execute<'a>(&'a self, ctx: &'a OpContext, inputs: Vec<R>)
    -> BoxFuture<'a, Result<Vec<R>, Failure<R>>>;

    /// False if what comes of running it never depends on the client that it runs for: then a failure is the same for
    /// all who wait for it, also when that client has left.
    fn needs_client(&self) -> bool {
        true
    }

    /// Upper bound class: how many of these may run at once is limited per class by the solver.
    fn class(&self) -> OpClass {
        OpClass::Run
    }
}

/// Which of the daemon's concurrency limits an operation counts against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OpClass {
    /// A sandboxed process (`max-parallelism`).
    Run,
    /// Network or disk transfer, file operations: not limited by `max-parallelism`.
    Io,
}

/// Where results live. A result handle keeps what it names alive until dropped.
pub trait ResultStore<R>: Send + Sync + 'static {
    /// The persistent name of a result, kept in the key store.
    fn id(&self, result: &R) -> String;
    /// A handle to a result of an earlier build; `None` when it is gone (the record is then dropped).
    fn load<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<R>, OpError>>;
    /// True if its content can be read without fetching it first.
    fn is_here(&self, _result: &R) -> bool {
        true
    }
    /// Digest of the part of a result that `query` selects (see wire/llb: content hash; blake3 form).
    fn content_digest<'a>(
        &'a self,
        result: &'a R,
        query: &'a ContentQuery,
    ) -> BoxFuture<'a, Result<Key, OpError>>;
    /// Digest of what an operation produced (names, types, modes, owners, contents, xattrs; no
    /// mtimes) chained on what it was produced on; the basis of early cut-off.
    fn output_digest<'a>(&'a self, result: &'a R) -> BoxFuture<'a, Result<Key, OpError>>;
}

/// Makes operations of vertices. One for each build: it knows the build's session and entitlements.
pub trait OpFactory<R>: Send + Sync + 'static {
    /// The operation of a vertex; an error names what is unsupported or not allowed. May be called on any thread.
    fn op(&self, vertex: OpVertex) -> Result<Arc<dyn Op<R>>, OpError>;
}

/// A vertex as the factory sees it.
#[derive(Debug, Clone)]
pub struct OpVertex {
    /// `sha256:…` over the operation's bytes as received.
    pub digest: Arc<str>,
    /// The decoded operation.
    pub op: Box<pb::Op>,
    /// Its metadata (empty if none was sent).
    pub metadata: Arc<pb::OpMetadata>,
    /// What the progress stream calls it.
    pub name: Arc<str>,
}
