//! How records become bytes: one version byte, then a protobuf message. A field may be added
//! without a new version; the version byte exists for the day when that is not enough.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::error::{Result, StoreError};

const VERSION: u8 = 1;

pub(crate) fn encode(message: &impl Message) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + message.encoded_len());
    bytes.push(VERSION);
    message.encode_raw(&mut bytes);
    bytes
}

pub(crate) fn decode<M: Message + Default>(what: &'static str, key: &[u8], bytes: &[u8]) -> Result<M> {
    let corrupt = |reason: String| StoreError::Corrupt { what, key: printable(key), reason };
    match bytes.split_first() {
        Some((&VERSION, body)) => M::decode(body).map_err(|e| corrupt(e.to_string())),
        Some((version, _)) => Err(corrupt(format!("unknown record version {version}"))),
        None => Err(corrupt("empty value".to_owned())),
    }
}

fn printable(key: &[u8]) -> String {
    match std::str::from_utf8(key) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => hex::encode(key),
    }
}

/// Nanoseconds since 1970; a time before that, or beyond 2262, is clamped.
pub(crate) fn nanos(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

pub(crate) fn time(nanos: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0))
}
