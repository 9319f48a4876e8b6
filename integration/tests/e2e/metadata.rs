//! What LLB says beside an operation: cache to be ignored, cache not to be exported, groups of progress.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::Stdio;

use kiln_integration::{Built, Context, Kiln, Registry};
use kiln_proto::{llb, pb};
use prost::Message;
use serde_json::{Value, json};

/// A graph of shell commands on busybox.
struct Graph {
    builder: llb::Builder,
}

impl Graph {
    fn new() -> Self {
        Self { builder: llb::Builder::new() }
    }

    fn busybox(&mut self) -> pb::Input {
        let source = pb::SourceOp {
            identifier: "docker-image://docker.io/library/busybox:latest".to_owned(),
            ..Default::default()
        };
        self.add("busybox", Vec::new(), pb::op::Op::Source(source), pb::OpMetadata::default())
    }

    fn add(
        &mut self,
        name: &str,
        inputs: Vec<pb::Input>,
        op: pb::op::Op,
        mut metadata: pb::OpMetadata,
    ) -> pb::Input {
        metadata.description.insert(llb::CUSTOM_NAME.to_owned(), name.to_owned());
        let op = pb::Op {
            inputs,
            op: Some(op),
            platform: Some(pb::Platform {
                os: "linux".to_owned(),
                architecture: "amd64".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        };
        pb::Input { digest: self.builder.add(&op, metadata), index: 0 }
    }

    fn run(&mut self, name: &str, on: &pb::Input, command: &str, metadata: pb::OpMetadata) -> pb::Input {
        let op = pb::ExecOp {
            meta: Some(pb::Meta {
                args: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
                cwd: "/".to_owned(),
                ..Default::default()
            }),
            mounts: vec![pb::Mount { dest: "/".to_owned(), ..Default::default() }],
            ..Default::default()
        };
        self.add(name, vec![on.clone()], pb::op::Op::Exec(Box::new(op)), metadata)
    }
}

fn solve(kiln: &Kiln, definition: &pb::Definition) -> Built {
    let mut child = kiln
        .command(&["solve", "--progress", "rawjson"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start kiln");
    child.stdin.take().expect("piped").write_all(&definition.encode_to_vec()).expect("write the definition");
    Built::from(child.wait_with_output().expect("wait for kiln")).ok()
}

/// The last state of each vertex by name.
fn vertices(built: &Built) -> BTreeMap<String, Value> {
    let messages = built.stderr.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut states = BTreeMap::new();
    for message in messages {
        for vertex in message["vertexes"].as_array().into_iter().flatten() {
            states.insert(vertex["name"].as_str().unwrap_or_default().to_owned(), vertex.clone());
        }
    }
    states
}

fn cached(built: &Built, name: &str) -> bool {
    vertices(built)[name]["cached"] == true
}

#[test]
fn a_vertex_that_ignores_the_cache_runs_and_is_recorded() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let definition = |ignore_cache| {
        let ignoring = || pb::OpMetadata { ignore_cache, ..Default::default() };
        let mut graph = Graph::new();
        let base = graph.busybox();
        let same = graph.run("same", &base, "echo same > /same", ignoring());
        let after_same = graph.run("after same", &same, "cat /same", pb::OpMetadata::default());
        let random = graph.run("random", &after_same, "cat /proc/sys/kernel/random/uuid > /id", ignoring());
        let after_random = graph.run("after random", &random, "cat /id", pb::OpMetadata::default());
        graph.builder.finish(&after_random)
    };
    let all = ["same", "after same", "random", "after random"];
    let expect = |built: &Built, wanted: [bool; 4]| {
        let found = all.map(|name| cached(built, name));
        assert_eq!(found, wanted, "{}", built.stderr);
    };
    expect(&solve(&kiln, &definition(false)), [false; 4]);
    expect(&solve(&kiln, &definition(false)), [true; 4]);
    // What came out the same is followed by what was cached; what did not is not.
    expect(&solve(&kiln, &definition(true)), [false, true, false, false]);
    expect(&solve(&kiln, &definition(false)), [true; 4]);
}

#[test]
fn a_vertex_whose_cache_is_not_to_be_exported_is_cached_like_any_other() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let definition = |export: Option<bool>| {
        let export_cache = export.map(|value| pb::ExportCache { value });
        let mut graph = Graph::new();
        let base = graph.busybox();
        let step =
            graph.run("step", &base, "echo x > /x", pb::OpMetadata { export_cache, ..Default::default() });
        graph.builder.finish(&step)
    };
    assert!(!cached(&solve(&kiln, &definition(Some(false))), "step"));
    for export in [Some(false), Some(true), None] {
        assert!(cached(&solve(&kiln, &definition(export)), "step"), "{export:?}");
    }
}

#[test]
fn groups_of_progress_reach_the_client() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let grouped = |weak| pb::OpMetadata {
        progress_group: Some(pb::ProgressGroup {
            id: "g1".to_owned(),
            name: "both of them".to_owned(),
            weak,
        }),
        ..Default::default()
    };
    let mut graph = Graph::new();
    let base = graph.busybox();
    let one = graph.run("one", &base, "echo 1", grouped(false));
    let two = graph.run("two", &one, "echo 2", grouped(true));
    let other = graph.run("other", &two, "echo 3", pb::OpMetadata::default());
    let definition = graph.builder.finish(&other);
    for _ in 0..2 {
        let states = vertices(&solve(&kiln, &definition));
        assert_eq!(
            states["one"]["progressGroup"],
            json!({"id": "g1", "name": "both of them", "weak": false})
        );
        assert_eq!(states["two"]["progressGroup"]["weak"], true);
        assert_eq!(states["other"]["progressGroup"], Value::Null);
    }
}

#[test]
fn named_stages_are_built_without_the_cache() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        "FROM busybox AS one\nRUN echo one > /f\n\
         FROM busybox AS two\nRUN echo two > /f\nRUN cat /proc/sys/kernel/random/uuid > /g\n\
         FROM busybox AS three\nRUN echo three > /f\n\
         FROM busybox\nCOPY --from=one /f /1\nCOPY --from=two /f /2\nCOPY --from=three /f /3\nCOPY --from=two /g /4\n",
    );
    let build = |args: &[&str]| kiln.build(context.path(), args).ok();
    let ran = |built: &Built, name: &str| {
        let number = built.stderr.lines().find(|line| line.contains(name)).expect("the step is shown");
        let number = number.split(' ').next().expect("a number");
        !built.stderr.contains(&format!("{number} CACHED"))
    };
    let steps = [
        "[one 2/2] RUN echo one",
        "[two 2/3] RUN echo two",
        "[two 3/3] RUN cat",
        "[three 2/2] RUN echo three",
        "COPY --from=two /f /2",
        "COPY --from=two /g /4",
    ];
    let expect = |built: &Built, wanted: [bool; 6]| {
        assert_eq!(steps.map(|step| ran(built, step)), wanted, "{}", built.stderr);
    };
    expect(&build(&[]), [true; 6]);
    expect(&build(&[]), [false; 6]);
    expect(&build(&["--no-cache-filter", "two"]), [false, true, true, false, false, true]);
    expect(&build(&["--no-cache-filter", "one,three"]), [true, false, false, true, false, false]);
    expect(&build(&[]), [false; 6]);
}

#[test]
fn without_cache_a_cache_mount_is_emptied_once_and_then_kept_for_the_build() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        "FROM busybox\n\
         RUN --mount=type=cache,target=/c echo held $(ls /c); touch /c/first\n\
         RUN --mount=type=cache,target=/c ls /c/first && touch /c/second\n",
    );
    kiln.build(context.path(), &[]).ok();
    let again = kiln.build(context.path(), &["--no-cache"]).ok();
    assert!(again.stderr.lines().any(|line| line.ends_with(" held")), "{}", again.stderr);
}
