//! What a build may be made from: rules that came with the request, and a client that is asked about each source.
//! Both may name another source instead.

mod rules;

use std::collections::HashMap;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use kiln_proto::gateway::{ResolveSourceMetaRequest, ResolveSourceMetaResponse};
use kiln_proto::pb::{self, SourceOp};
use kiln_proto::policy::{Policy, PolicyAction};
use kiln_proto::policysession::check_policy_response::Result as Answer;
use kiln_proto::policysession::policy_verifier_client::PolicyVerifierClient;
use kiln_proto::policysession::{CheckPolicyRequest, DecisionResponse};
use kiln_proto::reference::Reference;
use kiln_proto::{control, llb};
use kiln_session::SessionManager;
use tonic::Code;

use crate::error::{BuildError, denial_detail};
use crate::gateway::Bridge;
use rules::Rules;

/// How often a client is asked about one source.
const ROUNDS: usize = 10;
/// About so many sources at a time.
const AT_ONCE: usize = 32;
/// Largest answer of a client.
const MAX_ANSWER: usize = 16 << 20;
/// What the identifier of an image begins with.
pub(crate) const IMAGE: &str = "docker-image://";
/// Begins the identifiers of images in clients' content stores.
pub(crate) const LAYOUT: &str = "oci-layout://";

/// A build's source policy.
#[derive(Default, Clone)]
pub(crate) struct SourcePolicy {
    rules: Rules,
    verifier: Option<Verifier>,
}

/// A client that decides about sources.
#[derive(Clone)]
struct Verifier {
    sessions: Arc<SessionManager>,
    session: String,
}

impl SourcePolicy {
    /// The policy that a request names.
    ///
    /// # Errors
    /// Its rules make no sense.
    pub(crate) fn new(
        request: &control::SolveRequest,
        sessions: &Arc<SessionManager>,
    ) -> Result<Self, BuildError> {
        let mut rules = Rules::default();
        request.source_policy.iter().try_for_each(|policy| rules.add(policy))?;
        let session = &request.source_policy_session;
        let verifier =
            (!session.is_empty()).then(|| Verifier { sessions: sessions.clone(), session: session.clone() });
        Ok(Self { rules, verifier })
    }

    /// This policy, and after it the rules that one call brings.
    ///
    /// # Errors
    /// They make no sense.
    pub(crate) fn with(&self, further: &[Policy]) -> Result<Self, BuildError> {
        let mut all = self.clone();
        further.iter().try_for_each(|policy| all.rules.add(policy))?;
        Ok(all)
    }

    /// Everything is allowed.
    pub(crate) fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.verifier.is_none()
    }

    /// The definition with what the policy puts in place of its sources.
    ///
    /// # Errors
    /// One of them is not allowed.
    pub(crate) async fn apply(
        &self,
        bridge: &Bridge,
        definition: pb::Definition,
    ) -> Result<pb::Definition, BuildError> {
        if self.is_empty() {
            return Ok(definition);
        }
        let malformed = |error: llb::LoadError| BuildError::new(Code::InvalidArgument, error.to_string());
        let sources = llb::sources(&definition).map_err(malformed)?;
        let decided = stream::iter(sources).map(|(at, op)| async move {
            let Some(pb::op::Op::Source(source)) = &op.op else { return Ok(None) };
            let allowed = self.evaluate(bridge, source, op.platform.as_ref()).await;
            let allowed = allowed.map_err(|error| error.context("error evaluating the source policy"))?;
            let changed = (allowed != *source).then_some(pb::op::Op::Source(allowed));
            Ok::<_, BuildError>(changed.map(|changed| (at, pb::Op { op: Some(changed), ..op })))
        });
        // What a client has to think about holds up no other source.
        let decided: Vec<_> = decided.buffered(AT_ONCE).try_collect().await?;
        let changed: HashMap<_, _> = decided.into_iter().flatten().collect();
        if changed.is_empty() {
            Ok(definition)
        } else {
            llb::replace(&definition, changed).map_err(malformed)
        }
    }

    /// The source to use for one that is asked for.
    ///
    /// # Errors
    /// It is not allowed.
    pub(crate) async fn evaluate(
        &self,
        bridge: &Bridge,
        source: &SourceOp,
        platform: Option<&pb::Platform>,
    ) -> Result<SourceOp, BuildError> {
        let full = normalized(source);
        let mut current = full.clone();
        let mut rounds = ROUNDS;
        self.rules.evaluate(&mut current)?;
        if let Some(verifier) = &self.verifier {
            while let Some(other) = verifier.ask(bridge, &current, platform, &mut rounds).await? {
                current = normalized(&other);
                self.rules.evaluate(&mut current)?;
            }
        }
        // What the policy leaves as it is keeps its digest.
        Ok(if current == full { source.clone() } else { current })
    }
}

