//! Dockerfiles become the images that people expect.

use std::process::Command;

use kiln_integration::kiln::example;
use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Builds, pushes, unpacks with umoci and gives the bundle's directory.
fn build_and_unpack(kiln: &Kiln, registry: &Registry, context: &Context, args: &[&str]) -> (TempDir, Value) {
    let image = format!("{}/test/image:latest", registry.address);
    let mut all = vec!["-t", image.as_str(), "--push"];
    all.extend_from_slice(args);
    kiln.build(context.path(), &all).ok();
    let directory = TempDir::new().expect("temporary directory");
    let layout = directory.path().join("layout");
    tools::fetch(&image, &layout, "latest");
    tools::unpack(&layout, "latest", &directory.path().join("bundle"));
    (directory, tools::config(&image))
}

#[test]
fn a_pushed_image_is_read_by_skopeo_unpacked_by_umoci_and_run_by_runc() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(concat!(
        "FROM busybox\n",
        "RUN echo one > /one && mkdir -m 0751 /dir && chown 1000:50 /dir && ln -s one /link && rm -r /var\n",
        "RUN echo two > /dir/two && chmod 4755 /dir/two && rm /one\n",
        "CMD [\"cat\", \"/dir/two\"]\n",
    ));
    let image = format!("{}/test/run:v1", registry.address);
    kiln.build(context.path(), &["-t", &image, "--push"]).ok();

    let directory = TempDir::new().expect("temporary directory");
    let layout = directory.path().join("layout");
    let bundle = directory.path().join("bundle");
    tools::fetch(&image, &layout, "v1");
    tools::unpack(&layout, "v1", &bundle);

    let manifest = tools::manifest(&image);
    let layers = manifest["layers"].as_array().expect("layers");
    assert_eq!(layers.len(), 3, "one layer of the base and one for each RUN: {manifest}");
    let listing = |index: usize| {
        tools::tar_listing(&tools::blob(&layout, layers[index]["digest"].as_str().expect("a digest")))
    };
    let (whiteouts, entries): (Vec<_>, Vec<_>) =
        listing(1).into_iter().partition(|line| line.contains(".wh."));
    assert_eq!(entries, ["drwxr-x--x 1000/50 dir/", "lrwxrwxrwx 0/0 link -> one", "-rw-r--r-- 0/0 one"]);
    assert_eq!(whiteouts.len(), 1, "{whiteouts:?}");
    assert!(whiteouts[0].ends_with(" .wh.var"), "{whiteouts:?}");
    let second = listing(2);
    assert!(second.contains(&"-rwsr-xr-x 0/0 dir/two".to_owned()), "{second:?}");
    assert!(second.iter().any(|line| line.ends_with(" .wh.one")), "{second:?}");

    let config = tools::config(&image);
    assert_eq!(config["rootfs"]["diff_ids"].as_array().map(Vec::len), Some(3));
    let history: Vec<_> = config["history"].as_array().expect("history").iter().rev().take(3).rev().collect();
    assert_eq!(
        history[1]["created_by"],
        "RUN /bin/sh -c echo two > /dir/two && chmod 4755 /dir/two && rm /one # buildkit"
    );
    assert_eq!(history[2]["created_by"], "CMD [\"cat\" \"/dir/two\"]");
    assert_eq!(history[2]["empty_layer"], true);

    let spec = bundle.join("config.json");
    let mut runtime: Value =
        serde_json::from_slice(&std::fs::read(&spec).expect("umoci's config.json")).expect("JSON");
    runtime["process"]["terminal"] = json!(false);
    std::fs::write(&spec, runtime.to_string()).expect("write config.json");
    let id = format!("kiln-test-{}", std::process::id());
    let out = run(Command::new("runc").args(["run", "--bundle"]).arg(&bundle).arg(&id));
    assert_eq!(String::from_utf8_lossy(&out).trim(), "two");
}

#[test]
fn every_instruction_reaches_the_image() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        r#"# a comment before anything
ARG TAG=latest
FROM busybox:${TAG} AS tools
RUN mkdir -p /out && echo tool > /out/tool

FROM tools AS unused
RUN exit 1

FROM busybox
ARG VERSION=1 \
    # a comment inside a continuation
    UNSET
