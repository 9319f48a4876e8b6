//! The built-in Dockerfile frontend through the socket, with a client's session.

use std::collections::HashMap;
use std::path::Path;

use crate::common::Daemon;
use kiln_proto::control::{Exporter, SolveRequest, SolveResponse, StatusResponse};
use kiln_proto::gateway::{PingRequest, Result as GatewayResult, ReturnRequest, result};
use kiln_proto::{gateway, rpc};
use kiln_session::client::{Attachables, ClientSession, ExportTarget, SharedDir};
use prost::Message;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::{Code, Status};

/// A client with a build context and a place for output.
struct Client {
    context: TempDir,
    out: TempDir,
    session: ClientSession,
    id: String,
}

impl Client {
    async fn attach(daemon: &Daemon, files: &[(&str, &str)]) -> Self {
        let context = tempfile::tempdir().expect("temporary directory");
        for (path, text) in files {
            std::fs::write(context.path().join(path), text).expect("write");
        }
        let out = tempfile::tempdir().expect("temporary directory");
        let share = |name: &str| SharedDir { name: name.into(), path: context.path().to_owned() };
        let mut attachables = Attachables::new();
        attachables.share(vec![share("context"), share("dockerfile")]);
        let target = ExportTarget::Dir { path: out.path().join("tree"), mirror: false };
        attachables.export(vec![Some(target)]);
        let id = kiln_session::new_id();
        let mut control = daemon.control().await;
        let session = attachables.attach(&mut control, &id, "test").await.expect("attach");
        Self { context, out, session, id }
    }

