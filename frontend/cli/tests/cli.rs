//! The binary against a scripted daemon: what it sends, shows and writes, and how it ends.

mod common;

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use common::{Daemon, assert_file, ended, kiln, log, vertex, vertices};
use kiln_proto::control::{SolveResponse, Vertex};
use kiln_proto::{llb, pb, rpc};
use kiln_session::FileSyncRequest;
use prost::Message;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tonic::{Code, Status};

fn response(pairs: &[(&str, &str)]) -> SolveResponse {
    SolveResponse {
        exporter_response: pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
    }
}

#[test]
fn a_build_shows_its_steps_and_writes_what_was_asked_for() {
    let daemon = Daemon::start(|request, _, progress| async move {
        assert_eq!(request.frontend, "dockerfile.v0");
        assert_eq!(request.frontend_attrs["build-arg:A"], "1");
        progress.send(vertices(vec![vertex("one", false)]));
        progress.send(log("one", "hello\n"));
        progress.send(vertices(vec![vertex("one", true), Vertex { cached: true, ..vertex("two", true) }]));
        Ok(response(&[("containerimage.digest", "sha256:1"), ("containerimage.config.digest", "sha256:2")]))
    });
    let (id, metadata) = (daemon.path("iid"), daemon.path("metadata.json"));
    let (code, stdout, stderr) = daemon.run(&[
        "build",
        "--progress",
        "plain",
        "--build-arg",
        "A=1",
        "--iidfile",
        id.to_str().unwrap(),
        "--metadata-file",
        metadata.to_str().unwrap(),
        &daemon.context(),
    ]);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout, "");
    assert_eq!(stderr, "#1 [one] step\n#1 0.050 hello\n#1 DONE 0.1s\n\n#2 [two] step\n#2 CACHED\n");
    assert_file(&id, "sha256:2");
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(metadata).unwrap()).unwrap();
    assert_eq!(
        written,
        json!({"containerimage.digest": "sha256:1", "containerimage.config.digest": "sha256:2"})
    );
}

#[test]
fn a_quiet_build_prints_the_id_only() {
    let daemon = Daemon::start(|_, _, progress| async move {
        progress.send(vertices(vec![vertex("one", true)]));
        Ok(response(&[("containerimage.digest", "sha256:1")]))
    });
    let out = daemon.run(&["build", "-q", &daemon.context()]);
    assert_eq!(out, (0, "sha256:1\n".into(), String::new()));
}

#[test]
fn a_failed_build_shows_output_source_lines_and_the_error() {
    let daemon = Daemon::start(|_, _, progress| async move {
        progress.send(vertices(vec![vertex("one", false)]));
        progress.send(log("one", "last words\n"));
        progress.send(vertices(vec![Vertex { error: "exit code: 42".into(), ..vertex("one", true) }]));
        let source = json!({
            "info": {"filename": "Dockerfile", "data": STANDARD.encode("FROM busybox\nRUN exit 42\n")},
            "ranges": [{"start": {"line": 2}, "end": {"line": 2}}],
        });
        let detail = prost_types::Any {
            type_url: "github.com/moby/buildkit/errdefs.Source+json".into(),
            value: source.to_string().into_bytes(),
        };
        let full = rpc::Status { code: 2, message: "exit code: 42".into(), details: vec![detail] };
        Err(Status::with_details(Code::Unknown, "exit code: 42", full.encode_to_vec().into()))
    });
    let (code, _, stderr) = daemon.run(&["build", "--progress", "plain", &daemon.context()]);
    assert_eq!(code, 1);
    let expected = concat!(
        "#1 [one] step\n#1 0.050 last words\n#1 ERROR: exit code: 42\n",
        "------\n > [one] step:\n0.050 last words\n------\n",
        "Dockerfile:2\n--------------------\n   1 |     FROM busybox\n   2 | >>> RUN exit 42\n--------------------\n",
        "ERROR: failed to solve: exit code: 42\n",
    );
    assert_eq!(stderr, expected);
}

