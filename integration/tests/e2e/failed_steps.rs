//! What a client that is the frontend itself can see of a step that failed.

use kiln_integration::{Kiln, Registry, wait_until};
use kiln_proto::{llb, pb, rpc};
use prost::Message;
use serde_json::Value;
use tonic::Status;

use crate::gateway_client::{Build, PATIENCE, ask, busybox};

/// A build of what `make` adds, which fails: what its error says to those who look into it.
async fn failure(build: &mut Build, make: impl FnOnce(&mut llb::Builder) -> pb::Input) -> Value {
    let mut builder = llb::Builder::new();
    let result = make(&mut builder);
    let mut request = ask(builder.finish(&result));
    request.evaluate = true;
    told(&build.gateway.solve(request).await.expect_err("it fails"))
}

fn told(status: &Status) -> Value {
    let all = rpc::Status::decode(status.details()).expect("details").details;
    let detail = all.iter().find(|any| any.type_url == "github.com/moby/buildkit/errdefs.Solve+json");
    serde_json::from_slice(&detail.expect("a detail of its own").value).expect("JSON")
}

fn texts(told: &Value, name: &str) -> Vec<String> {
    let list = told[name].as_array().cloned().unwrap_or_default();
    list.iter().map(|id| id.as_str().expect("a text").to_owned()).collect()
}

fn shown(dest: &str, id: &str) -> pb::Mount {
    pb::Mount { dest: dest.into(), result_id: id.into(), ..pb::Mount::default() }
}

fn add(builder: &mut llb::Builder, op: pb::op::Op, inputs: &[&pb::Input]) -> pb::Input {
    let inputs = inputs.iter().copied().cloned().collect();
    let op = pb::Op { op: Some(op), inputs, ..pb::Op::default() };
    let description = [("llb.customname".to_owned(), "the one that fails".to_owned())];
    let metadata = pb::OpMetadata { description: description.into(), ..pb::OpMetadata::default() };
    pb::Input { digest: builder.add(&op, metadata), index: 0 }
}

fn run(script: &str, mounts: Vec<pb::Mount>) -> pb::op::Op {
    let args = ["sh", "-c", script].map(String::from).into();
    let env = vec!["PATH=/bin".into()];
    let meta = pb::Meta { args, env, cwd: "/".into(), ..pb::Meta::default() };
    pb::op::Op::Exec(pb::ExecOp { meta: Some(meta), mounts, ..pb::ExecOp::default() }.into())
}

fn mkfile(path: &str) -> pb::file_action::Action {
    let action =
        pb::FileActionMkFile { path: path.into(), mode: 0o644, data: b"made".into(), ..Default::default() };
    pb::file_action::Action::Mkfile(action.into())
}

/// File actions, one on top of the other.
fn file(actions: Vec<pb::file_action::Action>) -> pb::op::Op {
    let last = actions.len() as i64 - 1;
    let action = |(index, action)| pb::FileAction {
        input: index as i64 - 1,
        secondary_input: -1,
        output: if index as i64 == last { 0 } else { -1 },
        action: Some(action),
    };
    pb::op::Op::File(pb::FileOp { actions: actions.into_iter().enumerate().map(action).collect() })
}

impl Build {
    /// What a process of a new name says.
    async fn prints(&mut self, name: &str, mounts: Vec<pb::Mount>, script: &str) -> String {
        self.container_of("c", mounts).await.expect("a container");
        self.run(name, &["sh", "-c", script], |_| {}).await;
        let [process] = self.ended([name]).await;
        assert_eq!(process.exit.code, 0, "{}", String::from_utf8_lossy(&process.err));
        self.release().await.expect("nothing failed");
        process.out()
    }
}

fn with_daemon(test: impl AsyncFn(&Kiln)) {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let staged = || std::fs::read_dir(kiln.root().join("staging")).map_or(0, Iterator::count);
    let before = staged();
    tokio::runtime::Runtime::new().expect("a runtime").block_on(test(&kiln));
    wait_until("what failed steps left to go", PATIENCE, || staged() == before);
    kiln.stop();
}

