//! The image config: what the frontend made, completed with what only the layers know.

use std::time::SystemTime;

use jiff::Timestamp;
use kiln_proto::pb;
use serde_json::{Map, Value, json};

use super::ExportError;
use crate::image::EMPTY_DIFF_ID;

/// Where the records of a cache are.
pub(crate) const CACHE: &str = "moby.buildkit.cache.v0";
const COMMENT: &str = "buildkit.exporter.image.v0";
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the config needs to know of a layer.
#[derive(Debug, Clone)]
pub(super) struct LayerFacts {
    pub(super) diff_id: String,
    pub(super) created: SystemTime,
    pub(super) description: String,
}

/// A finished config.
pub(super) struct Patched {
    /// Compact JSON, keys sorted.
    pub(super) bytes: Vec<u8>,
    /// Which layers are part of the image: those without any entry are not.
    pub(super) kept: Vec<bool>,
    /// Platform that the config states.
    pub(super) platform: pb::Platform,
}

/// Completes a config with root file system, history and times.
pub(super) fn patch(
    config: Option<&[u8]>,
    base_history: usize,
    platform: Option<&pb::Platform>,
    layers: &[LayerFacts],
    epoch: Option<i64>,
) -> Result<Patched, ExportError> {
    let bad = |text: String| ExportError::Input(format!("invalid image config: {text}"));
    let mut image: Map<String, Value> = match config {
        Some(bytes) => match serde_json::from_slice(bytes) {
            Ok(Some(image)) => image,
            Ok(None) => return Err(ExportError::Input("invalid null image config for export".to_string())),
            Err(error) => return Err(bad(error.to_string())),
        },
        None => default_config(platform),
    };
    // Those of the base image say nothing about this one.
    image.remove(CACHE);
    let history = match image.remove("history") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(entries)) => entries
            .into_iter()
            .map(|entry| match entry {
                Value::Object(entry) => Ok(entry),
                other => Err(bad(format!("history entry {other}"))),
            })
            .collect::<Result<Vec<_>, _>>()?,
        Some(other) => return Err(bad(format!("history is {other}"))),
    };
    let text = |key: &str| image.get(key).and_then(Value::as_str).unwrap_or_default().to_string();
    let stated = pb::Platform {
        os: text("os"),
        architecture: text("architecture"),
        variant: text("variant"),
        os_version: text("os.version"),
        os_features: Vec::new(),
    };
    if stated.os.is_empty() || stated.architecture.is_empty() {
        return Err(bad("os and architecture must be specified together".to_string()));
    }
    let (history, kept) = align(history, base_history, layers, epoch);
    let diff_ids: Vec<&str> = layers
        .iter()
        .zip(&kept)
        .filter(|(_, kept)| **kept)
        .map(|(layer, _)| layer.diff_id.as_str())
        .collect();
    image.insert("rootfs".to_string(), json!({"type": "layers", "diff_ids": diff_ids}));
    if !matches!(image.get("created"), Some(Value::String(_))) {
        image.remove("created");
        if let Some(last) = history.iter().rev().find_map(|entry| entry.get("created")) {
            image.insert("created".to_string(), last.clone());
        }
    }
    if let Some(epoch) = epoch
        && let Some(created) = image.get("created").and_then(Value::as_str)
        && created.parse::<Timestamp>().is_ok_and(|t| t.as_second() > epoch)
    {
        image.insert("created".to_string(), Value::String(at(epoch)));
    }
    image.insert("history".to_string(), Value::Array(history.into_iter().map(Value::Object).collect()));
    image.sort_keys();
    let bytes = serde_json::to_vec(&image).map_err(|e| bad(e.to_string()))?;
    Ok(Patched { bytes, kept, platform: stated })
}

fn default_config(platform: Option<&pb::Platform>) -> Map<String, Value> {
    let host = kiln_proto::platform::host();
    let platform = platform.unwrap_or(&host);
    let mut image = Map::new();
    image.insert("architecture".to_string(), json!(platform.architecture));
    image.insert("os".to_string(), json!(platform.os));
    if !platform.variant.is_empty() {
        image.insert("variant".to_string(), json!(platform.variant));
    }
    image.insert("config".to_string(), json!({"Env": [DEFAULT_PATH], "WorkingDir": "/"}));
    image
}

