//! Containers of a client that is the frontend itself.

use kiln_integration::{Kiln, Registry, wait_until};
use kiln_proto::gateway::exec_message::Input;
use kiln_proto::gateway::{FdMessage, ReadDirRequest, ReadFileRequest, ResizeMessage, SignalMessage};
use kiln_proto::pb;
use tonic::Code;

use crate::gateway_client::{Build, PATIENCE};

/// With each executor that is there.
fn each(test: impl AsyncFn(&mut Kiln)) {
    let registry = Registry::with_busybox();
    for lines in ["", "[worker.oci]\nbinary = \"runc\"\n"] {
        let mut kiln = Kiln::new(&registry);
        if !lines.is_empty() {
            kiln.configure(lines);
        }
        kiln.start();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(test(&mut kiln));
    }
}

#[test]
fn processes_of_a_container() {
    each(async |kiln: &mut Kiln| {
        let mut build = Build::start(kiln, "processes").await;
        build.container("c").await.expect("a container");
        assert_eq!(build.container("c").await.expect_err("again").code(), Code::AlreadyExists);
        build.run("first", &["sleep", "1000"], |_| {}).await;
        build.run("cat", &["sh", "-c", "hostname; cat; echo $0 $TERM >&2; exit 3"], |_| {}).await;
        build.input("cat", "through ", false).await;
        build.input("cat", "a pipe\n", true).await;
        let [cat] = build.ended(["cat"]).await;
        assert_eq!((cat.out().as_str(), cat.err.as_slice()), ("box\nthrough a pipe\n", b"sh\n".as_slice()));
        assert_eq!(cat.exit.code, 3);
        let error = cat.exit.error.expect("an error");
        assert_eq!(error.message, "exit code: 3");
        let detail = &error.details[0];
        assert_eq!(detail.type_url, "github.com/moby/buildkit/gatewayapi.ExitMessage+json");
        assert_eq!(detail.value, b"{\"Code\":3}");

        let script = "grep -q '10.0.0.7.db' /etc/hosts && test -w /t && echo text > /file && trap 'exit 5' USR1 && \
            echo set && while :; do sleep 0.05; done";
        build.run("trap", &["sh", "-c", script], |_| {}).await;
        let (_, set) = build.hear().await;
        assert!(matches!(&set, Input::File(FdMessage { fd: 1, data, .. }) if data == b"set\n"), "{set:?}");
        let file = ReadFileRequest { r#ref: "c".into(), file_path: "/file".into(), ..Default::default() };
        let data = build.gateway.read_file_container(file.clone()).await.expect("read").into_inner();
        assert_eq!(data.data, b"text\n");
        let list = ReadDirRequest { r#ref: "c".into(), dir_path: "/".into(), ..Default::default() };
        let entries = build.gateway.read_dir_container(list).await.expect("list").into_inner();
        assert!(entries.entries.iter().any(|entry| entry.path == b"file"));
        let beyond = ReadFileRequest { mount_index: 7, ..file };
        build.gateway.read_file_container(beyond).await.expect_err("no such mount");
        build.say("trap", Input::Signal(SignalMessage { name: "USR1".into() })).await;
        let [trap] = build.ended(["trap"]).await;
        assert_eq!(trap.exit.code, 5);

        let script =
            "read line; until stty size | grep -q '40 80'; do sleep 0.02; done; echo got $line $TERM; exit 9";
        build.run("tty", &["sh", "-c", script], |init| init.tty = true).await;
        build.say("tty", Input::Resize(ResizeMessage { rows: 40, cols: 80 })).await;
        build.input("tty", "line\n", false).await;
        let [tty] = build.ended(["tty"]).await;
        assert!(tty.exit.code == 9 && tty.out().contains("got line xterm\r\n"), "{:?}", tty.out());

        build.run("none", &["/no/such/program"], |_| {}).await;
        let [none] = build.ended(["none"]).await;
        assert_eq!(none.exit.code, 255);
        assert!(none.exit.error.expect("an error").message.contains("/no/such/program"));
        let insecure = pb::SecurityMode::Insecure.into();
        build.run("insecure", &["true"], |init| init.security = insecure).await;
        let [refused] = build.ended(["insecure"]).await;
        assert_eq!(refused.exit.error.expect("an error").message, "security.insecure is not allowed");

        build.run("last", &["sleep", "1001"], |_| {}).await;
        build.release().await.expect_err("what ran in it was ended");
        let [first, last] = build.ended(["first", "last"]).await;
        for ended in [first, last] {
            assert!(ended.exit.error.expect("an error").message.ends_with("context canceled"));
        }
        assert!(!kiln.processes().iter().any(|(_, line)| line.starts_with("sleep 100")));
        build.release().await.expect_err("it is gone");
        build.finish().await;
        assert_eq!(kiln.mounts(), Vec::<String>::new());
    });
}

fn running(mark: &str) -> bool {
    std::fs::read_dir("/proc").expect("/proc").flatten().any(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        line == format!("sleep\0{mark}\0").as_bytes()
    })
}

#[test]
fn a_container_ends_with_its_first_process_and_with_its_build() {
    each(async |kiln: &mut Kiln| {
        let mark = format!("2000.{}", std::process::id());
        let mut build = Build::start(kiln, "ends").await;
        build.container("c").await.expect("a container");
        build.run("first", &["cat"], |_| {}).await;
        build.run("second", &["sleep", &mark], |_| {}).await;
        wait_until("the second process to run", PATIENCE, || running(&mark));
        build.input("first", "", true).await;
        let [first, second] = build.ended(["first", "second"]).await;
        assert_eq!((first.exit.code, second.exit.code), (0, 137));
        build.run("late", &["true"], |_| {}).await;
        let [late] = build.ended(["late"]).await;
        let error = late.exit.error.expect("an error").message;
        assert!(error.contains("container") && error.ends_with("not found"), "{error}");
        build.release().await.expect_err("processes failed");

        build.container("c").await.expect("another container");
        build.run("again", &["sleep", &mark], |_| {}).await;
        wait_until("the process to run", PATIENCE, || running(&mark));
        build.finish().await;
        assert!(!running(&mark), "the build's answer waits for its containers");

        let mut build = Build::start(kiln, "left").await;
        build.container("c").await.expect("a container");
        build.run("first", &["sleep", &mark], |_| {}).await;
        wait_until("the process to run", PATIENCE, || running(&mark));
        build.solve.abort();
        drop(build);
        wait_until("the processes of a client that left to end", PATIENCE, || !running(&mark));
    });
}
