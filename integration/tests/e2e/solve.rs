//! LLB goes in and out of the command line.

use std::io::Write;
use std::process::Stdio;

use kiln_integration::{Built, Context, Kiln, Registry, tools};
use kiln_proto::{llb, pb};
use prost::Message;
use tempfile::TempDir;

fn solve(kiln: &Kiln, definition: &[u8], args: &[&str]) -> Built {
    let mut all = vec!["solve", "--progress", "plain"];
    all.extend_from_slice(args);
    let mut child = kiln
        .command(&all)
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
