//! Images into the store: resolution, laziness, verification, one download for all.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use kiln_cache::RecordType;
use kiln_proto::pb;
use kiln_proto::reference::Reference;
use kiln_worker::image::{Access, ResolveMode, chain_ids};
use kiln_worker::layer::Compression;
use kiln_worker::registry::RegistryConfig;
use serde_json::{Value, json};

use super::support::{
    Answer, Member, Request, Scripted, World, answer, archive, digest, pack, root, sh, world,
};

/// Blobs and manifests of a scripted registry, by digest or tag.
#[derive(Default, Clone)]
pub(crate) struct Content {
    pub(crate) items: Vec<(String, String, Vec<u8>)>,
}

impl Content {
    pub(crate) fn add(&mut self, name: &str, media_type: &str, bytes: Vec<u8>) -> Value {
        let entry = json!({"mediaType": media_type, "digest": digest(&bytes), "size": bytes.len()});
        self.items.push((digest(&bytes), media_type.to_string(), bytes.clone()));
        if !name.is_empty() {
            self.items.push((name.to_string(), media_type.to_string(), bytes));
        }
        entry
    }

    pub(crate) fn image(&mut self, tag: &str, arch: &str, layers: &[(Vec<u8>, &str, String)]) -> Value {
        let diff_ids: Vec<&String> = layers.iter().map(|(_, _, diff_id)| diff_id).collect();
        let config =
            json!({"os": "linux", "architecture": arch, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        let config = self.add(
            "",
            "application/vnd.oci.image.config.v1+json",
            serde_json::to_vec(&config).expect("json"),
        );
        let entries: Vec<Value> =
            layers.iter().map(|(bytes, media_type, _)| self.add("", media_type, bytes.clone())).collect();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": entries});
        self.add(tag, media_type, serde_json::to_vec(&manifest).expect("json"))
    }

    pub(crate) fn answer(&self, request: &Request) -> Answer {
        let name = request.path.rsplit('/').next().unwrap_or_default();
        match self.items.iter().find(|(known, _, _)| known == name) {
            Some((_, media_type, bytes)) => answer(200, bytes.clone())
                .with("content-type", media_type)
                .with("docker-content-digest", digest(bytes)),
            None => answer(404, ""),
        }
    }
}

pub(crate) const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub(crate) const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.docker.image.rootfs.diff.tar";

fn layer(dir: &Path, compression: Compression, media_type: &'static str) -> (Vec<u8>, &'static str, String) {
    let (bytes, stats) = pack(dir, compression);
    (bytes, media_type, stats.diff_id)
}

pub(crate) fn amd64() -> pb::Platform {
    kiln_proto::platform::parse("linux/amd64").expect("platform")
}

pub(crate) fn named(host: &str, name: &str) -> Reference {
    Reference::parse(&format!("{host}/{name}")).expect("reference")
}

async fn pull(world: &World, reference: &Reference) -> kiln_cache::Ref {
    let access = Access::anonymous();
    let image =
        world.images.resolve(reference, &amd64(), ResolveMode::Default, &access).await.expect("resolve");
    world.images.pull(&image, RecordType::Regular).await.expect("pull")
}

/// Three layers: bottom, something deleted, something added below a directory of the bottom.
fn three_layers() -> Content {
    let dir = tempfile::tempdir().expect("temp dir");
    let dirs: Vec<_> = ["1", "2", "3"].iter().map(|n| dir.path().join(n)).collect();
    for d in &dirs {
        std::fs::create_dir(d).expect("dir");
    }
    sh(
        &dirs[0],
        "mkdir -p etc usr/lib; echo a >etc/a; chmod 700 etc; ln -s usr/lib lib; head -c 2000000 /dev/urandom >big",
    );
    sh(&dirs[1], "mkdir etc; mknod etc/a c 0 0; echo b >etc/b");
    let third = archive(&[Member::file("etc/c", b"c"), Member::file("lib/d", b"d")]);
    let mut content = Content::default();
    let third_diff = digest(&third);
    let layers = [
        layer(&dirs[0], Compression::Gzip, GZIP),
        layer(&dirs[1], Compression::Zstd, ZSTD),
        (third, PLAIN, third_diff),
    ];
    let amd = content.image("single", "amd64", &layers);
    let arm = content.image("", "arm64", &layers[..1]);
    let with = |entry: &Value, arch: &str| {
        let mut entry = entry.clone();
        entry["platform"] = json!({"os": "linux", "architecture": arch});
        entry
    };
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": media_type,
        "manifests": [with(&arm, "arm64"), with(&amd, "amd64"), with(&amd, "unknown")]});
    content.add("multi", media_type, serde_json::to_vec(&index).expect("json"));
    content
}

