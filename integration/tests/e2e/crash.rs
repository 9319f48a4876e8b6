//! `kill -9` of the daemon at random moments loses no finished step and leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln_integration::{Context, Kiln, Moments, Registry, tools, wait_until};

const KILLS: usize = 50;
const STEPS: usize = 50;
/// Chains that are built at the same time; one that got through is followed by a new one.
const BUILDS: usize = 3;

/// A chain of steps of its own; each execution leaves a mark in a cache mount that outlives the build.
fn chain(number: usize) -> Context {
    let mut dockerfile = "FROM busybox\n".to_owned();
    for step in 0..STEPS {
        let name = format!("{number}.{step}");
        dockerfile += &format!(
            "RUN --mount=type=cache,id=marks,target=/marks sleep 0.02; head -c 20000 /dev/zero > /{name}; mktemp /marks/{name}.XXXXXX\n"
        );
    }
    Context::new(&dockerfile)
}

/// The RUN steps that plain progress shows, by name: whether they came to their end, and whether by running.
#[derive(Default)]
struct Seen {
    ran: BTreeSet<String>,
    cached: BTreeSet<String>,
}

impl Seen {
    fn in_progress(text: &str) -> Self {
        let mut names: BTreeMap<&str, &str> = BTreeMap::new();
        let mut seen = Self::default();
        for line in text.lines() {
            let Some((number, rest)) = line.split_once(' ') else { continue };
            if let Some((_, name)) = rest.split_once("] RUN ") {
                names.insert(number, name);
            } else if let Some(name) = names.get(number) {
                if rest == "CACHED" {
                    seen.cached.insert((*name).to_owned());
                } else if rest.starts_with("DONE ") {
                    seen.ran.insert((*name).to_owned());
                }
            }
        }
        seen
    }
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries.map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8")).collect()
}

#[test]
fn fifty_kills_lose_no_finished_step_and_leave_nothing_behind() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    let mut chains: Vec<Context> = (0..BUILDS).map(chain).collect();
    let mut building: Vec<usize> = (0..BUILDS).collect();
    let mut moments = Moments::new(42);
    let mut finished = BTreeSet::new();
    for round in 0..KILLS {
        kiln.start();
        let clients: Vec<_> = building
            .iter()
            .map(|&number| {
                let path = chains[number].path().to_str().expect("UTF-8");
                kiln.command(&["build", "--progress", "plain", path])
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped())
                    .spawn()
                    .expect("start kiln")
            })
            .collect();
        std::thread::sleep(moments.up_to(Duration::from_millis(400)));
        kiln.kill();
        for (client, number) in clients.into_iter().zip(&mut building) {
            let output = client.wait_with_output().expect("the client ends when its daemon is gone");
            let seen = Seen::in_progress(&String::from_utf8_lossy(&output.stderr));
            let again: Vec<_> = seen.ran.intersection(&finished).collect();
            assert!(again.is_empty(), "round {round}: finished before and ran again: {again:?}");
            finished.extend(seen.ran);
            if output.status.success() {
                *number = chains.len();
                chains.push(chain(*number));
            }
        }
        // A client that lost its daemon before it saw anything starts another one.
        for pid in kiln.daemons() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        wait_until("every process of the killed daemon to be gone", Duration::from_secs(10), || {
            kiln.processes().is_empty()
        });
        assert_eq!(kiln.mounts(), Vec::<String>::new(), "round {round}");
    }
    assert!(finished.len() > KILLS, "only {} steps finished: the kills came too soon", finished.len());

    kiln.start();
    for context in &chains {
        let seen = Seen::in_progress(&kiln.build(context.path(), &[]).ok().stderr);
        assert_eq!(seen.ran.intersection(&finished).count(), 0, "finished before and ran again");
        assert_eq!(seen.ran.len() + seen.cached.len(), STEPS);
        let again = Seen::in_progress(&kiln.build(context.path(), &[]).ok().stderr);
        assert_eq!((again.ran.len(), again.cached.len()), (0, STEPS));
    }
    // A finished step leaves exactly one mark; only those that a kill interrupted may have left more.
    let count = Context::new(
        "FROM busybox\nRUN --mount=type=cache,id=marks,target=/marks echo marks $(ls /marks | wc -l)\n",
    );
    let listed = kiln.build(count.path(), &[]).ok();
    let mut found =
        listed.stderr.lines().filter_map(|line| line.split_once(" marks ")?.1.parse::<usize>().ok());
    let marks = found.next().expect("the number of marks");
    let steps = chains.len() * STEPS;
    assert!((steps..=steps + BUILDS * KILLS).contains(&marks), "{marks} executions of {steps} steps");

    everything_is_accounted_for(&kiln);
    kiln.stop();
    assert_eq!(kiln.mounts(), Vec::<String>::new());
    assert_eq!(kiln.processes(), []);
}

/// The ledger has what is on the disk, no more and no less.
fn everything_is_accounted_for(kiln: &Kiln) {
    let root = kiln.root();
    wait_until("the trash to be emptied", Duration::from_secs(20), || names(&root.join("trash")).is_empty());
    let records = kiln.usage();
    let id = |record: &serde_json::Value| record["id"].as_str().expect("id").to_owned();
    let ids = |wanted: &dyn Fn(&serde_json::Value) -> bool| -> BTreeSet<String> {
        records.iter().filter(|record| wanted(record)).map(id).collect()
    };
    let own = |record: &serde_json::Value| ["database", "staging"].contains(&id(record).as_str());
    let blob = |record: &serde_json::Value| id(record).starts_with("sha256:");
    let mutable = |record: &serde_json::Value| record["mutable"] == true;
    let layers = ids(&|record| !own(record) && !blob(record) && !mutable(record));
    assert_eq!(names(&root.join("snapshots")), layers, "directories and records of snapshots");
    assert_eq!(
        names(&root.join("mutable")),
        ids(&mutable),
        "directories and records of cache mounts and contexts"
    );
    for digest in ids(&blob) {
        assert!(root.join("content").join(digest.replacen(':', "/", 1)).exists(), "{digest}");
    }

    let total: i64 = records.iter().map(|record| record["size"].as_i64().expect("size")).sum();
    let disk = tools::disk_usage(root);
    assert!((total - disk).abs() * 50 <= disk, "kiln du: {total}, du: {disk}");
}