fn is_empty_layer(entry: &Map<String, Value>) -> bool {
    entry.get("empty_layer").and_then(Value::as_bool).unwrap_or(false)
}

fn set_empty(entry: &mut Map<String, Value>) {
    entry.insert("empty_layer".to_string(), Value::Bool(true));
}

/// Makes history and layers fit each other, and gives every entry a time.
fn align(
    mut history: Vec<Map<String, Value>>,
    base_history: usize,
    layers: &[LayerFacts],
    epoch: Option<i64>,
) -> (Vec<Map<String, Value>>, Vec<bool>) {
    let mut seen = 0;
    for entry in &mut history {
        if entry.get("created").is_some_and(|created| !created.is_string()) {
            entry.remove("created");
        }
        if is_empty_layer(entry) {
            continue;
        }
        // More steps than layers: the last ones made none.
        if seen == layers.len() {
            set_empty(entry);
        } else {
            seen += 1;
        }
    }
    // A time that nobody stated is the epoch's, even one to come: now would not be reproducible.
    let time = |layer: &LayerFacts| epoch.map_or_else(|| rfc3339(layer.created), at);
    for layer in &layers[seen..] {
        let mut entry = Map::new();
        entry.insert("created".to_string(), Value::String(time(layer)));
        entry.insert("created_by".to_string(), Value::String(layer.description.clone()));
        entry.insert("comment".to_string(), Value::String(COMMENT.to_string()));
        history.push(entry);
    }
    let mut kept = vec![true; layers.len()];
    let mut index = 0;
    for (position, entry) in history.iter_mut().enumerate() {
        if is_empty_layer(entry) {
            continue;
        }
        let Some(layer) = layers.get(index) else { break };
        if !entry.contains_key("created") {
            let created = if position < base_history { rfc3339(layer.created) } else { time(layer) };
            entry.insert("created".to_string(), Value::String(created));
        }
        if layer.diff_id == EMPTY_DIFF_ID {
            set_empty(entry);
            kept[index] = false;
        }
        index += 1;
    }
    fill_times(&mut history);
    if let Some(epoch) = epoch {
        for entry in history.iter_mut().skip(base_history) {
            let later = entry
                .get("created")
                .and_then(Value::as_str)
                .and_then(|text| text.parse::<Timestamp>().ok())
                .is_none_or(|time| time.as_second() > epoch);
            if later {
                entry.insert("created".to_string(), Value::String(at(epoch)));
            }
        }
    }
    (history, kept)
}

/// Steps without a layer get the time of the layer before them; those at the start of the new steps that
/// of the first new layer, because the base image's times would be misleading.
fn fill_times(history: &mut [Map<String, Value>]) {
    let mut current: Option<Value> = None;
    let mut missing = false;
    for entry in history.iter() {
        match entry.get("created") {
            Some(created) => {
                current = Some(created.clone());
                if missing {
                    break;
                }
            }
            None => missing = true,
        }
    }
    let mut after_missing = false;
    for entry in history.iter_mut() {
        match entry.get("created") {
            Some(created) if after_missing => current = Some(created.clone()),
            Some(_) => {}
            None => {
                after_missing = true;
                if let Some(current) = &current {
                    entry.insert("created".to_string(), current.clone());
                }
            }
        }
    }
}

/// The config with records of a cache in it.
pub(super) fn with_cache(config: &[u8], records: &[u8]) -> Result<Vec<u8>, ExportError> {
    use base64::Engine;
    let bad = |error: serde_json::Error| ExportError::Internal(format!("image config: {error}"));
    let mut image: Map<String, Value> = serde_json::from_slice(config).map_err(bad)?;
    let records = base64::engine::general_purpose::STANDARD.encode(records);
    image.insert(CACHE.to_string(), Value::String(records));
    image.sort_keys();
    serde_json::to_vec(&image).map_err(bad)
}

pub(crate) fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|t| t.to_string()).unwrap_or_default()
}

pub(super) fn at(epoch: i64) -> String {
    Timestamp::from_second(epoch).map(|t| t.to_string()).unwrap_or_default()
}

