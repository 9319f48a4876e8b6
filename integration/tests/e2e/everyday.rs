//! What people do with a builder every day, by Kiln's own client and by docker buildx where `BUILDX` names it: the same
//! flags, the same results.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_integration::peers::Buildx;
use kiln_integration::{Built, Context, Kiln, Registry, tools};
use serde_json::Value;
use tempfile::TempDir;

type Client<'a> = (&'static str, Box<dyn Fn(&[&str]) -> Command + 'a>);

fn clients<'a>(kiln: &'a Kiln, buildx: Option<&'a Buildx>) -> Vec<Client<'a>> {
    let own = |args: &[&str]| kiln.command(&[&["build", "--progress", "plain"], args].concat());
    let mut all: Vec<Client<'_>> = vec![("kiln", Box::new(own))];
    if let Some(buildx) = buildx {
        let other = |args: &[&str]| buildx.command(&[&["build", "--progress", "plain"], args].concat());
        all.push(("buildx", Box::new(other)));
    }
    all
}

fn run(mut command: Command, input: Option<&[u8]>) -> Built {
    let Some(input) = input else { return command.output().expect("run the client").into() };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("run the client");
    child.stdin.take().expect("piped").write_all(input).expect("write");
    child.wait_with_output().expect("wait for the client").into()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn builds_of_every_shape() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let buildx = Buildx::new(&kiln);
    let context = Context::new(
        "FROM busybox AS base\nARG WHO=nobody\nRUN echo $WHO > /who\n\
         FROM base AS secret\nRUN --mount=type=secret,id=key cp /run/secrets/key /copied\n\
         FROM base AS agent\nRUN --mount=type=ssh test -S \"$SSH_AUTH_SOCK\"\n\
         FROM scratch AS last\nLABEL a=b\nCOPY --from=base /who /\nCOPY file /\nCMD [\"/who\"]\n",
    );
    context.file("file", "in the context").file("key", "hidden");
    let here = text(context.path());
    for (name, client) in clients(&kiln, buildx.as_ref()) {
        let directory = TempDir::new().expect("temporary directory");
        let file = |name: &str| directory.path().join(name);
        let ok = |args: &[&str]| run(client(args), None).ok();
        let read = |path: &str| std::fs::read_to_string(file(path)).expect("exported");
        let local = |name: &str| format!("type=local,dest={}", text(&file(name)));

        ok(&["--build-arg", "WHO=me", "-o", &local("tree"), here]);
        assert_eq!((read("tree/who"), read("tree/file")), ("me\n".into(), "in the context".into()), "{name}");
        run(client(&["-f", "-", "-o", &local("stdin"), here]), Some(b"FROM scratch\nCOPY file /only\n")).ok();
        assert_eq!(read("stdin/only"), "in the context");
        let archive = tools::run(Command::new("tar").args(["-c", "-C", here, "."]));
        run(client(&["-o", &local("archive"), "-"]), Some(&archive)).ok();
        assert_eq!(read("archive/file"), "in the context");
        let key = format!("id=key,src={}", text(&context.path().join("key")));
        ok(&["--target", "secret", "--secret", &key, "-o", &local("secret"), here]);
        assert_eq!(read("secret/copied"), "hidden");
        let socket = file("agent");
        let _agent = UnixListener::bind(&socket).expect("bind");
        ok(&["--target", "agent", "--ssh", &format!("default={}", text(&socket)), here]);

        let docker = file("image.tar");
        ok(&["-t", "example.org/a:1", "-o", &format!("type=docker,dest={}", text(&docker)), here]);
        let image = format!("docker-archive:{}", text(&docker));
        let config = tools::run(Command::new("skopeo").args(["inspect", "--config", &image]));
        let config: Value = serde_json::from_slice(&config).expect("JSON");
        assert_eq!(config["config"]["Cmd"], serde_json::json!(["/who"]));
        assert_eq!(config["config"]["Labels"]["a"], "b");

        let image = format!("{}/{name}:1", registry.address);
        let metadata = text(&file("metadata.json")).to_owned();
        ok(&["-t", &image, "--push", "--metadata-file", &metadata, "--label", "c=d", here]);
        let metadata: Value = serde_json::from_str(&read("metadata.json")).expect("JSON");
        assert_eq!(metadata["containerimage.digest"], tools::digest(&image));
        let failed = run(client(&["--target", "nowhere", here]), None);
        assert_ne!(failed.code, 0);
        assert!(failed.stderr.contains("nowhere"), "{}", failed.stderr);
    }
}

#[test]
fn buildx_looks_after_its_builder() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let Some(buildx) = Buildx::new(&kiln) else { return };
    let inspected = buildx.run(&["inspect", "--bootstrap"]).ok().stdout;
    assert!(inspected.contains("running") && inspected.contains("linux/"), "{inspected}");

    let context =
        Context::new("FROM busybox AS one\nRUN echo 1 > /n\nFROM busybox AS two\nRUN echo 2 > /n\n");
    let tag = |name: &str| format!("{}/{name}:1", registry.address);
    let target = |name: &str| {
        serde_json::json!({
            "context": text(context.path()), "target": name, "tags": [tag(name)],
            "output": ["type=image,push=true"],
        })
    };
    let file = serde_json::json!({
        "group": {"default": {"targets": ["one", "two"]}},
        "target": {"one": target("one"), "two": target("two")},
    });
    context.file("bake.json", file.to_string());
    let bake = context.path().join("bake.json");
    let allow = format!("--allow=fs.read={}", text(context.path()));
    buildx.run(&["bake", "--progress", "plain", &allow, "-f", text(&bake)]).ok();
    for name in ["one", "two"] {
        let raw = buildx.run(&["imagetools", "inspect", "--raw", &tag(name)]).ok().stdout;
        let index: Value = serde_json::from_str(&raw).expect("JSON");
        assert!(index["manifests"].as_array().is_some_and(|all| !all.is_empty()), "{raw}");
        assert!(tools::digest(&tag(name)).starts_with("sha256:"));
    }
    let used = buildx.run(&["du", "--verbose"]).ok().stdout;
    assert!(used.contains("echo 1 > /n") && used.contains("Total:"), "{used}");
    let pruned = buildx.run(&["prune", "--all", "--force"]).ok().stdout;
    assert!(pruned.contains("Total:"), "{pruned}");
    let kept: Vec<_> = kiln.usage().into_iter().filter(|record| record["inUse"] == false).collect();
    assert!(kept.is_empty(), "{kept:?}");
}
