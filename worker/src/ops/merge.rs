//! The merge operation: layers of several results, stacked. Nothing is copied or mounted.

use std::sync::Arc;

use futures::future::BoxFuture;
use kiln_cache::{Ref, SnapshotMeta};
use kiln_proto::pb;
use kiln_solver::op::{CacheMap, Failure, Op, OpClass, OpContext, OpError};

use super::keys::KeyBuilder;
use crate::worker::Worker;

/// A merge operation of one vertex.
pub(crate) struct MergeOp {
    worker: Arc<Worker>,
    /// Input of the vertex for each merged tree; `None` is scratch.
    parts: Vec<Option<usize>>,
    name: String,
}

impl MergeOp {
    pub(crate) fn new(
        worker: Arc<Worker>,
        op: &pb::MergeOp,
        inputs: usize,
        name: &str,
    ) -> Result<Self, OpError> {
        let parts =
            op.inputs.iter().map(|part| super::operand(part.input, inputs)).collect::<Result<Vec<_>, _>>()?;
        if parts.len() < 2 {
            return Err(OpError::new("merge needs at least two inputs"));
        }
        Ok(Self { worker, parts, name: name.into() })
    }
}

impl Op<Ref> for MergeOp {
    fn known_map(&self) -> Option<CacheMap> {
        let mut key = KeyBuilder::new("kiln.merge.v1");
        for part in &self.parts {
            key.part("merge input", part.map_or("scratch".into(), |index| index.to_string()));
        }
        Some(key.finish(Vec::new(), true))
    }

    fn execute<'a>(
        &'a self,
        _ctx: &'a OpContext,
        inputs: Vec<Ref>,
    ) -> BoxFuture<'a, Result<Vec<Ref>, Failure<Ref>>> {
        Box::pin(async move {
            let part = |part: &Option<usize>| part.and_then(|index| inputs.get(index).cloned().flatten());
            let parts: Vec<_> = self.parts.iter().filter_map(part).collect();
            if parts.is_empty() {
                return Ok(vec![None]);
            }
            let merged = self.worker.layers().snapshots().merge(&parts, SnapshotMeta::new(&self.name));
            Ok(vec![Some(merged.map_err(|err| OpError::new(err.to_string()))?)])
        })
    }

    fn class(&self) -> OpClass {
        OpClass::Io
    }
}