#[test]
fn a_process_that_failed() {
    with_daemon(async |kiln: &Kiln| {
        let mut build = Build::start(kiln, "exec").await;
        let mount = |dest: &str, input: i64, output: i64| pb::Mount {
            dest: dest.into(),
            input,
            output,
            ..pb::Mount::default()
        };
        let given = failure(&mut build, |builder| {
            let base = busybox(builder);
            let below = add(builder, file(vec![mkfile("/below")]), &[]);
            let mounts = vec![mount("/", 0, 0), mount("/new", -1, 1), mount("/loose", 1, -1)];
            let script = "echo root > /data; echo new > /new/data; echo loose > /loose/data; exit 3";
            add(builder, run(script, mounts), &[&base, &below])
        })
        .await;
        assert_eq!(given["op"]["exec"]["meta"]["args"][0], "sh");
        assert_eq!(given["op"]["exec"]["mounts"][1]["input"], "-1", "protobuf's JSON: {given}");
        assert_eq!(given["description"]["llb.customname"], "the one that fails");
        let (inputs, states) = (texts(&given, "inputIDs"), texts(&given, "mountIDs"));
        assert_eq!((inputs.len(), states.len()), (3, 3));
        assert_eq!(inputs[1], "", "nothing was given there");

        let places = ["/", "/new", "/loose"];
        let mounts = |ids: &[String]| places.iter().zip(ids).map(|(dest, id)| shown(dest, id)).collect();
        let script = "cat /data /new/data /loose/data /loose/below";
        assert_eq!(build.prints("after", mounts(&states), script).await, "root\nnew\nloose\nmade");
        let before = "ls /data /new/data /loose/data 2>/dev/null; cat /loose/below";
        assert_eq!(build.prints("before", mounts(&inputs), before).await, "made");
        build.finish().await;

        let mut build = Build::start(kiln, "later").await;
        let gone = build.container_of("c", mounts(&states)).await.expect_err("the other build is over");
        assert!(gone.message().contains("failed to find ref"), "{gone}");
        build.finish().await;
    });
}

#[test]
fn a_file_action_that_failed() {
    with_daemon(async |kiln: &Kiln| {
        let mut build = Build::start(kiln, "file").await;
        let given = failure(&mut build, |builder| {
            add(builder, file(vec![mkfile("/a"), mkfile("/b"), mkfile("/not/there")]), &[])
        })
        .await;
        assert_eq!(given["file"]["index"], "2");
        assert_eq!(given["op"]["file"]["actions"][2]["mkfile"]["path"], "/not/there");
        let states = texts(&given, "mountIDs");
        assert_eq!(states.len(), 3);
        let mounts = vec![shown("/", &build.root.clone()), shown("/seen", &states[2])];
        assert_eq!(build.prints("list", mounts, "ls /seen").await, "a\nb\n");
        build.finish().await;
    });
}

#[test]
fn what_a_key_could_not_be_computed_of() {
    with_daemon(async |kiln: &Kiln| {
        let mut build = Build::start(kiln, "key").await;
        let given = failure(&mut build, |builder| {
            let base = busybox(builder);
            let below = add(builder, file(vec![mkfile("/below")]), &[]);
            let root = pb::Mount { dest: "/".into(), ..pb::Mount::default() };
            let missing = pb::Mount {
                dest: "/m".into(),
                input: 1,
                output: -1,
                selector: "/nowhere".into(),
                readonly: true,
                ..pb::Mount::default()
            };
            add(builder, run("true", vec![root, missing]), &[&base, &below])
        })
        .await;
        assert_eq!(given["cache"]["index"], "1");
        let inputs = texts(&given, "inputIDs");
        assert_eq!((inputs.len(), texts(&given, "mountIDs").len()), (1, 0));
        let mounts = vec![shown("/", &build.root.clone()), shown("/seen", &inputs[0])];
        assert_eq!(build.prints("list", mounts, "ls /seen").await, "below\n");
        build.finish().await;
    });
}
