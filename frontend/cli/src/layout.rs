//! The index of an image layout that the daemon exported into: `tar=false` outputs.

use std::fs::File;
use std::io;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::reference::Reference;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Map, Value, json};

use crate::error::CliError;
use crate::outputs::{self, OutputSpec};
use crate::run::Response;

const NAME: &str = "io.containerd.image.name";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Enters the image that a build answered into the layouts that it went into.
pub(crate) fn record(outputs: &[OutputSpec], response: &Response) -> Result<(), CliError> {
    let encoded = response.get("containerimage.descriptor");
    let descriptor = encoded.and_then(|text| STANDARD.decode(text).ok());
    let descriptor = descriptor.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    let Some(descriptor) = descriptor else { return Ok(()) };
    let names: Vec<&str> =
        response.get("image.name").map(|names| names.split(',').collect()).unwrap_or_default();
    outputs::layouts(outputs).try_for_each(|path| {
        update(path, &descriptor, &names).map_err(|error| CliError::file("write index of", path, error))
    })
}

/// The digest of what has this tag in a layout.
pub(crate) fn tagged(layout: &Path, tag: &str) -> Option<String> {
    let index: Value = serde_json::from_slice(&std::fs::read(layout.join("index.json")).ok()?).ok()?;
    let entries = index["manifests"].as_array()?;
    let found = entries.iter().rev().find(|entry| entry["annotations"][REF_NAME] == tag)?;
    Some(found["digest"].as_str()?.to_owned())
}

/// Gives a tag of a layout to what has this descriptor.
pub(crate) fn tag(layout: &Path, descriptor: &Value, tag: &str) -> io::Result<()> {
    update_as(layout, descriptor, vec![json!({REF_NAME: tag})])
}

fn update(layout: &Path, descriptor: &Value, names: &[&str]) -> io::Result<()> {
    update_as(layout, descriptor, annotations(names))
}

/// What says that an image has these names.
fn annotations(names: &[&str]) -> Vec<Value> {
    let unnamed = [json!({REF_NAME: "latest"})];
    let named = names.iter().map(|name| {
        let reference = Reference::parse(name).ok();
        let tag = reference.as_ref().and_then(|reference| reference.tag().or(reference.digest()));
        json!({NAME: name, REF_NAME: tag.unwrap_or(name)})
    });
    if names.is_empty() { unnamed.into() } else { named.collect() }
}

fn update_as(layout: &Path, descriptor: &Value, named: Vec<Value>) -> io::Result<()> {
    let lock_path = layout.join("index.json.lock");
    let lock = File::create(&lock_path)?;
    flock(&lock, FlockOperation::LockExclusive)?;
    let path = layout.join("index.json");
    let mut index = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => json!({"schemaVersion": 2}),
        Err(error) => return Err(error),
    };
    enter(&mut index, descriptor, named)?;
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let temporary = layout.join("index.json.new");
    std::fs::write(&temporary, serde_json::to_vec(&index)?)?;
    std::fs::rename(&temporary, &path)?;
    std::fs::remove_file(&lock_path)
}

/// Puts the image under each of its names, where it takes the place of what had that name.
fn enter(index: &mut Value, descriptor: &Value, named: Vec<Value>) -> io::Result<()> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "index.json is no image index");
    let index = index.as_object_mut().ok_or_else(wrong)?;
    index.entry("mediaType").or_insert_with(|| json!("application/vnd.oci.image.index.v1+json"));
    let manifests = index.entry("manifests").or_insert_with(|| json!([])).as_array_mut().ok_or_else(wrong)?;
    for name in named {
        manifests.retain(|entry| {
            let same = |key| entry["annotations"].get(key) == name.get(key);
            !(same(NAME) && same(REF_NAME))
        });
        let mut entry = descriptor.clone();
        let annotations = entry.as_object_mut().ok_or_else(wrong)?.entry("annotations");
        let annotations = annotations.or_insert_with(|| Value::Object(Map::new()));
        if let (Some(annotations), Value::Object(name)) = (annotations.as_object_mut(), name) {
            annotations.extend(name);
        }
        manifests.push(entry);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_takes_the_place_of_the_former_one() {
        let dir = tempfile::tempdir().unwrap();
        let image = |digest: &str| json!({"digest": digest, "annotations": {"created": "now"}});
        let entries = || {
            let index: Value =
                serde_json::from_slice(&std::fs::read(dir.path().join("index.json")).unwrap()).unwrap();
            let entries = index["manifests"].as_array().unwrap().clone();
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let row = |entry: &Value| {
                (
                    text(&entry["digest"]),
                    text(&entry["annotations"][NAME]),
                    text(&entry["annotations"][REF_NAME]),
                )
            };
            entries.iter().map(row).collect::<Vec<_>>()
        };
        let row = |digest: &str, name: &str, tag: &str| (digest.to_owned(), name.to_owned(), tag.to_owned());
        update(dir.path(), &image("1"), &[]).unwrap();
        update(dir.path(), &image("2"), &["docker.io/library/a:1", "example.org/b:2"]).unwrap();
        update(dir.path(), &image("3"), &["example.org/b:2"]).unwrap();
        update(dir.path(), &image("4"), &[]).unwrap();
        let expected = [
            row("2", "docker.io/library/a:1", "1"),
            row("3", "example.org/b:2", "2"),
            row("4", "", "latest"),
        ];
        assert_eq!(entries(), expected);
        assert!(!dir.path().join("index.json.lock").exists());
        std::fs::write(dir.path().join("index.json"), "[]").unwrap();
        assert!(update(dir.path(), &image("5"), &[]).is_err());
    }
}
