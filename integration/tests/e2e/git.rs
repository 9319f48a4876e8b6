//! Git sources: ADD with a repository, contexts that are one, and the source of LLB below both.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use kiln_integration::tools::run;
use kiln_integration::{Built, Context, Kiln, WebAnswer, WebServer, free_port, wait_until};
use tempfile::TempDir;

/// Steps of an ADD with a repository: the checkout and its copy.
const ADD: usize = 2;

/// Every test makes its files of nothing, so no registry is needed.
fn kiln() -> Kiln {
    Kiln::with_mirror("127.0.0.1:1")
}

/// Git without this machine's configuration.
fn git(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).args(args);
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "a").env(format!("GIT_{who}_EMAIL"), "a@b");
        command.env(format!("GIT_{who}_DATE"), "@1000000000 +0000");
    }
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    String::from_utf8_lossy(&run(&mut command)).trim().to_owned()
}

/// Repositories behind `git daemon`.
struct Server {
    dir: TempDir,
    port: u16,
    daemon: Child,
}

impl Server {
    fn start() -> Self {
        let (dir, port) = (TempDir::new().expect("temporary directory"), free_port());
        let daemon = Command::new("git")
            .args(["daemon", "--export-all", "--reuseaddr", "--listen=127.0.0.1"])
            .arg(format!("--port={port}"))
            .arg(format!("--base-path={}", dir.path().display()))
            .arg(dir.path())
            .process_group(0)
            .stderr(Stdio::null())
            .spawn()
            .expect("git daemon");
        wait_until("git daemon to listen", Duration::from_secs(20), || {
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        Self { dir, port, daemon }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A repository with one commit on `main`.
    fn repository(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let path = self.path(name);
        run(Command::new("git").args(["init", "-q", "-b", "main"]).arg(&path));
        commit(&path, files);
        path
    }

    fn url(&self, name: &str) -> String {
        format!("git://127.0.0.1:{}/{name}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // With the process that it may have handed its work to.
        let _ = Command::new("kill").args(["-9", "--", &format!("-{}", self.daemon.id())]).status();
        let _ = self.daemon.wait();
    }
}

/// Writes files and commits them; gives the commit.
fn commit(repository: &Path, files: &[(&str, &str)]) -> String {
    for (name, content) in files {
        let path = repository.join(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("create");
        fs::write(path, content).expect("write");
    }
    git(repository, &["add", "-A"]);
    git(repository, &["commit", "-q", "--allow-empty", "-m", "m"]);
    git(repository, &["rev-parse", "HEAD"])
}

/// Builds `FROM scratch` and an instruction; gives the files of the result.
fn add(kiln: &Kiln, instruction: &str, args: &[&str]) -> (Built, TempDir) {
    let out = TempDir::new().expect("temporary directory");
    let context = Context::new(&format!("FROM scratch\n{instruction}\n"));
    let output = format!("type=local,dest={}", out.path().display());
    let built = kiln.build(context.path(), &[args, &["-o", &output]].concat());
    (built, out)
}

fn read(dir: &TempDir, path: &str) -> String {
    fs::read_to_string(dir.path().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn branches_tags_and_commits_are_the_commit_that_they_name() {
    let (kiln, server) = (kiln(), Server::start());
    let repository = server.repository("r.git", &[("f", "one"), ("sub/dir/g", "deep")]);
    let first = git(&repository, &["rev-parse", "HEAD"]);
    git(&repository, &["tag", "-a", "v1", "-m", "annotated"]);
    git(&repository, &["update-ref", "refs/pull/7/head", &first]);
    commit(&repository, &[("f", "two"), ("sub/dir/g", "deeper")]);
    git(&repository, &["tag", "v2"]);
    let url = server.url("r.git");

    for (fragment, content) in [
        ("", "two"),
        ("#main", "two"),
        ("#refs/heads/main", "two"),
        ("#v2", "two"),
        ("#v1", "one"),
        ("?tag=v1", "one"),
    ] {
        let (built, out) = add(&kiln, &format!("ADD {url}{fragment} /x"), &[]);
        built.ok();
        assert_eq!(read(&out, "x/f"), content, "{fragment}");
        assert!(!out.path().join("x/.git").exists());
    }
    for fragment in ["#pull/7/head".to_owned(), format!("#{first}")] {
        let (built, out) = add(&kiln, &format!("ADD {url}{fragment} /x"), &[]);
        assert_eq!(built.ok().cached(), ADD, "the commit of v1: {fragment}");
        assert_eq!(read(&out, "x/f"), "one");
    }
    let (built, out) = add(&kiln, &format!("ADD {url}#v1:sub/dir /"), &[]);
    built.ok();
    assert_eq!(read(&out, "g"), "deep");
    assert!(!out.path().join("sub").exists());

    commit(&repository, &[("f", "three")]);
    let (built, out) = add(&kiln, &format!("ADD {url}#main /x"), &[]);
    assert_eq!(built.ok().cached(), 0);
    assert_eq!(read(&out, "x/f"), "three");
    // One whose history does not have what was fetched before.
    git(&repository, &["checkout", "-q", "--orphan", "other"]);
    commit(&repository, &[("f", "four")]);
    git(&repository, &["branch", "-q", "-f", "main"]);
    let (built, out) = add(&kiln, &format!("ADD {url}#main /x"), &[]);
    built.ok();
    assert_eq!(read(&out, "x/f"), "four");

    let described =
        |text: &str| kiln.usage().iter().filter(|record| record.to_string().contains(text)).count();
    assert_eq!(described("shared git repo for git://127.0.0.1"), 1, "{:?}", kiln.usage());
    assert!(
        kiln.usage().iter().any(|record| record["recordType"] == "source.git.checkout"),
        "{:?}",
        kiln.usage()
    );
    kiln.run(&["prune", "--all"]).ok();
    assert_eq!(described("git"), 0);
    let (built, out) = add(&kiln, &format!("ADD {url}#v1 /x"), &[]);
    assert_eq!(built.ok().cached(), 0);
    assert_eq!(read(&out, "x/f"), "one");
}

#[test]
fn the_git_directory_is_kept_if_asked_for() {
    let (kiln, server) = (kiln(), Server::start());
    let repository = server.repository("r.git", &[("f", "one")]);
    let first = git(&repository, &["rev-parse", "HEAD"]);
    git(&repository, &["tag", "-a", "v1", "-m", "annotated"]);
    commit(&repository, &[("f", "two")]);
    let url = server.url("r.git");
    let (built, out) = add(&kiln, &format!("ADD --keep-git-dir=true {url}#v1 /x"), &[]);
    built.ok();
    let tree = out.path().join("x");
    let ask = |args: &[&str]| git(&tree, &[&["-c", "safe.directory=*"], args].concat());
    assert_eq!(ask(&["rev-parse", "HEAD"]), first);
    assert_eq!(ask(&["cat-file", "-t", "refs/tags/v1"]), "tag");
    assert_eq!(ask(&["status", "--porcelain"]), "");
    assert_eq!(ask(&["remote", "get-url", "origin"]), url);
    assert_eq!(ask(&["rev-list", "--count", "--all"]), "1");
    // Another ref is another result, be it the same commit.
    let (built, out) = add(&kiln, &format!("ADD {url}?keep-git-dir&ref={first} /x"), &[]);
    assert_eq!(built.ok().cached(), 0);
    assert_eq!(git(&out.path().join("x"), &["-c", "safe.directory=*", "rev-parse", "HEAD"]), first);
}

#[test]
fn submodules_are_fetched_over_the_network_only() {
    let (kiln, server) = (kiln(), Server::start());
    server.repository("sub.git", &[("inner", "in")]);
    let repository = server.repository("r.git", &[("f", "one")]);
    let name = server.path("sub.git");
    git(
        &repository,
        &[
            "-c",
            "protocol.file.allow=always",
            "submodule",
            "--quiet",
            "add",
            name.to_str().expect("UTF-8"),
            "mod",
        ],
    );
    let modules = |url: &str| format!("[submodule \"mod\"]\n\tpath = mod\n\turl = {url}\n");
    commit(&repository, &[(".gitmodules", &modules("../sub.git"))]);
    let url = server.url("r.git");
    let (built, out) = add(&kiln, &format!("ADD {url} /x"), &[]);
    built.ok();
    assert_eq!((read(&out, "x/f"), read(&out, "x/mod/inner")), ("one".to_owned(), "in".to_owned()));
    for git_dir in ["x/.git", "x/mod/.git"] {
        assert!(!out.path().join(git_dir).exists(), "{git_dir}");
    }
    let (built, out) = add(&kiln, &format!("ADD {url}?submodules=false /x"), &[]);
    built.ok();
    assert!(out.path().join("x/mod").is_dir() && !out.path().join("x/mod/inner").exists());
    let (built, out) = add(&kiln, &format!("ADD {url}#:mod /x"), &[]);
    built.ok();
    assert_eq!(read(&out, "x/inner"), "in");
    let (built, out) = add(&kiln, &format!("ADD {url}?keep-git-dir=1 /x"), &[]);
    built.ok();
    let inner = out.path().join("x/mod");
    assert_eq!(git(&inner, &["-c", "safe.directory=*", "status", "--porcelain"]), "");

    // The daemon's own repositories are none of a client's business.
    commit(&repository, &[(".gitmodules", &modules(name.to_str().expect("UTF-8")))]);
    let (built, _) = add(&kiln, &format!("ADD {url} /x"), &[]);
    built.fails(&["failed to update submodules", "transport 'file' not allowed"]);
}

#[test]
fn what_is_promised_is_checked() {
    let (kiln, server) = (kiln(), Server::start());
    let repository = server.repository("r.git", &[("f", "one"), ("d/g", "")]);
    std::os::unix::fs::symlink("/etc", repository.join("link")).expect("link");
    let first = commit(&repository, &[]);
    let second = commit(&repository, &[("f", "two")]);
    let url = server.url("r.git");
    for reference in ["main", &second] {
        let (built, _) = add(&kiln, &format!("ADD --checksum={first} {url}#{reference} /"), &[]);
        built.fails(&[&format!("expected checksum to match {first}, got {second}"), "Dockerfile:2"]);
    }
    let (built, out) = add(&kiln, &format!("ADD {url}?branch=main&commit={first}&fetch-by-commit=1 /"), &[]);
    built.ok();
    assert_eq!(read(&out, "f"), "one");
    let (built, out) = add(&kiln, &format!("ADD --checksum={} {url}?mtime=commit /", &second[..9]), &[]);
    built.ok();
    for path in ["f", "d/g"] {
        let time = fs::metadata(out.path().join(path)).and_then(|meta| meta.modified()).expect("a time");
        assert_eq!(
            time.duration_since(SystemTime::UNIX_EPOCH).expect("later").as_secs(),
            1_000_000_000,
            "{path}"
        );
    }
    for subdir in ["link", "f", "none"] {
        let (built, _) = add(&kiln, &format!("ADD {url}#:{subdir} /"), &[]);
        built.fails(&[&format!("invalid subdir {subdir}")]);
    }
}

#[test]
fn a_repository_may_be_the_context() {
    let (kiln, server) = (kiln(), Server::start());
    let dockerfile = "FROM scratch\nCOPY f /\n";
    let repository =
        server.repository("r.git", &[("Dockerfile", dockerfile), ("f", "top"), ("sub/f", "sub")]);
    commit(
        &repository,
        &[("sub/Dockerfile", dockerfile), ("other.Dockerfile", "FROM scratch\nCOPY sub /\n")],
    );
    let out = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", out.path().display());
    let url = server.url("r.git");
    let build = |url: &str, args: &[&str]| kiln.build(Path::new(url), &[args, &["-o", &output]].concat());
    let built = build(&url, &[]).ok();
    assert_eq!(read(&out, "f"), "top");
    assert!(built.stderr.contains(&format!("[internal] load git source {url}")), "{}", built.stderr);
    build(&format!("{url}#main:sub"), &[]).ok();
    assert_eq!(read(&out, "f"), "sub");
    build(&url, &["-f", "other.Dockerfile"]).ok();
    assert_eq!(read(&out, "f"), "sub");
    build(&url, &["--build-arg", "BUILDKIT_CONTEXT_KEEP_GIT_DIR=1"]).ok();
    build(&format!("{url}#main:none"), &[]).fails(&["invalid subdir none"]);

    let here = TempDir::new().expect("temporary directory");
    fs::write(here.path().join("Dockerfile"), "FROM scratch\nCOPY sub/f /own\n").expect("write");
    let file = fs::File::open(here.path().join("Dockerfile")).expect("open");
    let built: Built = kiln
        .command(&["build", "--progress", "plain", "-o", &output, "-f", "-", &url])
        .stdin(file)
        .output()
        .expect("run kiln")
        .into();
    built.ok();
    assert_eq!(read(&out, "own"), "sub");
}

#[test]
fn a_repository_may_be_a_named_context() {
    let (kiln, server) = (kiln(), Server::start());
    let repository = server.repository("r.git", &[("f", "one"), ("sub/g", "deep")]);
    git(&repository, &["tag", "v1"]);
    commit(&repository, &[("f", "two")]);
    let url = server.url("r.git");
    let dockerfile = "FROM scratch AS base\nFROM scratch\nCOPY --from=base / /\nCOPY --from=part / /\n";
    let context = Context::new(dockerfile);
    let out = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", out.path().display());
    let [base, part] = [format!("base={url}#v1"), format!("part={url}?subdir=sub")];
    let contexts = ["--build-context", &base, "--build-context", &part];
    let built = kiln.build(context.path(), &[&contexts[..], &["-o", &output]].concat()).ok();
    assert_eq!((read(&out, "f"), read(&out, "g")), ("one".to_owned(), "deep".to_owned()));
    assert!(built.stderr.contains(&format!("[internal] load git source {url}#v1")), "{}", built.stderr);
    let refused = format!("base={url}?colour=red");
    kiln.build(context.path(), &["--build-context", &refused]).fails(&["unexpected query \"colour\""]);
}

#[test]
fn failures_name_the_remote_and_no_secrets() {
    let (kiln, server) = (kiln(), Server::start());
    server.repository("r.git", &[("f", "one")]);
    let url = server.url("r.git");
    let (built, _) = add(&kiln, &format!("ADD {url}#none /"), &[]);
    built.fails(&["repository does not contain ref none", &url]);
    let (built, _) = add(&kiln, "ADD http://user:hush@127.0.0.1:1/r.git#main /", &[]);
    let built = built.fails(&["failed to fetch remote http://127.0.0.1:1/r.git"]);
    let said = built.stderr.split("ERROR").last().unwrap_or_default();
    let first = said.lines().take_while(|line| !line.contains("Dockerfile:")).collect::<String>();
    assert!(!first.contains("hush"), "{first}");

    let lacking = self::kiln();
    let context = Context::new(&format!("FROM scratch\nADD {url} /\n"));
    let path = context.path().to_str().expect("UTF-8");
    let built: Built = lacking
        .command(&["build", "--progress", "plain", path])
        .env("PATH", "/nonexistent")
        .output()
        .expect("run kiln")
        .into();
    built.fails(&["need the git program", "install the package \"git\""]);
}

#[test]
fn secrets_are_sent_to_servers_that_know_nothing_but_files() {
    let (kiln, server) = (kiln(), Server::start());
    let inner = server.repository("sub.git", &[("inner", "in")]);
    let repository = server.repository("r.git", &[("f", "private")]);
    let name = inner.to_str().expect("UTF-8");
    git(&repository, &["-c", "protocol.file.allow=always", "submodule", "--quiet", "add", name, "mod"]);
    commit(&repository, &[(".gitmodules", "[submodule \"mod\"]\n\tpath = mod\n\turl = ../sub.git\n")]);
    for repository in [&inner, &repository] {
        git(repository, &["update-server-info"]);
    }
    let root = server.dir.path().to_owned();
    let web = WebServer::start(move |request| {
        let path = request.path.split('?').next().unwrap_or_default();
        let (name, path) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
        let file = fs::read(root.join(name).join(".git").join(path)).ok();
        // x-access-token:hush, user:hush
        let known = ["basic eC1hY2Nlc3MtdG9rZW46aHVzaA==", "Basic dXNlcjpodXNo"];
        let asking = vec![("www-authenticate", "Basic realm=\"x\"".to_owned())];
        match file {
            _ if !request.header("authorization").is_some_and(|given| known.contains(&given)) => {
                WebAnswer { status: 401, headers: asking, ..WebAnswer::default() }
            }
            None => WebAnswer { status: 404, ..WebAnswer::default() },
            Some(body) => WebAnswer { status: 200, body, ..WebAnswer::default() },
        }
    });
    let instruction = format!("ADD http://{}/r.git?submodules=false#main /", web.address);
    let (built, _) = add(&kiln, &instruction, &[]);
    built.fails(&["failed to fetch remote", "could not read Username"]);
    let secret = TempDir::new().expect("temporary directory");
    fs::write(secret.path().join("token"), "hush\n").expect("write");
    let given = format!("id=GIT_AUTH_TOKEN.{},src={}", web.address, secret.path().join("token").display());
    let (built, out) = add(&kiln, &instruction, &["--secret", &given]);
    let built = built.ok();
    assert_eq!(read(&out, "f"), "private");
    assert!(!built.stderr.contains("hush") && !built.stderr.contains("eC1hY2"), "{}", built.stderr);

    // A commit that no ref leads to.
    let tree = git(&repository, &["rev-parse", "HEAD^^{tree}"]);
    let loose = git(&repository, &["commit-tree", &tree, "-m", "loose"]);
    let instruction = format!("ADD http://{}/r.git#{loose} /", web.address);
    let (built, out) = add(&kiln, &instruction, &["--secret", &given]);
    built.ok();
    assert!(read(&out, "f") == "private" && !out.path().join("mod").exists());

    let (built, out) =
        add(&kiln, &format!("ADD http://user:hush@{}/r.git?keep-git-dir=1 /", web.address), &[]);
    built.ok();
    assert_eq!(read(&out, "mod/inner"), "in");
    let found = Command::new("grep").arg("-r").arg("hush").arg(out.path()).output().expect("grep");
    assert_eq!(String::from_utf8_lossy(&found.stdout), "");
    assert!(read(&out, ".git/config").contains(&format!("http://{}/r.git", web.address)));
}

#[test]
fn ssh_gets_the_clients_agent_and_nothing_of_the_daemons() {
    let (mut kiln, server) = (kiln(), Server::start());
    let repository = server.repository("r.git", &[("f", "over ssh")]);
    let tools = TempDir::new().expect("temporary directory");
    let log = tools.path().join("log");
    let ssh = tools.path().join("ssh");
    let script = format!(
        "#!/bin/sh\necho \"$SSH_AUTH_SOCK $*\" >> {}\n[ -S \"$SSH_AUTH_SOCK\" ] || exit 1\n\
         for last; do :; done\nexec sh -c \"$last\"\n",
        log.display()
    );
    fs::write(&ssh, script).expect("write");
    fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).expect("mode");
    let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").expect("PATH"));
    let context = Context::new(&format!("FROM scratch\nADD git@127.0.0.1:{} /\n", repository.display()));
    let (dir, out) = (context.path().to_str().expect("UTF-8"), tools.path().join("out"));
    let build = |kiln: &Kiln, args: &[&str]| -> Built {
        let output = format!("type=local,dest={}", out.display());
        let all = [&["build", "--progress", "plain", "-o", &output][..], args, &[dir]].concat();
        kiln.command(&all).env("PATH", &path).output().expect("run kiln").into()
    };
    build(&kiln, &[]).fails(&["no SSH key \"default\" forwarded from the client"]);
    let socket = tools.path().join("agent");
    let _agent = std::os::unix::net::UnixListener::bind(&socket).expect("bind");
    build(&kiln, &["--ssh", &format!("default={}", socket.display())]).ok();
    assert_eq!(fs::read_to_string(out.join("f")).expect("f"), "over ssh");
    let said = fs::read_to_string(&log).expect("log");
    assert!(said.contains("-F /dev/null") && said.contains("IdentityFile=none"), "{said}");
    assert!(!said.contains(socket.to_str().expect("UTF-8")), "the agent is the session's: {said}");
    kiln.stop();
}

#[test]
fn cancelling_ends_git_with_its_helpers() {
    let mut kiln = kiln();
    kiln.start();
    let silent = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    let address = silent.local_addr().expect("address");
    let context = Context::new(&format!("FROM scratch\nADD http://{address}/r.git /\n"));
    let path = context.path().to_str().expect("UTF-8");
    let mut build =
        kiln.command(&["build", "--progress", "plain", path]).stderr(Stdio::null()).spawn().expect("kiln");
    // The helper that speaks http is connected.
    let connection = silent.accept().expect("a connection");
    run(Command::new("kill").args(["-INT", &build.id().to_string()]));
    assert!(!build.wait().expect("wait").success());
    wait_until("the helper to let go of its connection", Duration::from_secs(20), || {
        let mut byte = [0];
        connection.0.set_read_timeout(Some(Duration::from_millis(100))).expect("timeout");
        loop {
            match std::io::Read::read(&mut &connection.0, &mut byte) {
                Ok(0) => break true,
                Ok(_) => {}
                Err(error) => break error.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    });
}
