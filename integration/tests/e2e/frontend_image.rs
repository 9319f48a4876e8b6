//! Frontends that are images: a program in a container speaks with the daemon and returns the result.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_integration::tools::run;
use kiln_integration::{Context, Kiln, Registry, wait_until};
use kiln_proto::control::SolveRequest;
use kiln_proto::control::control_client::ControlClient;
use kiln_proto::{llb, pb};
use tempfile::TempDir;
use tonic::{Code, Status};

use crate::gateway_client::connect;

const CAPS: &str =
    "moby.buildkit.frontend.caps=moby.buildkit.frontend.inputs,moby.buildkit.frontend.contexts";

/// A registry with the frontend's image, the name of that, and a daemon.
fn world() -> (Registry, String, Kiln) {
    let registry = Registry::with_busybox();
    let image = format!("{}/test/frontend", registry.address);
    let kiln = Kiln::new(&registry);
    push(&kiln, &image, &format!("LABEL {CAPS}\n"));
    (registry, image, kiln)
}

fn push(kiln: &Kiln, image: &str, lines: &str) {
    let made = Context::new(&format!(
        "FROM scratch\nCOPY root /\nENV GREETING=hello\nWORKDIR /work\nENTRYPOINT [\"/frontend\"]\n{lines}"
    ));
    let program = Path::new(env!("CARGO_BIN_EXE_kiln-sample-frontend"));
    // With what its loader wants, at the same places.
    let listing = String::from_utf8(run(Command::new("ldd").arg(program))).expect("text");
    let libraries = listing.split_whitespace().filter(|word| word.starts_with('/')).map(Path::new);
    let copies = libraries.map(|library| (library, library.to_owned()));
    for (from, to) in copies.chain([(program, "/frontend".into())]) {
        let to = made.path().join("root").join(to.strip_prefix("/").expect("absolute"));
        std::fs::create_dir_all(to.parent().expect("a parent")).expect("create directories");
        std::fs::copy(from, to).expect("copy");
    }
    kiln.build(made.path(), &["-t", image, "--push"]).ok();
}

/// Has a file built into a directory.
fn build(kiln: &Kiln, context: &Context, args: &[&str]) -> (TempDir, kiln_integration::Built) {
    let out = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", out.path().display());
    let all: Vec<&str> = ["-o", &output].into_iter().chain(args.iter().copied()).collect();
    let built = kiln.build(context.path(), &all).ok();
    (out, built)
}

