//! Exporters, judged by skopeo, umoci and our own pull.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use kiln_cache::{RecordType, Ref, SnapshotMeta, SnapshotRef};
use kiln_proto::reference::Reference;
use kiln_worker::export::{
    ExportContext, ExportInput, Exporter, LayoutBlob, NoOutput, Output, OutputError, TarOutput, Tree,
};
use kiln_worker::image::{Access, ResolveMode};
use kiln_worker::registry::RegistryConfig;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWrite};

use super::support::{RealRegistry, World, digest, listing, root, run, sh, world};

#[derive(Default)]
pub(crate) struct Collected {
    pub(crate) tar: Arc<Mutex<Vec<u8>>>,
    pub(crate) trees: Mutex<Vec<(String, Vec<String>)>>,
    pub(crate) blobs: Mutex<Vec<(&'static str, String, Vec<u8>)>>,
    refuse: Option<OutputError>,
}

struct Sink {
    bytes: Arc<Mutex<Vec<u8>>>,
    refuse: Option<OutputError>,
}

impl AsyncWrite for Sink {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &[u8]) -> Poll<std::io::Result<usize>> {
        if self.refuse.is_some() {
            return Poll::Ready(Err(std::io::ErrorKind::BrokenPipe.into()));
        }
        self.bytes.lock().expect("bytes").extend_from_slice(buffer);
        Poll::Ready(Ok(buffer.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl TarOutput for Sink {
    fn finish(self: Box<Self>) -> BoxFuture<'static, Result<(), OutputError>> {
        Box::pin(async move { self.refuse.map_or(Ok(()), Err) })
    }
}

impl Output for Collected {
    fn tar(&self, _: &BTreeMap<String, String>) -> Result<Box<dyn TarOutput>, OutputError> {
        Ok(Box::new(Sink { bytes: self.tar.clone(), refuse: self.refuse.clone() }))
    }

    fn directory<'a>(
        &'a self,
        trees: Vec<Tree>,
        _mirror: bool,
        progress: Arc<dyn Fn(u64) + Send + Sync>,
    ) -> BoxFuture<'a, Result<(), OutputError>> {
        Box::pin(async move {
            for tree in trees {
                let path = format!("/proc/self/fd/{}/.", std::os::fd::AsRawFd::as_raw_fd(&tree.root));
                progress(1);
                self.trees.lock().expect("trees").push((tree.prefix, listing(Path::new(&path))));
            }
            Ok(())
        })
    }

    fn blob(&self, mut blob: LayoutBlob) -> BoxFuture<'_, Result<(), OutputError>> {
        Box::pin(async move {
            let mut bytes = Vec::new();
            blob.content.read_to_end(&mut bytes).await.expect("content");
            assert_eq!(blob.size, bytes.len() as u64);
            self.blobs.lock().expect("blobs").push((blob.kind, blob.digest, bytes));
            Ok(())
        })
    }
}

pub(crate) fn context(world: &World) -> ExportContext {
    ExportContext { images: world.images.clone(), store: world.store.clone(), access: Access::anonymous() }
}

pub(crate) fn step(world: &World, parent: &Ref, name: &str, script: &str) -> Ref {
    let snapshots = world.store.snapshots();
    let staged = snapshots.stage(parent.as_ref()).expect("stage");
    sh(staged.fs(), script);
    Some(snapshots.commit(staged, SnapshotMeta::new(name)).expect("commit"))
}

/// A base with a file, a step that changes nothing, one that deletes and adds.
pub(crate) fn built(world: &World) -> Ref {
    let base = step(
        world,
        &None,
        "base",
        "mkdir -p etc bin; echo v1 >etc/version; echo old >etc/old; chown 3:4 etc/old",
    );
    let same = step(world, &base, "RUN true", "true");
    step(
        world,
        &same,
        "RUN change",
        "mkdir etc; echo v2 >etc/version; mknod etc/old c 0 0; ln etc/version bin-version; chmod 4711 etc/version",
    )
}

