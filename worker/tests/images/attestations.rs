//! What exporters make of claims: manifests beside images, statements beside files.

use std::collections::BTreeMap;

use kiln_worker::export::{Attestation, ExportInput, Steps, Subject};
use kiln_worker::registry::RegistryConfig;
use serde_json::{Map, Value, json};

use super::exports::{Collected, built, context, exporter, input, step};
use super::support::{digest, root, sh, world};

const TYPE: &str = "https://example.org/claim/v1";

fn claim(subjects: Vec<Subject>) -> Attestation {
    Attestation {
        predicate_type: TYPE.to_string(),
        predicate: json!({"made": {}}),
        subjects,
        file: "claim.json".to_string(),
        inline_only: false,
        steps: None,
    }
}

fn attested(mut input: ExportInput, attestation: &Attestation) -> ExportInput {
    for target in &mut input.targets {
        target.attestations = vec![attestation.clone()];
    }
    input
}

/// The blobs that an export stored, by digest.
fn stored(output: &Collected) -> BTreeMap<String, Value> {
    let blobs = output.blobs.lock().expect("blobs");
    let parsed = |bytes: &[u8]| serde_json::from_slice(bytes).unwrap_or(Value::Null);
    blobs.iter().map(|(_, digest, bytes)| (digest.clone(), parsed(bytes))).collect()
}