/// Number of history entries of a base image's config.
pub(super) fn history_len(config: Option<&[u8]>) -> usize {
    config
        .and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok())
        .and_then(|value| value["history"].as_array().map(Vec::len))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn layer(n: u64, diff_id: &str) -> LayerFacts {
        LayerFacts {
            diff_id: diff_id.to_string(),
            created: SystemTime::UNIX_EPOCH + Duration::from_secs(n),
            description: format!("step {n}"),
        }
    }

    fn patched(history: Value, layers: &[LayerFacts], epoch: Option<i64>) -> (Value, Vec<bool>) {
        let config = json!({"os": "linux", "architecture": "amd64", "zzz": 1, "history": history});
        let out = patch(Some(config.to_string().as_bytes()), 0, None, layers, epoch).expect("patch");
        (serde_json::from_slice(&out.bytes).expect("json"), out.kept)
    }

    #[test]
    fn steps_that_changed_nothing_lose_their_layer_but_keep_their_history() {
        let history =
            json!([{"created_by": "a"}, {"created_by": "b"}, {"created_by": "c", "empty_layer": true}]);
        let (config, kept) = patched(history, &[layer(1, "sha256:1"), layer(2, EMPTY_DIFF_ID)], None);
        assert_eq!(kept, [true, false]);
        assert_eq!(config["rootfs"]["diff_ids"], json!(["sha256:1"]));
        assert_eq!(config["history"][1]["empty_layer"], true);
        assert_eq!(config["history"][2]["created"], "1970-01-01T00:00:02Z");
        assert_eq!(config["zzz"], 1, "unknown keys survive");
        assert_eq!(config["created"], "1970-01-01T00:00:02Z");
    }

    #[test]
    fn history_and_layers_are_made_to_fit() {
        let (config, _) =
            patched(json!([{"created_by": "a"}, {"created_by": "b"}]), &[layer(1, "sha256:1")], None);
        assert_eq!(config["history"][1]["empty_layer"], true);
        let (config, _) = patched(json!([]), &[layer(1, "sha256:1")], None);
        assert_eq!(config["history"][0]["created_by"], "step 1");
        assert_eq!(config["history"][0]["comment"], COMMENT);
    }

    #[test]
    fn first_steps_without_layer_get_the_first_new_layers_time() {
        let history = json!([
            {"created": "2001-01-01T00:00:00Z"},
            {"created_by": "env", "empty_layer": true},
            {"created_by": "run"},
            {"created_by": "cmd", "empty_layer": true}
        ]);
        let (config, _) = patched(history, &[layer(1, "sha256:1"), layer(7, "sha256:2")], None);
        assert_eq!(config["history"][1]["created"], "1970-01-01T00:00:07Z");
        assert_eq!(config["history"][3]["created"], "1970-01-01T00:00:07Z");
    }

    #[test]
    fn the_epoch_bounds_new_times() {
        let (config, _) = patched(json!([{"created_by": "a"}]), &[layer(100, "sha256:1")], Some(50));
        assert_eq!(config["history"][0]["created"], "1970-01-01T00:00:50Z");
        assert_eq!(config["created"], "1970-01-01T00:00:50Z");
        let stated = json!([{"created_by": "a", "created": "1970-01-01T00:01:00Z"}]);
        let (config, _) = patched(stated, &[layer(60, "sha256:1"), layer(100, "sha256:2")], Some(200));
        assert_eq!(config["history"][0]["created"], "1970-01-01T00:01:00Z");
        assert_eq!(config["history"][1]["created"], "1970-01-01T00:03:20Z", "nobody stated a time");
    }

    #[test]
    fn a_config_without_platform_is_refused() {
        let error = patch(Some(b"{}"), 0, None, &[], None).err().map(|e| e.to_string());
        assert_eq!(
            error.as_deref(),
            Some("invalid image config: os and architecture must be specified together")
        );
        assert!(patch(None, 0, None, &[], None).is_ok());
        let error = patch(Some(b"null"), 0, None, &[], None).err().map(|e| e.to_string());
        assert_eq!(error.as_deref(), Some("invalid null image config for export"));
    }
}
