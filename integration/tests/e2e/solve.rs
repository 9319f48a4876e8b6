//! LLB goes in and out of the command line.

use std::io::Write;
use std::process::{Command, Stdio};

use kiln_integration::{Built, Context, Kiln, Registry, tools};
use kiln_proto::llb::Builder;
use kiln_proto::pb::file_action::Action;
use kiln_proto::{llb, pb};
use prost::Message;
use tempfile::TempDir;

fn solve(kiln: &Kiln, definition: &[u8], args: &[&str]) -> Built {
    let mut all = vec!["solve", "--progress", "plain"];
    all.extend_from_slice(args);
    fed(kiln.command(&all), definition)
}

fn fed(mut command: Command, definition: &[u8]) -> Built {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start kiln");
    child.stdin.take().expect("piped").write_all(definition).expect("write the definition");
    child.wait_with_output().expect("wait for kiln").into()
}

#[test]
fn what_dump_llb_prints_solve_builds() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context =
        Context::new("FROM busybox AS b\nRUN echo solved > /solved\nFROM scratch\nCOPY --from=b /solved /\n");
    let dumped = kiln
        .command(&["debug", "dump-llb", "--raw", context.path().to_str().expect("UTF-8")])
        .output()
        .expect("run kiln");
    assert!(dumped.status.success(), "{}", String::from_utf8_lossy(&dumped.stderr));
    let definition = pb::Definition::decode(dumped.stdout.as_slice()).expect("a Definition");
    for vertex in &llb::load(&definition).expect("a well-formed Definition").vertices {
        assert!(vertex.digest.starts_with("sha256:"));
    }
    let directory = TempDir::new().expect("temporary directory");
    let tar = directory.path().join("out.tar");
    solve(&kiln, &dumped.stdout, &["-o", &format!("type=tar,dest={}", tar.display())]).ok();
    assert_eq!(tools::tar_listing(&tar), ["-rw-r--r-- 0/0 solved"]);
}

#[test]
fn a_broken_definition_is_refused() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    assert_ne!(solve(&kiln, b"", &[]).code, 0);
    assert_ne!(solve(&kiln, b"\xff\xff\xff\xffnot a definition", &[]).code, 0);
    let one = pb::Definition { def: vec![vec![0x5a, 0]], ..Default::default() };
    solve(&kiln, &one.encode_to_vec(), &[]).fails(&["invalid LLB with 1 vertex"]);
}

/// So many files, each made by a vertex of its own, and one vertex that copies all of them.
fn join(files: usize) -> pb::Definition {
    let mut builder = Builder::new();
    let mut vertex = |inputs: &[pb::Input], actions: Vec<pb::FileAction>| {
        let op = pb::op::Op::File(pb::FileOp { actions });
        let op = pb::Op { inputs: inputs.to_vec(), op: Some(op), ..Default::default() };
        pb::Input { digest: builder.add(&op, pb::OpMetadata::default()), index: 0 }
    };
    let made: Vec<_> = (0..files)
        .map(|n| {
            let file = pb::FileActionMkFile {
                path: format!("/{n}"),
                mode: 0o644,
                timestamp: -1,
                ..Default::default()
            };
            let action = Some(Action::Mkfile(file.into()));
            vertex(&[], vec![pb::FileAction { input: -1, secondary_input: -1, output: 0, action }])
        })
        .collect();
    let copies = (0..files).map(|n| {
        let copy = pb::FileActionCopy {
            src: format!("/{n}"),
            dest: "/".into(),
            mode: -1,
            timestamp: -1,
            ..Default::default()
        };
        let number = |n: usize| i64::try_from(n).expect("small");
        pb::FileAction {
            input: if n == 0 { -1 } else { number(files + n - 1) },
            secondary_input: number(n),
            output: if n + 1 == files { 0 } else { -1 },
            action: Some(Action::Copy(copy.into())),
        }
    });
    let all = vertex(&made, copies.collect());
    builder.finish(&all)
}

#[test]
fn a_vertex_may_have_more_inputs_than_files_may_be_open() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let directory = TempDir::new().expect("temporary directory");
    let tar = directory.path().join("out.tar");
    let output = format!("type=tar,dest={}", tar.display());
    let client = kiln.command(&["solve", "--progress", "plain", "-o", &output]);
    let mut limited = Command::new("prlimit");
    limited.arg("--nofile=300:300").arg(client.get_program()).args(client.get_args());
    limited.envs(client.get_envs().filter_map(|(name, value)| Some((name, value?))));
    fed(limited, &join(400).encode_to_vec()).ok();
    assert_eq!(tools::tar_listing(&tar).len(), 400);
}