fn config() -> Vec<u8> {
    serde_json::to_vec(&json!({
        "os": "linux", "architecture": "amd64",
        "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
        "history": [{"created_by": "base"}, {"created_by": "RUN true"}, {"created_by": "RUN change"},
            {"created_by": "CMD", "empty_layer": true}],
    }))
    .expect("json")
}

pub(crate) fn input(result: Ref) -> ExportInput {
    ExportInput::single(result, BTreeMap::from([("containerimage.config".to_string(), config())]))
        .expect("input")
}

pub(crate) fn exporter(kind: &str, attributes: &[(&str, &str)]) -> Exporter {
    let attributes: BTreeMap<String, String> =
        attributes.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Exporter::new(kind, &attributes).expect("attributes")
}

fn refused(kind: &str, attributes: &[(&str, &str)]) -> String {
    let attributes: BTreeMap<String, String> =
        attributes.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Exporter::new(kind, &attributes).expect_err("must be refused").to_string()
}

fn expected_tree(dir: &Path) {
    assert_eq!(std::fs::read(dir.join("etc/version")).expect("version"), b"v2\n");
    assert!(!dir.join("etc/old").exists(), "deleted");
    assert!(dir.join("bin").is_dir());
    use std::os::unix::fs::MetadataExt;
    let version = std::fs::metadata(dir.join("etc/version")).expect("stat");
    assert_eq!(version.mode() & 0o7777, 0o4711);
    assert_eq!(version.ino(), std::fs::metadata(dir.join("bin-version")).expect("stat").ino());
}