fn read(dir: &Path, name: &str) -> String {
    std::fs::read_to_string(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Has the frontend answer a client that is no Dockerfile's.
fn solve(kiln: &Kiln, change: impl FnOnce(&mut SolveRequest)) -> Result<(), Status> {
    let mut request =
        SolveRequest { r#ref: "its-ref".into(), frontend: "gateway.v0".into(), ..SolveRequest::default() };
    change(&mut request);
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(async { ControlClient::new(connect(kiln).await).solve(request).await.map(drop) })
}

fn opts(list: &[(&str, &str)]) -> std::collections::HashMap<String, String> {
    list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn a_file_names_the_frontend_that_builds_it() {
    let (_registry, image, kiln) = world();
    let file = concat!(
        "warn be careful\n",
        "base docker.io/library/busybox:latest\n",
        "file /text some text\n",
        "opt /command cmdline\n",
        "opt /arg build-arg:A\n",
        "env /greeting GREETING\n",
        "env /workers BUILDKIT_WORKERS\n",
        "own /own\n",
    );
    let context = Context::new(&format!("# syntax={image} with more\n{file}"));
    let (out, built) = build(&kiln, &context, &["--build-arg", "A=x y"]);
    let read = |name| read(out.path(), name);
    assert_eq!(
        (read("text"), read("arg"), read("greeting")),
        ("some text".into(), "x y".into(), "hello".into())
    );
    assert_eq!(read("command"), format!("{image} with more"));
    assert!(read("own").starts_with(&format!("docker-image://{image}:latest@sha256:")), "{}", read("own"));
    let workers: serde_json::Value = serde_json::from_str(&read("workers")).expect("JSON");
    assert!(workers[0]["Platforms"][0]["architecture"].is_string(), "{workers}");
    assert!(out.path().join("bin/busybox").exists(), "the base");
    assert!(built.stderr.contains("be careful"), "{}", built.stderr);
    let frontends = kiln.usage().into_iter().filter(|record| record["recordType"] == "frontend").count();
    assert!(frontends > 0, "du tells them apart");

    // The request goes before the file, and a frontend may ask another one.
    let inner = Context::new("dockerfile inner\nfile /outer 2");
    inner.file("inner", "FROM busybox\nRUN echo 1 > /inner\n");
    let syntax = format!("BUILDKIT_SYNTAX={image}");
    let (out, _) = build(&kiln, &inner, &["--build-arg", &syntax]);
    assert_eq!(
        (self::read(out.path(), "inner"), self::read(out.path(), "outer")),
        ("1\n".into(), "2".into())
    );
}

#[test]
fn what_goes_wrong_is_told() {
    let (_registry, image, mut kiln) = world();
    let context = |line: &str| Context::new(&format!("# syntax={image}\n{line}\n"));
    let fails = |line: &str, texts: &[&str]| kiln.build(context(line).path(), &[]).fails(texts);
    // The lines of the file that named it are shown.
    fails("fail no such thing", &["no such thing", "Dockerfile:1", &format!("# syntax={image}")]);
    fails("crash out of ideas", &["frontend image", "exit code: 3", "out of ideas"]);
    fails("babble", &["frontend image", "closed its connection and did not end"]);
    fails("leave", &["frontend image", "closed its connection and did not end"]);
    fails("base 127.0.0.1:1/nowhere", &["127.0.0.1:1", "Dockerfile:1"]);
    let nowhere = Context::new("# syntax=127.0.0.1:1/nowhere\n");
    kiln.build(nowhere.path(), &[]).fails(&["127.0.0.1:1/nowhere", "Dockerfile:1"]);
    let nothing = Context::new("# syntax=docker.io/library/busybox\n");
    kiln.build(nothing.path(), &[]).fails(&["frontend image", "/run"]);
    let inner = context("dockerfile inner");
    inner.file("inner", "FROM busybox\nRUN false\n");
    kiln.build(inner.path(), &[]).fails(&["exit code: 1", "inner:2", "RUN false"]);

    let refused = solve(&kiln, |_| {}).expect_err("no image");
    assert_eq!(refused.message(), "no source specified for gateway");
    let old = opts(&[("source", &image), ("gateway-devel", "")]);
    let refused = solve(&kiln, |request| request.frontend_attrs = old).expect_err("no longer there");
    assert_eq!(refused.message(), "development gateway is no longer supported");
    let wants = opts(&[("source", &image), ("frontend.caps", "moby.buildkit.frontend.subrequests")]);
    let refused = solve(&kiln, |request| request.frontend_attrs = wants).expect_err("not able");
    assert_eq!(refused.code(), Code::Unimplemented);
    assert!(refused.message().contains("moby.buildkit.frontend.subrequests"), "{}", refused.message());

    kiln.stop();
    kiln.configure("[frontend.\"gateway.v0\"]\nallowedRepositories = [\"example.com/a\"]\n");
    kiln.build(context("").path(), &[]).fails(&[&format!("'{image}' is not an allowed gateway source")]);
    kiln.stop();
    kiln.configure("[frontend.\"dockerfile.v0\"]\nenabled = false\n");
    kiln.build(context("").path(), &[]).fails(&["invalid frontend: dockerfile.v0"]);
}

#[test]
fn definitions_that_come_with_a_build_reach_it() {
    let (_registry, image, kiln) = world();
    let mut builder = llb::Builder::new();
    let source = pb::SourceOp {
        identifier: "docker-image://docker.io/library/busybox:latest".into(),
        ..pb::SourceOp::default()
    };
    let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
    let digest = builder.add(&op, pb::OpMetadata::default());
    let definition = builder.finish(&pb::Input { digest, index: 0 });
    let give = |request: &mut SolveRequest, source: &str, text: &str| {
        request.frontend_attrs = opts(&[("source", source), ("text", text)]);
        request.frontend_inputs = [("here".to_owned(), definition.clone())].into();
    };
    solve(&kiln, |request| give(request, &image, "input here\nfile /a b")).expect("it is there");
    let missing = solve(&kiln, |request| give(request, &image, "input there")).expect_err("it is not");
    assert_eq!((missing.code(), missing.message()), (Code::NotFound, "no input there"));
    let unable = format!("{image}-unable");
    push(&kiln, &unable, "");
    let refused = solve(&kiln, |request| give(request, &unable, "input here")).expect_err("not able");
    assert!(refused.message().contains("moby.buildkit.frontend.inputs"), "{}", refused.message());
    // A context may stand in the image's place.
    solve(&kiln, |request| {
        give(request, "example.com/never/pulled:1", "input here\nfile /a b");
        let instead = format!("docker-image://{image}");
        request.frontend_attrs.insert("context:example.com/never/pulled:1".to_owned(), instead);
    })
    .expect("the image in its place");
}

#[test]
fn it_ends_with_its_client() {
    let (_registry, image, mut kiln) = world();
    kiln.start();
    let context = Context::new(&format!("# syntax={image}\nwait\n"));
    let path = context.path().display().to_string();
    let mut client = kiln.command(&["build", &path]).spawn().expect("kiln");
    let own = format!("source={image}");
    let runs = || {
        let processes = std::fs::read_dir("/proc").expect("processes").flatten();
        let environ =
            |process: std::fs::DirEntry| std::fs::read(process.path().join("environ")).unwrap_or_default();
        processes.map(environ).any(|environ| String::from_utf8_lossy(&environ).contains(&own))
    };
    wait_until("the frontend runs", Duration::from_secs(60), runs);
    run(Command::new("kill").arg(client.id().to_string()));
    client.wait().expect("it ends");
    wait_until("the frontend ends", Duration::from_secs(10), || !runs());
}
