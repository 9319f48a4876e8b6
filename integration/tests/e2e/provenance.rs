//! What Kiln claims of what it built, read where others look for it.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry};
use serde_json::{Value, json};
use tempfile::TempDir;

const DOCKERFILE: &str = "FROM busybox\nARG WHO\nRUN --mount=type=secret,id=word,required grep -q . /run/secrets/word && echo hello $WHO > /hello\n";
const ARGUMENT: &str = "argument-of-the-build";
const SECRET: &str = "the-secret-word";

/// A directory with a secret in it.
fn secrets() -> (TempDir, String) {
    let directory = TempDir::new().expect("temporary directory");
    let file = directory.path().join("word");
    std::fs::write(&file, SECRET).expect("write the secret");
    let flag = format!("id=word,src={}", file.display());
    (directory, flag)
}

fn document(layout: &Path, digest: &Value) -> Value {
    let path = tools::blob(layout, digest.as_str().expect("a digest"));
    serde_json::from_slice(&std::fs::read(path).expect("a blob")).expect("JSON")
}

/// The index's image, and the only statement of the manifest that the index has beside it.
fn statement(layout: &Path, index: &Value) -> (Value, Value) {
    let [image, attestation] = index["manifests"].as_array().expect("manifests").as_slice() else {
        panic!("not an image and its attestation: {index}");
    };
    assert_eq!(attestation["platform"], json!({"architecture": "unknown", "os": "unknown"}));
    let annotations = &attestation["annotations"];
    assert_eq!(annotations["vnd.docker.reference.type"], "attestation-manifest");
    assert_eq!(annotations["vnd.docker.reference.digest"], image["digest"]);
    let manifest = document(layout, &attestation["digest"]);
    assert_eq!(manifest["subject"]["digest"], image["digest"]);
    let layers = manifest["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 1);
    assert_eq!(layers[0]["annotations"]["in-toto.io/predicate-type"], "https://slsa.dev/provenance/v1");
    (image.clone(), document(layout, &layers[0]["digest"]))
}

#[test]
fn pushed_images_have_provenance() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    let (_secrets, secret) = secrets();
    let directory = TempDir::new().expect("temporary directory");
    let argument = format!("WHO={ARGUMENT}");
    for (mode, flag) in [("max", "--provenance=mode=max"), ("min", "--attest=type=provenance,mode=min")] {
        let name = format!("{}/test/provenance:{mode}", registry.address);
        let args =
            [flag, "--build-arg", &argument, "--secret", &secret, "--label", "l=v", "-t", &name, "--push"];
        kiln.build(context.path(), &args).ok();
        let layout = directory.path().join(mode);
        run(Command::new("skopeo")
            .args(["copy", "-q", "--all", "--src-tls-verify=false"])
            .args([format!("docker://{name}"), format!("oci:{}:{mode}", layout.display())]));
        let (image, statement) = statement(&layout, &tools::manifest(&name));
        let subject = &statement["subject"][0];
        let digest = image["digest"].as_str().expect("a digest");
        assert_eq!(subject["digest"]["sha256"], digest.trim_start_matches("sha256:"));
        let escaped = registry.address.replace(':', "%3A");
        let repository = format!("pkg:docker/{escaped}/test/provenance@{mode}?");
        assert!(subject["name"].as_str().is_some_and(|name| name.starts_with(&repository)), "{subject}");

        let definition = &statement["predicate"]["buildDefinition"];
        let request = &definition["externalParameters"]["request"];
        assert_eq!(request["frontend"], "dockerfile.v0");
        assert_eq!(request["locals"], json!([{"name": "context"}, {"name": "dockerfile"}]));
        let busybox = tools::digest(&format!("{}/library/busybox:latest", registry.address));
        let sources = definition["resolvedDependencies"].as_array().expect("sources");
        assert_eq!(sources.len(), 1, "{sources:?}");
        assert_eq!(sources[0]["digest"]["sha256"], busybox.trim_start_matches("sha256:"));
        assert!(sources[0]["uri"].as_str().is_some_and(|uri| uri.starts_with("pkg:docker/busybox@latest?")));
        let metadata = &statement["predicate"]["runDetails"]["metadata"];
        assert_eq!(metadata["buildkit_completeness"]["resolvedDependencies"], false);

        let whole = statement.to_string();
        assert!(!whole.contains(SECRET), "{whole}");
        let layers = &metadata["buildkit_metadata"]["layers"];
        let manifest = document(&layout, &image["digest"]);
        if mode == "max" {
            assert_eq!(request["args"]["build-arg:WHO"], ARGUMENT);
            assert_eq!(request["secrets"], json!([{"id": "word"}]));
            let last = layers["step1:0"][0].as_array().expect("layers of the last step");
            let digests =
                |list: &[Value]| list.iter().map(|entry| entry["digest"].clone()).collect::<Vec<_>>();
            assert_eq!(digests(last), digests(manifest["layers"].as_array().expect("layers")));
            let text = &metadata["buildkit_metadata"]["source"]["infos"][0];
            assert_eq!(text["filename"], "Dockerfile");
        } else {
            assert!(!whole.contains(ARGUMENT) && !whole.contains("label:"), "{whole}");
            assert_eq!(request.get("secrets"), None);
            assert_eq!(metadata["buildkit_completeness"]["request"], false);
            assert_eq!(layers, &Value::Null);
        }

        // Who builds on it gets the image.
        let above =
            Context::new(&format!("FROM {name}\nRUN grep -q {ARGUMENT} /hello && echo above > /above\n"));
        let output = format!("type=local,dest={}", directory.path().join(format!("above-{mode}")).display());
        kiln.build(above.path(), &["-o", &output]).ok();
        let found = std::fs::read_to_string(directory.path().join(format!("above-{mode}/above")));
        assert_eq!(found.expect("what was built on it"), "above\n");
        // And who asks for its configuration as well.
        assert_eq!(tools::config(&name)["config"]["Labels"]["l"], "v");
    }
}