fn at<'a>(blobs: &'a BTreeMap<String, Value>, descriptor: &Value) -> &'a Value {
    &blobs[descriptor["digest"].as_str().expect("a digest")]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_beside_the_image_holds_the_statements() {
    let world = world(RegistryConfig::default());
    let base = step(&world, &None, "base", "echo v1 >version");
    let result = step(&world, &base, "RUN", "echo v2 >more");
    let mut attestation = claim(Vec::new());
    let results = BTreeMap::from([("step0:0".to_string(), base), ("step1:0".to_string(), result.clone())]);
    attestation.steps = Some(Steps { place: "/made", results });
    for artifact in ["true", "false"] {
        let output = Collected::default();
        let attributes = [("tar", "false"), ("name", "localhost:5000/a:1,b"), ("oci-artifact", artifact)];
        let input = attested(input(result.clone()), &attestation);
        let response =
            exporter("oci", &attributes).export(&context(&world), &input, &output).await.expect("export");
        let blobs = stored(&output);
        let index = &blobs[&response["containerimage.digest"]];
        let (image, beside) = (&index["manifests"][0], &index["manifests"][1]);
        assert_eq!(index["manifests"].as_array().map(Vec::len), Some(2));
        assert_eq!(beside["platform"], json!({"architecture": "unknown", "os": "unknown"}));
        assert_eq!(
            beside["annotations"],
            json!({
                "vnd.docker.reference.digest": image["digest"],
                "vnd.docker.reference.type": "attestation-manifest",
            })
        );
        let manifest = at(&blobs, beside);
        let layer = &manifest["layers"][0];
        assert_eq!(layer["mediaType"], "application/vnd.in-toto+json");
        assert_eq!(layer["annotations"], json!({"in-toto.io/predicate-type": TYPE}));
        if artifact == "true" {
            assert_eq!(manifest["artifactType"], "application/vnd.docker.attestation.manifest.v1+json");
            assert_eq!(
                manifest["subject"],
                json!({"mediaType": image["mediaType"], "digest": image["digest"], "size": image["size"]})
            );
            assert_eq!(manifest["config"]["data"], "e30=");
        } else {
            assert_eq!(manifest.get("subject"), None);
            let config = at(&blobs, &manifest["config"]);
            assert_eq!(config["rootfs"]["diff_ids"], json!([layer["digest"]]));
            assert_eq!(config["os"], "unknown");
        }
        let statement = at(&blobs, layer);
        assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
        let names: Vec<&str> = statement["subject"]
            .as_array()
            .expect("subjects")
            .iter()
            .map(|subject| subject["name"].as_str().expect("a name"))
            .collect();
        assert_eq!(
            names,
            [
                "pkg:docker/localhost%3A5000/a@1?platform=linux%2Famd64",
                "pkg:docker/b@latest?platform=linux%2Famd64"
            ]
        );
        let hex = image["digest"].as_str().expect("a digest").trim_start_matches("sha256:");
        assert_eq!(statement["subject"][1]["digest"], json!({"sha256": hex}));
        let layers = &at(&blobs, image)["layers"];
        let made = &statement["predicate"]["made"]["layers"];
        assert_eq!(made, &json!({"step0:0": [[layers[0]]], "step1:0": [[layers[0], layers[1]]]}));
    }
    let error = exporter("oci", &[("oci-mediatypes", "false")])
        .export(&context(&world), &attested(input(result), &attestation), &Collected::default())
        .await;
    let text = error.expect_err("not among docker's media types").to_string();
    assert_eq!(text, "cannot export attestations with \"oci-mediatypes=false\"");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_inline_only_comes_only_where_it_is_asked_for() {
    if !root() {
        return;
    }
    let world = world(RegistryConfig::default());
    let mut attestation = claim(Vec::new());
    attestation.inline_only = true;
    let input = attested(input(built(&world)), &attestation);
    let export = async |kind: &str, attributes: &[(&str, &str)]| {
        let output = Collected::default();
        let response = exporter(kind, attributes).export(&context(&world), &input, &output).await;
        let indexed = !response.expect("export").contains_key("containerimage.config.digest");
        let tree =
            output.trees.lock().expect("trees").iter().any(|tree| tree.1.concat().contains("claim.json"));
        (indexed, tree)
    };
    assert_eq!(export("oci", &[]).await, (false, false));
    assert_eq!(export("oci", &[("attestation-inline", "true")]).await, (true, false));
    assert_eq!(export("image", &[]).await, (true, false));
    assert_eq!(export("image", &[("attestation-inline", "false")]).await, (false, false));
    assert!(!export("local", &[]).await.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_lie_beside_the_files_that_they_are_about() {
    if !root() {
        return;
    }
    let world = world(RegistryConfig::default());
    let result = step(&world, &None, "base", "mkdir d; echo one >d/one; ln -s one d/link; echo two >two");
    let elsewhere: Map<String, Value> = [("sha256".to_string(), json!("00"))].into_iter().collect();
    let subjects = vec![Subject::Other { name: "elsewhere".to_string(), digest: elsewhere }, Subject::Itself];
    let output = Collected::default();
    let claimed = attested(input(result.clone()), &claim(subjects));
    exporter("tar", &[("attestation-prefix", "of.")])
        .export(&context(&world), &claimed, &output)
        .await
        .expect("export");
    let dir = tempfile::tempdir().expect("temp dir");
    std::fs::write(dir.path().join("root.tar"), &*output.tar.lock().expect("tar")).expect("write");
    sh(dir.path(), "mkdir root; tar -C root -xpf root.tar");
    let statement = std::fs::read(dir.path().join("root/of.claim.json")).expect("the statement");
    let statement: Value = serde_json::from_slice(&statement).expect("JSON");
    let hex = |text: &str| digest(text.as_bytes()).trim_start_matches("sha256:").to_string();
    assert_eq!(
        statement["subject"],
        json!([
            {"name": "elsewhere", "digest": {"sha256": "00"}},
            {"name": "d/one", "digest": {"sha256": hex("one\n")}},
            {"name": "two", "digest": {"sha256": hex("two\n")}},
        ])
    );
    assert_eq!(sh(dir.path(), "stat -c %a:%U root/of.claim.json").trim(), "600:root");

    let mut outside = claim(Vec::new());
    outside.file = "../outside".to_string();
    let led = attested(input(result), &outside);
    let refused = exporter("local", &[]).export(&context(&world), &led, &Collected::default()).await;
    refused.expect_err("a name that leads elsewhere");
}

#[tokio::test(flavor = "multi_thread")]
async fn platforms_share_a_directory_if_they_share_no_file() {
    if !root() {
        return;
    }
    let world = world(RegistryConfig::default());
    let amd64 = step(&world, &None, "amd64", "mkdir d; echo amd64 >d/amd64");
    let arm64 = step(&world, &None, "arm64", "mkdir d; echo arm64 >d/arm64");
    let platforms = json!({"Platforms": [
        {"ID": "linux/amd64", "Platform": {"os": "linux", "architecture": "amd64"}},
        {"ID": "linux/arm64", "Platform": {"os": "linux", "architecture": "arm64"}}]});
    let metadata = BTreeMap::from([("refs.platforms".to_string(), platforms.to_string().into_bytes())]);
    let several = |arm64: &kiln_cache::Ref| {
        let refs = BTreeMap::from([
            ("linux/amd64".to_string(), amd64.clone()),
            ("linux/arm64".to_string(), arm64.clone()),
        ]);
        attested(ExportInput::map(refs, metadata.clone()).expect("input"), &claim(Vec::new()))
    };
    let output = Collected::default();
    let tar = exporter("tar", &[("platform-split", "false")]);
    tar.export(&context(&world), &several(&arm64), &output).await.expect("export");
    let dir = tempfile::tempdir().expect("temp dir");
    std::fs::write(dir.path().join("root.tar"), &*output.tar.lock().expect("tar")).expect("write");
    sh(dir.path(), "mkdir root; tar -C root -xpf root.tar");
    let names = sh(dir.path(), "cd root && find . -type f | sort");
    assert_eq!(names, "./claim.linux_amd64.json\n./claim.linux_arm64.json\n./d/amd64\n./d/arm64\n");

    let error = tar.export(&context(&world), &several(&amd64), &Collected::default()).await;
    let text = error.expect_err("the same file").to_string();
    assert_eq!(
        text,
        "cannot overwrite d/amd64 from linux/amd64 with that of linux/arm64 when split option is disabled"
    );
}
