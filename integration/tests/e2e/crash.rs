//! `kill -9` of the daemon at random moments loses no finished step and leaves nothing behind.

use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_integration::kiln::cached;
use kiln_integration::{Context, Kiln, Registry, wait_until};

/// A small linear congruential generator: the moments differ, the sequence is always the same.
struct Moments(u64);

impl Moments {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// A chain of steps; each leaves a mark in a cache mount that outlives the build.
fn chain(steps: usize) -> String {
    let mut dockerfile = "FROM busybox\n".to_owned();
    for step in 0..steps {
        dockerfile += &format!(
            "RUN --mount=type=cache,id=marks,target=/marks sleep 0.02; echo {step} > /step{step}; mktemp /marks/{step}.XXXXXX\n"
        );
    }
    dockerfile
}

/// How many RUN steps plain progress shows as run to their end.
fn ran(progress: &str) -> usize {
    let steps: Vec<&str> = progress
        .lines()
        .filter(|line| line.contains("] RUN "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    progress
        .lines()
        .filter_map(|line| line.split_once(" DONE "))
        .filter(|(number, _)| steps.contains(number))
        .count()
}

#[test]
fn twenty_kills_lose_no_finished_step_and_leave_nothing_mounted() {
    const STEPS: usize = 60;
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    let context = Context::new(&chain(STEPS));
    let mut moments = Moments(42);
    let mut finished = 0;
    for round in 0..20 {
        kiln.start();
        let child = kiln
            .command(&["build", "--progress", "plain", context.path().to_str().expect("UTF-8")])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start kiln");
        std::thread::sleep(Duration::from_millis(50 + moments.next(400)));
        kiln.kill();
        let output = child.wait_with_output().expect("the client ends when its daemon is gone");
        let text = String::from_utf8_lossy(&output.stderr);
        finished = finished.max(cached(&text) + ran(&text));
        // A client that lost its daemon before it saw anything starts another one.
        for pid in kiln.daemons() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        wait_until("every process of the killed daemon to be gone", Duration::from_secs(10), || {
            kiln.processes().is_empty()
        });
        assert_eq!(kiln.mounts(), Vec::<String>::new(), "round {round}");
    }
    kiln.start();
    let after = kiln.build(context.path(), &[]).ok();
    assert!(after.cached() >= finished, "{} cached of {finished} that were seen to finish", after.cached());
    let again = kiln.build(context.path(), &[]).ok();
    assert_eq!(again.cached(), STEPS);

    // A step ran once for each time that it was not cached: a finished step leaves exactly one mark,
    // and only the step that a kill interrupted may have left more.
    let count =
        Context::new("FROM busybox\nRUN --mount=type=cache,id=marks,target=/marks ls /marks | wc -l\n");
    let listed = kiln.build(count.path(), &[]).ok();
    let marks: usize = listed
        .stderr
        .lines()
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .find(|&number| number >= STEPS)
        .expect("the number of marks");
    assert!(marks <= STEPS + 20, "{marks} executions of {STEPS} steps in 20 interrupted builds");
    kiln.stop();
}