#[test]
fn layouts_and_directories_have_provenance() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM scratch\nCOPY file /\n");
    context.file("file", "content");
    let directory = TempDir::new().expect("temporary directory");
    let layout = directory.path().join("layout");
    let output = format!("type=oci,dest={},tar=false", layout.display());
    kiln.build(context.path(), &["--provenance", "-t", "example.org/a:1", "-o", &output]).ok();
    let top = serde_json::from_slice::<Value>(&std::fs::read(layout.join("index.json")).expect("an index"));
    let index = document(&layout, &top.expect("JSON")["manifests"][0]["digest"]);
    let (image, statement_of) = statement(&layout, &index);
    assert_eq!(document(&layout, &image["digest"])["layers"].as_array().map(Vec::len), Some(1));
    assert_eq!(statement_of["_type"], "https://in-toto.io/Statement/v1");

    let tree = directory.path().join("tree");
    let output = format!("type=local,dest={}", tree.display());
    kiln.build(context.path(), &["--provenance=mode=min,version=v0.2", "-o", &output]).ok();
    let file = tree.join("provenance.json");
    let mode = std::fs::metadata(&file).expect("provenance.json").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let claimed: Value = serde_json::from_slice(&std::fs::read(&file).expect("read")).expect("JSON");
    assert_eq!(claimed["predicateType"], "https://slsa.dev/provenance/v0.2");
    let sum = run(Command::new("sha256sum").arg(tree.join("file")));
    let sum = String::from_utf8_lossy(&sum).split_whitespace().next().map(str::to_owned).expect("a digest");
    assert_eq!(claimed["subject"], json!([{"name": "file", "digest": {"sha256": sum}}]));

    let tar = directory.path().join("root.tar");
    let output = format!("type=tar,dest={}", tar.display());
    kiln.build(context.path(), &["--provenance", "-o", &output]).ok();
    let listing = tools::tar_listing(&tar);
    assert!(listing.contains(&"-rw------- 0/0 provenance.json".to_owned()), "{listing:?}");

    // Without being asked for, nothing is claimed.
    let plain = directory.path().join("plain");
    kiln.build(
        context.path(),
        &["--provenance=false", "-o", &format!("type=local,dest={}", plain.display())],
    )
    .ok();
    assert!(!plain.join("provenance.json").exists());
}

#[test]
fn platforms_have_provenance_each() {
    let registry = Registry::start();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM scratch\nARG TARGETARCH\nCOPY file /$TARGETARCH\n");
    context.file("file", "content");
    let directory = TempDir::new().expect("temporary directory");
    let platforms = "--platform=linux/amd64,linux/arm64";
    let name = format!("{}/test/platforms:1", registry.address);
    kiln.build(context.path(), &["--provenance", platforms, "-t", &name, "--push"]).ok();
    let index = tools::manifest(&name);
    let entries = index["manifests"].as_array().expect("manifests");
    let of = |at: usize| entries[at]["annotations"]["vnd.docker.reference.digest"].clone();
    assert_eq!(entries.len(), 4, "{entries:?}");
    assert_eq!([of(2), of(3)], [entries[0]["digest"].clone(), entries[1]["digest"].clone()]);

    let tree = directory.path().join("tree");
    kiln.build(
        context.path(),
        &["--provenance", platforms, "-o", &format!("type=local,dest={}", tree.display())],
    )
    .ok();
    for (platform, file) in [("linux_amd64", "amd64"), ("linux_arm64", "arm64")] {
        let claimed = std::fs::read(tree.join(platform).join("provenance.json")).expect("provenance.json");
        let claimed: Value = serde_json::from_slice(&claimed).expect("JSON");
        assert_eq!(claimed["subject"][0]["name"], file);
    }
}

#[test]
fn what_is_not_made_is_refused() {
    let registry = Registry::start();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM scratch\nCOPY Dockerfile /\n");
    kiln.build(context.path(), &["--sbom"]).fails(&["unsupported: attestation sbom"]);
    kiln.build(context.path(), &["--attest", "type=provenance,mode=huge"]).fails(&["mode"]);
    kiln.build(context.path(), &["--sbom=false", "--provenance=false"]).ok();
}
