//! Both ends of a session over a real gRPC connection.

mod common;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{daemon, listing, paths, write};
use futures::StreamExt;
use kiln_proto::filesync::auth_server::Auth;
use kiln_proto::filesync::*;
use kiln_session::client::{Agent, Attachables, ContentDir, ExportTarget, Secret, SharedDir};
use kiln_session::fsutil::{ReceiveOptions, Subtree};
use kiln_session::{Credentials, FileSyncRequest, NewBlob, SessionError, new_id};
use tempfile::tempdir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Request, Response, Status};

#[tokio::test]
async fn a_session_is_found_by_id_and_ends_with_its_client() {
    let (manager, mut control) = daemon().await;
    let id = new_id();
    let waiting = tokio::spawn({
        let (manager, id) = (manager.clone(), id.clone());
        async move { manager.get(&id).await }
    });
    let client = Attachables::new().attach(&mut control, &id, "shared").await.unwrap();
    let session = waiting.await.unwrap().unwrap();
    assert_eq!((session.id(), session.shared_key()), (id.as_str(), "shared"));
    assert!(session.supports("/GRPC.health.v1.Health/check"));
    assert!(!session.supports("/moby.filesync.v1.FileSync/DiffCopy"));
    assert!(manager.get(&format!("prefix:{id}")).await.is_ok());

    drop(client);
    tokio::time::timeout(Duration::from_secs(10), session.closed()).await.expect("the session must end");
    assert!(manager.try_get(&id).is_none());
    assert!(session.get_secret("any").await.is_err());
}

#[tokio::test]
async fn a_session_ends_when_the_daemon_closes_it() {
    let (manager, mut control) = daemon().await;
    let client = Attachables::new().attach(&mut control, "one", "").await.unwrap();
    manager.get("one").await.unwrap().close();
    tokio::time::timeout(Duration::from_secs(10), client.closed()).await.expect("the client must notice");
}

#[tokio::test]
async fn a_session_that_never_attaches_is_an_error() {
    let manager = kiln_session::SessionManager::new();
    let error = manager.get("nobody").await.unwrap_err();
    assert_eq!(error.to_string(), "no active session for nobody");
    assert!(error.is_not_found());
}

#[tokio::test]
async fn a_session_without_an_id_is_refused() {
    let (_, mut control) = daemon().await;
    match Attachables::new().attach(&mut control, "", "").await {
        Err(error) => assert_eq!(error.code(), Some(Code::InvalidArgument)),
        Ok(_) => panic!("attached"),
    }
}

#[tokio::test]
async fn the_daemon_reads_shared_directories_only() {
    let (manager, mut control) = daemon().await;
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "src/main.rs", "fn main() {}");
    write(from.path(), "größe.txt", "ü");
    write(from.path(), "big", &"x".repeat(3_000_000));
    let mut offer = Attachables::new();
    offer.share(vec![SharedDir { name: "context".into(), path: from.path().into() }]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();

    let request = FileSyncRequest { dir_name: "context".into(), ..Default::default() };
    let counted = Arc::new(Mutex::new(0));
    let count = counted.clone();
    let options = ReceiveOptions {
        progress: Some(Arc::new(move |bytes| *count.lock().unwrap() = bytes)),
        ..Default::default()
    };
    session.file_sync(&request, to.path(), options).await.unwrap();
    assert_eq!(listing(from.path()), listing(to.path()));
    assert!(*counted.lock().unwrap() > 3_000_000);

    let request = FileSyncRequest { include_patterns: vec!["größe.txt".into()], ..request };
    session.file_sync(&request, to.path(), ReceiveOptions::default()).await.unwrap();
    assert_eq!(paths(to.path()), ["größe.txt"]);

    let request = FileSyncRequest { dir_name: "elsewhere".into(), ..Default::default() };
    let error = session.file_sync(&request, to.path(), ReceiveOptions::default()).await.unwrap_err();
    assert!(error.is_not_found());
    assert!(error.to_string().contains("no access allowed to dir \"elsewhere\""), "{error}");
}

