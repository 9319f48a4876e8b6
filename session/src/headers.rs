//! Metadata keys on calls through and into a session, and the encoding of lists of paths in them
//! (wire/filesync-auth-secrets-ssh.md §1.1, wire/control-and-session.md §4).

use tonic::Status;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue, MetadataMap};

pub(crate) const SESSION_ID: &str = "x-docker-expose-session-uuid";
pub(crate) const SESSION_NAME: &str = "x-docker-expose-session-name";
pub(crate) const SESSION_SHARED_KEY: &str = "x-docker-expose-session-sharedkey";
pub(crate) const SESSION_METHOD: &str = "x-docker-expose-session-grpc-method";
pub(crate) const SESSION_HEALTH_TIMEOUT: &str = "x-buildkit-session-health-custom-timeout";

pub(crate) const DIR_NAME: &str = "dir-name";
pub(crate) const INCLUDE_PATTERNS: &str = "include-patterns";
pub(crate) const EXCLUDE_PATTERNS: &str = "exclude-patterns";
pub(crate) const FOLLOW_PATHS: &str = "followpaths";

pub(crate) const EXPORTER_ID: &str = "buildkit-attachable-exporter-id";
pub(crate) const EXPORTER_METADATA_PREFIX: &str = "exporter-md-";
pub(crate) const EXPORTER_MULTI_PLATFORM: &str = "buildkit-exporter-multi-platform";
pub(crate) const STORE_ID: &str = "buildkit-attachable-store-id";
pub(crate) const SSH_ID: &str = "buildkit.ssh.id";
pub(crate) const UPLOAD_PATH: &str = "urlpath";
pub(crate) const UPLOAD_HOST: &str = "urlhost";

/// Sets `key` to one ASCII value; the value came from outside, so it may not be ASCII.
pub(crate) fn put(map: &mut MetadataMap, key: &str, value: &str) -> Result<(), Status> {
    let key: AsciiMetadataKey =
        key.parse().map_err(|_| Status::invalid_argument(format!("invalid metadata key {key:?}")))?;
    let value: AsciiMetadataValue = value
        .parse()
        .map_err(|_| Status::invalid_argument(format!("invalid value of metadata key {key}: {value:?}")))?;
    map.append(key, value);
    Ok(())
}

/// Appends every value under `key`; query-escapes all of them when one would not survive as a header.
pub(crate) fn put_list(map: &mut MetadataMap, key: &str, values: &[String]) -> Result<(), Status> {
    let plain = |value: &String| value.bytes().all(|b| (0x20..0x7f).contains(&b)) && value.trim() == value;
    if values.iter().all(plain) {
        return values.iter().try_for_each(|value| put(map, key, value));
    }
    put(map, &format!("{key}-encoded"), "1")?;
    values.iter().try_for_each(|value| {
        put(map, key, &url::form_urlencoded::byte_serialize(value.as_bytes()).collect::<String>())
    })
}

/// Every value of `key`, decoded when the sender marked them as encoded.
pub(crate) fn get_list(map: &MetadataMap, key: &str) -> Result<Vec<String>, Status> {
    let encoded = map.get(format!("{key}-encoded")).is_some_and(|v| v.as_bytes() == b"1");
    map.get_all(key)
        .iter()
        .map(|value| {
            let text = value
                .to_str()
                .map_err(|_| Status::invalid_argument(format!("metadata key {key} is not ASCII")))?;
            if !encoded {
                return Ok(text.to_owned());
            }
            let pair = format!("={text}");
            let decoded =
                url::form_urlencoded::parse(pair.as_bytes()).next().map(|(_, value)| value.into_owned());
            decoded.ok_or_else(|| Status::invalid_argument(format!("metadata key {key} is badly encoded")))
        })
        .collect()
}

/// The first value of `key`, or an empty string.
pub(crate) fn get<'a>(map: &'a MetadataMap, key: &str) -> &'a str {
    map.get(key).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ascii_lists_travel_plain() {
        let mut map = MetadataMap::new();
        put_list(&mut map, "include-patterns", &["a b".into(), "!c+d".into()]).unwrap();
        assert!(map.get("include-patterns-encoded").is_none());
        assert_eq!(get_list(&map, "include-patterns").unwrap(), ["a b", "!c+d"]);
    }

    proptest! {
        #[test]
        fn any_list_survives(values in proptest::collection::vec("\\PC{0,12}", 0..5)) {
            let mut map = MetadataMap::new();
            put_list(&mut map, "followpaths", &values).unwrap();
            prop_assert_eq!(get_list(&map, "followpaths").unwrap(), values);
        }
    }
}
