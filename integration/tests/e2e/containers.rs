//! Containers of a client that is the frontend itself.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use kiln_integration::{Kiln, Registry, wait_until};
use kiln_proto::control::SolveRequest;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::gateway::exec_message::Input;
use kiln_proto::gateway::llb_bridge_client::LlbBridgeClient;
use kiln_proto::gateway::{
    self, ExecMessage, ExitMessage, FdMessage, InitMessage, NewContainerRequest, ReadDirRequest,
    ReadFileRequest, ReleaseContainerRequest, ResizeMessage, ReturnRequest, SignalMessage, result,
};
use kiln_proto::{llb, pb};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

const PATIENCE: Duration = Duration::from_secs(30);

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

/// Says on each request which build it is about.
struct OfBuild(MetadataValue<Ascii>);

impl Interceptor for OfBuild {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("buildkit-controlapi-buildid", self.0.clone());
        Ok(request)
    }
}

/// A build whose frontend is the test.
struct Build {
    gateway: LlbBridgeClient<InterceptedService<Channel, OfBuild>>,
    solve: tokio::task::JoinHandle<Result<(), Status>>,
    requests: mpsc::Sender<ExecMessage>,
    answers: Streaming<ExecMessage>,
    root: String,
}

/// What came of a process.
#[derive(Default)]
struct Ended {
    out: Vec<u8>,
    err: Vec<u8>,
    exit: ExitMessage,
}

impl Ended {
    fn out(&self) -> String {
        String::from_utf8_lossy(&self.out).into_owned()
    }
}