#[tokio::test]
async fn the_guard_of_a_dropped_transfer_is_released() {
    let (manager, mut control) = daemon().await;
    let (from, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(from.path(), "file", "x");
    let mut offer = Attachables::new();
    offer.share(vec![SharedDir { name: "context".into(), path: from.path().into() }]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    let (held, released) = tokio::sync::oneshot::channel::<()>();
    let options = ReceiveOptions { guard: Some(Box::new(held)), ..Default::default() };
    let request = FileSyncRequest { dir_name: "context".into(), ..Default::default() };
    let transfer = session.file_sync(&request, to.path(), options);
    let _ = tokio::time::timeout(Duration::ZERO, transfer).await;
    assert!(tokio::time::timeout(Duration::from_secs(10), released).await.expect("released").is_err());
}

#[tokio::test]
async fn exports_reach_their_targets() {
    let (manager, mut control) = daemon().await;
    let (tree, dir) = (tempdir().unwrap(), tempdir().unwrap());
    write(tree.path(), "bin/tool", "x");
    write(dir.path(), "mine", "stays");
    let file = dir.path().join("out.tar");
    let open = {
        let file = file.clone();
        move || {
            Ok(Box::pin(tokio::fs::File::from_std(std::fs::File::create(file)?))
                as Pin<Box<dyn tokio::io::AsyncWrite + Send>>)
        }
    };
    let mut offer = Attachables::new();
    offer.export(vec![
        None,
        Some(ExportTarget::Bytes(Box::new(open))),
        Some(ExportTarget::Dir { path: dir.path().join("made"), mirror: false }),
    ]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();

    let metadata = BTreeMap::from([("containerimage.digest".to_owned(), "sha256:00".to_owned())]);
    let mut tar = session.file_send_tar(1, &metadata).unwrap();
    let content = "content".repeat(200_000);
    tar.write_all(content.as_bytes()).await.unwrap();
    tar.finish().await.unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), content);

    let sent =
        session.file_send_dir(2, false, vec![Subtree::open(tree.path()).unwrap()], None).await.unwrap();
    assert_eq!((sent.entries, sent.bytes), (2, 1));
    assert_eq!(paths(&dir.path().join("made")), ["bin", "bin/tool"]);

    let again = session.file_send_tar(1, &metadata).unwrap().finish().await.unwrap_err();
    assert!(again.to_string().contains("already taken"), "{again}");
    let none = session.file_send_tar(0, &metadata).unwrap().finish().await.unwrap_err();
    assert!(none.is_not_found(), "{none}");
    let none =
        session.file_send_dir(0, false, vec![Subtree::open(tree.path()).unwrap()], None).await.unwrap_err();
    assert!(none.is_not_found(), "{none}");
}

#[tokio::test]
async fn a_mirrored_directory_needs_the_whole_listing() {
    let (manager, mut control) = daemon().await;
    let (tree, dir) = (tempdir().unwrap(), tempdir().unwrap());
    write(tree.path(), "new", "x");
    write(dir.path(), "old", "goes");
    let mut offer = Attachables::new();
    offer.export(vec![Some(ExportTarget::Dir { path: dir.path().into(), mirror: true })]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    let refused = session.file_send_dir(0, false, vec![Subtree::open(tree.path()).unwrap()], None).await;
    assert!(refused.is_err());
    assert_eq!(paths(dir.path()), ["old"]);
    session.file_send_dir(0, true, vec![Subtree::open(tree.path()).unwrap()], None).await.unwrap();
    assert_eq!(paths(dir.path()), ["new"]);
}

#[tokio::test]
async fn a_failing_output_fails_the_export() {
    let (manager, mut control) = daemon().await;
    let mut offer = Attachables::new();
    offer.export(vec![Some(ExportTarget::Bytes(Box::new(|| Err(std::io::Error::other("no space here")))))]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    let mut tar = session.file_send_tar(0, &BTreeMap::new()).unwrap();
    // The client may refuse before all is written; what counts is what `finish` says.
    let _ = tar.write_all(&vec![0; 4 << 20]).await;
    let error = tar.finish().await.unwrap_err();
    assert!(error.to_string().contains("no space here"), "{error}");
}

#[tokio::test]
async fn secrets_and_their_absence() {
    let (manager, mut control) = daemon().await;
    let dir = tempdir().unwrap();
    write(dir.path(), "token", "from file");
    let mut offer = Attachables::new();
    offer.secrets(vec![
        Secret::Value { id: "value".into(), value: b"v".to_vec() },
        Secret::File { id: "file".into(), path: dir.path().join("token") },
        Secret::Value { id: "huge".into(), value: vec![0; 600 << 10] },
    ]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    assert_eq!(session.get_secret("value").await.unwrap().unwrap(), b"v");
    assert_eq!(session.get_secret("file").await.unwrap().unwrap(), b"from file");
    assert!(session.get_secret("none").await.unwrap().is_none());
    assert!(matches!(session.get_secret("huge").await, Err(SessionError::Call { .. })));

    let _other = Attachables::new().attach(&mut control, "bare", "").await.unwrap();
    let bare = manager.get("bare").await.unwrap();
    assert!(bare.get_secret("value").await.unwrap().is_none());
    assert!(bare.credentials("registry-1.docker.io").await.unwrap().is_none());
    assert!(bare.token_authority("registry-1.docker.io", b"salt").await.unwrap().is_none());
    assert!(!bare.ssh_check("").await.unwrap());
    assert!(matches!(bare.file_send_tar(0, &BTreeMap::new()), Err(SessionError::Unsupported { .. })));
}

#[tokio::test]
async fn ssh_connections_reach_the_agent() {
    let (manager, mut control) = daemon().await;
    let dir = tempdir().unwrap();
    let socket = dir.path().join("agent");
    let agent = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = agent.accept().await.unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).await.unwrap();
        request.reverse();
        stream.write_all(&request).await.unwrap();
    });
    let mut offer = Attachables::new();
    offer.ssh(vec![Agent { id: "default".into(), socket }]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    assert!(session.ssh_check("").await.unwrap());
    assert!(session.ssh_check("other").await.is_err());

    let (mut ours, theirs) = tokio::io::duplex(64);
    let forward = tokio::spawn(async move { session.ssh_forward("", theirs).await });
    ours.write_all(b"abc").await.unwrap();
    ours.shutdown().await.unwrap();
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, b"cba");
    forward.await.unwrap().unwrap();
}

struct Keys;

#[tonic::async_trait]
impl Auth for Keys {
    async fn credentials(
        &self,
        request: Request<CredentialsRequest>,
    ) -> Result<Response<CredentialsResponse>, Status> {
        match request.into_inner().host.as_str() {
            "broken" => Err(Status::unknown("helper failed")),
            "anonymous" => Ok(Response::new(CredentialsResponse::default())),
            host => Ok(Response::new(CredentialsResponse { username: "u".into(), secret: host.into() })),
        }
    }
    async fn fetch_token(
        &self,
        request: Request<FetchTokenRequest>,
    ) -> Result<Response<FetchTokenResponse>, Status> {
        let token = request.into_inner().scopes.join(",");
        Ok(Response::new(FetchTokenResponse { token, ..Default::default() }))
    }
    async fn get_token_authority(
        &self,
        _: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("off"))
    }
    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unavailable("off"))
    }
}