#[test]
fn an_interrupt_cancels_and_a_second_one_leaves_at_once() {
    let daemon = Daemon::start(|_, _, progress| async move {
        progress.send(vertices(vec![vertex("one", false)]));
        std::future::pending().await
    });
    let mut child = daemon
        .kiln(&["build", "--progress", "plain", &daemon.context()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("#1 [one] step"));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    daemon.wait_dropped();
    // The script's status stream never ends, so the first interrupt alone would linger.
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_lost_daemon_is_an_error() {
    let mut daemon = Daemon::start(|_, _, progress| async move {
        progress.send(vertices(vec![vertex("one", false)]));
        std::future::pending().await
    });
    let mut child = daemon
        .kiln(&["build", "--progress", "plain", &daemon.context()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert_eq!(lines.next().as_deref(), Some("#1 [one] step"));
    daemon.kill();
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(rest.last().unwrap().starts_with("ERROR: failed to solve: "), "{rest:?}");
}

#[test]
fn the_daemon_gets_files_and_secrets_and_sends_the_output() {
    let received = Arc::new(Mutex::new(None));
    let seen = received.clone();
    let daemon = Daemon::start(move |request, sessions, _| {
        let seen = seen.clone();
        async move {
            let session = sessions.get(&request.session).await.unwrap();
            let dir = tempfile::tempdir().unwrap();
            let wanted = FileSyncRequest { dir_name: "context".into(), ..Default::default() };
            session.file_sync(&wanted, dir.path(), Default::default()).await.unwrap();
            let file = std::fs::read_to_string(dir.path().join("Dockerfile")).unwrap();
            let secret = session.get_secret("token").await.unwrap();
            *seen.lock().unwrap() = Some((file, secret));
            let mut tar = session.file_send_tar(0, &Default::default()).unwrap();
            tar.write_all(b"archive").await.unwrap();
            tar.finish().await.unwrap();
            Ok(SolveResponse::default())
        }
    });
    let out = daemon.path("out.tar");
    let output = daemon
        .kiln(&[
            "build",
            "--progress",
            "plain",
            "--secret",
            "id=token,env=KILN_TEST_TOKEN",
            "-o",
            &format!("type=tar,dest={}", out.display()),
            &daemon.context(),
        ])
        .env("KILN_TEST_TOKEN", "s3cret")
        .output()
        .unwrap();
    let (code, _, stderr) = ended(output);
    assert_eq!(code, 0, "{stderr}");
    assert_file(&out, "archive");
    let expected = ("FROM scratch\n".to_owned(), Some(b"s3cret".to_vec()));
    assert_eq!(received.lock().unwrap().take(), Some(expected));
}

#[test]
fn an_archive_can_go_to_standard_output() {
    let daemon = Daemon::start(|request, sessions, _| async move {
        let session = sessions.get(&request.session).await.unwrap();
        let mut tar = session.file_send_tar(0, &Default::default()).unwrap();
        tar.write_all(b"archive").await.unwrap();
        tar.finish().await.unwrap();
        Ok(SolveResponse::default())
    });
    let (code, stdout, stderr) = daemon.run(&["build", "--progress", "plain", "-o", "-", &daemon.context()]);
    assert_eq!((code, stdout.as_str()), (0, "archive"), "{stderr}");
}

#[test]
fn a_failed_build_leaves_no_half_output() {
    let daemon = Daemon::start(|request, sessions, _| async move {
        let session = sessions.get(&request.session).await.unwrap();
        let mut tar = session.file_send_tar(0, &Default::default()).unwrap();
        tar.write_all(b"half").await.unwrap();
        drop(tar);
        Err(Status::unknown("disk is full"))
    });
    let out = daemon.path("dir");
    std::fs::create_dir(&out).unwrap();
    let dest = format!("type=oci,dest={}", out.join("image.tar").display());
    let (code, _, stderr) = daemon.run(&["build", "--progress", "plain", "-o", &dest, &daemon.context()]);
    assert_eq!(code, 1);
    assert!(stderr.ends_with("ERROR: failed to solve: disk is full\n"), "{stderr}");
    assert!(std::fs::read_dir(&out).unwrap().next().is_none());
}

#[test]
fn solve_sends_the_definition_as_it_is() {
    let received = Arc::new(Mutex::new(None));
    let seen = received.clone();
    let daemon = Daemon::start(move |request, _, _| {
        *seen.lock().unwrap() = request.definition;
        async { Ok(SolveResponse::default()) }
    });
    let op = pb::Op {
        op: Some(pb::op::Op::Source(pb::SourceOp { identifier: "local://x".into(), ..Default::default() })),
        ..Default::default()
    };
    let mut builder = llb::Builder::new();
    let digest = builder.add(&op, Default::default());
    let definition = builder.finish(&pb::Input { digest, index: 0 });
    let mut child = daemon
        .kiln(&["solve", "--progress", "plain"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&definition.encode_to_vec()).unwrap();
    let (code, _, stderr) = ended(child.wait_with_output().unwrap());
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(received.lock().unwrap().take(), Some(definition));

    let mut child = daemon.kiln(&["solve"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\xff\xff\xff").unwrap();
    let (code, _, stderr) = ended(child.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(stderr.contains("no LLB definition"), "{stderr}");
}

#[test]
fn du_and_prune_list_records() {
    let daemon = Daemon::start(|_, _, _| async { Err(Status::unimplemented("")) });
    let (code, stdout, _) = daemon.run(&["du"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("abc  true         2.00MB"), "{stdout}");
    let (code, stdout, _) =
        daemon.run(&["prune", "-v", "--all", "--keep-duration", "2s", "--filter", "type==regular"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("true 2000000000 [\"type==regular\"]"), "{stdout}");
    let (code, _, stderr) = daemon.run(&["debug", "workers"]);
    assert_eq!((code, stderr.as_str()), (1, "ERROR: not scripted\n"));
}

#[test]
fn a_daemon_that_does_not_come_up_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let context = dir.path().to_str().unwrap();
    let output = kiln(&["build", "--progress", "plain", context])
        .env("KILN_HOST", format!("unix://{}/run/kilnd.sock", dir.path().display()))
        .env("KILN_ROOT", dir.path().join("state"))
        .env("KILN_CONFIG", "/no/such/config.toml")
        .output()
        .unwrap();
    let (code, _, stderr) = ended(output);
    assert_eq!(code, 1);
    assert!(stderr.contains("the daemon ended at once"), "{stderr}");
}

#[test]
fn addresses_without_a_daemon_are_named() {
    for (address, expected) in [
        ("tcp://127.0.0.1:1", "no daemon answers at tcp://127.0.0.1:1"),
        ("ssh://host", "unsupported: address scheme ssh"),
        ("unix://relative", "invalid address"),
    ] {
        let (code, _, stderr) = ended(kiln(&["--addr", address, "du"]).output().unwrap());
        assert_eq!(code, 1);
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[test]
fn forgetting_builds_passes_over_what_runs_and_what_others_forgot() {
    let daemon = Daemon::start(|_, _, _| async { Ok(response(&[])) });
    let forgotten = (0, "ended\\u{1b}[2J\n".to_owned(), String::new());
    assert_eq!(daemon.run(&["history", "rm", "--all"]), forgotten);
    let (code, _, stderr) = daemon.run(&["history", "rm", "other", "taken"]);
    assert_eq!((code, stderr.as_str()), (1, "ERROR: no such build taken\n"));
    let address = format!("unix://{}", daemon.path("kilnd.sock").display());
    let (code, stdout, stderr) = daemon.run(&["buildctl", "--addr", &address, "prune-histories"]);
    assert_eq!((code, stderr.as_str()), (0, ""));
    let rows = "TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\n\
                COMPLETE\tended\\u{1b}[2J\t1970-01-01T00:00:01Z\t1970-01-01T00:00:04Z\t0\n";
    assert_eq!(stdout, rows);
    let (_, listed, _) = daemon.run(&["history", "ls"]);
    assert!(listed.contains("ended\\u{1b}[2J") && !listed.contains('\u{1b}'), "{listed:?}");
}
