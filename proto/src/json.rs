//! Messages as protobuf's JSON: lowerCamelCase names, enums by name, 64-bit numbers as texts, bytes as base64, nothing
//! for zero values (<https://protobuf.dev/programming-guides/json/>).

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::Value;

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(crate::DESCRIPTORS).ok());

/// A message of the type `name` (e.g. `pb.Op`) as JSON; `None` if it is not of that type.
pub fn to_json(name: &str, message: &impl Message) -> Option<Value> {
    let descriptor = POOL.as_ref()?.get_message_by_name(name)?;
    let message = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice()).ok()?;
    serde_json::to_value(&message).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::pb;

    #[test]
    fn an_operation() {
        let mounts = vec![
            pb::Mount { dest: "/".into(), ..Default::default() },
            pb::Mount { dest: "/m".into(), input: -1, output: 1, ..Default::default() },
            pb::Mount { dest: "/c".into(), mount_type: pb::MountType::Cache.into(), ..Default::default() },
        ];
        let exec = pb::ExecOp { mounts, ..Default::default() };
        let op = pb::Op { op: Some(pb::op::Op::Exec(exec.into())), ..Default::default() };
        let mounts = json!([{ "dest": "/" }, { "input": "-1", "dest": "/m", "output": "1" }, { "dest": "/c", "mountType": "CACHE" }]);
        assert_eq!(to_json("pb.Op", &op), Some(json!({ "exec": { "mounts": mounts } })));
        assert_eq!(to_json("pb.Nothing", &op), None);
    }
}
