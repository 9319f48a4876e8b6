//! Traces of builds: what a client reports and what the daemon did, in the build's record.

use crate::common::{Daemon, chain, request};
use kiln_proto::content::ReadContentRequest;
use kiln_proto::content::content_client::ContentClient;
use kiln_proto::control::{BuildHistoryRecord, BuildHistoryRequest, UpdateBuildHistoryRequest};
use kiln_proto::otlp::collector::trace::v1::ExportTraceServiceRequest;
use kiln_proto::otlp::collector::trace::v1::trace_service_client::TraceServiceClient;
use kiln_proto::otlp::trace::v1::{ResourceSpans, ScopeSpans, Span};
use serde_json::Value;
use tonic::Request;

const TRACE: &str = "4a2cd8e337e673d578ca0b5db34f271c";
const SPAN: &str = "d28e51ed66ddcc16";

async fn record(daemon: &Daemon, id: &str) -> BuildHistoryRecord {
    let request = BuildHistoryRequest { r#ref: id.into(), early_exit: true, ..Default::default() };
    let stream = daemon.control().await.listen_build_history(request).await;
    let event = stream.expect("history").into_inner().message().await.expect("event").expect("a build");
    event.record.expect("record")
}

/// The spans of a build's trace, which is asked for.
async fn spans(daemon: &Daemon, id: &str) -> Vec<Value> {
    let finalize = UpdateBuildHistoryRequest { r#ref: id.into(), finalize: true, ..Default::default() };
    daemon.control().await.update_build_history(finalize).await.expect("finalize");
    let trace = record(daemon, id).await.trace.expect("a trace");
    assert_eq!(trace.media_type, "application/vnd.buildkit.otlp.json.v0");
    let read = ReadContentRequest { digest: trace.digest, ..Default::default() };
    let mut stream = ContentClient::new(daemon.channel().await).read(read).await.expect("read").into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = stream.message().await.expect("piece") {
        bytes.extend(piece.data);
    }
    serde_json::Deserializer::from_slice(&bytes).into_iter().collect::<Result<_, _>>().expect("JSON objects")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_has_spans_of_both_sides() {
    let mut daemon = Daemon::start().await;
    let report = async |trace: &str, name: &str| {
        let bytes = |text: &str| hex::decode(text).expect("hex");
        let span =
            Span { trace_id: bytes(trace), span_id: bytes(SPAN), name: name.into(), ..Span::default() };
        let scope_spans = vec![ScopeSpans { spans: vec![span], ..ScopeSpans::default() }];
        let resource_spans = vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }];
        let mut client = TraceServiceClient::new(daemon.channel().await);
        client.export(ExportTraceServiceRequest { resource_spans }).await.expect("export");
    };
    report(TRACE, "before").await;
    let (definition, digest) = chain(&[("/a", "1"), ("/b", "2")]);
    let mut call = Request::new(request("one", definition.clone()));
    let parent = format!("00-{TRACE}-{SPAN}-01");
    call.metadata_mut().insert("traceparent", parent.parse().expect("a header"));
    daemon.control().await.solve(call).await.expect("built");
    assert!(record(&daemon, "one").await.trace.is_none(), "the client has more to say");
    report(TRACE, "after").await;
    report("00000000000000000000000000000001", "of another").await;

    let all = spans(&daemon, "one").await;
    let names: Vec<&str> = all.iter().filter_map(|span| span["Name"].as_str()).collect();
    let expected = ["moby.buildkit.v1.Control/Solve", "mkfile /a", "mkfile /b", "before", "after"];
    assert_eq!(names, expected);
    assert!(all.iter().all(|span| span["SpanContext"]["TraceID"] == TRACE));
    assert_eq!(all[0]["Parent"]["SpanID"], SPAN);
    assert_eq!(all[2]["Parent"]["SpanID"], all[0]["SpanContext"]["SpanID"]);
    assert_eq!(all[2]["Attributes"][0]["Value"]["Value"], digest);
    assert_eq!(spans(&daemon, "one").await.len(), all.len(), "there is one trace");

    // A client that does not trace is no reason not to know what took the time.
    daemon.build(request("two", definition)).await.0.expect("built");
    let own = spans(&daemon, "two").await;
    assert_eq!(own.len(), 3);
    assert_eq!(own[2]["Attributes"][1]["Value"]["Value"], true, "cached: {:#}", own[2]);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_is_stored_without_being_asked_for() {
    let mut daemon = Daemon::start().await;
    let (definition, _) = chain(&[("/a", "1")]);
    let mut call = Request::new(request("one", definition));
    call.metadata_mut().insert("traceparent", format!("00-{TRACE}-{SPAN}-01").parse().expect("a header"));
    daemon.control().await.solve(call).await.expect("built");
    // One that stops does not wait.
    daemon.stop().await;
    daemon.restart().await;
    assert!(record(&daemon, "one").await.trace.is_some());
    daemon.stop().await;
}
