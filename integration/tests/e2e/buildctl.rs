//! `buildctl build`, as Kiln has it under that name and as the peer's binary does it: one daemon, the same results.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_integration::peers::buildctls;
use kiln_integration::{Built, Context, Kiln, Registry, layout, tools};
use serde_json::Value;
use tempfile::TempDir;

const DOCKERFILE: &str =
    "FROM busybox AS b\nARG WHO=nobody\nRUN echo $WHO > /who\nFROM scratch\nCOPY --from=b /who /\n";

fn run(mut command: Command) -> Built {
    command.output().expect("run buildctl").into()
}

fn fed(mut command: Command, input: &[u8]) -> Built {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("run buildctl");
    child.stdin.take().expect("piped").write_all(input).expect("write the definition");
    child.wait_with_output().expect("wait for buildctl").into()
}

/// `build` of a Dockerfile, with its context.
fn build<'a>(context: &'a [String; 2], args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["build", "--progress=plain", "--frontend=dockerfile.v0"];
    all.extend(context.iter().map(String::as_str));
    all.extend_from_slice(args);
    all
}

fn locals(path: &Path) -> [String; 2] {
    ["context", "dockerfile"].map(|name| format!("--local={name}={}", path.display()))
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn every_output_is_written() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new(DOCKERFILE);
    let context = locals(context.path());
    for (number, buildctl) in buildctls(&kiln).into_iter().enumerate() {
        let directory = TempDir::new().expect("temporary directory");
        let file = |name: &str| directory.path().join(name);
        let output = |kind: &str, name: &str| format!("--output=type={kind},dest={}", file(name).display());
        let done = |args: &[&str]| run(buildctl(&build(&context, args))).ok();

        done(&["--opt", "build-arg:WHO=me", &output("local", "tree")]);
        assert_eq!(std::fs::read_to_string(file("tree/who")).expect("exported"), "me\n");
        done(&[&output("tar", "tree.tar")]);
        assert_eq!(tools::tar_listing(&file("tree.tar")), ["-rw-r--r-- 0/0 who"]);
        let layout = output("oci", "layout") + ",tar=false,name=example.org/a:1";
        done(&[&layout]);
        let digest = tools::layout_digest(&file("layout"), "1");
        let names = ["oci", "docker"].map(|kind| output(kind, &format!("{kind}.tar")));
        done(&[&names[0], &names[1]]);
        for name in ["oci.tar", "docker.tar"] {
            assert!(
                tools::tar_listing(&file(name)).iter().any(|line| line.ends_with("index.json")),
                "{name}"
            );
        }
        let archive = buildctl(&build(&context, &["-o", "type=docker"])).output().expect("run buildctl");
        assert!(archive.status.success());
        std::fs::write(file("stdout.tar"), &archive.stdout).expect("written");
        assert!(tools::tar_listing(&file("stdout.tar")).iter().any(|line| line.ends_with("manifest.json")));

        let name = format!("{}/app:{number}", registry.address);
        let (metadata, id) = (file("metadata.json"), file("ref"));
        let files = [("metadata-file", &metadata), ("ref-file", &id), ("trace", &file("trace"))]
            .map(|(flag, path)| format!("--{flag}={}", path.display()));
        let image = format!("--output=type=image,name={name},push=true");
        done(&[&image, &files[0], &files[1], &files[2]]);
        assert_eq!(json(&metadata)["containerimage.digest"], tools::digest(&name));
        assert_eq!(digest, tools::digest(&name), "one image, however it is written");
        let id = std::fs::read_to_string(&id).expect("the build's ref");
        let listed = kiln.run(&["history", "ls", "--filter", &format!("ref=={id}")]).ok();
        assert!(listed.stdout.contains("Completed"), "{}", listed.stdout);
        let trace = std::fs::read_to_string(file("trace")).expect("a trace");
        let vertexes = trace.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        assert!(vertexes.flat_map(|line| line["vertexes"].as_array().cloned()).flatten().count() > 3);
    }
}

#[test]
fn builds_get_what_they_ask_for() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new(
        "FROM busybox\nCOPY --from=base /bin/busybox /copied\nRUN --mount=type=secret,id=key test $(cat /run/secrets/key) = hidden\n",
    );
    context.file("key", "hidden");
    let secret = format!("--secret=id=key,src={}", context.path().join("key").display());
    let shared = locals(context.path());
    let busybox = layout("busybox");
    let digest = tools::layout_digest(&busybox, "latest");
    let store = format!("--oci-layout=store={}", busybox.display());
    let base = format!("--opt=context:base=oci-layout://store@{digest}");
    let plain = Context::new("FROM busybox\nRUN echo solved > /solved\n");
    let definition = kiln
        .command(&["debug", "dump-llb", "--raw", plain.path().to_str().expect("UTF-8")])
        .output()
        .expect("run kiln")
        .stdout;
    let policy = plain.path().join("policy.json");
    let rule = r#"{"rules": [{"action": "DENY", "selector": {"identifier": "docker-image://docker.io/library/busybox*"}}]}"#;
    std::fs::write(&policy, rule).expect("written");
    let policy = format!("--source-policy-file={}", policy.display());
    for buildctl in buildctls(&kiln) {
        run(buildctl(&build(&shared, &[&secret, &store, &base]))).ok();
        let directory = TempDir::new().expect("temporary directory");
        let tree = format!("--output=type=local,dest={}", directory.path().display());
        fed(buildctl(&["build", "--progress=plain", &tree]), &definition).ok();
        assert_eq!(std::fs::read_to_string(directory.path().join("solved")).expect("exported"), "solved\n");
        let denied = fed(buildctl(&["build", "--progress=plain", &policy]), &definition);
        assert_ne!(denied.code, 0);
        assert!(denied.stderr.contains("busybox"), "{}", denied.stderr);
        let again = fed(buildctl(&["build", "--progress=plain", "--no-cache"]), &definition).ok();
        assert!(!again.stderr.contains("CACHED"), "{}", again.stderr);
    }
}

#[test]
fn what_goes_wrong_is_told() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN echo said; exit 7\n");
    let shared = locals(context.path());
    for buildctl in buildctls(&kiln) {
        let failed = run(buildctl(&build(&shared, &[])));
        assert_eq!(failed.code, 1);
        for text in ["exit code: 7", "Dockerfile:2", ">>> RUN echo said; exit 7", "said"] {
            assert!(failed.stderr.contains(text), "{text}: {}", failed.stderr);
        }
        for (args, text) in [
            (&["build", "--frontend=dockerfile.v0", "--local=context=/nonexistent"][..], "/nonexistent"),
            (&["build"], "--frontend"),
            (&["build", "--frontend=dockerfile.v0", "--opt=target"], "target"),
            (&["build", "--frontend=dockerfile.v0", "--output=dest=x"], "type"),
            (&["build", "--frontend=dockerfile.v0", "--output=type=local"], "local"),
            (&["build", "--frontend=dockerfile.v0", "--export-cache=mode=max"], "type"),
        ] {
            let failed = run(buildctl(args));
            assert_eq!(failed.code, 1, "{args:?}: {}", failed.stderr);
            assert!(failed.stderr.contains(text), "{args:?}: {}", failed.stderr);
        }
    }
}
