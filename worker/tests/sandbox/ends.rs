//! How sandboxes end: by themselves, by an error, by cancellation, by the death of what runs them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use kiln_worker::sandbox::{ExecutorChoice, ExitOutcome, LayeredMount, RootSource, SandboxError, open};
use tokio_util::sync::CancellationToken;

use crate::PATIENCE;
use crate::world::{World, cgroups_named, eventually, mark, null, process_with, runtime};

pub(crate) fn programs_that_do_not_start(world: &World) {
    let missing = world.program(&["no-such-program"]).run(world);
    let text = missing.error().to_string();
    assert!(
        text.contains("no-such-program")
            && text.contains("executable file")
            && text.contains("not found in $PATH"),
        "{text}"
    );
    let missing = world.program(&["/no/such"]).run(world);
    let text = missing.error().to_string();
    assert!(text.contains("/no/such") && text.to_lowercase().contains("no such file or directory"), "{text}");
    let refused = world.program(&["/etc/passwd"]).run(world);
    let text = refused.error().to_string();
    assert!(text.to_lowercase().contains("permission denied"), "{text}");
}

pub(crate) fn bad_sources(world: &World) {
    let mut step = world.program(&["true"]);
    step.mounts.push(LayeredMount {
        dest: "/m".into(),
        source: RootSource::Dir(world.root.clone()),
        selector: Some("not/there".into()),
        readonly: true,
    });
    let text = step.run(world).error().to_string();
    assert!(text.contains("not/there") && text.contains("No such file"), "{text}");
    let mut step = world.program(&["true"]);
    step.rootfs = RootSource::Overlay { lowers: vec![], upper: None, work: None };
    assert!(matches!(step.run(world).error(), SandboxError::Invalid(_)));
    let mut step = world.program(&["true"]);
    step.rootfs = RootSource::Dir(world.base.join("nowhere"));
    assert!(matches!(step.run(world).error(), SandboxError::Setup(_)));
    let step = world.program(&["true"]);
    let mut request = step.request(null(), null());
    request.id = "../up".into();
    let result = runtime().block_on(world.executor.run(request, CancellationToken::new()));
    assert!(matches!(result, Err(SandboxError::Invalid(_))));
}

pub(crate) fn background_processes_end(world: &World) {
    let mark = mark();
    let started = Instant::now();
    let ran = world.sh(&format!("sleep {mark} & (setsid sleep {mark} &) ; echo started")).run(world);
    assert_eq!(ran.out(), "started");
    assert!(started.elapsed() < PATIENCE && !process_with(&mark));
}

/// Starts a step that says when it runs, and gives the rest to `then`.
pub(crate) fn while_running(
    world: &World,
    mark: &str,
    then: impl AsyncFnOnce(SandboxRun<'_>, CancellationToken),
) {
    let (out, out_end) = std::io::pipe().unwrap();
    let step = world.sh(&format!("(setsid sleep {mark} &) ; sleep {mark} & echo ready; wait"));
    let request = step.request(out_end.into(), null());
    let token = CancellationToken::new();
    let run = world.executor.run(request, token.clone());
    runtime().block_on(async {
        let mut run = run;
        let ready = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(out).read_line(&mut line).unwrap();
            line
        });
        tokio::select! {
            result = &mut run => panic!("ended early: {result:?}"),
            line = ready => assert_eq!(line.unwrap(), "ready\n"),
        }
        eventually("the sandbox runs", || process_with(mark));
        then(run, token).await;
    });
}

pub(crate) type SandboxRun<'a> = futures::future::BoxFuture<'a, Result<ExitOutcome, SandboxError>>;

pub(crate) fn cancel(world: &World) {
    let mark = mark();
    while_running(world, &mark, async |run, token| {
        token.cancel();
        let result = tokio::time::timeout(PATIENCE, run).await.unwrap();
        assert!(matches!(result, Err(SandboxError::Cancelled)), "{result:?}");
        assert!(!process_with(&mark));
    });
    let token = CancellationToken::new();
    token.cancel();
    let request = world.sh("echo never").request(null(), null());
    let result = runtime().block_on(world.executor.run(request, token));
    assert!(matches!(result, Err(SandboxError::Cancelled)));
}

pub(crate) fn dropped(world: &World) {
    let mark = mark();
    while_running(world, &mark, async |run, _| drop(run));
    eventually("the processes of a dropped run are gone", || !process_with(&mark));
}

