//! The same work by Kiln's own client and, where `BUILDX` and `BUILDCTL` name them, by others.

use std::path::Path;
use std::process::{Command, Stdio};

use kiln_integration::peers::{Buildx, buildctl};
use kiln_integration::tools::{self, run};
use kiln_integration::{Built, Context, Kiln, Registry};
use serde_json::Value;
use tempfile::TempDir;

const DOCKERFILE: &str = "FROM busybox AS base\nARG WHO=world\nRUN echo hello $WHO > /hello\nFROM scratch\nCOPY --from=base /hello /\nCMD [\"/x\"]\n";

fn json(text: &[u8]) -> Value {
    serde_json::from_slice(text).expect("JSON")
}

/// The layout holds the image under this name, whole.
fn check_layout(layout: &Path, name: &str) {
    let image = format!("oci:{}:{name}", layout.display());
    let config = json(&run(Command::new("skopeo").args(["inspect", "--config", &image])));
    assert_eq!(config["config"]["Cmd"], serde_json::json!(["/x"]));
    let bundle = TempDir::new().expect("temporary directory");
    tools::unpack(layout, name, &bundle.path().join("b"));
    let hello = std::fs::read_to_string(bundle.path().join("b/rootfs/hello")).expect("hello");
    assert!(hello.starts_with("hello "), "{hello}");
}

fn entries(layout: &Path) -> Vec<(String, String)> {
    let index = json(&std::fs::read(layout.join("index.json")).expect("an index"));
    let text = |entry: &Value, name: &str| entry["annotations"][name].as_str().unwrap_or_default().to_owned();
    let entries = index["manifests"].as_array().expect("manifests").iter();
    entries
        .map(|entry| {
            (text(entry, "io.containerd.image.name"), text(entry, "org.opencontainers.image.ref.name"))
        })
        .collect()
}

#[test]
fn an_image_layout_is_filled_and_added_to() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new(DOCKERFILE);
    let directory = TempDir::new().expect("temporary directory");
    let buildx = Buildx::new(&kiln);
    let build = |client: &str, args: &[&str]| match client {
        "kiln" => kiln.build(context.path(), args).ok(),
        _ => buildx.as_ref().expect("named").build(context.path(), args).ok(),
    };
    for client in ["kiln", "buildx"] {
        if client == "buildx" && buildx.is_none() {
            continue;
        }
        let layout = directory.path().join(client);
        let output = format!("type=oci,dest={},tar=false", layout.display());
        build(client, &["-o", &output, "-t", "example.org/a:1"]);
        check_layout(&layout, "1");
        // What is there already is not sent again; what had the name gives it up.
        build(client, &["-o", &output, "-t", "example.org/a:1", "-t", "example.org/b:2"]);
        let named = |name: &str, tag: &str| (format!("example.org/{name}"), tag.to_owned());
        assert_eq!(entries(&layout), [named("a:1", "1"), named("b:2", "2")]);
        build(client, &["-o", &output, "--build-arg", "WHO=you"]);
        check_layout(&layout, "latest");
        check_layout(&layout, "2");
        assert_eq!(entries(&layout).len(), 3);
        let blobs = std::fs::read_dir(layout.join("blobs/sha256")).expect("blobs");
        assert_eq!(blobs.count(), 6, "two of each");
    }
    if let Some(mut command) = buildctl(&kiln, &["build", "--frontend=dockerfile.v0"]) {
        let layout = directory.path().join("buildctl");
        let local = |name: &str| format!("--local={name}={}", context.path().display());
        let output = format!("type=oci,dest={},tar=false,name=example.org/a:1", layout.display());
        run(command.args([local("context"), local("dockerfile")]).args(["--output", &output]));
        check_layout(&layout, "1");
    }
    let output = format!("type=oci,dest={},tar=false", directory.path().join("x").display());
    let refused = kiln.build(context.path(), &["-o", &output, "-o", &output]);
    assert!(refused.stderr.contains("only one output can have tar=false"), "{}", refused.stderr);
}

