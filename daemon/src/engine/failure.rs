//! Errors of the solver and the store in the daemon's form, with the details that clients read.

use kiln_cache::StoreError;
use kiln_proto::pb;
use kiln_solver::SolveError;
use tonic::Code;

use crate::error::{BuildError, exit_detail, solve_detail, source_details, vertex_detail};

/// A failed vertex, with the places in `definition`'s sources that it came from.
pub(super) fn solve_error(error: SolveError, definition: &pb::Definition) -> BuildError {
    let SolveError { vertex, error, .. } = error;
    let code = error.code.map_or(Code::Unknown, Code::from_i32);
    let mut out = BuildError { code, message: error.message, details: error.details };
    if code == Code::Cancelled {
        return out;
    }
    if let Some(action) = error.file_action {
        out.details.push(solve_detail(Some(action)));
    }
    if let Some(vertex) = &vertex {
        if let Some(sources) = &definition.source {
            out.details.extend(source_details(sources, vertex));
        }
        out.details.push(vertex_detail(vertex));
    }
    if let Some(code) = error.exit_code {
        out.details.push(exit_detail(code));
    }
    out
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