#[tokio::test]
async fn credentials_come_from_the_client() {
    let (manager, mut control) = daemon().await;
    let mut offer = Attachables::new();
    offer.auth(Keys);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    let expected = Credentials { username: "u".into(), secret: "ghcr.io".into() };
    assert_eq!(session.credentials("ghcr.io").await.unwrap(), Some(expected));
    assert_eq!(session.credentials("anonymous").await.unwrap(), None);
    let error = session.credentials("broken").await.unwrap_err();
    assert_eq!(error.to_string(), "credentials for broken: helper failed");
    assert_eq!(session.token_authority("ghcr.io", b"salt").await.unwrap(), None);
    let request = FetchTokenRequest { scopes: vec!["a".into(), "b".into()], ..Default::default() };
    assert_eq!(session.fetch_token(request).await.unwrap().token, "a,b");
}

/// A peer that swallows everything and says nothing.
#[tokio::test]
async fn a_client_that_stops_answering_is_dropped() {
    let manager = kiln_session::SessionManager::new();
    let mut metadata = tonic::metadata::MetadataMap::new();
    metadata.insert("x-docker-expose-session-uuid", "silent".parse().unwrap());
    metadata.insert("x-buildkit-session-health-custom-timeout", "1000".parse().unwrap());
    let incoming = futures::stream::pending();
    let answers = manager.handle(&metadata, incoming).unwrap();
    let drain = tokio::spawn(answers.for_each(|_| std::future::ready(())));
    let session = manager.get("silent").await.unwrap();
    session.closed().await;
    drain.await.unwrap();
    assert!(manager.try_get("silent").is_none());
}

#[tokio::test]
async fn blobs_go_into_a_clients_layout_whole_or_not_at_all() {
    let (manager, mut control) = daemon().await;
    let dir = tempdir().unwrap();
    let mut offer = Attachables::new();
    offer.content(vec![ContentDir { name: "export".into(), path: dir.path().into() }]);
    let _client = offer.attach(&mut control, "s", "").await.unwrap();
    let session = manager.get("s").await.unwrap();
    let content = vec![7_u8; 3 << 20];
    let hex = "e1a85e01a6bd55ce1bcfffbd02a2a91f3e4abd2d67a2b44d4d8b0a5e8a4f5b26";
    let digest = format!("sha256:{hex}");
    let blob = |digest| NewBlob { reference: "layer-x", digest, size: 3 << 20 };
    let error =
        session.write_blob("export", blob(&digest), content.as_slice()).await.unwrap_err().to_string();
    let digests = error.split_whitespace().filter_map(|word| word.strip_prefix("sha256:"));
    let real = digests.map(|word| word.trim_end_matches(':')).find(|word| *word != hex);
    let real = real.unwrap_or_else(|| panic!("it says what came: {error}"));
    assert!(error.contains("3145728 bytes with digest"), "{error}");
    let blobs = dir.path().join("blobs/sha256");
    assert!(paths(&blobs).is_empty(), "nothing is left");

    let digest = format!("sha256:{real}");
    session.write_blob("export", blob(&digest), content.as_slice()).await.unwrap();
    assert_eq!(std::fs::read(blobs.join(real)).unwrap(), content);
    session.write_blob("export", blob(&digest), tokio::io::empty()).await.expect("it is there");
    assert_eq!(paths(&blobs), [real]);
    let error = session.write_blob("other", blob(&digest), content.as_slice()).await.unwrap_err();
    assert!(error.is_not_found(), "{error}");
    let outside = session.write_blob("export", blob("sha256:../../x"), content.as_slice()).await.unwrap_err();
    assert_eq!(outside.code(), Some(Code::InvalidArgument));
}
