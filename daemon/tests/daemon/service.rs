//! The daemon through its socket, with builds that need no sandbox and no network.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::common::{Daemon, chain, file, for_build, request};
use kiln_proto::content::ListContentRequest;
use kiln_proto::content::content_client::ContentClient;
use kiln_proto::control::{
    BuildHistoryEventType, BuildHistoryRequest, DiskUsageRequest, Exporter, InfoRequest, ListWorkersRequest,
    PruneRequest, SolveRequest, StatusRequest, StatusResponse, UpdateBuildHistoryRequest, Vertex,
};
use kiln_proto::gateway::{
    PingRequest, ReadDirRequest, ReadFileRequest, Result as GatewayResult, ReturnRequest, StatFileRequest,
    WarnRequest, result,
};
use kiln_proto::{content, gateway, rpc};
use prost::Message;
use tonic::{Code, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

fn vertex<'a>(messages: &'a [StatusResponse], digest: &str) -> Vec<&'a Vertex> {
    messages.iter().flat_map(|message| &message.vertexes).filter(|vertex| vertex.digest == digest).collect()
}

async fn history(daemon: &Daemon, id: &str) -> Vec<kiln_proto::control::BuildHistoryEvent> {
    let request =
        BuildHistoryRequest { r#ref: id.into(), early_exit: true, ..BuildHistoryRequest::default() };
    let mut stream =
        daemon.control().await.listen_build_history(request).await.expect("history").into_inner();
    let mut events = Vec::new();
    while let Some(event) = stream.message().await.expect("event") {
        events.push(event);
    }
    events
}

/// What a record names, in one piece.
async fn blob(daemon: &Daemon, digest: &str) -> Vec<u8> {
    let read = content::ReadContentRequest { digest: digest.into(), ..Default::default() };
    let mut pieces = ContentClient::new(daemon.channel().await).read(read).await.expect("read").into_inner();
    pieces.message().await.expect("piece").expect("one").data
}

#[tokio::test(flavor = "multi_thread")]
async fn says_who_it_is() {
    let mut daemon = Daemon::start().await;
    let mut control = daemon.control().await;
    let info = control.info(InfoRequest {}).await.expect("info").into_inner();
    assert_eq!(info.buildkit_version.expect("version").version, "v0.31.0+kiln");
    let worker = |filter: &str| ListWorkersRequest { filter: vec![filter.to_owned()] };
    let workers = control.list_workers(worker("")).await.expect("workers").into_inner().record;
    assert_eq!(workers.len(), 1);
    assert!(!workers[0].platforms.is_empty());
    assert_eq!(workers[0].id.len(), 25);
    assert_eq!(workers[0].labels["org.mobyproject.buildkit.worker.executor"], "oci");
    let none = control.list_workers(worker("id==other")).await.expect("workers").into_inner();
    assert!(none.record.is_empty());
    let bad = control.list_workers(worker("id==\"x")).await.expect_err("malformed filter");
    assert_eq!(bad.code(), Code::InvalidArgument);

    let id = workers[0].id.clone();
    drop(control);
    daemon.stop().await;
    daemon.restart().await;
    let again = daemon.control().await.list_workers(worker("")).await.expect("workers").into_inner();
    assert_eq!(again.record[0].id, id, "the worker keeps its id");
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn describes_its_services() {
    let mut daemon = Daemon::start().await;
    let ask = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..ServerReflectionRequest::default()
    };
    let mut client = ServerReflectionClient::new(daemon.channel().await);
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([ask])).await.expect("v1").into_inner();
    let answer = answers.message().await.expect("an answer").expect("one").message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["moby.buildkit.v1.Control", "moby.buildkit.v1.frontend.LLBBridge", "grpc.health.v1.Health"] {
        assert!(names.iter().any(|listed| listed == name), "{name}: {names:?}");
    }
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_in_the_record_of_their_build() {
    let mut daemon = Daemon::start().await;
    let exporter = |attrs: &[(&str, &str)]| Exporter {
        r#type: "image".into(),
        attrs: attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
    };
    let exporters = vec![exporter(&[]), exporter(&[("oci-mediatypes", "false")])];
    let request = SolveRequest { exporters, ..request("images", chain(&[("/a", "1")]).0) };
    let response = daemon.build(request).await.0.expect("built").exporter_response;
    let record = history(&daemon, "images").await.remove(0).record.expect("record");
    let result = record.result.expect("result");
    let types: Vec<_> = result
        .results
        .values()
        .map(|image| image.media_type.clone())
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let manifests = [
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
    ];
    assert_eq!(types, manifests);
    assert_eq!(result.result_deprecated.as_ref(), result.results.get(&0));
    assert_eq!(result.results[&1].digest, response["containerimage.digest"]);
    // What the descriptor names can be read.
    let manifest = blob(&daemon, &result.results[&0].digest).await;
    assert_eq!(manifest.len() as i64, result.results[&0].size);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn builds_and_remembers() {
    let mut daemon = Daemon::start().await;
    let (definition, digest) = chain(&[("/a", "1"), ("/b", "2")]);
    let (response, status) = daemon.build(request("one", definition.clone())).await;
    response.expect("the build succeeds");
    let seen = vertex(&status, &digest);
    assert!(seen[0].started.is_none(), "announced first");
    let last = seen.last().expect("seen");
    assert!(last.completed.is_some() && !last.cached && last.error.is_empty(), "{last:?}");
    assert_eq!(last.name, "mkfile /b");

    let (response, status) = daemon.build(request("two", definition.clone())).await;
    response.expect("the build succeeds again");
    assert!(vertex(&status, &digest).last().is_some_and(|vertex| vertex.cached));

    daemon.stop().await;
    daemon.restart().await;
    let (response, status) = daemon.build(request("three", definition)).await;
    response.expect("the build succeeds after a restart");
    assert!(vertex(&status, &digest).last().is_some_and(|vertex| vertex.cached));

    let events = history(&daemon, "one").await;
    assert_eq!(events.len(), 1);
    let record = events[0].record.clone().expect("record");
    assert_eq!(events[0].r#type, BuildHistoryEventType::Complete as i32);
    assert_eq!((record.num_total_steps, record.num_completed_steps, record.num_cached_steps), (2, 2, 0));
    // Nobody has to ask for provenance to find it later.
    let [provenance] = &record.result.as_ref().expect("result").attestations[..] else { panic!("one") };
    assert_eq!(provenance.annotations["in-toto.io/predicate-type"], "https://slsa.dev/provenance/v1");
    let predicate: serde_json::Value =
        serde_json::from_slice(&blob(&daemon, &provenance.digest).await).expect("JSON");
    assert_eq!(predicate["runDetails"]["metadata"]["invocationId"], "one");
    let steps = &predicate["buildDefinition"]["internalParameters"]["buildConfig"]["llbDefinition"];
    assert_eq!(steps.as_array().expect("steps").len(), 3);
    let mut stream = daemon
        .control()
        .await
        .status(StatusRequest { r#ref: "one".into() })
        .await
        .expect("replayed from the history")
        .into_inner();
    let replayed = stream.message().await.expect("message").expect("log");
    assert!(replayed.vertexes.iter().any(|vertex| vertex.digest == digest));
    let delete = UpdateBuildHistoryRequest { r#ref: "one".into(), delete: true, ..Default::default() };
    daemon.control().await.update_build_history(delete).await.expect("delete");
    assert!(history(&daemon, "one").await.is_empty());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refuses_before_it_builds() {
    let mut daemon = Daemon::start().await;
    let (definition, digest) = file("/a", "1");
    let exporter = Exporter { r#type: "floppy".into(), ..Exporter::default() };
    let refused = SolveRequest { exporters: vec![exporter], ..request("x", definition.clone()) };
    let (response, status) = daemon.build(refused).await;
    assert_eq!(response.expect_err("no such exporter").message(), "exporter \"floppy\" could not be found");
    assert!(vertex(&status, &digest).is_empty());

    let granted =
        SolveRequest { entitlements: vec!["network.host".into()], ..request("y", definition.clone()) };
    let error = daemon.control().await.solve(granted).await.expect_err("not allowed");
    assert_eq!(
        error.message(),
        "granting entitlement network.host is not allowed by build daemon configuration"
    );

    let frontend = SolveRequest { frontend: "nope.v0".into(), definition: None, ..request("z", definition) };
    let error = daemon.control().await.solve(frontend).await.expect_err("unknown frontend");
    assert_eq!(error.message(), "invalid frontend: nope.v0");
    let failed = history(&daemon, "z").await[0].record.clone().expect("record");
    assert_eq!(failed.error.expect("failed").message, "invalid frontend: nope.v0");

    let missing = file("relative/../../x", "1").0;
    let mut broken = missing.clone();
    broken.def.swap(0, 1);
    let error = daemon.control().await.solve(request("w", broken)).await.expect_err("malformed");
    assert!(error.message().starts_with("failed to load LLB: "), "{}", error.message());
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn client_is_the_frontend() {
    let mut daemon = Daemon::start().await;
    let (definition, digest) = chain(&[("/hello", "world"), ("/link-to", "x")]);
    let mut control = daemon.control().await;
    let solve = tokio::spawn(async move {
        control.solve(SolveRequest { r#ref: "b".into(), ..SolveRequest::default() }).await
    });
    let mut gateway = daemon.gateway().await;
    let pong = gateway.ping(for_build("b", PingRequest {})).await.expect("ping").into_inner();
    assert!(pong.llb_caps.iter().any(|cap| cap.id == "file.base" && cap.enabled));
    assert!(pong.frontend_api_caps.iter().any(|cap| cap.id == "readfile"));

    let twice = daemon.control().await.solve(SolveRequest { r#ref: "b".into(), ..Default::default() }).await;
    assert_eq!(twice.expect_err("same ref").message(), "job ID b exists");

    let ask = gateway::SolveRequest {
        definition: Some(definition),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..gateway::SolveRequest::default()
    };
    let answer = gateway.solve(for_build("b", ask)).await.expect("solve").into_inner();
    let Some(result::Result::Ref(reference)) = answer.result.expect("result").result else {
        panic!("a single ref");
    };
    assert!(reference.def.is_some());
    let read = |path: &str| {
        let message =
            ReadFileRequest { r#ref: reference.id.clone(), file_path: path.into(), ..Default::default() };
        for_build("b", message)
    };
    let data = gateway.read_file(read("/hello")).await.expect("read").into_inner().data;
    assert_eq!(data, b"world");
    let error = gateway.read_file(read("/nope")).await.expect_err("missing");
    assert_eq!((error.code(), error.message()), (Code::Unknown, "open /nope: no such file or directory"));
    let details = rpc::Status::decode(error.details()).expect("details").details;
    assert!(details[0].type_url.ends_with("errdefs.Solve+json"));

    let list = ReadDirRequest { r#ref: reference.id.clone(), dir_path: "/".into(), ..Default::default() };
    let entries = gateway.read_dir(for_build("b", list)).await.expect("list").into_inner().entries;
    assert_eq!(entries.iter().map(|entry| &*entry.path).collect::<Vec<_>>(), [&b"hello"[..], b"link-to"]);
    let stat = StatFileRequest { r#ref: reference.id.clone(), path: "/hello".into(), ..Default::default() };
    let stat = gateway.stat_file(for_build("b", stat)).await.expect("stat").into_inner().stat.expect("stat");
    assert_eq!((&*stat.path, stat.size, stat.mode), (&b"hello"[..], 5, 0o644));

    let warning = WarnRequest { digest: digest.clone(), short: b"careful".to_vec(), ..Default::default() };
    gateway.warn(for_build("b", warning)).await.expect("warn");
    let back = ReturnRequest {
        result: Some(GatewayResult {
            result: Some(result::Result::Ref(reference)),
            metadata: [("frontend.note".to_owned(), b"yes".to_vec())].into(),
            ..GatewayResult::default()
        }),
        error: None,
    };
    gateway.r#return(for_build("b", back)).await.expect("return");
    let response = solve.await.expect("task").expect("the build succeeds").into_inner();
    assert_eq!(response.exporter_response["frontend.note"], "yes");

    let mut stream = daemon
        .control()
        .await
        .status(StatusRequest { r#ref: "b".into() })
        .await
        .expect("a finished job answers")
        .into_inner();
    let mut warnings = 0;
    while let Some(message) = stream.message().await.expect("status") {
        warnings += message.warnings.len();
    }
    assert_eq!(warnings, 1);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frontend_errors_come_back_whole() {
    let mut daemon = Daemon::start().await;
    let mut control = daemon.control().await;
    let solve = tokio::spawn(async move {
        control.solve(SolveRequest { r#ref: "e".into(), ..SolveRequest::default() }).await
    });
    let detail = prost_types::Any { type_url: "x/y".into(), value: b"{}".to_vec() };
    let sent = rpc::Status { code: Code::NotFound as i32, message: "no stage".into(), details: vec![detail] };
    let message = ReturnRequest { result: None, error: Some(sent.clone()) };
    daemon.gateway().await.r#return(for_build("e", message)).await.expect("return");
    let error = solve.await.expect("task").expect_err("the frontend failed");
    assert_eq!((error.code(), error.message()), (Code::NotFound, "no stage"));
    assert_eq!(rpc::Status::decode(error.details()).expect("details"), sent);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_ends_with_its_caller() {
    let mut daemon = Daemon::start().await;
    let mut control = daemon.control().await;
    let solve = tokio::spawn(async move {
        control.solve(SolveRequest { r#ref: "gone".into(), ..SolveRequest::default() }).await
    });
    let mut gateway = daemon.gateway().await;
    gateway.ping(for_build("gone", PingRequest {})).await.expect("the build is there");
    let mut stream = daemon
        .control()
        .await
        .status(StatusRequest { r#ref: "gone".into() })
        .await
        .expect("status")
        .into_inner();
    solve.abort();
    let end = tokio::time::timeout(Duration::from_secs(20), stream.message()).await.expect("the stream ends");
    assert!(end.expect("in good order").is_none());
    let error = gateway.ping(for_build("gone", PingRequest {})).await.expect_err("the build is over");
    assert_eq!((error.code(), error.message()), (Code::NotFound, "no such job gone"));
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_cancels_builds() {
    let mut daemon = Daemon::start().await;
    let mut control = daemon.control().await;
    let solve = tokio::spawn(async move {
        control.solve(SolveRequest { r#ref: "s".into(), ..SolveRequest::default() }).await
    });
    daemon.gateway().await.ping(for_build("s", PingRequest {})).await.expect("the build is there");
    daemon.stop().await;
    let error = solve.await.expect("task").expect_err("canceled");
    assert_eq!(error.code(), Code::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_and_prune() {
    let mut daemon = Daemon::start().await;
    let (definition, digest) = file("/a", &"x".repeat(10_000));
    daemon.build(request("p", definition.clone())).await.0.expect("built");
    let mut control = daemon.control().await;
    let usage = control.disk_usage(DiskUsageRequest::default()).await.expect("usage").into_inner().record;
    assert!(usage.iter().any(|record| record.size >= 10_000), "{usage:?}");
    let all = PruneRequest { all: true, ..PruneRequest::default() };
    let mut stream = control.prune(all).await.expect("prune").into_inner();
    let mut removed = 0;
    while let Some(record) = stream.message().await.expect("record") {
        removed += record.size;
    }
    assert!(removed >= 10_000);
    let (response, status) = daemon.build(request("q", definition)).await;
    response.expect("built again");
    assert!(vertex(&status, &digest).last().is_some_and(|vertex| !vertex.cached), "the result was pruned");
    drop(control);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_is_listed_and_goes_with_what_names_it() {
    let mut daemon = Daemon::with(|config| config.history.max_entries = 1000).await;
    let client = ContentClient::new(daemon.channel().await);
    let list = async |filters: &[&str]| {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let mut stream = client.clone().list(ListContentRequest { filters }).await?.into_inner();
        let mut pages = Vec::new();
        while let Some(page) = stream.message().await? {
            pages.push(page.info);
        }
        Ok::<_, Status>(pages)
    };
    assert!(list(&[]).await.expect("nothing").is_empty());
    // The log and the provenance of each build are others.
    for number in 0..120 {
        let (definition, _) = file("/a", "1");
        daemon.build(request(&format!("b{number}"), definition)).await.0.expect("built");
    }
    let events = history(&daemon, "").await;
    let records = events.iter().filter_map(|event| event.record.as_ref());
    let blobs: BTreeMap<_, _> = records
        .flat_map(|record| {
            record.logs.iter().chain(record.result.iter().flat_map(|result| &result.attestations))
        })
        .map(|blob| (blob.digest.clone(), blob.size))
        .collect();
    let pages = list(&[]).await.expect("all");
    let all: Vec<_> = pages.iter().flatten().map(|info| (info.digest.clone(), info.size)).collect();
    assert_eq!(all, blobs.into_iter().collect::<Vec<_>>());
    let first = &all[0].0;
    let only = list(&[&format!("digest=={first}"), "labels.\"a.b/c:d\"==x"]).await.expect("one");
    assert_eq!(only.iter().flatten().map(|info| &info.digest).collect::<Vec<_>>(), [first]);
    let found =
        client.clone().info(content::InfoRequest { digest: first.clone() }).await.expect("info").into_inner();
    assert_eq!(found.info.expect("info").size, all[0].1);
    let error = list(&["size==3"]).await.expect_err("nothing to filter by");
    assert_eq!(
        (error.code(), error.message()),
        (Code::Unimplemented, "unsupported: content filter on \"size\"")
    );
    assert_eq!(list(&["digest==\"x"]).await.expect_err("malformed").code(), Code::InvalidArgument);
    for event in events {
        let id = event.record.expect("record").r#ref;
        let delete = UpdateBuildHistoryRequest { r#ref: id, delete: true, ..Default::default() };
        daemon.control().await.update_build_history(delete).await.expect("delete");
    }
    assert!(list(&[]).await.expect("nothing").is_empty());
    let error = client.clone().info(content::InfoRequest { digest: first.clone() }).await.expect_err("gone");
    assert_eq!(error.code(), Code::NotFound);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leaves_when_idle() {
    let mut daemon = Daemon::with(|config| config.idle_exit = Some(Duration::from_millis(300))).await;
    let mut control = daemon.control().await;
    control.info(InfoRequest {}).await.expect("answers");
    drop(control);
    tokio::time::timeout(Duration::from_secs(20), daemon.ended()).await.expect("leaves by itself");
    assert!(!daemon.socket().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_daemon_for_one_socket() {
    let mut daemon = Daemon::start().await;
    let second = kiln_daemon::serve(daemon.config.clone(), tokio_util::sync::CancellationToken::new()).await;
    let error = second.expect_err("the first one answers").to_string();
    assert_eq!(error, format!("a daemon is already listening on {}", daemon.socket().display()));
    daemon.stop().await;
}
