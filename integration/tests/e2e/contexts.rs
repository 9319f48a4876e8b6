//! Build contexts that are no directory, and named contexts: what takes the place of what a Dockerfile names.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_integration::peers::buildctl;
use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry, WebAnswer, WebServer, layout};
use tempfile::TempDir;

/// Builds into a directory.
fn build(kiln: &Kiln, context: &Context, args: &[&str]) -> (TempDir, kiln_integration::Built) {
    let out = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", out.path().display());
    let mut all = vec!["-o", &output];
    all.extend_from_slice(args);
    let built = kiln.build(context.path(), &all).ok();
    (out, built)
}

fn read(dir: &TempDir, name: &str) -> String {
    std::fs::read_to_string(dir.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn flag(name: &str, dir: &Path) -> String {
    format!("--build-context={name}={}", dir.display())
}

#[test]
fn a_directory_takes_the_place_of_a_stage() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context =
        Context::new("FROM busybox AS base\nRUN false\nFROM scratch\nCOPY --from=base /o* /sub/in /\n");
    let other = Context::new("never built");
    other.file("out", "1").file("out2", "2").file("sub/in", "3").file("big", "4");
    other.file(".dockerignore", "out2\n");
    let (out, built) = build(&kiln, &context, &[&flag("base", other.path())]);
    assert_eq!((read(&out, "out"), read(&out, "in")), ("1".to_owned(), "3".to_owned()));
    assert!(!out.path().join("out2").exists(), "it is in the directory's own ignore file");
    for step in ["[context base] load .dockerignore", "[context base] load from client"] {
        assert!(built.stderr.contains(step), "{}", built.stderr);
    }

    // What is not copied may change.
    other.file("big", "changed");
    assert_eq!(build(&kiln, &context, &[&flag("base", other.path())]).1.cached(), 1);
    other.file("out", "changed");
    let (out, built) = build(&kiln, &context, &[&flag("base", other.path())]);
    assert_eq!((read(&out, "out").as_str(), built.cached()), ("changed", 0));
}

#[test]
fn a_directory_is_mounted_and_is_built_upon() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let tools = Context::new("");
    tools.file("bin/tool", "tool").file("etc/x", "x");
    let context = Context::new(concat!(
        "FROM busybox AS made\n",
        "RUN --mount=from=tools,source=/bin,target=/tools cp /tools/tool /made\n",
        "FROM tools\n",
        "COPY --from=made /made /made\n",
    ));
    let (out, _) = build(&kiln, &context, &[&flag("tools", tools.path())]);
    assert_eq!((read(&out, "made"), read(&out, "etc/x")), ("tool".to_owned(), "x".to_owned()));
}

#[test]
fn an_image_takes_the_place_of_another() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context =
        Context::new("FROM nosuch AS made\nRUN echo yes > /made\nFROM scratch\nCOPY --from=made /made /\n");
    let (out, _) = build(&kiln, &context, &["--build-context", "nosuch=docker-image://busybox"]);
    assert_eq!(read(&out, "made"), "yes\n");
    let refused = ["--build-context", "nosuch=ipfs://image"];
    kiln.build(context.path(), &refused).fails(&["unsupported: --build-context"]);
}

#[test]
fn an_image_of_a_layout_takes_the_place_of_another() {
    // There is no registry.
    let kiln = Kiln::with_mirror("127.0.0.1:1");
    let context = Context::new(concat!(
        "FROM nosuch AS made\nRUN echo $PATH > /path\n",
        "FROM scratch\nCOPY --from=made /path /\nCOPY --from=nosuch /bin/busybox /\n",
    ));
    let copy = TempDir::new().expect("temporary directory");
    run(Command::new("cp").arg("-r").arg(layout("busybox")).arg(copy.path().join("layout")));
    let copy = copy.path().join("layout");
    let from = |rest: &str| format!("--build-context=nosuch=oci-layout://{}{rest}", copy.display());
    let (out, built) = build(&kiln, &context, &[&from(":latest")]);
    assert!(read(&out, "path").contains("/bin") && out.path().join("busybox").exists());
    let digest = tools::layout_digest(&copy, "latest");
    assert!(
        built
            .stderr
            .contains(&format!("[context nosuch] load metadata for docker.io/library/nosuch@{digest}"))
    );
    assert!(built.stderr.contains("[context nosuch] OCI load from client"), "{}", built.stderr);
    // By its digest; and it is known again.
    assert_eq!(build(&kiln, &context, &[&from(&format!("@{digest}"))]).1.cached(), 4);

    kiln.build(context.path(), &[&from(":v2")]).fails(&["no image with the tag v2"]);
    let zero = format!("sha256:{}", "0".repeat(64));
    kiln.build(context.path(), &[&from(&format!("@{zero}"))]).fails(&[&zero]);
    kiln.build(context.path(), &["--build-context=nosuch=oci-layout:///nowhere"]).fails(&["/nowhere"]);

    // What a client says is not believed.
    let fresh = Kiln::with_mirror("127.0.0.1:1");
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(tools::blob(&copy, &digest)).expect("manifest")).expect("JSON");
    let layer = manifest["layers"][0]["digest"].as_str().expect("a layer").to_owned();
    let path = tools::blob(&copy, &layer);
    let mut bytes = std::fs::read(&path).expect("layer");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).expect("write");
    fresh.build(context.path(), &[&from(":latest")]).fails(&[&layer]);
    bytes.push(0);
    std::fs::write(&path, &bytes).expect("write");
    fresh.build(context.path(), &[&from(":latest")]).fails(&["more than"]);
    std::fs::remove_file(&path).expect("remove");
    fresh.build(context.path(), &[&from(":latest")]).fails(&[&layer, "No such file"]);
    std::fs::write(tools::blob(&copy, &digest), "{}").expect("write");
    let fresh = Kiln::with_mirror("127.0.0.1:1");
    fresh.build(context.path(), &[&from(":latest")]).fails(&[&format!("expected {digest}")]);
    // What the other daemon has it has.
    build(&kiln, &context, &[&from(&format!("@{digest}"))]);
}

