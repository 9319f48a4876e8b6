//! Several shells at once share one daemon, one cache and one execution.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_integration::{Built, Context, Kiln, Registry, tools, wait_until};

#[test]
fn sixteen_builds_of_one_dockerfile_run_each_step_once() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    // Every execution draws a name of its own in the cache mount, so that doubled work can be counted.
    let context = Context::new(concat!(
        "FROM busybox\n",
        "RUN --mount=type=cache,id=count,target=/count mktemp /count/first.XXXXXX && sleep 0.3 && cat /proc/sys/kernel/random/uuid > /one\n",
        "RUN --mount=type=cache,id=count,target=/count mktemp /count/second.XXXXXX && cat /proc/sys/kernel/random/uuid > /two\n",
    ));
    let children: Vec<_> = (0..16)
        .map(|number| {
            let image = format!("{}/test/same:{number}", registry.address);
            kiln.command(&[
                "build",
                "--progress",
                "plain",
                "-t",
                &image,
                "--push",
                context.path().to_str().expect("UTF-8"),
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start kiln")
        })
        .collect();
    for child in children {
        Built::from(child.wait_with_output().expect("wait for kiln")).ok();
    }
    assert_eq!(
        kiln.daemons().len(),
        1,
        "the sixteen started one daemon between them: {:?}",
        kiln.processes()
    );
    let digests: BTreeSet<_> =
        (0..16).map(|number| tools::digest(&format!("{}/test/same:{number}", registry.address))).collect();
    assert_eq!(digests.len(), 1, "{digests:?}");

    let count = Context::new("FROM busybox\nRUN --mount=type=cache,id=count,target=/count ls /count\n");
    let listed = kiln.build(count.path(), &[]).ok();
    assert_eq!(listed.stderr.matches("first.").count(), 1, "{}", listed.stderr);
    assert_eq!(listed.stderr.matches("second.").count(), 1, "{}", listed.stderr);
}

#[test]
fn independent_stages_run_at_the_same_time() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    // Each stage waits for the other one's mark: one after the other they could not succeed.
    let meet = |own: &str, other: &str| {
        format!(
            "FROM busybox AS {own}\nRUN --mount=type=cache,id=meet,target=/m touch /m/{own} && \
             for i in $(seq 200); do [ -e /m/{other} ] && exit 0; sleep 0.1; done; exit 1\n"
        )
    };
    let dockerfile = format!(
        "{}{}FROM scratch\nCOPY --from=a /bin/busybox /a\nCOPY --from=b /bin/busybox /b\n",
        meet("a", "b"),
        meet("b", "a")
    );
    kiln.build(Context::new(&dockerfile).path(), &[]).ok();
}

#[test]
fn a_daemon_that_was_started_on_demand_leaves_when_idle() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN true\n");
    let built = kiln
        .command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")])
        .env("KILN_IDLE_TIMEOUT", "1s")
        .output()
        .expect("run kiln");
    Built::from(built).ok();
    wait_until("the idle daemon to leave", Duration::from_secs(30), || kiln.daemons().is_empty());
    let again = kiln.build(context.path(), &[]).ok();
    assert_eq!(again.cached(), 1, "{}", again.stderr);
}

#[test]
fn the_daemon_may_open_more_files_than_its_steps() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN test $(ulimit -Sn) = 300\n");
    let build = kiln.command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")]);
    let mut limited = Command::new("prlimit");
    limited.arg("--nofile=300:").arg(build.get_program()).args(build.get_args());
    limited.envs(build.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Built::from(limited.output().expect("run kiln")).ok();

    let daemons = kiln.daemons();
    let limits =
        std::fs::read_to_string(format!("/proc/{}/limits", daemons[0])).expect("the daemon's limits");
    let files = limits.lines().find(|line| line.starts_with("Max open files")).expect("open files");
    let fields: Vec<_> = files.split_whitespace().collect();
    assert_eq!(fields[3], fields[4], "soft and hard limit: {files}");
}