#[tokio::test(flavor = "multi_thread")]
async fn pushed_images_are_read_by_skopeo_and_pulled_again() {
    if !root() {
        return;
    }
    let registry = RealRegistry::start();
    let world = world(RegistryConfig::default());
    let name = format!("{}/team/app:v1", registry.host);
    let result = built(&world);
    let push = exporter("image", &[("name", &name), ("push", "true")]);
    let response = push.export(&context(&world), &input(result.clone()), &NoOutput).await.expect("push");
    assert_eq!(response["image.name"], name);
    let inspect =
        run(Command::new("skopeo").args(["inspect", "--tls-verify=false", &format!("docker://{name}")]));
    let inspected: Value = serde_json::from_str(&inspect).expect("json");
    assert_eq!(inspected["Digest"], response["containerimage.digest"].as_str());
    assert_eq!(
        inspected["Layers"].as_array().map(Vec::len),
        Some(2),
        "the step without changes has no layer"
    );
    assert_eq!(inspected["Env"][0], "A=b");
    let args = ["inspect", "--config", "--raw", "--tls-verify=false", &format!("docker://{name}")];
    let raw = run(Command::new("skopeo").args(args));
    assert_eq!(digest(raw.as_bytes()), response["containerimage.config.digest"]);
    let raw: Value = serde_json::from_str(&raw).expect("json");
    assert_eq!(raw["history"].as_array().map(Vec::len), Some(4));
    assert_eq!(raw["history"][1]["empty_layer"], true);
    assert!(raw["history"][3]["created"].is_string());

    let descriptor = {
        use base64::Engine;
        let bytes = base64::engine::general_purpose::STANDARD.decode(&response["containerimage.descriptor"]);
        serde_json::from_slice::<Value>(&bytes.expect("base64")).expect("json")
    };
    assert_eq!(descriptor["digest"], response["containerimage.digest"].as_str());
    assert_eq!(descriptor["platform"]["architecture"], "amd64");

    let again = push.export(&context(&world), &input(result.clone()), &NoOutput).await.expect("push again");
    assert_eq!(again, response, "the same result gives the same image");

    let work = world.dir.path();
    run(Command::new("skopeo").current_dir(work).args([
        "copy",
        "--src-tls-verify=false",
        &format!("docker://{name}"),
        "oci:layout:v1",
    ]));
    run(Command::new("umoci").current_dir(work).args(["unpack", "--image", "layout:v1", "bundle"]));
    expected_tree(&work.join("bundle/rootfs"));

    let other = super::support::world(RegistryConfig::default());
    let reference = Reference::parse(&name).expect("reference");
    let platform = kiln_proto::platform::host();
    let access = Access::anonymous();
    let image =
        other.images.resolve(&reference, &platform, ResolveMode::Default, &access).await.expect("resolve");
    assert_eq!(image.digest, response["containerimage.digest"]);
    let pulled = other.images.pull(&image, RecordType::Regular).await.expect("pull");
    // Only its config changes: the layers go over by mount, without ever being here.
    let copy = format!("{}/team/copy:v1", registry.host);
    let mount = exporter("image", &[("name", &copy), ("push", "")]);
    mount.export(&context(&other), &input(pulled.clone()), &NoOutput).await.expect("mount");
    assert!(!pulled.as_ref().is_some_and(SnapshotRef::is_materialized));
    for layer in &image.layers {
        assert!(other.store.blobs().get(&layer.digest).expect("blobs").is_none(), "nothing was downloaded");
    }
    run(Command::new("skopeo").args(["inspect", "--tls-verify=false", &format!("docker://{copy}")]));
    // To another registry they have to travel.
    let second = RealRegistry::start();
    let far = format!("{}/x:y", second.host);
    let export = exporter("image", &[("name", &far), ("push", "true")]);
    export.export(&context(&other), &input(pulled.clone()), &NoOutput).await.expect("push");
    run(Command::new("skopeo")
        .args(["copy", "--src-tls-verify=false", &format!("docker://{far}"), "oci:far:y"])
        .current_dir(work));
    other.images.materialize(&pulled, &access).await.expect("materialize");
    let dirs: Vec<_> = pulled.expect("layers").layers().iter().map(SnapshotRef::dir).collect();
    let original: Vec<_> = result.expect("layers").layers().iter().map(SnapshotRef::dir).collect();
    assert_eq!(listing(&dirs[0]), listing(&original[0]));
    assert_eq!(listing(&dirs[1]), listing(&original[2]));
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_hold_a_valid_layout() {
    if !root() {
        return;
    }
    let world = world(RegistryConfig::default());
    let result = built(&world);
    for (kind, attributes) in [
        ("oci", vec![("name", "local/test:1")]),
        ("oci", vec![("compression", "zstd"), ("force-compression", "true"), ("name", "local/test:1")]),
        ("docker", vec![("name", "local/test:1,local/other")]),
        (
            "docker",
            vec![
                ("oci-mediatypes", "false"),
                ("compression", "uncompressed"),
                ("force-compression", "true"),
                ("name", "local/test:1"),
            ],
        ),
    ] {
        let output = Collected::default();
        let response = exporter(kind, &attributes)
            .export(&context(&world), &input(result.clone()), &output)
            .await
            .expect("export");
        let dir = tempfile::tempdir().expect("temp dir");
        let file = dir.path().join("image.tar");
        std::fs::write(&file, &*output.tar.lock().expect("tar")).expect("write");
        sh(dir.path(), "mkdir layout; tar -C layout -xf image.tar");
        let index: Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("layout/index.json")).expect("index"))
                .expect("json");
        let first = &index["manifests"][0];
        assert_eq!(first["annotations"]["io.containerd.image.name"], "docker.io/local/test:1");
        assert_eq!(first["annotations"]["org.opencontainers.image.ref.name"], "1");
        assert_eq!(first["digest"], response["containerimage.digest"].as_str());
        assert!(response["image.name"].starts_with("docker.io/local/test:1"));
        if attributes.contains(&("compression", "zstd")) {
            // This umoci knows no zstd; skopeo checks what it copies.
            run(Command::new("skopeo").current_dir(dir.path()).args(["copy", "oci:layout:1", "dir:copy"]));
        } else if kind == "oci" {
            run(Command::new("umoci")
                .current_dir(dir.path())
                .args(["unpack", "--image", "layout:1", "bundle"]));
            expected_tree(&dir.path().join("bundle/rootfs"));
        } else {
            let manifest = std::fs::read(dir.path().join("layout/manifest.json")).expect("manifest.json");
            let manifest: Value = serde_json::from_slice(&manifest).expect("json");
            assert_eq!(manifest[0]["RepoTags"][0], "local/test:1");
            run(Command::new("skopeo").current_dir(dir.path()).args(["inspect", "docker-archive:image.tar"]));
        }
        // Every blob is what its name says.
        sh(dir.path(), "cd layout/blobs/sha256; for f in *; do echo \"$f  $f\"; done | sha256sum -c --quiet");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_out_merged() {
    if !root() {
        return;
    }
    let world = world(RegistryConfig::default());
    let result = built(&world);
    let output = Collected::default();
    exporter("tar", &[]).export(&context(&world), &input(result.clone()), &output).await.expect("tar");
    let dir = tempfile::tempdir().expect("temp dir");
    std::fs::write(dir.path().join("root.tar"), &*output.tar.lock().expect("tar")).expect("write");
    sh(dir.path(), "mkdir root; tar -C root -xpf root.tar");
    expected_tree(&dir.path().join("root"));
    exporter("local", &[]).export(&context(&world), &input(result.clone()), &output).await.expect("local");
    let trees = output.trees.lock().expect("trees").clone();
    assert_eq!(trees.len(), 1);
    assert_eq!(trees[0].0, "");
    assert_eq!(trees[0].1[1..], listing(&dir.path().join("root"))[1..]);

    let platforms = json!({"Platforms": [
        {"ID": "linux/amd64", "Platform": {"os": "linux", "architecture": "amd64"}},
        {"ID": "linux/arm64", "Platform": {"os": "linux", "architecture": "arm64"}}]});
    let metadata = BTreeMap::from([("refs.platforms".to_string(), platforms.to_string().into_bytes())]);
    let refs =
        BTreeMap::from([("linux/amd64".to_string(), result.clone()), ("linux/arm64".to_string(), None)]);
    let several = ExportInput::map(refs, metadata.clone()).expect("input");
    let output = Collected::default();
    exporter("local", &[]).export(&context(&world), &several, &output).await.expect("local");
    let mut prefixes: Vec<String> = output.trees.lock().expect("trees").iter().map(|t| t.0.clone()).collect();
    prefixes.sort();
    assert_eq!(prefixes, ["linux_amd64", "linux_arm64"]);
    exporter("tar", &[]).export(&context(&world), &several, &output).await.expect("tar");
    std::fs::write(dir.path().join("several.tar"), &*output.tar.lock().expect("tar")).expect("write");
    assert!(sh(dir.path(), "tar -tf several.tar").contains("linux_amd64/etc/version"));

    let response = exporter(
        "oci",
        &[("name", "x"), ("annotation-index.k", "v"), ("annotation[linux/arm64].only", "arm")],
    )
    .export(&context(&world), &several, &Collected::default())
    .await
    .expect("index");
    assert!(!response.contains_key("containerimage.config.digest"), "an index has no config");
    let error = exporter("docker", &[]).export(&context(&world), &several, &Collected::default()).await;
    assert!(
        error
            .expect_err("no lists")
            .to_string()
            .contains("does not currently support exporting manifest lists")
    );
    let missing = ExportInput::map(BTreeMap::from([("linux/amd64".to_string(), result)]), metadata);
    assert_eq!(missing.expect_err("ref").to_string(), "failed to find ref for ID linux/arm64");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_content_store_gets_blobs_before_what_names_them() {
    let world = world(RegistryConfig::default());
    let result = built(&world);
    let platforms = json!({"Platforms": [
        {"ID": "linux/amd64", "Platform": {"os": "linux", "architecture": "amd64"}},
        {"ID": "linux/arm64", "Platform": {"os": "linux", "architecture": "arm64"}}]});
    let metadata = BTreeMap::from([("refs.platforms".to_string(), platforms.to_string().into_bytes())]);
    let results =
        BTreeMap::from([("linux/amd64".to_string(), result.clone()), ("linux/arm64".to_string(), result)]);
    let input = ExportInput::map(results, metadata).expect("input");
    let output = Collected::default();
    let response =
        exporter("oci", &[("tar", "false")]).export(&context(&world), &input, &output).await.expect("oci");
    assert!(output.tar.lock().expect("tar").is_empty());
    let blobs = output.blobs.lock().expect("blobs");
    let mut kinds: Vec<&str> = blobs.iter().map(|blob| blob.0).collect();
    kinds.dedup();
    assert_eq!(kinds, ["layer", "config", "manifest", "index"]);
    assert!(blobs.iter().all(|blob| blob.1 == digest(&blob.2)));
    assert_eq!(blobs.last().map(|blob| &blob.1), response.get("containerimage.digest"));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_at_all_can_be_exported() {
    let world = world(RegistryConfig::default());
    let empty = ExportInput::single(None, BTreeMap::new()).expect("input");
    let output = Collected::default();
    let response = exporter("oci", &[]).export(&context(&world), &empty, &output).await.expect("oci");
    assert!(response.contains_key("containerimage.digest"));
    assert!(!response.contains_key("image.name"));
    let output = Collected::default();
    exporter("tar", &[]).export(&context(&world), &empty, &output).await.expect("tar");
    assert_eq!(output.tar.lock().expect("tar").len(), 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_receivers_word_counts() {
    let world = world(RegistryConfig::default());
    let empty = ExportInput::single(None, BTreeMap::new()).expect("input");
    let says = |already_exists| Collected {
        refuse: Some(OutputError { message: "disk quota exceeded".to_string(), already_exists }),
        ..Collected::default()
    };
    let error =
        exporter("oci", &[]).export(&context(&world), &empty, &says(false)).await.expect_err("refused");
    assert_eq!(error.to_string(), "disk quota exceeded");
    assert!(exporter("oci", &[]).export(&context(&world), &empty, &says(true)).await.is_ok());
    assert!(exporter("tar", &[]).export(&context(&world), &empty, &says(true)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_fails_names_image_and_cause() {
    let world = world(RegistryConfig::default());
    let server = super::support::Scripted::start(|_| super::support::answer(500, "")).await;
    let name = format!("{}/a/b:c", server.host);
    let push = exporter("image", &[("name", &name), ("push", "true")]);
    let empty = ExportInput::single(None, BTreeMap::new()).expect("input");
    let error = push.export(&context(&world), &empty, &NoOutput).await.expect_err("500").to_string();
    assert!(error.starts_with(&format!("failed to push {name}: ")), "{error}");
    assert!(error.contains("500 Internal Server Error"), "{error}");
}

#[test]
fn attributes_are_checked_before_anything_is_built() {
    assert!(refused("image", &[("compression", "estargz")]).starts_with("unsupported: "));
    for kind in ["image", "oci", "local", "tar"] {
        let other = BTreeMap::from([("colour".to_owned(), "blue".to_owned())]);
        Exporter::new(kind, &other).expect("what other exporters may know is let be");
    }
    assert!(refused("nope", &[]).contains("could not be found"));
    assert!(refused("image", &[("push", "maybe")]).contains("non-bool value"));
    assert!(refused("image", &[("push", "true")]).contains("no name"));
    let by_digest = [("push", "true"), ("push-by-digest", "true"), ("name", "example.org/a:1")];
    assert_eq!(refused("image", &by_digest), "can't push tagged ref example.org/a:1 by digest");
    assert!(refused("image", &[("compression-level", "10")]).contains("compression level"));
    assert!(refused("local", &[("mode", "odd")]).contains("mode"));
    assert!(refused("image", &[("annotation-odd.x", "y")]).contains("annotation type"));
}
