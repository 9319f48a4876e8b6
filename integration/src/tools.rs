//! Independent judges of what Kiln made: skopeo, umoci, tar, runc.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Runs a command that must succeed and gives its standard output.
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// The raw manifest (or index) that a registry serves for an image, as skopeo reads it.
pub fn manifest(image: &str) -> Value {
    let out = run(Command::new("skopeo").args([
        "inspect",
        "--raw",
        "--tls-verify=false",
        &format!("docker://{image}"),
    ]));
    serde_json::from_slice(&out).expect("a manifest is JSON")
}

/// The image's configuration, as skopeo reads it.
pub fn config(image: &str) -> Value {
    let out = run(Command::new("skopeo").args([
        "inspect",
        "--config",
        "--tls-verify=false",
        &format!("docker://{image}"),
    ]));
    serde_json::from_slice(&out).expect("a configuration is JSON")
}

/// Digest of the image that a registry serves.
pub fn digest(image: &str) -> String {
    let out = run(Command::new("skopeo").args([
        "inspect",
        "--tls-verify=false",
        "--format",
        "{{.Digest}}",
        &format!("docker://{image}"),
    ]));
    String::from_utf8(out).expect("text").trim().to_owned()
}

/// Copies an image from a registry into an OCI layout `layout:tag`.
pub fn fetch(image: &str, layout: &Path, tag: &str) {
    run(Command::new("skopeo")
        .args(["copy", "-q", "--src-tls-verify=false"])
        .args([format!("docker://{image}"), format!("oci:{}:{tag}", layout.display())]));
}

/// Unpacks `layout:tag` as a runtime bundle with umoci.
pub fn unpack(layout: &Path, tag: &str, bundle: &Path) {
    run(Command::new("umoci")
        .args(["unpack", "--image", &format!("{}:{tag}", layout.display())])
        .arg(bundle));
}

/// What `tar -tv` lists of a (compressed) tar file, one line an entry: mode, owner, size, name.
/// Dates are left out.
pub fn tar_listing(file: &Path) -> Vec<String> {
    let out = run(Command::new("tar").args(["--numeric-owner", "-tvf"]).arg(file));
    String::from_utf8_lossy(&out)
        .lines()
        .map(|line| {
            let mut words = line.split_whitespace();
            let mode = words.next().unwrap_or_default();
            let owner = words.next().unwrap_or_default();
            // "size date time name" or, for devices, "major,minor date time name"
            let name: Vec<&str> = words.skip(3).collect();
            format!("{mode} {owner} {}", name.join(" "))
        })
        .collect()
}

/// Blob file of a digest in an OCI layout.
pub fn blob(layout: &Path, digest: &str) -> std::path::PathBuf {
    layout.join("blobs").join(digest.replacen(':', "/", 1))
}

/// Bytes that a directory occupies, as `du` counts them.
pub fn disk_usage(dir: &Path) -> i64 {
    let out = run(Command::new("du").args(["-s", "-B1"]).arg(dir));
    let text = String::from_utf8_lossy(&out).into_owned();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).expect("a number from du")
}

/// The digest of what has a tag in an OCI layout.
pub fn layout_digest(layout: &Path, tag: &str) -> String {
    let index = std::fs::read(layout.join("index.json")).expect("read the index");
    let index: Value = serde_json::from_slice(&index).expect("the index is JSON");
    let named = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == tag;
    let entry = index["manifests"].as_array().expect("manifests").iter().find(named).expect("the tag");
    entry["digest"].as_str().expect("a digest").to_owned()
}
