//! What a client that is the frontend asks about sources, and the policies that it brings along.

use std::process::Command;

use hyper_util::rt::TokioIo;
use kiln_integration::tools::run;
use kiln_integration::{Kiln, WebAnswer, WebServer};
use kiln_proto::control::SolveRequest;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::gateway::checksum_request::ChecksumAlgo;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::gateway::{
    self, ChecksumRequest, PingRequest, ReadFileRequest, ResolveSourceHttpRequest, ResolveSourceHttpResponse,
    ResolveSourceMetaRequest, ReturnRequest, result,
};
use kiln_proto::policy::{Policy, PolicyAction, Rule, Selector, Update};
use kiln_proto::{llb, pb};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

const BUILD: &str = "asking";

async fn connect(kiln: &Kiln) -> Channel {
    let socket = kiln.socket();
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .expect("the daemon listens")
}

fn of_build<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("buildkit-controlapi-buildid", BUILD.parse().expect("a header"));
    request
}

fn source(identifier: &str, attrs: &[(&str, &str)]) -> pb::SourceOp {
    let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    pb::SourceOp { identifier: identifier.into(), attrs }
}

/// A build whose frontend is the test.
struct Build {
    gateway: LlbBridgeClient<Channel>,
    solve: tokio::task::JoinHandle<Result<(), Status>>,
}