ENV GREETING="hello world" PLAIN=$VERSION
LABEL org.example.version=${VERSION:-none} org.example.unset=${UNSET:-none}
WORKDIR /srv
WORKDIR app
COPY --from=tools --chown=1000:50 --chmod=0640 /out/tool ./tool
COPY a.txt dir/ ./copied/
ADD archive.tar /unpacked/
RUN ["/bin/sh", "-c", "echo $GREETING > greeting"]
USER app
RUN id -u > /tmp/uid; pwd > /tmp/pwd
EXPOSE 80 53/udp
VOLUME /data
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s CMD true
SHELL ["/bin/sh", "-ec"]
ENTRYPOINT ["/bin/sh"]
CMD echo done
"#,
    );
    context
        .file("a.txt", "a")
        .file("dir/b.txt", "b")
        .file("dir/ignored.log", "x")
        .file(".dockerignore", "**/*.log\n");
    let source = TempDir::new().expect("temporary directory");
    std::fs::write(source.path().join("inside"), "inside").expect("write");
    run(Command::new("tar")
        .arg("-cf")
        .arg(context.path().join("archive.tar"))
        .arg("-C")
        .arg(source.path())
        .arg("inside"));

    let (directory, config) =
        build_and_unpack(&kiln, &registry, &context, &["--build-arg", "VERSION=7", "--label", "from=cli"]);
    let root = directory.path().join("bundle/rootfs");
    let read = |path: &str| {
        std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    assert_eq!(read("srv/app/tool"), "tool\n");
    assert_eq!(read("srv/app/copied/a.txt"), "a");
    assert_eq!(read("srv/app/copied/b.txt"), "b");
    assert!(!root.join("srv/app/copied/ignored.log").exists(), ".dockerignore applies");
    assert_eq!(read("unpacked/inside"), "inside");
    assert_eq!(read("srv/app/greeting"), "hello world\n");
    assert_eq!(read("tmp/uid"), "1000\n");
    assert_eq!(read("tmp/pwd"), "/srv/app\n");
    let tool = std::fs::metadata(root.join("srv/app/tool")).expect("metadata");
    use std::os::unix::fs::MetadataExt;
    assert_eq!((tool.uid(), tool.gid(), tool.mode() & 0o7777), (1000, 50, 0o640));
    for leftover in ["etc/resolv.conf", "etc/hosts", "etc/hostname"] {
        assert!(!root.join(leftover).exists(), "{leftover} of the sandbox is in the image");
    }

    let settings = &config["config"];
    assert_eq!(settings["User"], "app");
    assert_eq!(settings["WorkingDir"], "/srv/app");
    assert_eq!(settings["Entrypoint"], json!(["/bin/sh"]));
    assert_eq!(settings["Cmd"], json!(["/bin/sh", "-ec", "echo done"]));
    assert_eq!(settings["StopSignal"], "SIGINT");
    assert_eq!(settings["ExposedPorts"], json!({"80/tcp": {}, "53/udp": {}}));
    assert_eq!(settings["Volumes"], json!({"/data": {}}));
    assert_eq!(
        settings["Labels"],
        json!({"org.example.version": "7", "org.example.unset": "none", "from": "cli"})
    );
    let env = settings["Env"].as_array().expect("Env");
    assert!(env.contains(&json!("GREETING=hello world")) && env.contains(&json!("PLAIN=7")), "{env:?}");
}

#[test]
fn a_second_build_does_no_work_and_gives_the_same_image() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        "FROM busybox\nCOPY file /file\nRUN head -c 16 /dev/urandom > /random\nRUN echo after\nCMD [\"sh\"]\n",
    );
    context.file("file", "content");
    let image = format!("{}/test/again:latest", registry.address);
    kiln.build(context.path(), &["-t", &image, "--push"]).ok();
    let first = tools::digest(&image);
    let second = kiln.build(context.path(), &["-t", &image, "--push"]).ok();
    assert_eq!(second.cached(), 3, "COPY and both RUN are cached:\n{}", second.stderr);
    assert_eq!(tools::digest(&image), first);

    let third = kiln.build(context.path(), &["-t", &image, "--push", "--no-cache"]).ok();
    assert_eq!(third.cached(), 0, "{}", third.stderr);
    assert_ne!(tools::digest(&image), first, "--no-cache ran the step that draws random bytes");
}