    /// Builds with the frontend in the daemon; the result goes to the output directory.
    async fn build(
        &self,
        daemon: &Daemon,
        id: &str,
        opts: &[(&str, &str)],
    ) -> (Result<SolveResponse, Status>, Vec<StatusResponse>) {
        let request = SolveRequest {
            r#ref: id.into(),
            session: self.id.clone(),
            frontend: "dockerfile.v0".into(),
            frontend_attrs: attrs(opts),
            exporters: vec![Exporter { r#type: "local".into(), attrs: HashMap::new() }],
            ..SolveRequest::default()
        };
        daemon.build(request).await
    }

    fn written(&self) -> std::path::PathBuf {
        self.out.path().join("tree")
    }
}

fn attrs(opts: &[(&str, &str)]) -> HashMap<String, String> {
    opts.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn names(status: &[StatusResponse]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for vertex in status.iter().flat_map(|message| &message.vertexes) {
        if !names.contains(&vertex.name) {
            names.push(vertex.name.clone());
        }
    }
    names
}

fn cached(status: &[StatusResponse], name: &str) -> bool {
    let last = status.iter().flat_map(|message| &message.vertexes).rfind(|vertex| vertex.name == name);
    last.is_some_and(|vertex| vertex.cached)
}

fn details(status: &Status) -> Vec<(String, Value)> {
    let details = rpc::Status::decode(status.details()).expect("details").details;
    details
        .into_iter()
        .map(|any| {
            let name = any.type_url.rsplit('/').next().unwrap_or_default().to_owned();
            (name, serde_json::from_slice(&any.value).expect("JSON"))
        })
        .collect()
}

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

const DOCKERFILE: &str = "FROM scratch AS base\nCOPY a /kept\nFROM base\nCOPY b .dockerignore /\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerfile_becomes_files_at_the_client() {
    let mut daemon = Daemon::start().await;
    let files =
        [("Dockerfile", DOCKERFILE), ("a", "1"), ("b", "2"), ("junk", "3"), (".dockerignore", "junk\n")];
    let client = Client::attach(&daemon, &files).await;
    let (response, status) = client.build(&daemon, "one", &[]).await;
    response.expect("built");
    assert_eq!(read(&client.written(), "kept"), "1");
    assert_eq!(read(&client.written(), "b"), "2");
    let steps = names(&status);
    for step in [
        "[internal] load build definition from Dockerfile",
        "[internal] load .dockerignore",
        "[internal] load build context",
        "[base 1/1] COPY a /kept",
        "[stage-1 1/1] COPY b .dockerignore /",
        "exporting to client directory",
    ] {
        assert!(steps.iter().any(|name| name == step), "{step} is not in {steps:?}");
    }

    // What was not read may change; what was read may not.
    std::fs::write(client.context.path().join("junk"), "changed").expect("write");
    let (response, status) = client.build(&daemon, "two", &[]).await;
    response.expect("built again");
    assert!(cached(&status, "[stage-1 1/1] COPY b .dockerignore /"), "{status:?}");
    std::fs::write(client.context.path().join("b"), "new").expect("write");
    let (response, status) = client.build(&daemon, "three", &[]).await;
    response.expect("built with the change");
    assert!(cached(&status, "[base 1/1] COPY a /kept"), "{status:?}");
    assert!(!cached(&status, "[stage-1 1/1] COPY b .dockerignore /"));
    assert_eq!(read(&client.written(), "b"), "new");

    let (response, _) = client.build(&daemon, "four", &[("target", "base")]).await;
    response.expect("built one stage");
    daemon.stop().await;
    client.session.closed().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_show_the_lines() {
    let mut daemon = Daemon::start().await;
    let client = Client::attach(
        &daemon,
        &[
            ("Dockerfile", "FROM scratch\nCOPPY a /\n"),
            ("Bad", "FROM scratch\nCOPY nope /\n"),
            ("Foreign", "# check=skip=all\n#syntax=foobar\nFROM scratch\n"),
        ],
    )
    .await;
    let error = client.build(&daemon, "one", &[]).await.0.expect_err("not an instruction");
    assert_eq!(
        error.message(),
        "dockerfile parse error on line 2: unknown instruction: COPPY (did you mean COPY?)"
    );
    let found = details(&error);
    let source = &found.iter().find(|(name, _)| name == "errdefs.Source+json").expect("a source").1;
    assert_eq!(source["info"]["filename"], "Dockerfile");
    assert_eq!(source["ranges"][0]["start"]["line"], 2);
    assert!(
        found.iter().any(|(name, value)| name == "errdefs.Frontend+json" && value["name"] == "dockerfile.v0")
    );

    let error = client.build(&daemon, "two", &[("filename", "Bad")]).await.0.expect_err("no such file");
    assert!(error.message().ends_with("\"/nope\": not found"), "{}", error.message());
    let found = details(&error);
    let source = &found.iter().find(|(name, _)| name == "errdefs.Source+json").expect("a source").1;
    assert_eq!(
        (&source["info"]["filename"], &source["ranges"][0]["start"]["line"]),
        (&"Bad".into(), &2.into())
    );
    assert!(found.iter().any(|(name, _)| name == "errdefs.Vertex+json"));

    let error =
        client.build(&daemon, "syntax", &[("filename", "Foreign")]).await.0.expect_err("no such frontend");
    assert_eq!(error.message(), "unsupported: frontend image foobar");
    let found = details(&error);
    let source = &found.iter().find(|(name, _)| name == "errdefs.Source+json").expect("a source").1;
    assert_eq!(source["ranges"], json!([{ "start": { "line": 2 }, "end": { "line": 2 } }]));
    assert!(source["info"]["definition"].is_object());

    let error =
        client.build(&daemon, "three", &[("filename", "None")]).await.0.expect_err("no such Dockerfile");
    assert_eq!(error.message(), "failed to read dockerfile: open None: no such file or directory");
    let error =
        client.build(&daemon, "four", &[("requestid", "frontend.lint")]).await.0.expect_err("a subrequest");
    assert_eq!(
        (error.code(), error.message()),
        (Code::Unimplemented, "unsupported: subrequest frontend.lint")
    );
    assert_eq!(details(&error)[0].1["name"], "frontend.lint");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_drives_the_frontend_itself() {
    let mut daemon = Daemon::start().await;
    let client =
        Client::attach(&daemon, &[("Dockerfile", DOCKERFILE), ("a", "1"), ("b", "2"), (".dockerignore", "")])
            .await;
    let mut control = daemon.control().await;
    let session = client.id.clone();
    let solve = tokio::spawn(async move {
        let exporter = Exporter { r#type: "local".into(), attrs: HashMap::new() };
        let request =
            SolveRequest { r#ref: "g".into(), session, exporters: vec![exporter], ..SolveRequest::default() };
        control.solve(request).await
    });
    let mut gateway = daemon.gateway().await;
    gateway.ping(crate::common::for_build("g", PingRequest {})).await.expect("ping");
    let ask = gateway::SolveRequest {
        frontend: "gateway.v0".into(),
        frontend_opt: attrs(&[("source", "docker/dockerfile:1"), ("multi-platform", "true")]),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..gateway::SolveRequest::default()
    };
    let answer = gateway.solve(crate::common::for_build("g", ask)).await.expect("solve").into_inner();
    let answer = answer.result.expect("result");
    let Some(result::Result::Refs(refs)) = &answer.result else { panic!("a map of platforms: {answer:?}") };
    let platform = refs.refs.keys().next().expect("one platform").clone();
    assert!(answer.metadata.contains_key(&format!("containerimage.config/{platform}")));
    let back = ReturnRequest { result: Some(GatewayResult { ..answer }), error: None };
    gateway.r#return(crate::common::for_build("g", back)).await.expect("return");
    solve.await.expect("task").expect("built");
    assert_eq!(read(&client.written().join(platform.replace('/', "_")), "kept"), "1");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_ends_with_its_session() {
    let mut daemon = Daemon::start().await;
    let client = Client::attach(&daemon, &[]).await;
    let mut control = daemon.control().await;
    let session = client.id.clone();
    let solve = tokio::spawn(async move {
        control.solve(SolveRequest { r#ref: "s".into(), session, ..SolveRequest::default() }).await
    });
    daemon
        .gateway()
        .await
        .ping(crate::common::for_build("s", PingRequest {}))
        .await
        .expect("the build is there");
    client.session.close();
    let error = solve.await.expect("task").expect_err("nobody is left to build for");
    assert_eq!(error.code(), Code::Cancelled);
    assert!(error.message().ends_with("context canceled"), "{}", error.message());
    daemon.stop().await;
}