#[test]
fn standard_input_is_a_context() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM scratch\nCOPY a sub /\n");
    context.file("a", "1").file("sub/b", "2").file("Other", "FROM scratch\nCOPY a /other\n");
    let archive = |flags: &str| {
        let tar = Command::new("tar")
            .args(["-C", context.path().to_str().expect("UTF-8"), flags, "-", "."])
            .output();
        tar.expect("tar").stdout
    };
    let build = |input: &[u8], args: &[&str]| {
        let out = TempDir::new().expect("temporary directory");
        let output = format!("type=local,dest={}", out.path().display());
        let mut command =
            kiln.command(&[&["build", "--progress=plain", "-o", &output], args, &["-"]].concat());
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kiln");
        child.stdin.take().expect("piped").write_all(input).expect("write");
        (out, kiln_integration::Built::from(child.wait_with_output().expect("kiln")))
    };
    for flags in ["-cf", "-czf"] {
        let (out, built) = build(&archive(flags), &[]);
        built.ok();
        assert_eq!((read(&out, "a"), read(&out, "b")), ("1".to_owned(), "2".to_owned()));
    }
    for known in [false, true] {
        let (out, built) = build(&archive("-cf"), &["-f", "Other"]);
        let progress = built.ok().stderr;
        assert_eq!(read(&out, "other"), "1");
        let step = progress.lines().find(|line| line.ends_with("] COPY a /other")).expect("the step");
        let number = step.split(' ').next().unwrap_or_default();
        assert_eq!(progress.contains(&format!("{number} CACHED")), known, "{progress}");
    }
    let (out, built) =
        build(b"FROM busybox AS made\nRUN echo alone > /made\nFROM scratch\nCOPY --from=made /made /\n", &[]);
    built.ok();
    assert_eq!(read(&out, "made"), "alone\n");
    let (_, built) = build(&archive("-cf"), &["-f", "None"]);
    built.fails(&["failed to read dockerfile"]);
}

#[test]
fn urls_are_contexts() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM scratch\nCOPY --from=file context /file\nCOPY a /\n");
    context.file("a", "1");
    let dir = context.path().to_str().expect("UTF-8");
    let archive = Command::new("tar").args(["-C", dir, "-cf", "-", "."]).output().expect("tar").stdout;
    let web = WebServer::start(move |request| match request.path.as_str() {
        "/x.tar" => WebAnswer { status: 200, body: archive.clone(), ..WebAnswer::default() },
        "/file" => WebAnswer { status: 200, body: b"as it is".to_vec(), ..WebAnswer::default() },
        _ => WebAnswer { status: 404, ..WebAnswer::default() },
    });
    let out = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", out.path().display());
    let named = format!("--build-context=file=http://{}/file", web.address);
    let url = format!("http://{}/x.tar", web.address);
    kiln.build(Path::new(&url), &[&named, "-o", &output]).ok();
    assert_eq!((read(&out, "a"), read(&out, "file")), ("1".to_owned(), "as it is".to_owned()));
    let missing = format!("http://{}/none", web.address);
    kiln.build(Path::new(&missing), &[]).fails(&["404"]);
}

#[test]
fn the_main_directories_keep_their_names() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let other = Context::new("FROM scratch\n");
    other.file("a", "other");
    let context = Context::new("FROM scratch\nCOPY --from=dockerfile a /other\nCOPY a /own\n");
    context.file("a", "own");
    let (out, _) = build(&kiln, &context, &[&flag("dockerfile", other.path())]);
    assert_eq!((read(&out, "other"), read(&out, "own")), ("other".to_owned(), "own".to_owned()));
}

