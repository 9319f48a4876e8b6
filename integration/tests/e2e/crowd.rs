//! Many builds at once, some of which are cancelled.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kiln_integration::{Built, Context, Kiln, Moments, Registry, tools, wait_until};

const BUILDS: usize = 40;
const VARIANTS: usize = 8;
const STEPS: usize = 4;

/// Each execution of a step leaves one mark when it begins and one when it ends. All variants begin alike.
fn dockerfile(variant: usize) -> String {
    let mut text = "FROM busybox\nARG SOURCE_DATE_EPOCH\n".to_owned();
    let step = |name: &str| {
        format!(
            "RUN --mount=type=cache,id=marks,target=/marks mktemp /marks/{name}.began.XXXXXX && sleep 0.1 && \
             echo {name} > /{name} && mktemp /marks/{name}.ended.XXXXXX\n"
        )
    };
    text += &step("common");
    for number in 0..STEPS {
        text += &step(&format!("v{variant}s{number}"));
    }
    text
}

fn image(registry: &Registry, name: &str, number: usize) -> String {
    format!("{}/test/{name}:{number}", registry.address)
}

/// Builds and pushes with times that don't depend on when it was.
fn start(kiln: &Kiln, context: &Context, image: &str) -> Child {
    let output = format!("type=image,name={image},push=true,rewrite-timestamp=true");
    kiln.command(&["build", "--progress", "plain", "--build-arg", "SOURCE_DATE_EPOCH=1700000000", "-o"])
        .arg(output)
        .arg(context.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start kiln")
}

fn finish(child: Child) -> Built {
    Built::from(child.wait_with_output().expect("wait for kiln"))
}

#[test]
fn forty_builds_a_quarter_of_them_cancelled_give_what_each_gives_alone() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let contexts: Vec<Context> = (0..VARIANTS).map(|variant| Context::new(&dockerfile(variant))).collect();
    let mut moments = Moments::new(7);
    let began = Instant::now();
    let mut running: Vec<(usize, Option<Duration>, Child)> = (0..BUILDS)
        .map(|number| {
            // Some variants are left alone, so that what they ran can be counted strictly.
            let variant = number % VARIANTS;
            let cancelled = variant >= VARIANTS / 2 && moments.below(2) == 0;
            let moment = cancelled.then(|| moments.up_to(Duration::from_millis(2500)));
            let child = start(&kiln, &contexts[variant], &image(&registry, "crowd", number));
            (number, moment, child)
        })
        .collect();
    let cancelled = running.iter().filter(|(_, moment, _)| moment.is_some()).count();
    assert!((8..=12).contains(&cancelled), "{cancelled} of {BUILDS}");
    let mut ended: BTreeMap<usize, bool> = BTreeMap::new();
    // Their progress must be read, or they would wait for that.
    let readers: Vec<_> = running
        .iter_mut()
        .map(|(number, _, child)| {
            let (number, mut stderr) = (*number, child.stderr.take().expect("piped"));
            std::thread::spawn(move || {
                let mut text = String::new();
                let _ = std::io::Read::read_to_string(&mut stderr, &mut text);
                (number, text)
            })
        })
        .collect();
    wait_until("all builds to end", Duration::from_secs(120), || {
        for (number, moment, child) in &mut running {
            if moment.is_some_and(|moment| began.elapsed() >= moment) {
                let signal = if *number % 2 == 0 { "-INT" } else { "-TERM" };
                let _ = Command::new("kill").args([signal, &child.id().to_string()]).status();
                *moment = None;
                ended.entry(*number).or_insert(false);
            }
        }
        running.retain_mut(|(number, moment, child)| match child.try_wait().expect("wait for kiln") {
            None => true,
            Some(status) => {
                *moment = None;
                // One that was done before its signal came succeeded all the same.
                ended.insert(*number, status.success());
                false
            }
        });
        running.is_empty()
    });
    let texts: BTreeMap<usize, String> =
        readers.into_iter().map(|reader| reader.join().expect("reader")).collect();
    let failed: Vec<_> = ended.iter().filter(|(_, good)| !**good).map(|(number, _)| *number).collect();
    assert!(failed.len() <= cancelled, "{failed:?}: {}", texts[&failed[0]]);
    for number in (0..BUILDS).filter(|number| number % VARIANTS < VARIANTS / 2) {
        assert!(ended[&number], "nobody cancelled build {number}:\n{}", texts[&number]);
    }

    let list = Context::new("FROM busybox\nRUN --mount=type=cache,id=marks,target=/marks ls /marks\n");
    let listed = kiln.build(list.path(), &[]).ok().stderr;
    let marks = |step: &str, what: &str| listed.matches(&format!(" {step}.{what}.")).count();
    for variant in 0..VARIANTS {
        for step in (0..STEPS).map(|number| format!("v{variant}s{number}")) {
            let counts = (marks(&step, "began"), marks(&step, "ended"));
            if variant < VARIANTS / 2 {
                assert_eq!(counts, (1, 1), "executions of {step}\n{listed}");
            } else if (0..BUILDS).any(|number| number % VARIANTS == variant && ended[&number]) {
                assert!(
                    counts.1 >= 1 && counts.0 <= 1 + cancelled,
                    "executions of {step}: {counts:?}\n{listed}"
                );
            }
        }
    }
    // Its first asker may have left before anybody else came.
    assert!((1..=1 + cancelled).contains(&marks("common", "ended")), "{listed}");

    let mut alone = Kiln::new(&registry);
    alone.start();
    for (variant, context) in contexts.iter().enumerate() {
        let single = image(&registry, "alone", variant);
        finish(start(&alone, context, &single)).ok();
        let mut digests = BTreeSet::from([tools::digest(&single)]);
        for number in (variant..BUILDS).step_by(VARIANTS).filter(|number| ended[number]) {
            digests.insert(tools::digest(&image(&registry, "crowd", number)));
        }
        assert_eq!(digests.len(), 1, "images of variant {variant}: {digests:?}");
    }
    assert_eq!(kiln.mounts(), Vec::<String>::new());
    kiln.stop();
    alone.stop();
    assert_eq!(kiln.processes(), []);
}
