//! Sandboxes that somebody takes part in: signals, terminals, further processes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use kiln_worker::sandbox::{
    Attendance, ExitOutcome, MemoryFile, ProcessRequest, SandboxError, SandboxRequest, Stdio, spec,
};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::PATIENCE;
use crate::world::{Step, World, eventually, mark, null, process_with, runtime};

/// The attendant's side.
struct Attendant {
    started: oneshot::Receiver<Option<OwnedFd>>,
    signals: mpsc::UnboundedSender<i32>,
}

fn attendance() -> (Attendance, Attendant) {
    let (started, start) = oneshot::channel();
    let (signals, signalled) = mpsc::unbounded_channel();
    (Attendance { started, signals: signalled }, Attendant { started: start, signals })
}

fn nowhere() -> Stdio {
    Stdio::Files { stdin: null(), stdout: null(), stderr: null() }
}

/// Streams of which the output can be read.
fn printing() -> (Stdio, JoinHandle<String>) {
    let (out, end) = std::io::pipe().unwrap();
    (Stdio::Files { stdin: null(), stdout: end.into(), stderr: null() }, read_all(OwnedFd::from(out)))
}

fn read_all(from: OwnedFd) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let (mut all, mut piece) = (Vec::new(), [0; 1024]);
        // A terminal that nobody has open any more is an error, not an end.
        while let Ok(count @ 1..) = File::read(&mut File::from(from.try_clone().unwrap()), &mut piece) {
            all.extend(&piece[..count]);
        }
        String::from_utf8_lossy(&all).into_owned()
    })
}

type Running = tokio::task::JoinHandle<Result<ExitOutcome, SandboxError>>;

/// Starts a sandbox and waits until it is set up; also its id.
async fn start(world: &World, step: Step, stdio: Stdio) -> (Running, Attendant, Option<OwnedFd>, String) {
    let (attendance, mut attendant) = attendance();
    let request = SandboxRequest { stdio, attendance: Some(attendance), ..step.request(null(), null()) };
    let (id, executor) = (request.id.clone(), world.executor.clone());
    let run = tokio::spawn(async move { executor.run(request, CancellationToken::new()).await });
    let started = tokio::time::timeout(PATIENCE, &mut attendant.started).await.unwrap();
    match started {
        Ok(terminal) => (run, attendant, terminal, id),
        Err(_) => panic!("not started: {:?}", run.await),
    }
}

/// Starts a further process and waits until it runs, or has failed.
async fn join(
    world: &World,
    sandbox: &str,
    step: Step,
    stdio: Stdio,
    cancel: CancellationToken,
) -> (Running, Attendant, Option<OwnedFd>) {
    let (attendance, mut attendant) = attendance();
    let request = ProcessRequest {
        id: step.params.id.clone(),
        sandbox: sandbox.to_owned(),
        spec: spec::build(&step.params).unwrap(),
        stdio,
        attendance: Some(attendance),
    };
    let executor = world.executor.clone();
    let run = tokio::spawn(async move { executor.exec(request, cancel).await });
    let started = tokio::time::timeout(PATIENCE, &mut attendant.started).await.unwrap();
    (run, attendant, started.ok().flatten())
}

/// Runs a further process to its end: its exit status and output.
async fn joined(world: &World, sandbox: &str, step: Step) -> (u32, String) {
    let (stdio, output) = printing();
    let (run, _attendant, _) = join(world, sandbox, step, stdio, CancellationToken::new()).await;
    let outcome = tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap();
    let output = tokio::task::spawn_blocking(|| output.join().unwrap()).await.unwrap();
    (outcome.unwrap_or_else(|err| panic!("{err} ({output})")).code, output)
}

async fn ends(run: Running) -> u32 {
    tokio::time::timeout(PATIENCE, run).await.unwrap().unwrap().unwrap().code
}

pub(crate) fn signals(world: &World) {
    runtime().block_on(async {
        let text = "trap 'exit 99' HUP; touch /trapped; while :; do sleep 0.02; done";
        let step = world.sh(text);
        let trapped = step.upper().join("trapped");
        let (run, attendant, ..) = start(world, step, nowhere()).await;
        eventually("the trap is set", || trapped.exists());
        attendant.signals.send(libc::SIGHUP).unwrap();
        assert_eq!(ends(run).await, 99);
        let mark = mark();
        let (run, attendant, ..) = start(world, world.program(&["sleep", &mark]), nowhere()).await;
        // The init of a sandbox has no default actions; only this one always works.
        attendant.signals.send(libc::SIGTERM).unwrap();
        attendant.signals.send(libc::SIGKILL).unwrap();
        assert_eq!(ends(run).await, 137);
        assert!(!process_with(&mark));
    });
}

