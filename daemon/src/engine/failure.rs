//! Errors of the solver and the store in the daemon's form, with the details that clients read.

use std::sync::Arc;

use kiln_cache::{Ref, StoreError};
use kiln_proto::{llb, pb};
use kiln_solver::SolveError;
use prost::Message;
use tonic::Code;

use crate::error::{BuildError, FailedVertex, exit_detail, source_details, vertex_detail};

/// A failed vertex, with the places in `definition`'s sources that it came from.
pub(super) fn solve_error(error: SolveError<Ref>, definition: &pb::Definition) -> BuildError {
    let SolveError { vertex, error, remains, .. } = error;
    let code = error.code.map_or(Code::Unknown, Code::from_i32);
    let mut out = BuildError { details: error.details, ..BuildError::new(code, error.message) };
    if code == Code::Cancelled {
        return out;
    }
    if let Some(vertex) = &vertex {
        if let Some(sources) = &definition.source {
            out.details.extend(source_details(sources, vertex));
        }
        out.details.push(vertex_detail(vertex));
        let description = definition.metadata.get(&**vertex).map(|metadata| metadata.description.clone());
        out.failed = operation(definition, vertex).map(|op| {
            let description = description.unwrap_or_default().into_iter().collect();
            Arc::new(FailedVertex { op, description, file_action: error.file_action, remains })
        });
    }
    if let Some(code) = error.exit_code {
        out.details.push(exit_detail(code));
    }
    out
}

fn operation(definition: &pb::Definition, vertex: &str) -> Option<pb::Op> {
    let bytes = definition.def.iter().find(|op| llb::digest::<String>(op) == vertex)?;
    pb::Op::decode(bytes.as_slice()).ok()
}

/// A failure of the store outside of any vertex.
pub(super) fn store_error(error: StoreError) -> BuildError {
    let code = match error {
        StoreError::Invalid(_) | StoreError::InvalidDigest(_) => Code::InvalidArgument,
        StoreError::Closed => Code::Unavailable,
        _ => Code::Internal,
    };
    BuildError::new(code, error.to_string())
}
