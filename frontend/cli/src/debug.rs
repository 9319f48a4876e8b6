//! `kiln debug`: looks into what the daemon makes of a Dockerfile, and at its workers.

use std::io::Write;

use kiln_proto::control::SolveRequest;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::gateway::{self, PingRequest, ReturnRequest};
use kiln_proto::{llb, pb};
use prost::Message;
use serde_json::json;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use crate::args::{Connection, DebugCommand, DumpArgs};
use crate::build::Plan;
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::failure::{SolveFailure, excerpt};
use crate::{llbjson, workers};

/// Names the build that a gateway call belongs to.
const BUILD_ID: &str = "buildkit-controlapi-buildid";

/// Runs one of the debug commands.
pub(crate) fn main(connection: &Connection, command: DebugCommand) -> Result<(), CliError> {
    match command {
        DebugCommand::DumpLlb(args) => dump(connection, *args),
        DebugCommand::Workers(args) => workers::main(connection, &args),
    }
}

/// Has the daemon compile the Dockerfile without running anything, and prints the definition.
fn dump(connection: &Connection, args: DumpArgs) -> Result<(), CliError> {
    let raw = args.raw;
    let plan = Plan::new(args.build)?;
    let stream = connect::connect(connection, Start::IfNeeded)?;
    let runtime = connect::runtime()?;
    let result = runtime.block_on(async { compile(stream.channel()?, &plan).await });
    runtime.shutdown_background();
    let definitions = result.inspect_err(|error| {
        if let CliError::Solve(failure) = error {
            eprint!("{}", excerpt(failure));
        }
    })?;
    let mut out = std::io::stdout().lock();
    let written = match definitions.as_slice() {
        [(_, definition)] if raw => out.write_all(&definition.encode_to_vec()),
        _ if raw => return Err(CliError::usage("--raw prints one platform; name it with --platform")),
        all => all.iter().try_for_each(|(platform, definition)| {
            if let Some(platform) = platform {
                writeln!(out, "# {platform}")?;
            }
            print(&mut out, definition)
        }),
    };
    written.and_then(|()| out.flush()).map_err(|error| CliError::file("write", "standard output", error))
}

/// The definition of each platform, without evaluating any.
async fn compile(channel: Channel, plan: &Plan) -> Result<Vec<(Option<String>, pb::Definition)>, CliError> {
    let mut control = connect::control(channel.clone());
    let mut bridge = LlbBridgeClient::new(channel)
        .max_decoding_message_size(kiln_session::MAX_MESSAGE_SIZE)
        .max_encoding_message_size(kiln_session::MAX_MESSAGE_SIZE);
    let session = kiln_session::new_id();
    let failed = |status: &tonic::Status| CliError::Solve(Box::new(SolveFailure::from_status(status)));
    let attached = plan.attachables(&[])?.attach(&mut control, &session, &plan.shared_key()).await;
    let _session = attached.map_err(|error| CliError::Connect(error.to_string()))?;
    let reference = kiln_session::new_id();
    let build_id: MetadataValue<_> =
        reference.parse().map_err(|_| CliError::Connect("the build id is not ASCII".into()))?;
    let request = SolveRequest { r#ref: reference, session, internal: true, ..Default::default() };
    // The job lives for as long as this call waits.
    let job = async move { control.solve(request).await.map(drop) };
    let mut frontend_opt = plan.attrs()?;
    // The graph is for later, when this session is gone.
    for local in ["context", "dockerfile"] {
        frontend_opt.insert(format!("local-sessionid:{local}"), String::new());
    }
    let compile = async {
        bridge.ping(with_id(PingRequest {}, &build_id)).await?;
        let request = gateway::SolveRequest {
            frontend: "dockerfile.v0".into(),
            frontend_opt,
            allow_result_return: true,
            allow_result_array_ref: true,
            ..Default::default()
        };
        let answer = bridge.solve(with_id(request, &build_id)).await?.into_inner();
        let nothing = gateway::Result {
            result: Some(gateway::result::Result::Ref(gateway::Ref::default())),
            ..Default::default()
        };
        bridge.r#return(with_id(ReturnRequest { result: Some(nothing), error: None }, &build_id)).await?;
        Ok::<_, tonic::Status>(answer)
    };
    let (answer, _) = futures::try_join!(compile, job).map_err(|status| failed(&status))?;
    let result = answer.result.and_then(|result| result.result);
    let definition = |reference: gateway::Ref| reference.def.unwrap_or_default();
    Ok(match result {
        Some(gateway::result::Result::Ref(reference)) => vec![(None, definition(reference))],
        Some(gateway::result::Result::Refs(map)) => {
            let mut all: Vec<_> = map
                .refs
                .into_iter()
                .map(|(platform, reference)| (Some(platform), definition(reference)))
                .collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            all
        }
        _ => return Err(CliError::Connect("the daemon returned no definition".into())),
    })
}

fn with_id<T>(message: T, id: &MetadataValue<tonic::metadata::Ascii>) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(BUILD_ID, id.clone());
    request
}

/// One JSON object for each vertex, in the order of the definition.
fn print(out: &mut impl Write, definition: &pb::Definition) -> std::io::Result<()> {
    if definition.def.is_empty() {
        return writeln!(out, "{}", json!({"scratch": true}));
    }
    let graph = llb::load(definition).map_err(std::io::Error::other)?;
    let root = graph.root.map(|(vertex, _)| graph.vertices[vertex].digest.clone());
    for vertex in &graph.vertices {
        let mut shown = llbjson::vertex(vertex);
        if root.as_ref() == Some(&vertex.digest) {
            shown["result"] = true.into();
        }
        writeln!(out, "{shown}")?;
    }
    Ok(())
}
