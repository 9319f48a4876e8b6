//! A frontend as an image, for tests: it reads a file of commands, one on a line, and makes a file system of them. The
//! attribute `text` goes before the file.
//!
//! - `base IMAGE`, `input NAME`, `dockerfile FILE`: begin with an image, a definition that came with the build, or what
//!   the Dockerfile frontend makes of a file
//! - `file PATH TEXT`, `opt PATH NAME`, `env PATH NAME`: make a file of a text, of a frontend's attribute, of a variable
//! - `own PATH`: make a file of the name of the frontend's own image
//! - `warn TEXT`, `fail TEXT`, `crash TEXT`, `babble`, `leave`: say so, return an error, end without, write nonsense, close the
//!   connection and stay
//! - `wait`: does not end

use std::collections::HashMap;
use std::error::Error;
use std::io::Write;

use hyper_util::rt::TokioIo;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::gateway::{
    self, InputsRequest, PingRequest, ReadFileRequest, ResolveImageConfigRequest, ReturnRequest,
    SolveRequest, WarnRequest, result,
};
use kiln_proto::{llb, pb, rpc};
use prost::Message;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

const OWN_DEFINITION: &str = "/run/config/buildkit/metadata/frontend.bin";

struct Frontend {
    gateway: LlbBridgeClient<Channel>,
    opts: HashMap<String, String>,
    /// The vertex that fetched the file.
    file: String,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let stdio = || async {
        let io = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
        Ok::<_, std::io::Error>(TokioIo::new(io))
    };
    let endpoint = Endpoint::from_static("http://localhost");
    let channel = endpoint.connect_with_connector(tower::service_fn(move |_: http::Uri| stdio())).await?;
    let opts = std::env::vars().filter(|(name, _)| name.starts_with("BUILDKIT_FRONTEND_OPT_"));
    let opts = opts.filter_map(|(_, opt)| opt.split_once('=').map(|(key, value)| (key.into(), value.into())));
    let mut frontend =
        Frontend { gateway: LlbBridgeClient::new(channel), opts: opts.collect(), file: String::new() };
    let answer = match frontend.run().await {
        Ok(reference) => {
            let result = Some(result::Result::Ref(reference));
            ReturnRequest { result: Some(gateway::Result { result, ..Default::default() }), error: None }
        }
        Err(status) => {
            let error = rpc::Status::decode(status.details()).ok().filter(|full| !full.message.is_empty());
            let error = error.unwrap_or_else(|| rpc::Status {
                code: status.code() as i32,
                message: status.message().to_owned(),
                details: Vec::new(),
            });
            ReturnRequest { error: Some(error), result: None }
        }
    };
    frontend.gateway.r#return(answer).await?;
    // Standard input is read on a thread that nobody can end.
    std::process::exit(0);
}

