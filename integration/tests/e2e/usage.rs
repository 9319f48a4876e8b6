//! Ways of calling the command that are easily got wrong.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_integration::kiln::binary;
use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry, wait_until};
use tempfile::TempDir;

#[test]
fn attributes_and_kept_parents_reach_the_output() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nCOPY --parents a/b/c.txt /kept/\nCOPY ping /ping\n");
    context.file("a/b/c.txt", "c").file("a/b/other", "").file("ping", "x");
    let flags = rustix::fs::XattrFlags::empty();
    // CAP_NET_RAW, permitted and effective.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let file = context.path().join("ping");
    rustix::fs::setxattr(&file, "security.capability", &capability, flags).expect("set");
    rustix::fs::setxattr(&file, "user.origin", b"here", flags).expect("set");
    let out = TempDir::new().expect("temporary directory");
    let dest = format!("type=local,dest={}", out.path().display());
    kiln.build(context.path(), &["-o", &dest]).ok();
    assert_eq!(std::fs::read_to_string(out.path().join("kept/a/b/c.txt")).expect("kept"), "c");
    assert!(!out.path().join("kept/a/b/other").exists());
    for (name, value) in [("security.capability", &capability[..]), ("user.origin", b"here")] {
        let mut found = [0; 64];
        let size = rustix::fs::getxattr(out.path().join("ping"), name, &mut found[..]).expect(name);
        assert_eq!(&found[..size], value, "{name}");
    }
}

#[test]
fn a_dockerfile_comes_from_a_pipe_or_through_a_link() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let (context, elsewhere) =
        (Context::new("FROM nothing\n"), Context::new("FROM busybox\nRUN echo linked\n"));
    let mut command = kiln.command(&[
        "build",
        "--progress",
        "plain",
        "-f",
        "/dev/stdin",
        context.path().to_str().expect("UTF-8"),
    ]);
    let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kiln");
    child.stdin.take().expect("piped").write_all(b"FROM busybox\nRUN echo piped\n").expect("write");
    let output = child.wait_with_output().expect("kiln");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("RUN echo piped"), "{text}");

    let link = context.path().join("link");
    std::os::unix::fs::symlink(elsewhere.path().join("Dockerfile"), &link).expect("link");
    let built = kiln.build(context.path(), &["-f", link.to_str().expect("UTF-8")]).ok();
    assert!(built.stderr.contains("RUN echo linked"), "{}", built.stderr);
}

#[test]
fn bad_names_and_destinations_are_known_before_anything_runs() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN echo wasted\n");
    for args in [
        &["-t", "Bad Name", "--push"][..],
        &["-t", "a:b:c"],
        &["-o", "type=oci,dest=/no/such/directory/x.tar"],
        &["-o", "type=oci,dest=x.tar,name=UPPER"],
    ] {
        let built = kiln.build(context.path(), args).fails(&["ERROR: "]);
        assert!(!built.stderr.contains("wasted"), "{args:?}: {}", built.stderr);
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    kiln.build(Context::new("FROM busybox\nRUN echo > /x\n").path(), &[]).ok();
    for args in [&["du"][..], &["du", "--verbose"], &["prune", "--all"]] {
        let mut child =
            kiln.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kiln");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("kiln");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_daemon_whose_log_nobody_reads_still_works_and_stops() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let mut daemon = kiln
        .command(&["daemon"])
        .env("KILN_LOG", "debug")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("daemon");
    drop(daemon.stderr.take());
    wait_until("the daemon to answer", Duration::from_secs(20), || {
        std::os::unix::net::UnixStream::connect(kiln.socket()).is_ok()
    });
    kiln.build(Context::new("FROM busybox\nRUN true\n").path(), &[]).ok();
    run(Command::new("kill").arg(daemon.id().to_string()));
    wait_until("the daemon to leave", Duration::from_secs(20), || {
        daemon.try_wait().expect("wait").is_some_and(|status| status.success())
    });
}

#[test]
fn an_ordinary_user_without_a_daemon_is_told_what_is_missing() {
    let home = TempDir::new().expect("temporary directory");
    let copy = home.path().join("kiln");
    std::fs::copy(binary(), &copy).expect("copy");
    run(Command::new("chmod").arg("-R").arg("a+rx").arg(home.path()));
    let context = Context::new("FROM scratch\n");
    run(Command::new("chmod").arg("a+rx").arg(context.path()));
    let output = Command::new(&copy)
        .uid(65534)
        .gid(65534)
        .env_clear()
        .env("HOME", home.path())
        .env("KILN_HOST", format!("unix://{}/kiln.sock", home.path().display()))
        .env("KILN_ROOT", "")
        .arg("build")
        .arg(context.path())
        .output()
        .expect("kiln");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("takes root"), "{text}");
}

#[test]
fn a_dumped_graph_is_the_same_each_time_and_needs_no_old_session() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nCOPY f /f\n");
    context.file("f", "content");
    let dump = || {
        let path = context.path().to_str().expect("UTF-8").to_owned();
        run(&mut kiln.command(&["debug", "dump-llb", "--raw", &path]))
    };
    let graph = dump();
    assert!(graph == dump(), "the graph differs");
    let out = TempDir::new().expect("temporary directory");
    let file = out.path().join("graph");
    std::fs::write(&file, &graph).expect("write");
    let (local, dest) = (
        format!("context={}", context.path().display()),
        format!("type=tar,dest={}", out.path().join("o.tar").display()),
    );
    let mut solve = kiln.command(&["solve", "--local", &local, "-o", &dest]);
    run(solve.stdin(std::fs::File::open(&file).expect("graph")));
    let listing = tools::tar_listing(&out.path().join("o.tar"));
    assert!(listing.contains(&"-rw-r--r-- 0/0 f".to_owned()), "{listing:?}");
}