impl Build {
    async fn start(kiln: &Kiln) -> Self {
        let mut control = ControlClient::new(connect(kiln).await);
        let solve = tokio::spawn(async move {
            control.solve(SolveRequest { r#ref: BUILD.into(), ..SolveRequest::default() }).await.map(drop)
        });
        Self { gateway: LlbBridgeClient::new(connect(kiln).await), solve }
    }

    async fn capabilities(&mut self) -> Vec<String> {
        let pong = self.gateway.ping(of_build(PingRequest {})).await.expect("ping").into_inner();
        pong.frontend_api_caps.into_iter().map(|cap| cap.id).collect()
    }

    async fn ask(
        &mut self,
        source: pb::SourceOp,
        checksum_request: Option<ChecksumRequest>,
    ) -> Result<ResolveSourceHttpResponse, Status> {
        let request = ResolveSourceMetaRequest {
            source: Some(source.clone()),
            http: Some(ResolveSourceHttpRequest { checksum_request }),
            ..ResolveSourceMetaRequest::default()
        };
        let answer = self.gateway.resolve_source_meta(of_build(request)).await?.into_inner();
        assert_eq!(answer.source, Some(source));
        Ok(answer.http.expect("what is known of a file"))
    }

    /// Reads a file of what a source is under policies.
    async fn read(
        &mut self,
        source: pb::SourceOp,
        file: &str,
        source_policies: Vec<Policy>,
    ) -> Result<Vec<u8>, Status> {
        let mut builder = llb::Builder::new();
        let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
        let digest = builder.add(&op, pb::OpMetadata::default());
        let request = gateway::SolveRequest {
            definition: Some(builder.finish(&pb::Input { digest, index: 0 })),
            allow_result_return: true,
            allow_result_array_ref: true,
            source_policies,
            ..gateway::SolveRequest::default()
        };
        let answer = self.gateway.solve(of_build(request)).await?.into_inner();
        let Some(result::Result::Ref(reference)) = answer.result.expect("a result").result else {
            panic!("a single ref");
        };
        let request =
            ReadFileRequest { r#ref: reference.id, file_path: file.into(), ..ReadFileRequest::default() };
        Ok(self.gateway.read_file(of_build(request)).await?.into_inner().data)
    }

    async fn end(mut self) {
        let result = gateway::Result::default();
        let request = ReturnRequest { result: Some(result), ..ReturnRequest::default() };
        self.gateway.r#return(of_build(request)).await.expect("accepted");
        self.solve.await.expect("no panic").expect("the build succeeds");
    }
}

/// What coreutils make of a text.
fn sum(algorithm: &str, text: &str) -> String {
    let dir = TempDir::new().expect("temporary directory");
    std::fs::write(dir.path().join("f"), text).expect("write");
    let out = run(Command::new(format!("{algorithm}sum")).arg(dir.path().join("f")));
    let out = String::from_utf8_lossy(&out).into_owned();
    format!("{algorithm}:{}", out.split_whitespace().next().expect("a sum"))
}

/// A server that has something else each time, and says nothing by which that could be noticed.
fn fickle() -> WebServer {
    let count = std::sync::atomic::AtomicUsize::new(1);
    WebServer::start(move |request| {
        if request.path != "/file" {
            return WebAnswer { status: 404, ..WebAnswer::default() };
        }
        let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let headers = vec![
            ("content-disposition", "attachment; filename=\"my file\"".to_owned()),
            ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT".to_owned()),
        ];
        WebAnswer { status: 200, headers, body: format!("content {number}").into(), length: None }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_of_the_web_is_what_it_was_said_to_be() {
    let mut kiln = Kiln::with_mirror("127.0.0.1:1");
    kiln.start();
    let web = fickle();
    let url = format!("http://{}/file", web.address);
    let mut build = Build::start(&kiln).await;
    let capabilities = build.capabilities().await;
    assert!(capabilities.iter().any(|id| id == "source.metaresolver.http.checksumrequest"));

    let known = build.ask(source(&url, &[]), None).await.expect("known");
    assert_eq!((known.checksum, known.filename.as_str()), (sum("sha256", "content 1"), "my file"));
    assert_eq!(known.last_modified.map(|time| time.seconds), Some(784_111_777));
    assert_eq!(known.checksum_response, None);
    for (algo, name) in
        [(ChecksumAlgo::Sha256, "sha256"), (ChecksumAlgo::Sha384, "sha384"), (ChecksumAlgo::Sha512, "sha512")]
    {
        let request = ChecksumRequest { algo: algo.into(), suffix: b" and more".into() };
        let known = build.ask(source(&url, &[]), Some(request)).await.expect("known");
        let answer = known.checksum_response.expect("a checksum");
        assert_eq!((answer.digest, &answer.suffix[..]), (sum(name, "content 1 and more"), &b" and more"[..]));
    }
    let read = build.read(source(&url, &[]), "my file", Vec::new()).await.expect("built");
    assert_eq!(String::from_utf8_lossy(&read), "content 1", "what was asked about is what is built");
    assert_eq!(web.requests().len(), 1);

    // What a definition promises is not asked for, unless it is to be hashed.
    let promised = sum("sha256", "content 2");
    let checked = source(&url, &[("http.checksum", &promised)]);
    let known = build.ask(checked.clone(), None).await.expect("promised");
    assert_eq!((known.checksum.as_str(), known.filename.as_str()), (promised.as_str(), "file"));
    assert_eq!((known.last_modified, web.requests().len()), (None, 0));
    let request = ChecksumRequest { algo: ChecksumAlgo::Sha512.into(), suffix: Vec::new() };
    let known = build.ask(checked.clone(), Some(request.clone())).await.expect("kept");
    assert_eq!(known.checksum_response.expect("a checksum").digest, sum("sha512", "content 2"));
    let error = build.ask(checked, Some(request)).await.expect_err("broken");
    assert!(error.message().contains("digest mismatch"), "{}", error.message());

    for (request, text) in [
        (ChecksumRequest { suffix: vec![0; 4097], ..Default::default() }, "suffix exceeds max size 4096"),
        (ChecksumRequest { algo: 99, ..Default::default() }, "unsupported checksum algorithm 99"),
    ] {
        let error = build.ask(source(&url, &[]), Some(request)).await.expect_err(text);
        assert!(error.message().contains(text), "{}", error.message());
    }
    let missing = source(&format!("http://{}/missing", web.address), &[]);
    let error = build.ask(missing, None).await.expect_err("missing");
    assert!(error.message().contains("invalid response status 404"), "{}", error.message());
    build.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_brings_its_own_policies() {
    let mut kiln = Kiln::with_mirror("127.0.0.1:1");
    kiln.start();
    let web = fickle();
    let url = format!("http://{}/file", web.address);
    let mut build = Build::start(&kiln).await;
    let policy = |action: PolicyAction, identifier: &str, update: &str| Policy {
        version: 1,
        rules: vec![Rule {
            action: action as i32,
            selector: Some(Selector { identifier: identifier.into(), ..Selector::default() }),
            updates: Some(Update { identifier: update.into(), ..Update::default() }),
        }],
    };
    let deny = policy(PolicyAction::Deny, "http://*", "");
    let error = build.read(source(&url, &[]), "my file", vec![deny.clone()]).await.expect_err("denied");
    assert!(error.message().contains("source denied by policy"), "{}", error.message());
    let request = ResolveSourceMetaRequest {
        source: Some(source(&url, &[])),
        source_policies: vec![deny.clone()],
        ..ResolveSourceMetaRequest::default()
    };
    let error = build.gateway.resolve_source_meta(of_build(request)).await.expect_err("denied");
    assert!(error.message().contains("source denied by policy"), "{}", error.message());
    let allow = policy(PolicyAction::Allow, "*", "");
    let error = build.read(source(&url, &[]), "my file", vec![deny, allow]).await.expect_err("denied");
    assert!(error.message().contains("source denied by policy"), "{}", error.message());

    let error = {
        let request = gateway::ResolveImageConfigRequest {
            r#ref: "example.com/image:1".into(),
            source_policies: vec![policy(PolicyAction::Deny, "docker-image://example.com/*", "")],
            ..Default::default()
        };
        build.gateway.resolve_image_config(of_build(request)).await.expect_err("denied")
    };
    assert!(error.message().contains("source denied by policy"), "{}", error.message());

    let elsewhere = policy(PolicyAction::Convert, "http://nowhere.invalid/x", &url);
    let other = source("http://nowhere.invalid/x", &[]);
    let read = build.read(other, "my file", vec![elsewhere]).await.expect("converted");
    assert_eq!(String::from_utf8_lossy(&read), "content 1");
    // The next call has none of them.
    build.read(source(&url, &[]), "my file", Vec::new()).await.expect("allowed");
    build.end().await;
}
