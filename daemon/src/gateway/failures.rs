//! What a failed vertex left, for clients that look into it: the detail of the error names results, of which containers
//! can be made as long as the build lasts.

use kiln_cache::{Ref, SnapshotRef};
use kiln_proto::json::to_json;
use kiln_solver::op::Remains;
use serde_json::{Map, Value, json};
use tonic::Code;

use super::Bridge;
use crate::error::{BuildError, FailedVertex, solve_detail};

impl Bridge {
    /// An error as gateway calls tell it.
    pub(super) fn as_solve_error(&self, error: BuildError) -> BuildError {
        let told =
            |error: &BuildError| error.details.iter().any(|any| any.type_url.contains("errdefs.Solve"));
        if error.code == Code::Cancelled || told(&error) {
            return error;
        }
        let detail =
            error.failed.as_deref().map_or_else(|| json!({}), |failed| self.describe_failure(failed));
        error.with(solve_detail(&detail))
    }

    /// `errdefs.Solve` as protobuf's JSON.
    fn describe_failure(&self, failed: &FailedVertex) -> Value {
        let mut told = Map::new();
        let index = |index: usize| match index {
            0 => json!({}),
            index => json!({ "index": index.to_string() }),
        };
        match failed.remains.as_deref() {
            Some(Remains::Run { inputs, states }) => {
                for (name, results) in [("inputIDs", inputs), ("mountIDs", states)] {
                    if !results.is_empty() {
                        told.insert(name.into(), results.iter().map(|result| self.show(result)).collect());
                    }
                }
            }
            Some(Remains::Key { input, index: number }) => {
                told.insert("inputIDs".into(), json!([self.show(input)]));
                told.insert("cache".into(), index(*number));
            }
            None => {}
        }
        if let Some(op) = to_json("pb.Op", &failed.op) {
            told.insert("op".into(), op);
        }
        if let Some(action) = failed.file_action {
            told.insert("file".into(), index(action));
        }
        if !failed.description.is_empty() {
            told.insert("description".into(), json!(failed.description));
        }
        Value::Object(told)
    }

    /// Keeps a result as long as the build lasts; its name, which is empty for scratch.
    fn show(&self, result: &Ref) -> String {
        let Some(snapshot) = result else { return String::new() };
        let id = format!("{}::{}", self.common.build.worker_id(), snapshot.id());
        self.shown.insert(id.clone(), snapshot.clone());
        id
    }

    /// What an error named.
    pub(super) fn shown(&self, id: &str) -> Option<SnapshotRef> {
        self.shown.get(id).map(|snapshot| snapshot.value().clone())
    }
}
