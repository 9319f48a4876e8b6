//! The builds that the daemon remembers: listed, and forgotten.

use std::process::Stdio;
use std::time::Duration;

use kiln_integration::lab::wait_until;
use kiln_integration::{Context, Kiln, Registry};
use serde_json::Value;

fn builds(kiln: &Kiln, args: &[&str]) -> Vec<Value> {
    let all = [&["history", "ls", "--format", "json"], args].concat();
    let listed = kiln.run(&all).ok().stdout;
    listed.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn statuses(builds: &[Value]) -> Vec<&str> {
    builds.iter().map(|build| build["status"].as_str().expect("status")).collect()
}

#[test]
fn builds_are_listed_and_forgotten() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    assert_eq!(kiln.run(&["history", "ls"]).ok().stdout.lines().count(), 1, "only the heading");
    let context = Context::new("FROM busybox AS app\nRUN echo 1\nFROM app AS bad\nRUN false\n");
    kiln.build(context.path(), &["--target", "app"]).ok();
    kiln.build(context.path(), &[]).fails(&["exit code: 1"]);

    let found = builds(&kiln, &[]);
    assert_eq!(statuses(&found), ["Error", "Completed"], "the latest first: {found:#?}");
    let good = &found[1];
    assert_eq!(good["name"], "Dockerfile (app)");
    assert!(good["total_steps"].as_u64() >= Some(2), "{good:#}");
    assert!(good["created_at"].as_str() < good["completed_at"].as_str(), "{good:#}");
    let reference = good["ref"].as_str().expect("ref");
    let table = kiln.run(&["history", "ls"]).ok().stdout;
    let line = table.lines().find(|line| line.starts_with(reference)).expect("the build's line");
    let row: Vec<&str> = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
    assert_eq!((row[1], row[2]), ("Dockerfile (app)", "Completed"), "{table}");
    assert_eq!(statuses(&builds(&kiln, &["--filter", "status==error"])), ["Error"]);

    let logs = |args: &[&str]| kiln.run(&[&["history", "logs"], args].concat());
    assert!(logs(&[reference]).ok().stderr.contains("[app 2/2] RUN echo 1"));
    assert!(logs(&[]).ok().stderr.contains("RUN false"), "the last one");
    let inspect = |args: &[&str]| kiln.run(&[&["history", "inspect"], args].concat());
    let told = inspect(&[&reference[..10]]).ok().stdout;
    for text in
        ["Status:     Completed", "Option:     target=app", "Attachment: log ", "Attachment: attestation "]
    {
        assert!(told.contains(text), "{text}: {told}");
    }
    let last: Value = serde_json::from_str(&inspect(&["--format", "json"]).ok().stdout).expect("JSON");
    assert!(last["error"]["message"].as_str().is_some_and(|text| text.contains("exit code: 1")), "{last:#}");
    for command in ["logs", "inspect"] {
        kiln.run(&["history", command, "no-such-build"]).fails(&["no build \"no-such-build\" is remembered"]);
    }

    kiln.run(&["history", "rm", reference]).ok();
    assert_eq!(statuses(&builds(&kiln, &[])), ["Error"]);
    kiln.run(&["history", "explain", reference]).fails(&["no explanation of build"]);
    kiln.run(&["history", "rm", reference]).fails(&["no such build", reference]);
    // What was compared with the forgotten build still is.
    let explained = kiln.run(&["history", "explain"]).ok().stdout;
    assert!(explained.contains(&format!("compared with build {reference}")), "{explained}");
    assert!(explained.contains("RUN false: never built before"), "{explained}");
    kiln.stop();
    kiln.start();
    assert_eq!(kiln.run(&["history", "explain"]).ok().stdout, explained);
    kiln.run(&["history", "rm", "--all"]).ok();
    assert!(builds(&kiln, &[]).is_empty());
    kiln.run(&["history", "explain"]).fails(&["no build is remembered"]);
}

#[test]
fn builds_that_were_answered_are_remembered_at_once_and_by_the_next_daemon() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nARG N\nRUN echo $N\n");
    let build = |n: usize| kiln.build(context.path(), &["--build-arg", &format!("N={n}")]).ok();
    for n in 1..=5 {
        build(n);
        assert_eq!(statuses(&builds(&kiln, &[])), vec!["Completed"; n]);
        kiln.run(&["history", "explain"]).ok();
    }
    std::thread::scope(|scope| (6..=12).for_each(|n| drop(scope.spawn(move || build(n)))));
    kiln.stop();
    kiln.start();
    assert_eq!(builds(&kiln, &[]).len(), 12);
    let said = kiln.run(&["history", "explain"]).ok().stdout;
    assert!(said.contains("RUN echo"), "{said}");
}

#[test]
fn a_daemon_that_is_killed_once_it_has_answered_knows_the_build_and_no_other_in_its_place() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    for n in 1..=8 {
        kiln.start();
        let steps: String = (0..20).map(|step| format!("COPY <<E /{step}\n{n} {step}\nE\n")).collect();
        let context = Context::new(&format!("FROM busybox\n{steps}"));
        kiln.build(context.path(), &[]).ok();
        kiln.kill();
        kiln.start();
        let found = builds(&kiln, &[]);
        assert_eq!(statuses(&found), vec!["Completed"; n]);
        assert!(found[0]["total_steps"].as_u64() >= Some(20), "{:#}", found[0]);
        let reference = found[0]["ref"].as_str().expect("ref");
        let explained = kiln.run(&["history", "explain"]);
        match explained.code {
            0 => {
                assert!(explained.stdout.starts_with(&format!("Build {reference}: ")), "{}", explained.stdout)
            }
            _ => drop(explained.fails(&[reference, "the daemon was killed before it was stored"])),
        }
        kiln.kill();
    }
}

#[test]
fn a_running_build_is_listed_and_stays() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN sleep 600\n");
    let path = context.path().to_str().expect("a path in UTF-8");
    let mut build = kiln
        .command(&["build", "--progress", "plain", path])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("run kiln");
    wait_until("the build to be listed", Duration::from_secs(20), || !builds(&kiln, &[]).is_empty());
    let found = builds(&kiln, &[]);
    assert_eq!(statuses(&found), ["Running"]);
    assert!(found[0].get("completed_at").is_none(), "{found:#?}");
    let reference = found[0]["ref"].as_str().expect("ref");
    kiln.run(&["history", "rm", reference]).fails(&["is still running"]);
    kiln.run(&["history", "rm", "--all"]).ok();
    assert_eq!(statuses(&builds(&kiln, &[])), ["Running"]);
    build.kill().expect("kill the build");
    build.wait().expect("wait for the build");
    wait_until("the build to end", Duration::from_secs(20), || statuses(&builds(&kiln, &[])) == ["Canceled"]);
}
