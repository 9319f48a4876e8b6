//! Source policies: rules in the request, and a client that is asked.

use std::sync::{Arc, Mutex};

use crate::common::{Daemon, request};
use kiln_proto::control::SolveRequest;
use kiln_proto::pb::{self, SourceOp};
use kiln_proto::policy::{MatchType, Policy, PolicyAction, Rule, Selector, Update};
use kiln_proto::policysession::check_policy_response::Result as Answer;
use kiln_proto::policysession::policy_verifier_server::{PolicyVerifier, PolicyVerifierServer};
use kiln_proto::policysession::{CheckPolicyRequest, CheckPolicyResponse, DecisionResponse, DenyMessage};
use kiln_proto::{gateway, llb, rpc};
use kiln_session::client::{Attachables, SharedDir};
use prost::Message;
use tonic::{Request, Response, Status};

/// The client's directory `name`.
fn local(name: &str) -> (pb::Definition, String) {
    let mut builder = llb::Builder::new();
    let source = SourceOp { identifier: format!("local://{name}"), ..SourceOp::default() };
    let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
    let digest = builder.add(&op, pb::OpMetadata::default());
    (builder.finish(&pb::Input { digest: digest.clone(), index: 0 }), digest)
}

fn rule(action: PolicyAction, identifier: &str, update: &str) -> Rule {
    let selector = Selector {
        identifier: identifier.into(),
        match_type: MatchType::Wildcard as i32,
        ..Selector::default()
    };
    let updates = (!update.is_empty()).then(|| Update { identifier: update.into(), ..Update::default() });
    Rule { action: action as i32, selector: Some(selector), updates }
}

/// Answers as told; keeps what it was asked.
#[derive(Clone, Default)]
struct Judge(Arc<Mutex<Vec<String>>>);

#[tonic::async_trait]
impl PolicyVerifier for Judge {
    async fn check_policy(
        &self,
        request: Request<CheckPolicyRequest>,
    ) -> Result<Response<CheckPolicyResponse>, Status> {
        let source = request.into_inner().source.and_then(|source| source.source).unwrap_or_default();
        self.0.lock().expect("lock").push(source.identifier.clone());
        let decide = |action: PolicyAction, update| DecisionResponse {
            action: action as i32,
            deny_messages: vec![DenyMessage { message: "not this one".into() }],
            update,
        };
        let answer = match source.identifier.as_str() {
            "local://old" => {
                let update = SourceOp { identifier: "local://context".into(), ..source };
                Answer::Decision(decide(PolicyAction::Convert, Some(update)))
            }
            "local://other" => Answer::Request(gateway::ResolveSourceMetaRequest {
                source: Some(SourceOp { identifier: "local://elsewhere".into(), ..source }),
                ..Default::default()
            }),
            "local://bad" => Answer::Decision(decide(PolicyAction::Deny, None)),
            _ => Answer::Decision(decide(PolicyAction::Allow, None)),
        };
        Ok(Response::new(CheckPolicyResponse { result: Some(answer) }))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sources_are_denied_and_replaced() {
    let mut daemon = Daemon::start().await;
    let context = tempfile::tempdir().expect("temporary directory");
    std::fs::write(context.path().join("a"), "1").expect("write");
    let judge = Judge::default();
    let mut attachables = Attachables::new();
    attachables.share(vec![SharedDir { name: "context".into(), path: context.path().to_owned() }]);
    let method = "/moby.buildkit.v1.sourcepolicy.policysession.PolicyVerifier/CheckPolicy";
    attachables.add(PolicyVerifierServer::new(judge.clone()), &[method]);
    let session = attachables.attach(&mut daemon.control().await, "s", "").await.expect("attach");

    let with_rules = |id: &str, name: &str, rules: Vec<Rule>| SolveRequest {
        session: "s".into(),
        source_policy: Some(Policy { version: 1, rules }),
        ..request(id, local(name).0)
    };
    let deny = rule(PolicyAction::Deny, "local://*", "");
    let error = daemon.build(with_rules("deny", "context", vec![deny])).await.0.expect_err("denied");
    let expected = "error evaluating the source policy: source \"local://context\" denied by policy: source denied by policy";
    assert_eq!(error.message(), expected);
    let convert = rule(PolicyAction::Convert, "local://old*", "local://context");
    let (response, status) = daemon.build(with_rules("convert", "older", vec![convert])).await;
    response.expect("built of what is there");
    let replaced = local("context").1;
    assert!(status.iter().flat_map(|message| &message.vertexes).any(|vertex| vertex.digest == replaced));
    let broken = rule(PolicyAction::Convert, "**", "x");
    let error = daemon.build(with_rules("broken", "context", vec![broken])).await.0.expect_err("refused");
    assert!(error.message().contains("invalid source policy"), "{}", error.message());

    let asking = |id: &str, name: &str| SolveRequest {
        session: "s".into(),
        source_policy_session: "s".into(),
        ..request(id, local(name).0)
    };
    daemon.build(asking("allow", "context")).await.0.expect("allowed");
    daemon.build(asking("replace", "old")).await.0.expect("built of what is there");
    let error = daemon.build(asking("bad", "bad")).await.0.expect_err("denied");
    assert!(error.message().ends_with("source \"local://bad\" not allowed by policy: action DENY"));
    let details = rpc::Status::decode(error.details()).expect("details").details;
    let decision = details.iter().find(|any| any.type_url.ends_with("policysession.DecisionResponse+json"));
    let decision: serde_json::Value =
        serde_json::from_slice(&decision.expect("a decision").value).expect("JSON");
    assert_eq!(decision["denyMessages"][0]["message"], "not this one");
    let error = daemon.build(asking("other", "other")).await.0.expect_err("it asks for something else");
    assert!(error.message().contains("policy requested different source identifier"), "{}", error.message());
    let asked = judge.0.lock().expect("lock").clone();
    assert_eq!(asked, ["local://context", "local://old", "local://context", "local://bad", "local://other"]);
    drop(session);
    daemon.stop().await;
}
