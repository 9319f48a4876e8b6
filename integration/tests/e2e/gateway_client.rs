//! A client that is the frontend of its build itself.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use kiln_integration::Kiln;
use kiln_proto::control::SolveRequest;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::gateway::exec_message::Input;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::gateway::{
    self, ExecMessage, ExitMessage, FdMessage, InitMessage, NewContainerRequest, ReleaseContainerRequest,
    ReturnRequest, result,
};
use kiln_proto::{llb, pb};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn connect(kiln: &Kiln) -> Channel {
    let socket = kiln.socket();
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_: http::Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .expect("the daemon listens")
}

/// Says on each request which build it is about.
pub(crate) struct OfBuild(MetadataValue<Ascii>);

impl Interceptor for OfBuild {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("buildkit-controlapi-buildid", self.0.clone());
        Ok(request)
    }
}

/// A build whose frontend is the test.
pub(crate) struct Build {
    pub(crate) gateway: LlbBridgeClient<InterceptedService<Channel, OfBuild>>,
    pub(crate) solve: tokio::task::JoinHandle<Result<(), Status>>,
    pub(crate) requests: mpsc::Sender<ExecMessage>,
    pub(crate) answers: Streaming<ExecMessage>,
    pub(crate) root: String,
}

/// What came of a process.
#[derive(Default)]
pub(crate) struct Ended {
    pub(crate) out: Vec<u8>,
    pub(crate) err: Vec<u8>,
    pub(crate) exit: ExitMessage,
}

impl Ended {
    pub(crate) fn out(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

/// The base of all containers.
pub(crate) fn busybox(builder: &mut llb::Builder) -> pb::Input {
    let source = pb::SourceOp {
        identifier: "docker-image://docker.io/library/busybox:latest".into(),
        ..pb::SourceOp::default()
    };
    let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
    pb::Input { digest: builder.add(&op, pb::OpMetadata::default()), index: 0 }
}

pub(crate) fn ask(definition: pb::Definition) -> gateway::SolveRequest {
    gateway::SolveRequest {
        definition: Some(definition),
        allow_result_return: true,
        allow_result_array_ref: true,
        ..gateway::SolveRequest::default()
    }
}

impl Build {
    /// `id` is that of no other build of this daemon: one that ended is not waited for.
    pub(crate) async fn start(kiln: &Kiln, id: &str) -> Self {
        let mut control = ControlClient::new(connect(kiln).await);
        let request = SolveRequest { r#ref: id.into(), ..SolveRequest::default() };
        let solve = tokio::spawn(async move { control.solve(request).await.map(drop) });
        let of_build = OfBuild(id.parse().expect("a header"));
        let mut gateway = LlbBridgeClient::with_interceptor(connect(kiln).await, of_build);
        let mut builder = llb::Builder::new();
        let base = busybox(&mut builder);
        let answer = gateway.solve(ask(builder.finish(&base))).await.expect("solve").into_inner();
        let Some(result::Result::Ref(reference)) = answer.result.expect("a result").result else {
            panic!("a single ref");
        };
        let (requests, receiver) = mpsc::channel(16);
        let answers = gateway.exec_process(ReceiverStream::new(receiver)).await.expect("a stream");
        Self { gateway, solve, requests, answers: answers.into_inner(), root: reference.id }
    }

    /// A container of busybox.
    pub(crate) async fn container(&mut self, id: &str) -> Result<(), Status> {
        let root = pb::Mount { dest: "/".into(), result_id: self.root.clone(), ..pb::Mount::default() };
        let tmpfs =
            pb::Mount { dest: "/t".into(), mount_type: pb::MountType::Tmpfs.into(), ..pb::Mount::default() };
        self.container_of(id, vec![root, tmpfs]).await
    }

    pub(crate) async fn container_of(&mut self, id: &str, mounts: Vec<pb::Mount>) -> Result<(), Status> {
        let request = NewContainerRequest {
            container_id: id.into(),
            mounts,
            extra_hosts: vec![pb::HostIp { host: "db".into(), ip: "10.0.0.7".into() }],
            hostname: "box".into(),
            ..NewContainerRequest::default()
        };
        self.gateway.new_container(request).await.map(drop)
    }

    pub(crate) async fn say(&self, process: &str, input: Input) {
        let message = ExecMessage { process_id: process.into(), input: Some(input) };
        self.requests.send(message).await.expect("the stream is open");
    }

    /// Starts a process and waits until it has.
    pub(crate) async fn run(&mut self, process: &str, args: &[&str], change: impl FnOnce(&mut InitMessage)) {
        let mut init = InitMessage {
            container_id: "c".into(),
            meta: Some(pb::Meta {
                args: args.iter().map(ToString::to_string).collect(),
                ..pb::Meta::default()
            }),
            fds: vec![0, 1, 2],
            ..InitMessage::default()
        };
        change(&mut init);
        self.say(process, Input::Init(init)).await;
        let (name, input) = self.hear().await;
        assert!(name == process && matches!(input, Input::Started(_)), "{name}: {input:?}");
    }

    pub(crate) async fn hear(&mut self) -> (String, Input) {
        let message =
            tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer in time");
        let message = message.expect("no error").expect("not the end");
        (message.process_id, message.input.expect("something"))
    }

    /// Follows all processes until each of those named has ended; in the order of the names.
    pub(crate) async fn ended<const N: usize>(&mut self, processes: [&str; N]) -> [Ended; N] {
        let mut ended: [Ended; N] = std::array::from_fn(|_| Ended::default());
        let mut left = N;
        while left > 0 {
            let (name, input) = self.hear().await;
            let place = processes.iter().position(|process| *process == name).expect("one of them");
            let process = &mut ended[place];
            match input {
                Input::File(FdMessage { fd: 1, data, .. }) => process.out.extend(data),
                Input::File(FdMessage { fd: 2, data, .. }) => process.err.extend(data),
                Input::Exit(exit) => process.exit = exit,
                Input::Done(_) => left -= 1,
                other => panic!("{name}: {other:?}"),
            }
        }
        ended
    }

    pub(crate) async fn input(&self, process: &str, text: &str, eof: bool) {
        self.say(process, Input::File(FdMessage { fd: 0, eof, data: text.into() })).await;
    }

    pub(crate) async fn release(&mut self) -> Result<(), Status> {
        let request = ReleaseContainerRequest { container_id: "c".into() };
        self.gateway.release_container(request).await.map(drop)
    }

    pub(crate) async fn finish(mut self) {
        self.gateway.r#return(ReturnRequest::default()).await.expect("return");
        self.solve.await.expect("task").expect("the build succeeds");
    }
}
