//! What a registry, or a host that it points to, is not trusted with.

use std::collections::HashMap;
use std::sync::Arc;

use kiln_proto::reference::Reference;
use kiln_worker::image::{Access, ResolveMode};
use kiln_worker::registry::{
    Anonymous, BasicAuth, BlobSource, Credentials, PushOutcome, Registry, RegistryConfig, RegistryError,
    Repository, StaticCredentials,
};
use serde_json::json;
use sha2::{Digest, Sha512};

use super::pulls::amd64;
use super::support::{Answer, Request, Scripted, answer, digest, world};

fn repository(host: &str, credentials: Arc<dyn Credentials>) -> Repository {
    let reference = Reference::parse(&format!("{host}/team/app")).expect("reference");
    Registry::new(RegistryConfig::default()).repository(&reference, credentials)
}

/// Credentials for every host that the test has, so that none is spared for want of them.
fn everywhere(hosts: &[&str]) -> Arc<StaticCredentials> {
    let basic = BasicAuth { username: "u".into(), secret: "p".into() };
    let hosts = hosts.iter().map(|host| (host.to_string(), basic.clone())).collect::<HashMap<_, _>>();
    Arc::new(StaticCredentials { identity: "me".into(), hosts })
}

/// A host that takes uploads without authorization, or wants to have it from its own token server.
async fn storage(greedy: bool) -> Scripted {
    Scripted::start(move |request: &Request| match (greedy, request.method.as_str()) {
        (true, _) => {
            let realm = format!("Bearer realm=\"http://{}/steal\"", request.header("host"));
            answer(401, "").with("www-authenticate", realm)
        }
        (false, "GET") => answer(200, "blob"),
        (false, _) => answer(201, ""),
    })
    .await
}

/// A registry that wants Basic authorization and has its content at `storage`.
async fn pointing(storage: &str) -> Scripted {
    let storage = storage.to_string();
    Scripted::start(move |request: &Request| {
        if request.header("authorization") != "Basic dTpw" {
            return answer(401, "").with("www-authenticate", "Basic realm=\"r\"");
        }
        match request.method.as_str() {
            "HEAD" => answer(404, ""),
            "POST" => answer(202, "").with("location", format!("http://{storage}/up?signature=1")),
            _ => answer(307, "").with("location", format!("http://{storage}/blob?signature=1")),
        }
    })
    .await
}

fn authorized(server: &Scripted) -> usize {
    server.seen.lock().expect("log").iter().filter(|r| !r.header("authorization").is_empty()).count()
}

#[tokio::test]
async fn credentials_stay_with_the_registry() {
    let none: &(dyn Fn(u64) + Sync) = &|_| {};
    let name = digest(b"blob");
    for greedy in [false, true] {
        let storage = storage(greedy).await;
        let registry = pointing(&storage.host).await;
        let repository = repository(&registry.host, everywhere(&[&registry.host, &storage.host]));
        let pushed = repository.push_blob(&name, 4, Some(BlobSource::Bytes(b"blob")), &[], none).await;
        let mut stream = repository.blob(&name, 4);
        let pulled = stream.chunk().await;
        if greedy {
            assert!(matches!(pushed, Err(RegistryError::Status { code: 401, .. })), "{pushed:?}");
            let error = pulled.expect_err("refused").to_string();
            assert!(error.contains(&storage.host) && error.contains("401"), "{error}");
        } else {
            assert_eq!(pushed.expect("push"), PushOutcome::Uploaded);
            assert_eq!(pulled.expect("pull").expect("a piece"), "blob"[..]);
        }
        assert_eq!(authorized(&storage), 0, "{:?}", storage.seen);
        assert!(!storage.requests().iter().any(|r| r.contains("steal")), "{:?}", storage.requests());
        assert!(storage.requests().len() >= 2);
        assert!(authorized(&registry) >= 3);
    }
}

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn sha512(bytes: &[u8]) -> String {
    format!("sha512:{}", hex::encode(Sha512::digest(bytes)))
}