impl Build {
    /// `id` is that of no other build of this daemon: one that ended is not waited for.
    async fn start(kiln: &Kiln, id: &str) -> Self {
        let mut control = ControlClient::new(connect(kiln).await);
        let request = SolveRequest { r#ref: id.into(), ..SolveRequest::default() };
        let solve = tokio::spawn(async move { control.solve(request).await.map(drop) });
        let of_build = OfBuild(id.parse().expect("a header"));
        let mut gateway = LlbBridgeClient::with_interceptor(connect(kiln).await, of_build);
        let mut builder = llb::Builder::new();
        let source = pb::SourceOp {
            identifier: "docker-image://docker.io/library/busybox:latest".into(),
            ..pb::SourceOp::default()
        };
        let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
        let digest = builder.add(&op, pb::OpMetadata::default());
        let ask = gateway::SolveRequest {
            definition: Some(builder.finish(&pb::Input { digest, index: 0 })),
            allow_result_return: true,
            allow_result_array_ref: true,
            ..gateway::SolveRequest::default()
        };
        let answer = gateway.solve(ask).await.expect("solve").into_inner();
        let Some(result::Result::Ref(reference)) = answer.result.expect("a result").result else {
            panic!("a single ref");
        };
        let (requests, receiver) = mpsc::channel(16);
        let answers = gateway.exec_process(ReceiverStream::new(receiver)).await.expect("a stream");
        Self { gateway, solve, requests, answers: answers.into_inner(), root: reference.id }
    }

    async fn container(&mut self, id: &str) -> Result<(), Status> {
        let root = pb::Mount { dest: "/".into(), result_id: self.root.clone(), ..pb::Mount::default() };
        let tmpfs =
            pb::Mount { dest: "/t".into(), mount_type: pb::MountType::Tmpfs.into(), ..pb::Mount::default() };
        let request = NewContainerRequest {
            container_id: id.into(),
            mounts: vec![root, tmpfs],
            extra_hosts: vec![pb::HostIp { host: "db".into(), ip: "10.0.0.7".into() }],
            hostname: "box".into(),
            ..NewContainerRequest::default()
        };
        self.gateway.new_container(request).await.map(drop)
    }

    async fn say(&self, process: &str, input: Input) {
        let message = ExecMessage { process_id: process.into(), input: Some(input) };
        self.requests.send(message).await.expect("the stream is open");
    }

    /// Starts a process and waits until it has.
    async fn run(&mut self, process: &str, args: &[&str], change: impl FnOnce(&mut InitMessage)) {
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

    async fn hear(&mut self) -> (String, Input) {
        let message =
            tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer in time");
        let message = message.expect("no error").expect("not the end");
        (message.process_id, message.input.expect("something"))
    }

    /// Follows all processes until each of those named has ended; in the order of the names.
    async fn ended<const N: usize>(&mut self, processes: [&str; N]) -> [Ended; N] {
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

    async fn input(&self, process: &str, text: &str, eof: bool) {
        self.say(process, Input::File(FdMessage { fd: 0, eof, data: text.into() })).await;
    }

    async fn release(&mut self) -> Result<(), Status> {
        let request = ReleaseContainerRequest { container_id: "c".into() };
        self.gateway.release_container(request).await.map(drop)
    }

    async fn finish(mut self) {
        self.gateway.r#return(ReturnRequest::default()).await.expect("return");
        self.solve.await.expect("task").expect("the build succeeds");
    }
}

/// With each executor that is there.
fn each(test: impl AsyncFn(&mut Kiln)) {
    let registry = Registry::with_busybox();
    for lines in ["", "[worker.oci]\nbinary = \"runc\"\n"] {
        let mut kiln = Kiln::new(&registry);
        if !lines.is_empty() {
            kiln.configure(lines);
        }
        kiln.start();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(test(&mut kiln));
    }
}

#[test]
fn processes_of_a_container() {
    each(async |kiln: &mut Kiln| {
        let mut build = Build::start(kiln, "processes").await;
        build.container("c").await.expect("a container");
        assert_eq!(build.container("c").await.expect_err("again").code(), Code::AlreadyExists);
        build.run("first", &["sleep", "1000"], |_| {}).await;
        build.run("cat", &["sh", "-c", "hostname; cat; echo $0 $TERM >&2; exit 3"], |_| {}).await;
        build.input("cat", "through ", false).await;
        build.input("cat", "a pipe\n", true).await;
        let [cat] = build.ended(["cat"]).await;
        assert_eq!((cat.out().as_str(), cat.err.as_slice()), ("box\nthrough a pipe\n", b"sh\n".as_slice()));
        assert_eq!(cat.exit.code, 3);
        let error = cat.exit.error.expect("an error");
        assert_eq!(error.message, "exit code: 3");
        let detail = &error.details[0];
        assert_eq!(detail.type_url, "github.com/moby/buildkit/gatewayapi.ExitMessage+json");
        assert_eq!(detail.value, b"{\"Code\":3}");

        let script = "grep -q '10.0.0.7.db' /etc/hosts && test -w /t && echo text > /file && trap 'exit 5' USR1 && \
            echo set && while :; do sleep 0.05; done";
        build.run("trap", &["sh", "-c", script], |_| {}).await;
        let (_, set) = build.hear().await;
        assert!(matches!(&set, Input::File(FdMessage { fd: 1, data, .. }) if data == b"set\n"), "{set:?}");
        let file = ReadFileRequest { r#ref: "c".into(), file_path: "/file".into(), ..Default::default() };
        let data = build.gateway.read_file_container(file.clone()).await.expect("read").into_inner();
        assert_eq!(data.data, b"text\n");
        let list = ReadDirRequest { r#ref: "c".into(), dir_path: "/".into(), ..Default::default() };
        let entries = build.gateway.read_dir_container(list).await.expect("list").into_inner();
        assert!(entries.entries.iter().any(|entry| entry.path == "file"));
        let beyond = ReadFileRequest { mount_index: 7, ..file };
        build.gateway.read_file_container(beyond).await.expect_err("no such mount");
        build.say("trap", Input::Signal(SignalMessage { name: "USR1".into() })).await;
        let [trap] = build.ended(["trap"]).await;
        assert_eq!(trap.exit.code, 5);

        let script =
            "read line; until stty size | grep -q '40 80'; do sleep 0.02; done; echo got $line $TERM; exit 9";
        build.run("tty", &["sh", "-c", script], |init| init.tty = true).await;
        build.say("tty", Input::Resize(ResizeMessage { rows: 40, cols: 80 })).await;
        build.input("tty", "line\n", false).await;
        let [tty] = build.ended(["tty"]).await;
        assert!(tty.exit.code == 9 && tty.out().contains("got line xterm\r\n"), "{:?}", tty.out());

        build.run("none", &["/no/such/program"], |_| {}).await;
        let [none] = build.ended(["none"]).await;
        assert_eq!(none.exit.code, 255);
        assert!(none.exit.error.expect("an error").message.contains("/no/such/program"));
        let insecure = pb::SecurityMode::Insecure.into();
        build.run("insecure", &["true"], |init| init.security = insecure).await;
        let [refused] = build.ended(["insecure"]).await;
        assert_eq!(refused.exit.error.expect("an error").message, "security.insecure is not allowed");

        build.run("last", &["sleep", "1001"], |_| {}).await;
        build.release().await.expect_err("what ran in it was ended");
        let [first, last] = build.ended(["first", "last"]).await;
        for ended in [first, last] {
            assert!(ended.exit.error.expect("an error").message.ends_with("context canceled"));
        }
        assert!(!kiln.processes().iter().any(|(_, line)| line.starts_with("sleep 100")));
        build.release().await.expect_err("it is gone");
        build.finish().await;
        assert_eq!(kiln.mounts(), Vec::<String>::new());
    });
}

fn running(mark: &str) -> bool {
    std::fs::read_dir("/proc").expect("/proc").flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line == format!("sleep\0{mark}\0").as_bytes()
    })
}

#[test]
fn a_container_ends_with_its_first_process_and_with_its_build() {
    each(async |kiln: &mut Kiln| {
        let mark = format!("2000.{}", std::process::id());
        let mut build = Build::start(kiln, "ends").await;
        build.container("c").await.expect("a container");
        build.run("first", &["cat"], |_| {}).await;
        build.run("second", &["sleep", &mark], |_| {}).await;
        wait_until("the second process to run", PATIENCE, || running(&mark));
        build.input("first", "", true).await;
        let [first, second] = build.ended(["first", "second"]).await;
        assert_eq!((first.exit.code, second.exit.code), (0, 137));
        build.run("late", &["true"], |_| {}).await;
        let [late] = build.ended(["late"]).await;
        let error = late.exit.error.expect("an error").message;
        assert!(error.contains("container") && error.ends_with("not found"), "{error}");
        build.release().await.expect_err("processes failed");

        build.container("c").await.expect("another container");
        build.run("again", &["sleep", &mark], |_| {}).await;
        wait_until("the process to run", PATIENCE, || running(&mark));
        build.finish().await;
        assert!(!running(&mark), "the build's answer waits for its containers");

        let mut build = Build::start(kiln, "left").await;
        build.container("c").await.expect("a container");
        build.run("first", &["sleep", &mark], |_| {}).await;
        wait_until("the process to run", PATIENCE, || running(&mark));
        build.solve.abort();
        drop(build);
        wait_until("the processes of a client that left to end", PATIENCE, || !running(&mark));
    });
}