pub(crate) fn many_at_once(world: &World) {
    let requests: Vec<_> = (0..24)
        .map(|n| world.sh(&format!("echo {n} > /n; exit {n}")))
        .map(|step| (step.upper(), step.request(null(), null())))
        .collect();
    runtime().block_on(async {
        let runs = requests.into_iter().map(|(upper, request)| async move {
            (upper, world.executor.run(request, CancellationToken::new()).await)
        });
        for (n, (upper, result)) in futures::future::join_all(runs).await.into_iter().enumerate() {
            assert_eq!(result.unwrap().code, n as u32);
            assert_eq!(fs::read_to_string(upper.join("n")).unwrap(), format!("{n}\n"));
        }
    });
}
pub(crate) fn large_environment(world: &World) {
    let mut step = world.sh("echo ${#BIG} ${#LAST}");
    step.params.env.push(format!("BIG={}", "x".repeat(100_000)));
    step.params.env.extend((0..20).map(|n| format!("V{n}={}", "y".repeat(50_000))));
    step.params.env.push("LAST=z".into());
    assert_eq!(step.run(world).out(), "100000 1");
}

/// Another process of this program, ended with the test.
pub(crate) struct Daemon(pub(crate) std::process::Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts this program as a daemon with one running sandbox; returns it once the sandbox runs.
pub(crate) fn start_daemon(world: &World, mode: &str, mark: &str) -> Daemon {
    let choice = match &world.choice {
        ExecutorChoice::Lean => PathBuf::new(),
        ExecutorChoice::Runtime(path) => path.clone(),
    };
    let child = Command::new("/proc/self/exe")
        .env("KILN_TEST_DAEMON", mode)
        .env("KILN_TEST_BASE", &world.base)
        .env("KILN_TEST_RUNTIME", choice)
        .env("KILN_TEST_MARK", mark)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut daemon = Daemon(child);
    let mut line = String::new();
    BufReader::new(daemon.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    eventually("the sandbox runs", || process_with(mark));
    daemon
}

pub(crate) fn daemon(mode: &str) -> ExitCode {
    let base = PathBuf::from(std::env::var_os("KILN_TEST_BASE").unwrap());
    let mark = std::env::var("KILN_TEST_MARK").unwrap();
    let runtime = PathBuf::from(std::env::var_os("KILN_TEST_RUNTIME").unwrap());
    let choice =
        if runtime.as_os_str().is_empty() { ExecutorChoice::Lean } else { ExecutorChoice::Runtime(runtime) };
    let executor = open(&choice, &base.join("state-daemon")).unwrap();
    let world = World { executor, root: base.join("root"), base, choice, groups: String::new() };
    let ready = world
        .sh(&format!("echo ready; sleep {mark}"))
        .request(rustix::stdio::stdout().try_clone_to_owned().unwrap(), null());
    let result = self::runtime().block_on(world.executor.run(ready, CancellationToken::new()));
    if mode == "helper" {
        assert!(matches!(result, Err(SandboxError::Helper(_))), "{result:?}");
        // A new helper takes its place.
        assert_eq!(world.sh("exit 5").run(&world).code(), 5);
        return ExitCode::from(42);
    }
    ExitCode::FAILURE
}

pub(crate) fn death_of_the_daemon(world: &World) {
    let mark = mark();
    let daemon = start_daemon(world, "daemon", &mark);
    let pid = daemon.0.id();
    drop(daemon);
    eventually("the sandbox of a killed daemon is gone", || !process_with(&mark));
    let groups = format!("kiln-{pid}-");
    eventually("the cgroups of a killed daemon are gone", || cgroups_named(&groups).is_empty());
}

pub(crate) fn death_of_the_helper(world: &World) {
    let mark = mark();
    let mut daemon = start_daemon(world, "helper", &mark);
    let ours = format!("KILN_TEST_MARK={mark}");
    let helper = fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let line = fs::read(entry.path().join("status")).unwrap_or_default();
        // The helper's own pid is the second to last: it is the first of a nested namespace.
        let nested = String::from_utf8_lossy(&line)
            .lines()
            .any(|l| l.starts_with("NSpid:") && l.split('\t').count() == 3);
        name.trim() == "kiln-zygote" && nested && environment.split(|b| *b == 0).any(|v| v == ours.as_bytes())
    });
    let pid: i32 = helper.unwrap().file_name().to_str().unwrap().parse().unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(daemon.0.wait().unwrap().code(), Some(42));
    eventually("the sandbox of a killed helper is gone", || !process_with(&mark));
}