pub(crate) fn further_processes(world: &World) {
    runtime().block_on(async {
        let mark = mark();
        let mut step = world.sh(&format!("echo first > /made; exec sleep {mark}"));
        step.params.hostname = "box".into();
        let (dest, content) = ("/run/token".into(), b"hush\n".as_slice().into());
        step.files.push(MemoryFile { dest, content, uid: 0, gid: 0, mode: 0o400 });
        let upper = step.upper();
        let (run, attendant, _, id) = start(world, step, nowhere()).await;
        eventually("the first process has begun", || process_with(&mark));

        let text = "cat /made /run/token; hostname; tr '\\0' ' ' < /proc/1/cmdline; echo; echo second > /more; exit 7";
        let (code, output) = joined(world, &id, world.sh(text)).await;
        assert_eq!((code, output), (7, format!("first\nhush\nbox\nsleep {mark} \n")));
        assert_eq!(std::fs::read_to_string(upper.join("more")).unwrap(), "second\n");
        let (_, output) = joined(world, &id, world.sh("cat /proc/self/status; echo; ls /proc/self/fd")).await;
        for line in ["CapEff:\t00000000a80425fb", "CapBnd:\t00000000a80425fb", "Seccomp:\t2"] {
            assert!(output.contains(line), "{output}");
        }
        assert!(output.ends_with("\n\n0\n1\n2\n3\n"), "its streams and the directory: {output}");
        let mut step = world.sh("id -u; id -g; pwd; echo $A");
        step.params.uid = 1000;
        step.params.gid = 1001;
        step.params.cwd = "/tmp".into();
        step.params.env.push("A=b".into());
        assert_eq!(joined(world, &id, step).await, (0, "1000\n1001\n/tmp\nb\n".into()));

        // What it reads arrives, and has an end.
        let (input, mut write) = std::io::pipe().unwrap();
        let (out, end) = std::io::pipe().unwrap();
        let output = read_all(out.into());
        let stdio = Stdio::Files { stdin: input.into(), stdout: end.into(), stderr: null() };
        let (cat, ..) = join(world, &id, world.program(&["cat"]), stdio, CancellationToken::new()).await;
        write.write_all(b"through").unwrap();
        drop(write);
        assert_eq!(ends(cat).await, 0);
        assert_eq!(output.join().unwrap(), "through");

        // One can be ended alone.
        let (own, others) = (crate::world::mark(), CancellationToken::new());
        let (sleep, ..) = join(world, &id, world.program(&["sleep", &own]), nowhere(), others.clone()).await;
        eventually("the further process runs", || process_with(&own));
        others.cancel();
        let result = tokio::time::timeout(PATIENCE, sleep).await.unwrap().unwrap();
        assert!(matches!(result, Err(SandboxError::Cancelled)), "{result:?}");
        eventually("the further process is gone", || !process_with(&own));
        let (sleep, other, _) =
            join(world, &id, world.program(&["sleep", &own]), nowhere(), CancellationToken::new()).await;
        eventually("the further process runs", || process_with(&own));
        other.signals.send(libc::SIGKILL).unwrap();
        assert_eq!(ends(sleep).await, 137);
        assert!(!process_with(&own) && process_with(&mark));
        let missing = world.program(&["no-such-program"]);
        let (run_missing, ..) = join(world, &id, missing, nowhere(), CancellationToken::new()).await;
        let error = tokio::time::timeout(PATIENCE, run_missing).await.unwrap().unwrap().unwrap_err();
        assert!(error.to_string().contains("no-such-program"), "{error}");

        // The first takes all others along.
        let (sleep, ..) =
            join(world, &id, world.program(&["sleep", &own]), nowhere(), CancellationToken::new()).await;
        eventually("the further process runs", || process_with(&own));
        attendant.signals.send(libc::SIGKILL).unwrap();
        assert_eq!(ends(run).await, 137);
        assert_eq!(ends(sleep).await, 137);
        let (late, ..) =
            join(world, &id, world.program(&["true"]), nowhere(), CancellationToken::new()).await;
        let error = late.await.unwrap().unwrap_err();
        assert!(matches!(&error, SandboxError::Gone(gone) if *gone == id), "{error}");
    });
}

pub(crate) fn terminals(world: &World) {
    runtime().block_on(async {
        let text = "read line; until stty size | grep -q '33 77'; do sleep 0.02; done; \
            test -t 0 && test -t 1 && test -t 2 && echo got $line > /dev/tty; echo err >&2; exit 42";
        let converse = async |terminal: OwnedFd, run: Running| {
            let size = Winsize { ws_row: 33, ws_col: 77, ws_xpixel: 0, ws_ypixel: 0 };
            tcsetwinsize(&terminal, size).unwrap();
            File::from(terminal.try_clone().unwrap()).write_all(b"hello\n").unwrap();
            let output = read_all(terminal);
            assert_eq!(ends(run).await, 42);
            let output = tokio::task::spawn_blocking(|| output.join().unwrap()).await.unwrap();
            assert!(output.contains("got hello\r\n") && output.contains("err\r\n"), "{output:?}");
        };
        let mut step = world.sh(text);
        step.params.terminal = true;
        let (run, _attendant, terminal, _) = start(world, step, Stdio::Terminal).await;
        converse(terminal.unwrap(), run).await;

        let mark = mark();
        let (run, attendant, _, id) = start(world, world.program(&["sleep", &mark]), nowhere()).await;
        let mut step = world.sh(text);
        step.params.terminal = true;
        step.params.uid = 1000;
        let (further, _other, terminal) =
            join(world, &id, step, Stdio::Terminal, CancellationToken::new()).await;
        converse(terminal.unwrap(), further).await;
        attendant.signals.send(libc::SIGKILL).unwrap();
        assert_eq!(ends(run).await, 137);
    });
}
