//! What every side needs of LLB: the canonical bytes of an operation and their digest, building and
//! loading a [`pb::Definition`], capability ids. Owns no policy: which capabilities a daemon
//! supports, limits and entitlements are decided by the callers.

mod builder;
pub mod caps;
mod load;
mod name;
mod rewrite;

pub use builder::Builder;
pub use load::{LoadError, Loaded, LoadedVertex, load, validate};
pub use name::default_name;
pub use rewrite::{replace, sources};

use std::borrow::Cow;

use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, message, string};
use sha2::{Digest, Sha256};

use crate::pb;

/// Key in [`pb::OpMetadata::description`] that replaces a vertex's default display name.
pub const CUSTOM_NAME: &str = "llb.customname";

/// The index that stands for "no input" (scratch) in mounts, file actions and diffs.
pub const EMPTY: i64 = -1;

/// The digest of `bytes` as vertices carry it: `sha256:` and lower-case hex.
pub fn digest<T: for<'a> From<Cow<'a, str>>>(bytes: &[u8]) -> T {
    let mut text = *b"sha256:0000000000000000000000000000000000000000000000000000000000000000";
    // The room is right: 64 digits.
    let _ = hex::encode_to_slice(Sha256::digest(bytes), &mut text[7..]);
    T::from(String::from_utf8_lossy(&text))
}

/// The canonical bytes of an operation, equal to what Go clients of LLB send: inputs, platform,
/// constraints (present even when empty), then the operation itself; maps sorted by key.
pub fn encode_op(op: &pb::Op) -> Vec<u8> {
    let mut buf = Vec::with_capacity(op.encoded_len() + 2);
    message::encode_repeated(1, &op.inputs, &mut buf);
    if let Some(platform) = &op.platform {
        message::encode(10, platform, &mut buf);
    }
    match &op.constraints {
        Some(constraints) => message::encode(11, constraints, &mut buf),
        None => message::encode(11, &pb::WorkerConstraints::default(), &mut buf),
    }
    match &op.op {
        Some(pb::op::Op::Source(source)) => {
            let mut body = Vec::new();
            if !source.identifier.is_empty() {
                string::encode(1, &source.identifier, &mut body);
            }
            encode_string_map(2, &source.attrs, &mut body);
            encode_bytes_field(3, &body, &mut buf);
        }
        Some(pb::op::Op::Build(build)) => encode_bytes_field(5, &encode_build(build), &mut buf),
        Some(other) => other.encode(&mut buf),
        None => {}
    }
    buf
}

/// Go writes both halves of a map entry even when they are empty; prost leaves empty ones out.
fn encode_string_map(tag: u32, map: &std::collections::BTreeMap<String, String>, buf: &mut Vec<u8>) {
    for (key, value) in map {
        let mut entry = Vec::with_capacity(key.len() + value.len() + 8);
        string::encode(1, key, &mut entry);
        string::encode(2, value, &mut entry);
        encode_bytes_field(tag, &entry, buf);
    }
}

fn encode_build(build: &pb::BuildOp) -> Vec<u8> {
    let mut body = Vec::new();
    if build.builder != 0 {
        prost::encoding::int64::encode(1, &build.builder, &mut body);
    }
    for (key, value) in &build.inputs {
        let mut entry = Vec::new();
        string::encode(1, key, &mut entry);
        message::encode(2, value, &mut entry);
        encode_bytes_field(2, &entry, &mut body);
    }
    if let Some(def) = &build.def {
        message::encode(3, def, &mut body);
    }
    encode_string_map(4, &build.attrs, &mut body);
    body
}

fn encode_bytes_field(tag: u32, bytes: &[u8], buf: &mut Vec<u8>) {
    encode_key(tag, WireType::LengthDelimited, buf);
    encode_varint(bytes.len() as u64, buf);
    buf.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constraints_are_always_written_and_the_operation_comes_last() {
        let op = pb::Op {
            platform: Some(pb::Platform {
                architecture: "amd64".into(),
                os: "linux".into(),
                ..Default::default()
            }),
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: "local://a".into(),
                attrs: [("k".to_string(), String::new())].into(),
            })),
            ..Default::default()
        };
        let bytes = encode_op(&op);
        let mut expected = vec![0x52, 14, 0x0a, 5];
        expected.extend(b"amd64");
        expected.extend([0x12, 5]);
        expected.extend(b"linux");
        expected.extend([0x5a, 0, 0x1a, 18, 0x0a, 9]);
        expected.extend(b"local://a");
        expected.extend([0x12, 5, 0x0a, 1, b'k', 0x12, 0]);
        assert_eq!(bytes, expected);
        let back = pb::Op::decode(&bytes[..]).expect("decodes");
        assert_eq!(back.op, op.op);
    }

    #[test]
    fn digest_is_sha256_hex() {
        assert_eq!(
            digest::<String>(b""),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