#[test]
fn buildx_asks_and_is_answered() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let Some(buildx) = Buildx::new(&kiln) else { return };
    let context = Context::new(DOCKERFILE);
    context.file("Other", "FROM scratch\nCOPY Other /\n");
    let outline = buildx.build(context.path(), &["--call", "outline", "--target", "base"]).ok().stdout;
    assert!(outline.contains("WHO") && outline.contains("world"), "{outline}");

    // A policy beside the Dockerfile, and an archive that might hold one.
    let policy = |allow: bool| {
        format!("package docker\ndefault allow := {allow}\ndecision := {{\"allow\": {allow}}}\n")
    };
    context.file("Dockerfile.rego", policy(true));
    buildx.build(context.path(), &[]).ok();
    context.file("Dockerfile.rego", policy(false));
    buildx.build(context.path(), &[]).fails(&["not allowed by policy"]);
    let archive = run(Command::new("tar").args(["-c", "-C"]).arg(context.path()).args(["Other"]));
    let out = TempDir::new().expect("temporary directory");
    let dest = out.path().to_str().expect("UTF-8");
    let mut child = buildx
        .command(&["build", "-f", "Other", "-o", dest, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("run docker-buildx");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), &archive).expect("write");
    Built::from(child.wait_with_output().expect("docker-buildx")).ok();
    assert!(out.path().join("Other").exists());
}

#[test]
fn buildx_reads_the_history() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let Some(buildx) = Buildx::new(&kiln) else { return };
    let context = Context::new(DOCKERFILE);
    context.file("Bad", "FROM busybox\nRUN echo words; exit 7\n");
    buildx.build(context.path(), &[]).ok();
    let bad = context.path().join("Bad");
    buildx.build(context.path(), &["-f", bad.to_str().expect("UTF-8")]).fails(&["exit code: 7"]);

    let listed = buildx.run(&["history", "ls", "--format", "json"]).ok().stdout;
    let statuses: Vec<Value> = listed.lines().map(|line| json(line.as_bytes())["status"].clone()).collect();
    assert_eq!(statuses, ["Error", "Completed"]);
    let failed = json(buildx.run(&["history", "inspect", "--format", "json"]).ok().stdout.as_bytes());
    assert_eq!(failed["Error"]["Code"], 2, "{failed:#}");
    let recent = buildx.run(&[
        "history",
        "ls",
        "--format",
        "json",
        "--filter",
        "startedAt>1h",
        "--filter",
        "status=error",
    ]);
    assert_eq!(recent.ok().stdout.lines().count(), 1);
    // Recorded, although it is not attested.
    let metadata = context.path().join("metadata.json");
    let file = format!("--metadata-file={}", metadata.display());
    buildx.build(context.path(), &["--provenance=false", &file]).ok();
    let written = json(&std::fs::read(&metadata).expect("written"));
    let materials = &written["buildx.build.provenance"]["materials"];
    assert!(materials[0]["uri"].as_str().is_some_and(|uri| uri.contains("busybox")), "{written:#}");
    buildx
        .run(&[
            "history",
            "rm",
            written["buildx.build.ref"].as_str().and_then(|name| name.rsplit('/').next()).expect("a ref"),
        ])
        .ok();
    let logs = buildx.run(&["history", "logs", "--progress", "plain"]).ok();
    assert!(logs.stderr.contains("words"), "{}", logs.stderr);
    let names = |reference: &str| {
        let traced = buildx.run(&["history", "trace", reference]).ok().stdout;
        let spans = json(traced.as_bytes())["data"][0]["spans"].as_array().cloned().unwrap_or_default();
        spans
            .iter()
            .map(|span| span["operationName"].as_str().unwrap_or_default().to_owned())
            .collect::<Vec<_>>()
    };
    let has = |names: &[String], wanted: &str| {
        assert!(names.iter().any(|name| name == wanted), "{wanted}: {names:#?}")
    };
    let spans = names("");
    for wanted in ["moby.buildkit.v1.Control/Solve", "[2/2] RUN echo words; exit 7", "build"] {
        has(&spans, wanted);
    }
    // A build of Kiln's own client has spans, too.
    kiln.build(context.path(), &["--target", "base"]).ok();
    has(&names(""), "[base 2/2] RUN echo hello world > /hello");

    let export = context.path().join("build.dockerbuild");
    buildx.run(&["history", "export", "-o", export.to_str().expect("UTF-8")]).ok();
    assert!(tools::tar_listing(&export).iter().any(|line| line.ends_with("index.json")));
    buildx.run(&["history", "rm", "--all"]).ok();
    assert_eq!(buildx.run(&["history", "ls", "--format", "json"]).ok().stdout, "");
}