/// The entries of an archive as `name -> target: content`, escaped where they are not ASCII.
fn entries(archive: &Path) -> Vec<String> {
    let script = "import os, sys, tarfile
for m in tarfile.open(sys.argv[1]):
    content = m.isfile() and tarfile.open(sys.argv[1]).extractfile(m).read().decode() or ''
    name = os.fsencode(m.name) + (m.linkname and b' -> ' + os.fsencode(m.linkname) or b'')
    print(repr(name)[2:-1] + ': ' + content)";
    let out = run(Command::new("python3").arg("-c").arg(script).arg(archive));
    let out = String::from_utf8_lossy(&out);
    // A content may end its line itself.
    let mut lines: Vec<String> = out.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn names_that_are_no_text_go_all_the_way() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let raw = |name: &'static [u8]| Path::new(OsStr::from_bytes(name));
    let context = Context::new(concat!(
        "FROM busybox AS made\n",
        "RUN mkdir /made && cd /made && echo run > $(printf 'run\\377') && ln -s $(printf 'r\\376') link\n",
        "FROM scratch\n",
        "COPY tree /\n",
        "COPY tree/caf* /one/\n",
        "COPY --from=made /made /\n",
    ));
    context.file("tree/plain", "plain").file(".dockerignore", b"tree/ign?re\ntree/\xff\xfe\n");
    let tree = context.path().join("tree");
    std::fs::create_dir(tree.join(raw(b"d\xfe"))).expect("make directory");
    let files: [(&'static [u8], &str); 4] =
        [(b"caf\xe9", "acute"), (b"d\xfe/\xff", "below"), (b"ign\xf6re", "no"), (b"\xff\xfe", "no")];
    for (name, content) in files {
        std::fs::write(tree.join(raw(name)), content).expect("write");
    }
    symlink(raw(b"t\xff"), tree.join("target")).expect("link");
    let expected = |content: &str| {
        [
            format!("caf\\xe9: {content}"),
            "d\\xfe/\\xff: below".to_owned(),
            "d\\xfe: ".to_owned(),
            "link -> r\\xfe: ".to_owned(),
            format!("one/caf\\xe9: {content}"),
            "one: ".to_owned(),
            "plain: plain".to_owned(),
            "run\\xff: run".to_owned(),
            "target -> t\\xff: ".to_owned(),
        ]
    };
    let directory = TempDir::new().expect("temporary directory");
    let at = |name: &str| directory.path().join(name);
    for content in ["acute", "changed"] {
        std::fs::write(tree.join(raw(b"caf\xe9")), content).expect("write");
        let (out, built) = build(&kiln, &context, &[]);
        let read = |name| std::fs::read_to_string(out.path().join(raw(name))).expect("file");
        assert_eq!((read(b"caf\xe9").as_str(), read(b"one/caf\xe9").as_str()), (content, content));
        assert_eq!((read(b"d\xfe/\xff").as_str(), read(b"run\xff").as_str()), ("below", "run\n"));
        let target = |name: &str| out.path().join(name).read_link().expect("link");
        assert_eq!((target("target").as_path(), target("link").as_path()), (raw(b"t\xff"), raw(b"r\xfe")));
        assert!(!out.path().join(raw(b"ign\xf6re")).exists() && !out.path().join(raw(b"\xff\xfe")).exists());
        assert_eq!(built.cached() > 0, content == "changed", "{}", built.stderr);
        // Nothing has changed: nothing is copied again.
        let (_, again) = build(&kiln, &context, &[]);
        assert_eq!(again.cached(), 4, "{}", again.stderr);

        kiln.build(context.path(), &["-o", &format!("type=tar,dest={}", at("tar").display())]).ok();
        assert_eq!(entries(&at("tar")), expected(content));
        let layout = at(content);
        let output = format!("type=oci,tar=false,compression=uncompressed,dest={}", layout.display());
        kiln.build(context.path(), &["-t", "x", "-o", &output]).ok();
        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(layout.join("index.json")).expect("index")).expect("JSON");
        let blob =
            |entry: &serde_json::Value| tools::blob(&layout, entry["digest"].as_str().expect("digest"));
        let manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(blob(&index["manifests"][0])).expect("manifest"))
                .expect("JSON");
        let layers = manifest["layers"].as_array().expect("layers");
        let mut all: Vec<String> = layers.iter().flat_map(|layer| entries(&blob(layer))).collect();
        all.sort();
        assert_eq!(all, expected(content));
    }

    let Some(mut peer) = buildctl(&kiln, &["build", "--frontend=dockerfile.v0"]) else { return };
    for name in ["context", "dockerfile"] {
        peer.arg(format!("--local={name}={}", context.path().display()));
    }
    // It does not walk through such directories itself.
    std::fs::remove_dir_all(tree.join(raw(b"d\xfe"))).expect("remove");
    run(peer.arg("--output").arg(format!("type=local,dest={}", at("peer").display())));
    let read = |name| std::fs::read_to_string(at("peer").join(raw(name))).expect("file");
    assert_eq!((read(b"caf\xe9").as_str(), read(b"run\xff").as_str()), ("changed", "run\n"));
    assert_eq!(at("peer").join("target").read_link().expect("link"), raw(b"t\xff"));
}