/// Names of images as rules have them, with registry and tag.
fn normalized(source: &SourceOp) -> SourceOp {
    let mut source = source.clone();
    if let Some(Ok(reference)) = source.identifier.strip_prefix(IMAGE).map(Reference::parse) {
        source.identifier = format!("{IMAGE}{}", reference.with_default_tag());
    }
    source
}

impl Verifier {
    /// Asks about a source; the answer is what to use instead, if anything.
    async fn ask(
        &self,
        bridge: &Bridge,
        source: &SourceOp,
        platform: Option<&pb::Platform>,
        rounds: &mut usize,
    ) -> Result<Option<SourceOp>, BuildError> {
        let session = self.sessions.get(&self.session).await;
        let session = session.map_err(|error| BuildError::new(Code::NotFound, error.to_string()))?;
        let mut client = PolicyVerifierClient::new(session.channel()).max_decoding_message_size(MAX_ANSWER);
        let mut known = ResolveSourceMetaResponse { source: Some(source.clone()), ..Default::default() };
        while *rounds > 0 {
            *rounds -= 1;
            let question = CheckPolicyRequest {
                platform: platform.cloned(),
                source: Some(known.clone()),
                ..CheckPolicyRequest::default()
            };
            match client.check_policy(question).await?.into_inner().result {
                Some(Answer::Request(request)) => known = look_up(bridge, source, request).await?,
                Some(Answer::Decision(decision)) => return decided(source, decision),
                None => return Err(BuildError::build("no decision in policy response")),
            }
        }
        Err(BuildError::build("too many policy requests"))
    }
}

/// Finds out for a client what it needs to decide.
async fn look_up(
    bridge: &Bridge,
    source: &SourceOp,
    request: ResolveSourceMetaRequest,
) -> Result<ResolveSourceMetaResponse, BuildError> {
    let asked = request.source.as_ref();
    if asked.is_none_or(|asked| asked.identifier != source.identifier) {
        let other = asked.map(|asked| asked.identifier.as_str()).unwrap_or_default();
        let text =
            format!("policy requested different source identifier: {other:?} != {:?}", source.identifier);
        return Err(BuildError::build(text));
    }
    if asked.is_some_and(|asked| asked.attrs != source.attrs) {
        return Err(BuildError::build("policy requested different source attrs"));
    }
    if !request.source_policies.is_empty() {
        return Err(BuildError::unsupported("policies of a policy's question"));
    }
    let found = bridge.source_meta(request).await;
    found.map_err(|error| error.context("error resolving source metadata from policy request"))
}

fn decided(source: &SourceOp, decision: DecisionResponse) -> Result<Option<SourceOp>, BuildError> {
    match PolicyAction::try_from(decision.action) {
        Ok(PolicyAction::Allow) => Ok(None),
        Ok(PolicyAction::Convert) => match decision.update {
            Some(update) => Ok(Some(update)),
            None => Err(BuildError::build("convert action requires updated source")),
        },
        Ok(PolicyAction::Deny) | Err(_) => {
            let name = &source.identifier;
            let error = BuildError::build(format!("source {name:?} not allowed by policy: action DENY"));
            let messages: Vec<&str> =
                decision.deny_messages.iter().map(|message| message.message.as_str()).collect();
            Err(if messages.is_empty() { error } else { error.with(denial_detail(&messages)) })
        }
    }
}
