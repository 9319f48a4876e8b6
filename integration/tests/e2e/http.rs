//! Files of the web: ADD with a URL, and the source of LLB below it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use kiln_integration::tools::{self, run};
use kiln_integration::{Built, Context, Kiln, WebAnswer, WebRequest, WebServer};
use kiln_proto::{llb, pb};
use prost::Message;
use tempfile::TempDir;

/// Steps of an ADD with a URL: the file and its copy.
const ADD: usize = 2;

/// Every test makes its files of nothing, so no registry is needed.
fn kiln() -> Kiln {
    Kiln::with_mirror("127.0.0.1:1")
}

/// A page of a server that knows entity tags.
#[derive(Clone)]
struct Page {
    body: Vec<u8>,
    etag: &'static str,
    headers: Vec<(&'static str, String)>,
}

impl Page {
    fn new(body: &str, etag: &'static str) -> Self {
        Self { body: body.into(), etag, headers: Vec::new() }
    }

    fn answer(&self, request: &WebRequest) -> WebAnswer {
        let mut headers = self.headers.clone();
        headers.push(("etag", self.etag.to_owned()));
        let same = request.header("if-none-match") == Some(self.etag);
        let (status, body) = if same { (304, Vec::new()) } else { (200, self.body.clone()) };
        WebAnswer { status, headers, body, length: None }
    }
}

/// A server of one page, which may be changed; anything else is not found.
fn server(path: &'static str, page: Page) -> (WebServer, Arc<Mutex<Page>>) {
    let page = Arc::new(Mutex::new(page));
    let shared = page.clone();
    let server = WebServer::start(move |request| match request.path.split('?').next() {
        Some(asked) if asked == path => shared.lock().expect("not poisoned").answer(request),
        _ => WebAnswer { status: 404, ..WebAnswer::default() },
    });
    (server, page)
}

fn methods(server: &WebServer) -> Vec<String> {
    server.requests().into_iter().map(|request| request.method).collect()
}

fn sha256(text: &str) -> String {
    let file = TempDir::new().expect("temporary directory");
    fs::write(file.path().join("f"), text).expect("write");
    let out = run(Command::new("sha256sum").arg(file.path().join("f")));
    String::from_utf8_lossy(&out[..64]).into_owned()
}

/// Builds and unpacks the result into a directory; the listing has modes and owners.
fn tree(kiln: &Kiln, context: &Context, args: &[&str]) -> (Built, TempDir, Vec<String>) {
    let out = TempDir::new().expect("temporary directory");
    let tar = out.path().join("out.tar");
    let output = format!("type=tar,dest={}", tar.display());
    let built = kiln.build(context.path(), &[args, &["-o", &output]].concat()).ok();
    run(Command::new("tar").arg("-C").arg(out.path()).arg("-xpf").arg(&tar));
    let listing = tools::tar_listing(&tar);
    (built, out, listing)
}

fn gzip(text: &str) -> Vec<u8> {
    let dir = TempDir::new().expect("temporary directory");
    fs::write(dir.path().join("f"), text).expect("write");
    run(Command::new("gzip").arg("-c").arg(dir.path().join("f")))
}

/// What `kiln` says of the failure itself, without the progress before it.
fn error(built: &Built) -> String {
    built.stderr.lines().skip_while(|line| !line.starts_with("ERROR")).collect::<Vec<_>>().join("\n")
}

#[test]
fn add_fetches_once_and_then_asks_whether_it_changed() {
    let kiln = kiln();
    let (web, page) = server("/dir/a%20file.txt", Page::new("first\n", "\"1\""));
    let url = format!("http://{}/dir/a%20file.txt", web.address);
    let context = Context::new(&format!("FROM scratch\nADD --chmod=741 --chown=1000:7 {url} /x/file\n"));
    let (_, out, listing) = tree(&kiln, &context, &[]);
    assert_eq!(fs::read_to_string(out.path().join("x/file")).expect("file"), "first\n");
    assert!(listing.contains(&"-rwxr----x 1000/7 x/file".to_owned()), "{listing:?}");
    let first = web.requests();
    assert_eq!(first.len(), 1, "{first:?}");
    assert_eq!((first[0].method.as_str(), first[0].header("accept-encoding")), ("GET", Some("gzip")));

    let (built, ..) = tree(&kiln, &context, &[]);
    assert_eq!(built.cached(), ADD, "{}", built.stderr);
    assert!(first[0].header("user-agent").is_some_and(|agent| agent.contains("buildkit/v")));
    let again = web.requests();
    assert_eq!(again.len(), 1, "{again:?}");
    assert_eq!((again[0].method.as_str(), again[0].header("if-none-match")), ("HEAD", Some("\"1\"")));

    // The same bytes under another tag, compressed for the way, keep what follows cached.
    *page.lock().expect("not poisoned") = Page {
        body: gzip("first\n"),
        headers: vec![("content-encoding", "gzip".to_owned())],
        ..Page::new("", "W/\"2\"")
    };
    let (built, out, _) = tree(&kiln, &context, &[]);
    assert_eq!(built.cached(), ADD, "{}", built.stderr);
    assert_eq!(fs::read_to_string(out.path().join("x/file")).expect("file"), "first\n");
    assert_eq!(methods(&web), ["HEAD", "GET"]);

    *page.lock().expect("not poisoned") = Page::new("second\n", "\"3\"");
    let (built, out, _) = tree(&kiln, &context, &[]);
    assert_eq!(built.cached(), 0, "{}", built.stderr);
    assert_eq!(fs::read_to_string(out.path().join("x/file")).expect("file"), "second\n");
    assert_eq!(methods(&web), ["HEAD", "GET"]);

    kiln.run(&["prune", "--all"]).ok();
    tree(&kiln, &context, &[]);
    assert_eq!(methods(&web), ["GET"], "what was pruned is not asked about");
}

#[test]
fn a_checksum_is_kept_and_saves_the_question() {
    let kiln = kiln();
    let (web, _) = server("/file", Page::new("content", "\"1\""));
    let digest = sha256("content");
    let dockerfile = |digest: &str| {
        format!("FROM scratch\nADD --checksum=sha256:{digest} http://{}/file /\n", web.address)
    };
    let context = Context::new(&dockerfile(&digest));
    let (_, out, listing) = tree(&kiln, &context, &[]);
    assert_eq!(fs::read_to_string(out.path().join("file")).expect("file"), "content");
    assert!(listing.contains(&"-rw------- 0/0 file".to_owned()), "{listing:?}");
    assert_eq!(methods(&web), ["GET"]);
    let (built, ..) = tree(&kiln, &context, &[]);
    assert_eq!((built.cached(), methods(&web).len()), (ADD, 0));

    let wrong = sha256("something else");
    context.file("Dockerfile", dockerfile(&wrong));
    for _ in 0..2 {
        let url = format!("http://{}/file", web.address);
        kiln.build(context.path(), &[]).fails(&["digest mismatch", &digest, &wrong, &url, "Dockerfile:2"]);
        assert_eq!(methods(&web), ["GET"], "what does not match is not kept");
    }
}

#[test]
fn failures_name_url_and_status_but_no_secrets() {
    let kiln = kiln();
    let (web, _) = server("/broken", Page::new("", "\"1\""));
    let context =
        Context::new(&format!("FROM scratch\nADD http://user:hush@{}/none?token=hush /\n", web.address));
    let built = kiln.build(context.path(), &[]).fails(&["invalid response status 404"]);
    let said = error(&built);
    assert!(said.contains(&format!("http://{}/none", web.address)), "{said}");
    let first = said.lines().next().unwrap_or_default();
    assert!(!first.contains("hush"), "{first}");

    context.file("Dockerfile", "FROM scratch\nADD http://127.0.0.1:1/file /\n");
    kiln.build(context.path(), &[]).fails(&["http://127.0.0.1:1/file", "refused"]);

    // One that stops in the middle is no file, and leaves none.
    let cut = Arc::new(Mutex::new(true));
    let cutting = cut.clone();
    let web = WebServer::start(move |_| WebAnswer {
        status: 200,
        headers: vec![("etag", "\"1\"".to_owned())],
        body: b"half".to_vec(),
        length: cutting.lock().expect("not poisoned").then_some(8),
    });
    context.file("Dockerfile", format!("FROM scratch\nADD http://{}/file /\n", web.address));
    kiln.build(context.path(), &[]).fails(&[&format!("http://{}/file", web.address)]);
    assert_eq!(kiln.usage().iter().filter(|record| record["recordType"] == "regular").count(), 0);
    *cut.lock().expect("not poisoned") = false;
    web.requests();
    let (_, out, _) = tree(&kiln, &context, &[]);
    assert_eq!(fs::read_to_string(out.path().join("file")).expect("file"), "half");
    assert_eq!(methods(&web), ["GET"]);
}

#[test]
fn secrets_go_to_their_host_and_no_further() {
    let kiln = kiln();
    let (target, _) = server("/real", Page::new("behind", "\"1\""));
    let location = format!("http://{}/real", target.address);
    let web = WebServer::start(move |_| WebAnswer {
        status: 302,
        headers: vec![("location", location.clone())],
        ..WebAnswer::default()
    });
    let context = Context::new(&format!("FROM scratch\nADD http://{}/file /\n", web.address));
    let secret = context.path().join("token");
    fs::write(&secret, "hush\n").expect("write");
    let secret = format!("id=HTTP_AUTH_TOKEN_127.0.0.1,src={}", secret.display());
    let (built, out, _) = tree(&kiln, &context, &["--secret", &secret]);
    assert_eq!(fs::read_to_string(out.path().join("file")).expect("file"), "behind");
    assert_eq!(web.requests()[0].header("authorization"), Some("Bearer hush"));
    assert_eq!(target.requests()[0].header("authorization"), None);
    assert!(!built.stderr.contains("hush"), "{}", built.stderr);
}

/// The only file of a solved source: its line of the listing, its content, and when it was modified.
fn solve(kiln: &Kiln, url: &str, attrs: &[(&str, &str)], args: &[&str]) -> Result<[String; 3], Built> {
    let attrs = attrs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let source = pb::SourceOp { identifier: url.to_owned(), attrs };
    let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
    let mut builder = llb::Builder::new();
    let digest = builder.add(&op, pb::OpMetadata::default());
    let definition = builder.finish(&pb::Input { digest, index: 0 });
    let dir = TempDir::new().expect("temporary directory");
    let (tar, file) = (dir.path().join("out.tar"), dir.path().join("definition"));
    fs::write(&file, definition.encode_to_vec()).expect("write");
    let output = format!("type=tar,dest={}", tar.display());
    let mut command = kiln.command(&[&["solve", "--progress", "plain", "-o", &output], args].concat());
    let built: Built =
        command.stdin(fs::File::open(&file).expect("definition")).output().expect("run kiln").into();
    if built.code != 0 {
        return Err(built);
    }
    let content = run(Command::new("tar").arg("-xOf").arg(&tar));
    Ok([tools::tar_listing(&tar).join("\n"), String::from_utf8_lossy(&content).into_owned(), dates(&tar)])
}

fn dates(tar: &Path) -> String {
    let out = run(Command::new("tar").args(["--utc", "--full-time", "-tvf"]).arg(tar));
    let text = String::from_utf8_lossy(&out).into_owned();
    text.split_whitespace().skip(3).take(2).collect::<Vec<_>>().join(" ")
}

#[test]
fn the_source_has_the_name_the_date_and_the_owner_it_is_told() {
    let kiln = kiln();
    let page = Page {
        headers: vec![
            ("last-modified", "Sunday, 06-Nov-94 08:49:37 GMT".to_owned()),
            ("content-disposition", "attachment; filename=\"../named.bin\"".to_owned()),
        ],
        ..Page::new("x", "\"1\"")
    };
    let (web, _) = server("/file", page);
    let url = format!("http://{}/file", web.address);
    let made = solve(&kiln, &url, &[], &[]).expect("solved");
    assert_eq!(made, ["-rw------- 0/0 named.bin", "x", "1994-11-06 08:49:37"]);
    let attrs = [("http.filename", "other"), ("http.perm", "0741"), ("http.uid", "5"), ("http.gid", "6")];
    let accept = [("http.header.accept", "text/x"), ("http.header.cookie", "no")];
    web.requests();
    let made = solve(&kiln, &url, &[&attrs[..], &accept].concat(), &[]).expect("solved");
    assert_eq!(made, ["-rwxr----x 5/6 other", "x", "1994-11-06 08:49:37"]);
    let asked = web.requests();
    assert_eq!((asked[0].header("accept"), asked[0].header("cookie")), (Some("text/x"), None));

    let auth = [("http.authheadersecret", "the-header")];
    let refused = solve(&kiln, &url, &auth, &[]).expect_err("no such secret");
    refused.fails(&["failed to retrieve HTTP auth secret the-header", &url]);
    assert!(web.requests().is_empty());
    let secret = TempDir::new().expect("temporary directory");
    fs::write(secret.path().join("s"), "Basic abc").expect("write");
    let given = format!("id=the-header,src={}", secret.path().join("s").display());
    solve(&kiln, &url, &auth, &["--secret", &given]).expect("solved");
    assert_eq!(web.requests()[0].header("authorization"), Some("Basic abc"));

    for (attr, text) in [
        (("http.sig.pubkey", "x"), "unsupported: signature verification"),
        (("http.perm", "rwx"), "invalid http.perm"),
        (("http.checksum", "md5:00"), "invalid checksum digest format"),
    ] {
        solve(&kiln, &url, &[attr], &[]).expect_err("refused").fails(&[text]);
    }
}
