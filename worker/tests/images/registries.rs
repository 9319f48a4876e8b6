//! The client against registries that demand tokens, break off, lie, or are down.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kiln_proto::reference::Reference;
use kiln_worker::registry::{
    Anonymous, BasicAuth, BlobSource, Credentials, HostConfig, PushOutcome, Registry, RegistryConfig,
    RegistryError, Repository, StaticCredentials,
};

use super::support::{Answer, RealRegistry, Request, Scripted, answer, digest};

fn reference(text: &str) -> Reference {
    Reference::parse(text).expect("reference")
}

fn repository(host: &str, credentials: Arc<dyn Credentials>) -> Repository {
    Registry::new(RegistryConfig::default()).repository(&reference(&format!("{host}/team/app")), credentials)
}

async fn download(repository: &Repository, digest: &str, size: u64) -> Result<Vec<u8>, RegistryError> {
    let mut stream = repository.blob(digest, size);
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

const MANIFEST: &[u8] = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;

fn manifest() -> Answer {
    answer(200, MANIFEST)
        .with("content-type", "application/vnd.oci.image.manifest.v1+json")
        .with("docker-content-digest", digest(MANIFEST))
}

#[tokio::test]
async fn tokens_are_fetched_once_for_each_scope_and_user() {
    let tokens = Arc::new(AtomicUsize::new(0));
    let count = tokens.clone();
    let server = Scripted::start(move |request: &Request| {
        if request.path.starts_with("/token") {
            count.fetch_add(1, Ordering::SeqCst);
            // The older protocol: POST is unknown.
            if request.method == "POST" {
                return answer(404, "");
            }
            assert_eq!(request.header("authorization"), "Basic dTpw", "u:p");
            assert!(request.path.contains("service=s"), "{}", request.path);
            return answer(200, r#"{"token":"T","expires_in":300}"#);
        }
        if request.header("authorization") == "Bearer T" {
            return manifest();
        }
        let realm = format!("Bearer realm=\"http://{}/token\",service=\"s\"", request.header("host"));
        answer(401, "").with("www-authenticate", realm)
    })
    .await;
    let basic = BasicAuth { username: "u".into(), secret: "p".into() };
    let credentials = Arc::new(StaticCredentials {
        identity: "me".into(),
        hosts: HashMap::from([(server.host.clone(), basic)]),
    });
    let repository = repository(&server.host, credentials);
    for _ in 0..3 {
        let found = repository.manifest("v1").await.expect("manifest");
        assert_eq!(found.bytes, MANIFEST);
    }
    assert_eq!(tokens.load(Ordering::SeqCst), 2, "one POST, one GET");
    let (a, b) = tokio::join!(repository.head_manifest("v1"), repository.head_manifest("v2"));
    assert_eq!(a.expect("head").expect("answered").digest, digest(MANIFEST));
    assert!(b.expect("head").is_some());
    assert_eq!(tokens.load(Ordering::SeqCst), 2);
    let scopes: Vec<String> = server.requests().into_iter().filter(|r| r.contains("/token?")).collect();
    assert!(scopes[0].contains("scope=repository%3Ateam%2Fapp%3Apull"), "{scopes:?}");
}

#[tokio::test]
async fn basic_credentials_are_sent_only_when_asked_for() {
    let server = Scripted::start(|request: &Request| match request.header("authorization") {
        "Basic dTpw" => manifest(),
        "" => answer(401, "").with("www-authenticate", "Basic realm=\"r\""),
        other => panic!("unexpected {other}"),
    })
    .await;
    let basic = BasicAuth { username: "u".into(), secret: "p".into() };
    let hosts = HashMap::from([(server.host.clone(), basic)]);
    let credentials = Arc::new(StaticCredentials { identity: "me".into(), hosts });
    repository(&server.host, credentials).manifest("v1").await.expect("manifest");
    let error = repository(&server.host, Arc::new(Anonymous)).manifest("v1").await.expect_err("denied");
    assert!(matches!(error, RegistryError::Denied { status: 401, .. }), "{error}");
    assert!(error.to_string().contains("pull access denied"), "{error}");
    assert!(error.to_string().contains(&server.host), "{error}");
}

#[tokio::test]
async fn wrong_credentials_end_in_an_error_not_in_a_loop() {
    let server = Scripted::start(|request: &Request| {
        if request.path.starts_with("/token") {
            return answer(401, r#"{"details":"incorrect username or password"}"#);
        }
        let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host"));
        answer(401, "").with("www-authenticate", realm)
    })
    .await;
    let basic = BasicAuth { username: "u".into(), secret: "p".into() };
    let hosts = HashMap::from([(server.host.clone(), basic)]);
    let credentials = Arc::new(StaticCredentials { identity: "me".into(), hosts });
    let error = repository(&server.host, credentials).manifest("v1").await.expect_err("denied").to_string();
    assert!(
        error.contains("failed to authorize") && error.contains("incorrect username or password"),
        "{error}"
    );

    // A token that is handed out but not accepted.
    let server = Scripted::start(|request: &Request| {
        if request.path.starts_with("/token") {
            return answer(200, r#"{"access_token":"T"}"#);
        }
        let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host"));
        answer(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}"#).with("www-authenticate", realm)
    })
    .await;
    let error =
        repository(&server.host, Arc::new(Anonymous)).manifest("v1").await.expect_err("denied").to_string();
    assert!(error.contains("UNAUTHORIZED: no"), "{error}");
    assert!(server.requests().len() < 8, "{:?}", server.requests());
}

#[tokio::test]
async fn what_passes_is_tried_again_what_does_not_is_told() {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    let server = Scripted::start(move |_: &Request| match count.fetch_add(1, Ordering::SeqCst) {
        0 => answer(503, "busy"),
        1 => answer(429, "").with("retry-after", 0),
        _ => manifest(),
    })
    .await;
    repository(&server.host, Arc::new(Anonymous)).manifest("v1").await.expect("third time lucky");
    assert_eq!(calls.load(Ordering::SeqCst), 3);

    let server =
        Scripted::start(|_: &Request| answer(500, r#"{"errors":[{"code":"BROKEN","message":"disk"}]}"#))
            .await;
    let error =
        repository(&server.host, Arc::new(Anonymous)).manifest("v1").await.expect_err("500").to_string();
    for part in [&server.host, "team/app:v1", "500 Internal Server Error", "BROKEN: disk", "GET"] {
        assert!(error.contains(part), "{part} in {error}");
    }

    let server = Scripted::start(|_: &Request| answer(404, "")).await;
    let error = repository(&server.host, Arc::new(Anonymous)).manifest("v1").await.expect_err("404");
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), format!("{}/team/app:v1: not found", server.host));
    assert_eq!(server.requests().len(), 1, "not found is final");
}

#[tokio::test]
async fn a_host_that_does_not_listen_fails_at_once() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("port").port();
    let started = std::time::Instant::now();
    let error = repository(&format!("127.0.0.1:{port}"), Arc::new(Anonymous)).manifest("v1").await;
    let error = error.expect_err("refused").to_string();
    assert!(error.contains("Connection refused"), "{error}");
    assert!(started.elapsed().as_secs() < 5);
}

#[tokio::test]
async fn broken_downloads_go_on_where_they_stopped() {
    let blob: Vec<u8> = (0..500_000u32).map(|i| (i / 7) as u8).collect();
    let content = blob.clone();
    let server = Scripted::start(move |request: &Request| {
        let from = request.header("range").strip_prefix("bytes=").and_then(|r| r.strip_suffix('-'));
        match from.and_then(|f| f.parse::<usize>().ok()) {
            None => Answer { cut: Some(100_000), ..answer(200, content.clone()) },
            // The range is ignored once.
            Some(from) if from < 200_000 => Answer { cut: Some(300_000), ..answer(200, content.clone()) },
            Some(from) => answer(206, &content[from..]),
        }
    })
    .await;
    let repository = repository(&server.host, Arc::new(Anonymous));
    let got = download(&repository, &digest(&blob), blob.len() as u64).await.expect("download");
    assert!(got == blob);
    assert_eq!(server.requests().len(), 3);
}

#[tokio::test]
async fn a_manifest_must_be_what_its_digest_says() {
    let server = Scripted::start(|_: &Request| manifest()).await;
    let repository = repository(&server.host, Arc::new(Anonymous));
    let wanted = digest(b"other");
    let error = repository.manifest(&wanted).await.expect_err("mismatch");
    assert!(matches!(error, RegistryError::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains(&wanted) && error.to_string().contains(&digest(MANIFEST)), "{error}");
    assert!(repository.manifest(&digest(MANIFEST)).await.is_ok());
}

#[tokio::test]
async fn mirrors_are_asked_first_and_may_fail() {
    let broken = Scripted::start(|_: &Request| answer(500, "")).await;
    let mirror = Scripted::start(|request: &Request| match request.path.contains("/blobs/") {
        true => answer(200, "blob"),
        false => answer(404, ""),
    })
    .await;
    let origin = Scripted::start(|request: &Request| match request.path.contains("/manifests/") {
        true => manifest(),
        false => answer(404, ""),
    })
    .await;
    let host = HostConfig {
        mirrors: vec![broken.host.clone(), format!("{}/proxy/hub", mirror.host)],
        http: Some(true),
        ..HostConfig::default()
    };
    let config = RegistryConfig { hosts: BTreeMap::from([(origin.host.clone(), host)]) };
    let repository = Registry::new(config)
        .repository(&reference(&format!("{}/team/app:v1", origin.host)), Arc::new(Anonymous));
    assert_eq!(repository.manifest("v1").await.expect("from the origin").bytes, MANIFEST);
    assert_eq!(download(&repository, &digest(b"blob"), 4).await.expect("from the mirror"), b"blob");
    let asked = mirror.requests();
    let namespace = origin.host.replace(':', "%3A");
    assert_eq!(asked[0], format!("GET /v2/proxy/hub/team/app/manifests/v1?ns={namespace}"));
    assert!(!origin.requests().iter().any(|r| r.contains("/blobs/")), "{:?}", origin.requests());
    // Mirrors are for pulls only.
    let before = mirror.requests().len();
    assert!(!repository.has_blob(&digest(b"blob")).await.expect("head"));
    assert_eq!(mirror.requests().len(), before);
}

#[tokio::test]
async fn insecure_registries_fall_back_to_plain_http() {
    let server = Scripted::start(|_: &Request| manifest()).await;
    // By name it would be loopback, which is plain anyway; an explicit `http = false` makes it https.
    let config = |insecure| {
        let host = HostConfig { http: Some(false), insecure, ..HostConfig::default() };
        RegistryConfig { hosts: BTreeMap::from([(server.host.clone(), host)]) }
    };
    let named = reference(&format!("{}/team/app", server.host));
    let strict = Registry::new(config(None)).repository(&named, Arc::new(Anonymous));
    let error = strict.manifest("v1").await.expect_err("no TLS there").to_string();
    assert!(error.contains("https://"), "{error}");
    let loopback = RegistryConfig::default();
    let plain = Registry::new(loopback).repository(&named, Arc::new(Anonymous)).insecure(true);
    assert!(plain.manifest("v1").await.is_ok());
}

#[tokio::test]
async fn pushes_check_mount_and_upload() {
    let registry = RealRegistry::start();
    let client = Registry::new(RegistryConfig::default());
    let first = client.repository(&reference(&format!("{}/a/one", registry.host)), Arc::new(Anonymous));
    let second = client.repository(&reference(&format!("{}/a/two", registry.host)), Arc::new(Anonymous));
    let blob = vec![42u8; 3_000_000];
    let name = digest(&blob);
    let size = blob.len() as u64;
    let none: &(dyn Fn(u64) + Sync) = &|_| {};
    let bytes = Some(BlobSource::Bytes(&blob));
    assert_eq!(first.push_blob(&name, size, bytes, &[], none).await.expect("upload"), PushOutcome::Uploaded);
    assert_eq!(first.push_blob(&name, size, None, &[], none).await.expect("there"), PushOutcome::Existed);
    assert_eq!(second.push_blob(&name, size, None, &[], none).await.expect("asked"), PushOutcome::Missing);
    let unknown = ["no/such".to_string()];
    assert_eq!(
        second.push_blob(&name, size, None, &unknown, none).await.expect("asked"),
        PushOutcome::Missing
    );
    let from = ["a/one".to_string()];
    assert_eq!(second.push_blob(&name, size, None, &from, none).await.expect("mount"), PushOutcome::Mounted);
    let third = client.repository(&reference(&format!("{}/a/three", registry.host)), Arc::new(Anonymous));
    // The mount is refused, and the upload that was opened instead is used.
    assert_eq!(
        third.push_blob(&name, size, bytes, &unknown, none).await.expect("upload"),
        PushOutcome::Uploaded
    );
    assert!(download(&third, &name, size).await.expect("download") == blob);
    let wrong = digest(b"wrong");
    let error =
        third.push_blob(&wrong, size, bytes, &[], none).await.expect_err("the registry checks").to_string();
    assert!(error.contains(&registry.host), "{error}");
    let empty = digest(b"");
    first.push_blob(&empty, 0, Some(BlobSource::Bytes(b"")), &[], none).await.expect("empty blob");
    assert_eq!(download(&first, &empty, 0).await.expect("empty"), b"");
}

#[tokio::test]
async fn large_blobs_go_up_in_pieces_that_can_be_repeated() {
    use std::sync::Mutex;
    let stored = Arc::new(Mutex::new(Vec::new()));
    let failures = Arc::new(AtomicUsize::new(0));
    let (store, fail) = (stored.clone(), failures.clone());
    let server = Scripted::start(move |request: &Request| {
        let mut stored = store.lock().expect("store");
        match request.method.as_str() {
            "HEAD" => answer(404, ""),
            "POST" => answer(202, "").with("location", "/up?state=1"),
            "PATCH" => {
                let from = request.header("content-range").split('-').next().and_then(|f| f.parse().ok());
                assert_eq!(from, Some(stored.len()));
                if !stored.is_empty() && fail.fetch_add(1, Ordering::SeqCst) == 0 {
                    // Half of it arrived.
                    stored.extend_from_slice(&request.body[..request.body.len() / 2]);
                    return answer(502, "");
                }
                stored.extend_from_slice(&request.body);
                answer(202, "").with("location", "/up?state=2")
            }
            "GET" => answer(204, "")
                .with("location", "/up?state=3")
                .with("range", format!("0-{}", stored.len() - 1)),
            "PUT" => {
                assert!(request.path.contains("state=") && request.path.contains("&digest=sha256"));
                stored.extend_from_slice(&request.body);
                answer(201, "")
            }
            other => panic!("{other}"),
        }
    })
    .await;
    let blob: Vec<u8> = (0..70_000_000u32).map(|i| (i / 1000) as u8).collect();
    let file = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(file.path(), &blob).expect("write");
    let name = digest(&blob);
    let seen = AtomicUsize::new(0);
    let sent = |bytes: u64| seen.store(bytes as usize, Ordering::SeqCst);
    let source = Some(BlobSource::File(file.path()));
    let repository = repository(&server.host, Arc::new(Anonymous));
    let outcome = repository.push_blob(&name, blob.len() as u64, source, &[], &sent).await.expect("push");
    assert_eq!(outcome, PushOutcome::Uploaded);
    assert!(*stored.lock().expect("store") == blob);
    assert_eq!(seen.load(Ordering::SeqCst), blob.len());
    assert!(failures.load(Ordering::SeqCst) >= 2, "one piece failed and was repeated");
}