#[tokio::test]
async fn digests_of_every_algorithm_are_checked_or_refused() {
    let server = Scripted::start(|request: &Request| {
        let stated = if request.path.ends_with("lies") { sha512(b"other") } else { sha512(MANIFEST) };
        answer(200, MANIFEST).with("docker-content-digest", stated)
    })
    .await;
    let repository = repository(&server.host, Arc::new(Anonymous));
    for name in ["v1", &sha512(MANIFEST), &digest(MANIFEST)] {
        let manifest = repository.manifest(name).await.expect(name);
        assert_eq!(manifest.digest, digest(MANIFEST));
    }
    let wrong = sha512(b"other");
    for name in ["lies", &wrong] {
        let error = repository.manifest(name).await.expect_err("not what was asked for");
        assert!(matches!(&error, RegistryError::Mismatch { expected, .. } if *expected == wrong), "{error}");
    }
    let unknown = "md5:d41d8cd98f00b204e9800998ecf8427e";
    let error = repository.manifest(unknown).await.expect_err("unknown algorithm").to_string();
    assert!(error.contains(&format!("unsupported: digest {unknown}")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn content_that_the_store_cannot_check_is_refused_before_it_is_fetched() {
    let config: &[u8] = br#"{"rootfs":{"type":"layers","diff_ids":[]}}"#;
    let server = Scripted::start(move |request: &Request| {
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let descriptor = json!({"mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": sha512(config), "size": config.len()});
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": descriptor, "layers": []});
        let bytes = serde_json::to_vec(&manifest).expect("json");
        match request.path.contains("/blobs/") {
            true => answer(200, config),
            false => answer(200, bytes.clone())
                .with("content-type", media_type)
                .with("docker-content-digest", digest(&bytes)),
        }
    })
    .await;
    let world = world(RegistryConfig::default());
    let reference = Reference::parse(&format!("{}/team/app:v1", server.host)).expect("reference");
    let resolved =
        world.images.resolve(&reference, &amd64(), ResolveMode::Default, &Access::anonymous()).await;
    let error = resolved.expect_err("sha512 config").to_string();
    assert!(error.contains(&format!("unsupported: config {}", sha512(config))), "{error}");
    assert!(!server.requests().iter().any(|r| r.contains("/blobs/")), "{:?}", server.requests());
}

#[tokio::test]
async fn an_upload_cannot_be_further_than_its_blob_is_long() {
    let blob = vec![7; 65 << 20];
    for end in [blob.len() as u64, u64::MAX - 1, u64::MAX] {
        let server = Scripted::start(move |request: &Request| -> Answer {
            match request.method.as_str() {
                "HEAD" => answer(404, ""),
                "POST" => answer(202, "").with("location", "/up"),
                "GET" => answer(204, "").with("location", "/up").with("range", format!("0-{end}")),
                _ => answer(502, ""),
            }
        })
        .await;
        let repository = repository(&server.host, Arc::new(Anonymous));
        let source = Some(BlobSource::Bytes(&blob));
        let pushed = repository.push_blob(&digest(b"any"), blob.len() as u64, source, &[], &|_| {}).await;
        let error = pushed.expect_err("impossible").to_string();
        assert!(error.contains(&format!("of {} that were sent", blob.len())), "{end}: {error}");
    }
}

#[tokio::test]
async fn a_token_of_any_life_is_used() {
    for life in ["0", "18446744073709551615"] {
        let server = Scripted::start(move |request: &Request| match request.header("authorization") {
            _ if request.path.starts_with("/token") => {
                answer(200, format!(r#"{{"token":"T","expires_in":{life}}}"#))
            }
            "Bearer T" => answer(200, MANIFEST),
            _ => {
                let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host"));
                answer(401, "").with("www-authenticate", realm)
            }
        })
        .await;
        let repository = repository(&server.host, Arc::new(Anonymous));
        assert_eq!(repository.manifest("v1").await.expect(life).bytes, MANIFEST);
    }
}