impl Frontend {
    async fn run(&mut self) -> Result<gateway::Ref, Status> {
        let pong = self.gateway.ping(PingRequest {}).await?.into_inner();
        if !pong.frontend_api_caps.iter().any(|cap| cap.id == "solve.base" && cap.enabled) {
            return Err(Status::unimplemented("the daemon can't solve"));
        }
        let text = match self.opts.get("text") {
            Some(text) => text.clone(),
            None => self.file().await?,
        };
        let mut base = gateway::Ref::default();
        let mut files = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
            let (path, value) = rest.split_once(' ').unwrap_or((rest, ""));
            match command {
                "base" => base = self.image(rest).await?,
                "input" => base = self.input(rest).await?,
                "dockerfile" => base = self.dockerfile(rest).await?,
                "file" => files.push((path.to_owned(), value.to_owned())),
                "opt" => files.push((path.to_owned(), self.opts.get(value).cloned().unwrap_or_default())),
                "env" => files.push((path.to_owned(), std::env::var(value).unwrap_or_default())),
                "own" => files.push((path.to_owned(), own_image()?)),
                "warn" => self.warn(rest).await?,
                "fail" => return Err(Status::unknown(rest)),
                "crash" => {
                    eprintln!("{rest}");
                    std::process::exit(3);
                }
                "babble" => {
                    let _ =
                        std::io::stdout().write_all(&[0xff; 100]).and_then(|()| std::io::stdout().flush());
                    std::future::pending::<()>().await;
                }
                "leave" => leave()?,
                "wait" => std::future::pending().await,
                _ => return Err(Status::invalid_argument(format!("unknown command {line:?}"))),
            }
        }
        self.with_files(base, files).await
    }

    /// The client's file.
    async fn file(&mut self) -> Result<String, Status> {
        let name = self.opts.get("filename").cloned().unwrap_or_else(|| "Dockerfile".to_owned());
        let source = source("local://dockerfile", &[("local.followpaths", &format!("[{name:?}]"))]);
        let mut builder = llb::Builder::new();
        let file = add(&mut builder, source, Vec::new());
        self.file.clone_from(&file.digest);
        let file = self.solve(builder.finish(&file)).await?;
        let request = ReadFileRequest { r#ref: file.id, file_path: name, ..ReadFileRequest::default() };
        let text = self.gateway.read_file(request).await?.into_inner().data;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    async fn solve(&mut self, definition: pb::Definition) -> Result<gateway::Ref, Status> {
        self.ask(SolveRequest { definition: Some(definition), ..SolveRequest::default() }).await
    }

    async fn ask(&mut self, request: SolveRequest) -> Result<gateway::Ref, Status> {
        let request = SolveRequest { allow_result_return: true, allow_result_array_ref: true, ..request };
        match self.gateway.solve(request).await?.into_inner().result.and_then(|result| result.result) {
            Some(result::Result::Ref(reference)) => Ok(reference),
            other => Err(Status::internal(format!("not one reference: {other:?}"))),
        }
    }

    async fn image(&mut self, name: &str) -> Result<gateway::Ref, Status> {
        let request = ResolveImageConfigRequest { r#ref: name.to_owned(), ..Default::default() };
        let found = self.gateway.resolve_image_config(request).await?.into_inner();
        let source = source(&format!("docker-image://{}@{}", found.r#ref, found.digest), &[]);
        let mut builder = llb::Builder::new();
        let image = add(&mut builder, source, Vec::new());
        self.solve(builder.finish(&image)).await
    }

    async fn input(&mut self, name: &str) -> Result<gateway::Ref, Status> {
        let inputs = self.gateway.inputs(InputsRequest {}).await?.into_inner().definitions;
        match inputs.get(name) {
            Some(definition) => self.solve(definition.clone()).await,
            None => Err(Status::not_found(format!("no input {name}"))),
        }
    }

    async fn dockerfile(&mut self, name: &str) -> Result<gateway::Ref, Status> {
        let frontend_opt =
            [("filename", name), ("cmdline", "")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        let frontend = "dockerfile.v0".to_owned();
        self.ask(SolveRequest { frontend, frontend_opt: frontend_opt.into(), ..SolveRequest::default() })
            .await
    }

    async fn warn(&mut self, text: &str) -> Result<(), Status> {
        self.gateway
            .warn(WarnRequest { digest: self.file.clone(), short: text.into(), ..WarnRequest::default() })
            .await
            .map(drop)
    }

    /// Files on top of what a reference stands for.
    async fn with_files(
        &mut self,
        base: gateway::Ref,
        files: Vec<(String, String)>,
    ) -> Result<gateway::Ref, Status> {
        let mut definition = base.def.unwrap_or_default();
        let last = definition.def.pop();
        let last = last.map(|last| pb::Op::decode(last.as_slice())).transpose();
        let mut top = last
            .map_err(|error| Status::internal(error.to_string()))?
            .and_then(|last| last.inputs.into_iter().next());
        let mut push = |op: pb::Op| {
            let bytes = op.encode_to_vec();
            let digest = llb::digest(&bytes);
            definition.def.push(bytes);
            pb::Input { digest, index: 0 }
        };
        for (path, text) in files {
            let mkfile = pb::FileActionMkFile {
                path,
                mode: 0o644,
                data: text.into_bytes(),
                timestamp: -1,
                ..pb::FileActionMkFile::default()
            };
            let action = pb::FileAction {
                input: if top.is_some() { 0 } else { -1 },
                secondary_input: -1,
                output: 0,
                action: Some(pb::file_action::Action::Mkfile(mkfile.into())),
            };
            let op = pb::op::Op::File(pb::FileOp { actions: vec![action] });
            top = Some(push(pb::Op { op: Some(op), inputs: top.into_iter().collect(), ..pb::Op::default() }));
        }
        let Some(top) = top else { return Ok(gateway::Ref::default()) };
        push(pb::Op { inputs: vec![top], ..pb::Op::default() });
        self.solve(definition).await
    }
}

fn source(identifier: &str, attrs: &[(&str, &str)]) -> pb::Op {
    let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let op = pb::op::Op::Source(pb::SourceOp { identifier: identifier.to_owned(), attrs });
    pb::Op { op: Some(op), ..pb::Op::default() }
}

fn add(builder: &mut llb::Builder, op: pb::Op, inputs: Vec<pb::Input>) -> pb::Input {
    pb::Input { digest: builder.add(&pb::Op { inputs, ..op }, pb::OpMetadata::default()), index: 0 }
}

/// The source that the frontend's own image is of.
fn own_image() -> Result<String, Status> {
    let unread = |error: &dyn Error| Status::internal(format!("{OWN_DEFINITION}: {error}"));
    let bytes = std::fs::read(OWN_DEFINITION).map_err(|error| unread(&error))?;
    let definition = pb::Definition::decode(bytes.as_slice()).map_err(|error| unread(&error))?;
    let ops = definition.def.iter().filter_map(|op| pb::Op::decode(op.as_slice()).ok()?.op);
    let mut sources = ops.filter_map(|op| match op {
        pb::op::Op::Source(source) => Some(source.identifier),
        _ => None,
    });
    sources.next().ok_or_else(|| Status::internal("no source"))
}

/// Closes standard output, which is the connection, and stays.
fn leave() -> Result<(), Status> {
    let null = std::fs::File::options().write(true).open("/dev/null");
    let moved = null.and_then(|null| Ok(rustix::stdio::dup2_stdout(null)?));
    moved.map_err(|error| Status::internal(error.to_string()))?;
    loop {
        std::thread::park();
    }
}