#[test]
fn a_target_builds_its_stages_only() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context =
        Context::new("FROM busybox AS good\nRUN echo good > /good\nFROM busybox AS bad\nRUN exit 7\n");
    kiln.build(context.path(), &["--target", "good"]).ok();
    kiln.build(context.path(), &["--target", "bad"]).fails(&["exit code: 7"]);
}

#[test]
fn a_dockerfile_elsewhere_with_its_own_dockerignore() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN exit 1\n");
    context.file(
        "sub/other.Dockerfile",
        "FROM busybox\nCOPY . /all\nRUN test ! -e /all/secret && test -e /all/public\n",
    );
    context.file("sub/other.Dockerfile.dockerignore", "secret\n").file("secret", "x").file("public", "x");
    let path = context.path().join("sub/other.Dockerfile");
    kiln.build(context.path(), &["-f", path.to_str().expect("UTF-8")]).ok();
}

#[test]
fn cache_mounts_persist_and_tmpfs_and_bind_mounts_leave_nothing() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let dockerfile = |run: &str| {
        format!(
            "FROM busybox\nRUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/t --mount=type=bind,target=/ctx {run}\n"
        )
    };
    let context = Context::new(&dockerfile("cp /ctx/file /c/kept && touch /t/x && ! touch /ctx/no"));
    context.file("file", "kept");
    kiln.build(context.path(), &[]).ok();
    context.file("Dockerfile", dockerfile("cat /c/kept && cp /c/kept /copy"));
    let (directory, _) = build_and_unpack(&kiln, &registry, &context, &[]);
    let root = directory.path().join("bundle/rootfs");
    assert_eq!(std::fs::read_to_string(root.join("copy")).expect("copied from the cache mount"), "kept");
    for stub in ["c", "t", "ctx"] {
        assert!(!root.join(stub).exists(), "/{stub} was left by a mount");
    }
}

#[test]
fn secrets_reach_the_step_and_nothing_else() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(concat!(
        "FROM busybox\n",
        "RUN --mount=type=secret,id=token,required=true --mount=type=secret,id=token,env=TOKEN,required=true ",
        "test $(rev /run/secrets/token) = eul4v-t3rc3s && test $(echo $TOKEN | rev) = eul4v-t3rc3s\n"
    ));
    let secret = TempDir::new().expect("temporary directory");
    let file = secret.path().join("token");
    std::fs::write(&file, "s3cr3t-v4lue").expect("write");
    let argument = format!("id=token,src={}", file.display());
    kiln.build(context.path(), &["--secret", &argument]).ok();
    let found =
        Command::new("grep").args(["-r", "-l", "s3cr3t-v4lue"]).arg(kiln.root()).output().expect("grep");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "the secret is in the state directory");
    kiln.build(context.path(), &["--no-cache"]).fails(&["secret token: not found"]);
}

#[test]
fn the_alpine_example_builds_with_an_apk_of_the_image() {
    let registry = Registry::with_busybox();
    let base = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nCOPY apk /sbin/apk\n");
    context.file(
        "apk",
        "#!/bin/sh\n[ \"$1 $2\" = 'add --update' ] || exit 2\nmkdir -p /lib/apk && echo \"$3\" >> /lib/apk/world\n",
    );
    context.mode("apk", 0o755);
    let alpine = format!("{}/library/alpine:latest", registry.address);
    base.build(context.path(), &["-t", &alpine, "--push"]).ok();

    let kiln = Kiln::new(&registry);
    let image = format!("{}/test/alpine-redis:latest", registry.address);
    kiln.build(&example("alpine-redis"), &["-t", &image, "--push"]).ok();
    let directory = TempDir::new().expect("temporary directory");
    let layout = directory.path().join("layout");
    tools::fetch(&image, &layout, "latest");
    tools::unpack(&layout, "latest", &directory.path().join("bundle"));
    let world =
        std::fs::read_to_string(directory.path().join("bundle/rootfs/lib/apk/world")).expect("apk's record");
    assert_eq!(world, "redis\ngcc\n");
    assert_eq!(tools::config(&image)["config"]["Cmd"], json!(["redis-server"]));

    let again = kiln.build(&example("alpine-redis"), &["-t", &image, "--push"]).ok();
    assert_eq!(again.cached(), 2, "both RUN steps:\n{}", again.stderr);
}