#[tokio::test(flavor = "multi_thread")]
async fn images_resolve_by_platform_and_fill_when_read() {
    if !root() {
        return;
    }
    let content = three_layers();
    let server = Scripted::start(move |request: &Request| content.answer(request)).await;
    let world = world(RegistryConfig::default());
    let access = Access::anonymous();
    let multi = named(&server.host, "team/app:multi");
    let image = world.images.resolve(&multi, &amd64(), ResolveMode::Default, &access).await.expect("resolve");
    assert_ne!(image.digest, image.manifest_digest);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.platform, Some(amd64()));
    let target = world.images.pull(&image, RecordType::Regular).await.expect("pull");
    let top = target.clone().expect("layers");
    assert!(
        !server.requests().iter().any(|r| r.contains(&image.layers[0].digest)),
        "nothing is downloaded yet"
    );
    let diff_ids: Vec<String> = image.layers.iter().map(|l| l.diff_id.clone()).collect();
    assert_eq!(top.chain_id(), chain_ids(&diff_ids).last().map(String::as_str));
    assert_eq!(top.layers().len(), 3);
    world.images.materialize(&target, &access).await.expect("materialize");
    assert!(top.is_materialized());
    let dirs: Vec<_> = top.layers().iter().map(|layer| layer.dir()).collect();
    assert_eq!(std::fs::read(dirs[0].join("etc/a")).expect("a"), b"a\n");
    assert!(std::fs::symlink_metadata(dirs[1].join("etc/a")).is_ok_and(|m| !m.is_file()));
    let mode = |p: &Path| {
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(p).expect("stat").permissions())
    };
    assert_eq!(mode(&dirs[2].join("etc")) & 0o777, 0o755, "of the layer right below");
    assert_eq!(std::fs::read(dirs[2].join("usr/lib/d")).expect("d"), b"d");

    let count = server.requests().len();
    let again = pull(&world, &multi).await.expect("layers");
    assert_eq!(again, top, "the same chain is the same snapshot");
    world.images.materialize(&Some(again), &access).await.expect("nothing to do");
    assert_eq!(server.requests().len(), count + 1, "one HEAD");

    let local =
        world.images.resolve(&multi, &amd64(), ResolveMode::PreferLocal, &access).await.expect("local");
    assert_eq!(local.digest, image.digest);
    let pinned = named(&server.host, &format!("team/app@{}", image.digest));
    world.images.resolve(&pinned, &amd64(), ResolveMode::Default, &access).await.expect("pinned");
    assert_eq!(server.requests().len(), count + 1, "known digests need no registry");

    let s390x = kiln_proto::platform::parse("linux/s390x").expect("platform");
    let error = world.images.resolve(&multi, &s390x, ResolveMode::Default, &access).await.expect_err("none");
    assert!(error.is_not_found());
    let text = error.to_string();
    assert!(
        text.contains("no match for platform linux/s390x") && text.contains("linux/arm64, linux/amd64"),
        "{text}"
    );
    let missing = named(&server.host, "team/app:nope");
    let error =
        world.images.resolve(&missing, &amd64(), ResolveMode::Default, &access).await.expect_err("none");
    assert_eq!(error.to_string(), format!("{missing}: not found"));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_askers_download_a_layer_once() {
    if !root() {
        return;
    }
    let content = three_layers();
    let server = Scripted::start(move |request: &Request| content.answer(request)).await;
    let world = world(RegistryConfig::default());
    let target = pull(&world, &named(&server.host, "team/app:single")).await;
    let asks = (0..16).map(|_| {
        let (images, target) = (world.images.clone(), target.clone());
        tokio::spawn(async move { images.materialize(&target, &Access::anonymous()).await })
    });
    for ask in futures::future::join_all(asks).await {
        ask.expect("task").expect("materialize");
    }
    let blobs: Vec<String> =
        server.requests().into_iter().filter(|r| r.starts_with("GET") && r.contains("/blobs/")).collect();
    assert_eq!(blobs.len(), 4, "a config and three layers: {blobs:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_lies_never_becomes_a_snapshot() {
    if !root() {
        return;
    }
    let good = three_layers();
    let layers: Vec<String> = good
        .items
        .iter()
        .filter(|(_, media_type, _)| media_type == GZIP)
        .map(|(name, _, _)| name.clone())
        .collect();
    for damage in ["flip", "short", "other", "garbage"] {
        let mut content = good.clone();
        for (name, _, bytes) in &mut content.items {
            if layers.contains(name) {
                match damage {
                    "flip" => bytes[1000] ^= 1,
                    "other" => {
                        // A valid layer of the same length, but not this one.
                        let mut other = super::support::archive(&[Member::file("evil", b"x")]);
                        other.resize(bytes.len(), 0);
                        *bytes = other;
                    }
                    "garbage" => bytes.fill(b'x'),
                    _ => {
                        bytes.pop();
                    }
                }
            }
        }
        let server = Scripted::start(move |request: &Request| content.answer(request)).await;
        let world = world(RegistryConfig::default());
        let target = pull(&world, &named(&server.host, "team/app:single")).await;
        let error =
            world.images.materialize(&target, &Access::anonymous()).await.expect_err(damage).to_string();
        if damage == "short" {
            assert!(error.contains("before the end"), "{damage}: {error}");
        } else {
            assert!(
                error.contains("content does not match") && error.contains(&layers[0]),
                "{damage}: {error}"
            );
        }
        let bottom = target.expect("layers").layers()[0].clone();
        assert!(!bottom.is_filled());
        assert!(world.store.blobs().get(&layers[0]).expect("blobs").is_none());
    }
    // The blob is right, the config promises another archive.
    let dir = tempfile::tempdir().expect("temp dir");
    std::fs::write(dir.path().join("f"), "x").expect("write");
    let (bytes, _, _) = layer(dir.path(), Compression::Gzip, GZIP);
    let mut content = Content::default();
    content.image("lie", "amd64", &[(bytes, GZIP, digest(b"something else"))]);
    let server = Scripted::start(move |request: &Request| content.answer(request)).await;
    let world = world(RegistryConfig::default());
    let target = pull(&world, &named(&server.host, "team/app:lie")).await;
    let error =
        world.images.materialize(&target, &Access::anonymous()).await.expect_err("diff id").to_string();
    assert!(error.contains("diff id does not match"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_images_are_refused() {
    let mut content = Content::default();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let config = content.add(
        "",
        "application/vnd.oci.image.config.v1+json",
        br#"{"rootfs":{"diff_ids":[]}}"#.to_vec(),
    );
    let blob = json!({"mediaType": GZIP, "digest": digest(b"x"), "size": 1});
    let manifest = |layers: Value| {
        serde_json::to_vec(
            &json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers}),
        )
        .expect("json")
    };
    let count = manifest(json!([blob]));
    content.add("count", media_type, count);
    content.add("broken", media_type, br#"{"schemaVersion":2,"config":7,"layers":[]}"#.to_vec());
    content.add(
        "old",
        "application/vnd.docker.distribution.manifest.v1+json",
        br#"{"schemaVersion":1}"#.to_vec(),
    );
    let server = Scripted::start(move |request: &Request| content.answer(request)).await;
    let world = world(RegistryConfig::default());
    for (tag, text) in [
        ("count", "manifest has 1 layers, config has 0"),
        ("broken", "malformed manifest"),
        ("old", "unsupported: image manifest schema 1"),
    ] {
        let reference = named(&server.host, &format!("team/app:{tag}"));
        let result =
            world.images.resolve(&reference, &amd64(), ResolveMode::Default, &Access::anonymous()).await;
        let error = result.expect_err(tag).to_string();
        assert!(error.contains(text) && error.contains("team/app"), "{tag}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_pull_stops_and_can_start_again() {
    if !root() {
        return;
    }
    let content = three_layers();
    let hold = Arc::new(AtomicBool::new(true));
    let cuts = Arc::new(AtomicUsize::new(0));
    let (held, count) = (hold.clone(), cuts.clone());
    let server = Scripted::start(move |request: &Request| {
        let mut answer = content.answer(request);
        // While held, large blobs break off again and again, which the client takes for a bad line.
        if held.load(Ordering::SeqCst) && answer.body.len() > 1_000_000 {
            count.fetch_add(1, Ordering::SeqCst);
            answer.cut = Some(1000);
        }
        answer
    })
    .await;
    let world = world(RegistryConfig::default());
    let target = pull(&world, &named(&server.host, "team/app:single")).await;
    let (images, pulled) = (world.images.clone(), target.clone());
    let task = tokio::spawn(async move { images.materialize(&pulled, &Access::anonymous()).await });
    while cuts.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    task.abort();
    assert!(task.await.is_err_and(|e| e.is_cancelled()));
    let staging = world.dir.path().join("root/staging");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while std::fs::read_dir(&staging).expect("staging").count() > 0 {
        assert!(std::time::Instant::now() < until, "half-filled directories are left");
        tokio::task::yield_now().await;
    }
    hold.store(false, Ordering::SeqCst);
    world.images.materialize(&target, &Access::anonymous()).await.expect("second time");
}
