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
            let path = context.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
            std::fs::write(path, text).expect("write");
        }
        let out = tempfile::tempdir().expect("temporary directory");
        let share = |name: &str| SharedDir { name: name.into(), path: context.path().to_owned() };
        let mut attachables = Attachables::new();
        attachables.share(vec![share("context"), share("dockerfile")]);
        let archive = std::process::Command::new("tar").arg("-cC").arg(context.path()).arg(".").output();
        attachables.upload("archive", std::io::Cursor::new(archive.expect("tar").stdout));
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
            ("Foreign", "# check=skip=all\n#syntax=127.0.0.1:1/foobar\nFROM scratch\n"),
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
    let unknown = "failed to resolve source metadata for 127.0.0.1:1/foobar:latest: ";
    assert!(error.message().starts_with(unknown), "{}", error.message());
    let found = details(&error);
    let source = &found.iter().find(|(name, _)| name == "errdefs.Source+json").expect("a source").1;
    assert_eq!(source["ranges"], json!([{ "start": { "line": 2 }, "end": { "line": 2 } }]));
    assert!(source["info"]["definition"].is_object());

    let error =
        client.build(&daemon, "three", &[("filename", "None")]).await.0.expect_err("no such Dockerfile");
    assert_eq!(error.message(), "failed to read dockerfile: open None: no such file or directory");
    let error = client
        .build(&daemon, "four", &[("requestid", "frontend.convertllb")])
        .await
        .0
        .expect_err("a subrequest");
    assert_eq!(
        (error.code(), error.message()),
        (Code::Unimplemented, "unsupported: subrequest frontend.convertllb")
    );
    assert_eq!(details(&error)[0].1["name"], "frontend.convertllb");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_an_archive_is_built() {
    let mut daemon = Daemon::start().await;
    let files = [("Dockerfile", "FROM scratch\nCOPY a /\n"), ("a", "outside"), ("sub/dir/a", "inside")];
    let client = Client::attach(&daemon, &files).await;
    let opts = [("context", "http://buildkit-session/archive"), ("contextsubdir", "sub/dir")];
    client.build(&daemon, "one", &opts).await.0.expect("built");
    assert_eq!(read(&client.written(), "a"), "inside");
    let error = client.build(&daemon, "two", &opts).await.0.expect_err("it was sent once");
    assert!(error.message().contains("no upload archive"), "{}", error.message());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn findings_that_stop_a_build_are_shown() {
    let mut daemon = Daemon::start().await;
    let file = "# check=error=true\nFROM scratch\nMAINTAINER x\n";
    let client = Client::attach(&daemon, &[("Dockerfile", file)]).await;
    let (error, status) = client.build(&daemon, "one", &[]).await;
    assert!(error.expect_err("a finding").message().contains("lint violation found"));
    let found = status.iter().flat_map(|message| &message.warnings).next().expect("a warning");
    assert!(found.short.starts_with(b"MaintainerDeprecated: "));
    daemon.stop().await;
}

/// What the frontend answers a client that drives it.
async fn ask(
    daemon: &Daemon,
    client: &Client,
    id: &str,
    opts: &[(&str, &str)],
    inputs: HashMap<String, kiln_proto::pb::Definition>,
) -> Result<GatewayResult, Status> {
    let mut control = daemon.control().await;
    let exporter = Exporter { r#type: "local".into(), attrs: HashMap::new() };
    let request = SolveRequest {
        r#ref: id.into(),
        session: client.id.clone(),
        exporters: vec![exporter],
        ..SolveRequest::default()
    };
    let solve = tokio::spawn(async move { control.solve(request).await });
    let mut gateway = daemon.gateway().await;
    let ask = gateway::SolveRequest {
        frontend: "dockerfile.v0".into(),
        frontend_opt: attrs(opts),
        frontend_inputs: inputs,
        allow_result_return: true,
        allow_result_array_ref: true,
        ..gateway::SolveRequest::default()
    };
    let answer = gateway.solve(crate::common::for_build(id, ask)).await;
    let answer = answer.map(|answer| answer.into_inner().result.expect("result"));
    let back = ReturnRequest {
        result: answer.clone().ok(),
        error: answer.as_ref().err().map(|status| rpc::Status {
            code: status.code() as i32,
            message: status.message().into(),
            details: Vec::new(),
        }),
    };
    gateway.r#return(crate::common::for_build(id, back)).await.expect("return");
    let ended = solve.await.expect("task");
    assert_eq!(ended.is_ok(), answer.is_ok(), "{ended:?}");
    answer
}

/// A file that asks for things.
const GIVEN: &str = "# A is first
ARG A=1
FROM scratch AS base
ARG B
FROM base AS unused
ARG C
# made is the product
FROM base AS made
ARG A
RUN --mount=type=secret,id=token,required true
";

#[tokio::test(flavor = "multi_thread")]
async fn questions_about_a_dockerfile() {
    let mut daemon = Daemon::start().await;
    let file = "# base is first\nFROM scratch AS base\nMAINTAINER x\nFROM base\nCOPY a /\n";
    let client = Client::attach(
        &daemon,
        &[("Dockerfile", file), ("Bad", "FROM scratch\nEXPOSE foo\n"), ("Given", GIVEN)],
    )
    .await;
    let answer = async |id: &str, opts: &[(&str, &str)]| {
        let caps = [("frontend.caps", "moby.buildkit.frontend.subrequests+forward")];
        let answer = ask(&daemon, &client, id, &[&caps, opts].concat(), HashMap::new()).await.expect(id);
        assert_eq!(answer.metadata["version"], b"1.0.0");
        let json: Value = serde_json::from_slice(&answer.metadata["result.json"]).expect("JSON");
        (
            json,
            answer.metadata.get("result.statuscode").map(|code| String::from_utf8_lossy(code).into_owned()),
        )
    };
    let (json, status) = answer("one", &[("requestid", "frontend.lint")]).await;
    assert_eq!(status.as_deref(), Some("1"));
    let warning = &json["warnings"][0];
    assert_eq!(
        (&warning["ruleName"], json["warnings"].as_array().map(Vec::len)),
        (&"MaintainerDeprecated".into(), Some(1))
    );
    assert_eq!(warning["location"]["ranges"][0]["start"]["line"], 3);
    assert_eq!(json["sources"][0]["filename"], "Dockerfile");
    assert!(json["buildError"].is_null());

    let (json, status) = answer("two", &[("requestid", "frontend.lint"), ("filename", "Bad")]).await;
    assert_eq!(status.as_deref(), Some("1"));
    assert_eq!(json["buildError"]["message"], "invalid containerPort: foo");
    assert_eq!(json["buildError"]["location"]["ranges"][0]["start"]["line"], 2);

    let (json, _) = answer("three", &[("requestid", "frontend.targets")]).await;
    let [base, last] = json["targets"].as_array().expect("targets").as_slice() else { panic!("{json}") };
    assert_eq!((&base["name"], &base["description"]), (&"base".into(), &"is first".into()));
    assert_eq!((&last["base"], &last["default"]), (&"base".into(), &true.into()));

    let opts =
        [("requestid", "frontend.outline"), ("filename", "Given"), ("target", "made"), ("build-arg:B", "2")];
    let (json, _) = answer("five", &opts).await;
    let places = |value: &Value| value["location"]["ranges"][0]["start"]["line"].as_i64();
    assert_eq!((&json["name"], &json["description"]), (&"made".into(), &"is the product".into()));
    assert_eq!(places(&json["args"][0]), Some(2), "{json}");
    assert_eq!(json["args"][1]["value"], "2");
    assert_eq!(json["secrets"][0]["required"], true);
    let text = ask(&daemon, &client, "six", &opts, HashMap::new()).await.expect("six").metadata["result.txt"]
        .clone();
    let expected = concat!(
        "TARGET:      made\nDESCRIPTION: is the product\n\n",
        "BUILD ARG   VALUE   DESCRIPTION\nA           1       is first\nB           2\n\n",
        "SECRET   REQUIRED\ntoken    true\n\n",
    );
    assert_eq!(String::from_utf8(text).expect("text"), expected);

    let (json, _) = answer("four", &[("requestid", "frontend.subrequests.describe")]).await;
    assert!(json.as_array().expect("a list").iter().any(|entry| entry["name"] == "frontend.targets"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_of_builds_are_contexts_of_others() {
    let mut daemon = Daemon::start().await;
    let client =
        Client::attach(&daemon, &[("Dockerfile", "FROM base\nCOPY --from=other /made /copied\n")]).await;
    let (made, _) = crate::common::file("/made", "before");
    // {"config":{"User":"maker"},"os":"linux","architecture":"amd64","rootfs":{"type":"layers"}}
    let config = "eyJjb25maWciOnsiVXNlciI6Im1ha2VyIn0sIm9zIjoibGludXgiLCJhcmNoaXRlY3R1cmUiOiJhbWQ2NCIsInJvb3RmcyI6eyJ0eXBlIjoibGF5ZXJzIn19";
    let metadata = format!(r#"{{"containerimage.config":"{config}"}}"#);
    let opts = [
        ("context:base", "input:0-base"),
        ("context:other", "input:0-base"),
        ("input-metadata:0-base", metadata.as_str()),
        ("frontend.caps", "moby.buildkit.frontend.contexts+forward"),
    ];
    let inputs = HashMap::from([("0-base".to_owned(), made.clone())]);
    let answer = ask(&daemon, &client, "one", &opts, inputs).await.expect("built");
    let config: Value = serde_json::from_slice(&answer.metadata["containerimage.config"]).expect("JSON");
    assert_eq!(config["config"]["User"], "maker");
    assert_eq!(read(&client.written(), "made"), "before");
    assert_eq!(read(&client.written(), "copied"), "before");
    let error = ask(&daemon, &client, "two", &opts, HashMap::new()).await.expect_err("no such input");
    assert!(error.message().contains("invalid input 0-base for base"), "{}", error.message());
    let layout = [("context:base", "oci-layout://store@sha256:00")];
    let error = ask(&daemon, &client, "three", &layout, HashMap::new()).await.expect_err("a layout");
    assert!(error.message().contains("could not parse oci-layout reference"), "{}", error.message());

    // The Dockerfile, too.
    let (file, _) = crate::common::file("/Dockerfile", "FROM scratch\nCOPY --from=other /made /alone\n");
    let inputs = HashMap::from([("0-base".to_owned(), made), ("dockerfile".to_owned(), file)]);
    ask(&daemon, &client, "four", &[("context:other", "input:0-base")], inputs).await.expect("built");
    assert_eq!(read(&client.written(), "alone"), "before");
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
