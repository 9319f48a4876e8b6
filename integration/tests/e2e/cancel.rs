//! A cancelled build leaves no process, mount or half record behind.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_integration::{Context, Kiln, Registry, wait_until};

fn processes_with(mark: &str) -> usize {
    std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter(|entry| {
            std::fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).split('\0').any(|word| word == mark))
        })
        .count()
}

#[test]
fn ctrl_c_ends_the_step_and_the_next_build_starts_afresh() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new(
        "FROM busybox\nRUN echo one > /one\nRUN echo started && sleep 98765 && echo over > /over\n",
    );
    let mut child = kiln
        .command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start kiln");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    assert!(
        lines.by_ref().map_while(Result::ok).any(|line| line.starts_with('#') && line.ends_with(" started")),
        "the step's output arrives while it runs"
    );
    wait_until("the step's process", Duration::from_secs(10), || processes_with("98765") == 1);
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill");
    let drain = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>());
    let status = child.wait().expect("wait for kiln");
    assert!(!status.success());
    drain.join().expect("read the rest");
    wait_until("the step's process to be gone", Duration::from_secs(10), || processes_with("98765") == 0);
    assert_eq!(kiln.mounts(), Vec::<String>::new());

    context.file("Dockerfile", "FROM busybox\nRUN echo one > /one\nRUN echo other\n");
    assert_eq!(kiln.build(context.path(), &[]).ok().cached(), 1, "the step that had finished is cached");
    kiln.stop();
}

#[test]
fn a_client_that_is_killed_takes_its_work_along_but_not_the_work_of_others() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN echo started && sleep 3 && echo 54321\n");
    let spawn = || {
        kiln.command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start kiln")
    };
    let mut first = spawn();
    let second = spawn();
    let mut lines = BufReader::new(first.stderr.take().expect("piped")).lines();
    assert!(lines.by_ref().map_while(Result::ok).any(|line| line.ends_with(" started")));
    first.kill().expect("kill -9 of the client");
    first.wait().expect("wait");
    let output = second.wait_with_output().expect("wait");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("54321"), "every asker gets the logs");
    kiln.stop();
}

#[test]
fn a_daemon_of_another_process_namespace_leaves_steps_alone() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN sleep 86420\n");
    let mut child = kiln
        .command(&["build", context.path().to_str().expect("UTF-8")])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start kiln");
    wait_until("the step's process", Duration::from_secs(20), || processes_with("86420") == 1);

    // A build starts its daemon, which ends with the namespace.
    let other = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN test $(ls -d /proc/[0-9]* | wc -l) -lt 20\n");
    let build = other.command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")]);
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(build.get_program())
        .args(build.get_args())
        .envs(build.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .output()
        .expect("run unshare");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(processes_with("86420"), 1, "the step still runs");
    assert!(child.try_wait().expect("wait").is_none());
    child.kill().expect("kill -9 of the client");
    child.wait().expect("wait");
    kiln.stop();
}
