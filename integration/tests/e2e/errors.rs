//! What goes wrong is said clearly, exits with 1, and leaves the cache whole.

use std::process::Command;
use std::sync::Arc;

use kiln_integration::tools::{self, run};
use kiln_integration::{Context, FakeRegistry, Kiln, Registry, layout};
use serde_json::Value;
use tempfile::TempDir;

/// After a failure, an ordinary build works and its steps are cached the second time.
fn still_works(kiln: &Kiln) {
    let context = Context::new("FROM busybox\nRUN echo fine > /fine\n");
    kiln.build(context.path(), &[]).ok();
    assert_eq!(kiln.build(context.path(), &[]).ok().cached(), 1);
    assert_eq!(kiln.mounts(), Vec::<String>::new());
}

#[test]
fn a_bad_dockerfile_names_file_line_column_and_the_nearest_word() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUNN echo hello\n");
    kiln.build(context.path(), &[]).fails(&["Dockerfile:2:1", "RUNN", "did you mean RUN?"]);
    context.file("Dockerfile", "FROM busybox\nCOPY --chwon=app a b\n");
    kiln.build(context.path(), &[]).fails(&["Dockerfile:2", "chwon", "did you mean chown?"]);
    context.file("Dockerfile", "FROM busybox\nENV\n");
    kiln.build(context.path(), &[]).fails(&["Dockerfile:2", "ENV"]);
    context.file("Dockerfile", "");
    kiln.build(context.path(), &[]).fails(&["Dockerfile"]);
    context.file("Dockerfile", "# check=skip=all\n# syntax=example.com/other:1\nFROM busybox\n");
    kiln.build(context.path(), &[]).fails(&["Dockerfile:2", ">>> # syntax=example.com/other:1"]);
    still_works(&kiln);
}

#[test]
fn a_missing_dockerfile_and_a_missing_copy_source_are_named() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nCOPY no-such-file /\n");
    kiln.build(context.path(), &[]).fails(&["\"/no-such-file\": not found", "COPY no-such-file /"]);
    kiln.build(context.path(), &["-f", "/nowhere/Dockerfile"]).fails(&["Dockerfile"]);
    still_works(&kiln);
}

#[test]
fn a_failing_step_shows_its_lines_command_exit_code_and_last_output() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        "FROM busybox\nRUN echo before && \\\n    echo the last words >&2 && \\\n    exit 42\nRUN echo never\n",
    );
    let built = kiln.build(context.path(), &[]).fails(&[
        "the last words",
        "exit code: 42",
        "Dockerfile:2",
        ">>> RUN echo before",
    ]);
    assert!(!built.stderr.contains("never\n#"), "{}", built.stderr);
    still_works(&kiln);
}

#[test]
fn the_last_output_of_a_failing_step_is_shown_however_much_came_before() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(
        "FROM busybox\nRUN yes 'a line of much output' | head -c 5000000; echo the last words; exit 3\n",
    );
    let built = kiln.build(context.path(), &[]).fails(&["the last words", "exit code: 3", "output clipped"]);
    assert!(built.stderr.len() < 4_000_000, "{} bytes", built.stderr.len());
    still_works(&kiln);
}

#[test]
fn a_killed_step_is_an_error_and_is_not_cached() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN sh -c 'kill -9 $$'; exit $?\n");
    kiln.build(context.path(), &[]).fails(&["exit code: 137"]);
    kiln.build(context.path(), &[]).fails(&["exit code: 137"]);
    still_works(&kiln);
}

#[test]
fn an_image_that_does_not_exist_is_named() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let name = format!("{}/no/such:image", registry.address);
    let context = Context::new(&format!("FROM {name}\nRUN true\n"));
    kiln.build(context.path(), &[]).fails(&[&name, "not found"]);
    still_works(&kiln);
}

#[test]
fn a_registry_that_answers_500_is_named_with_the_status() {
    let broken = FakeRegistry::start(|_, path| match path {
        "/v2/" => (200, "application/json", b"{}".to_vec()),
        _ => (500, "text/plain", b"boom".to_vec()),
    });
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(&format!("FROM {}/some/image\nRUN true\n", broken.address));
    kiln.build(context.path(), &[]).fails(&[&broken.address, "500"]);
    assert!(broken.requests() > 1, "a 500 is worth another try");
    still_works(&kiln);
}

/// Serves the busybox layout, with `change` applied to what is sent.
fn serve_layout(change: impl Fn(&str, Vec<u8>) -> Vec<u8> + Send + Sync + 'static) -> (FakeRegistry, String) {
    let layout = layout("busybox");
    let index: Value =
        serde_json::from_slice(&std::fs::read(layout.join("index.json")).expect("index")).expect("JSON");
    let manifest_digest = index["manifests"][0]["digest"].as_str().expect("a digest").to_owned();
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(tools::blob(&layout, &manifest_digest)).expect("manifest"))
            .expect("JSON");
    let layer = manifest["layers"][0]["digest"].as_str().expect("a digest").to_owned();
    let change = Arc::new(change);
    let server = FakeRegistry::start(move |_, path| {
        let last = path.rsplit('/').next().unwrap_or_default();
        if path == "/v2/" {
            return (200, "application/json", b"{}".to_vec());
        }
        let digest = if last.starts_with("sha256:") { last } else { manifest_digest.as_str() };
        match std::fs::read(tools::blob(&layout, digest)) {
            Ok(data) => {
                let kind = if path.contains("/manifests/") {
                    "application/vnd.oci.image.manifest.v1+json"
                } else {
                    "application/octet-stream"
                };
                (200, kind, change(digest, data))
            }
            Err(_) => (404, "text/plain", Vec::new()),
        }
    });
    (server, layer)
}

#[test]
fn a_layer_with_the_wrong_digest_is_refused() {
    let (_, layer) = serve_layout(|_, data| data);
    let wrong = layer.clone();
    let (server, _) = serve_layout(move |digest, mut data| {
        if digest == wrong {
            let middle = data.len() / 2;
            data[middle] ^= 1;
        }
        data
    });
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(&format!("FROM {}/some/image\nRUN true\n", server.address));
    kiln.build(context.path(), &[]).fails(&["does not match", &layer]);
    still_works(&kiln);
}

#[test]
fn a_manifest_that_is_not_what_was_asked_for_is_refused() {
    let (server, _) = serve_layout(|_, data| data);
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let digest = format!("sha256:{}", "0".repeat(64));
    let (wrong, _) = serve_layout(|_, data| data);
    let fake = FakeRegistry::start({
        let address = wrong.address.clone();
        move |_, path| {
            if path.contains("/manifests/") {
                let out = run(
                    Command::new("curl").args(["-s", &format!("http://{address}/v2/x/manifests/latest")])
                );
                (200, "application/vnd.oci.image.manifest.v1+json", out)
            } else {
                (200, "application/json", b"{}".to_vec())
            }
        }
    });
    let context = Context::new(&format!("FROM {}/some/image@{digest}\nRUN true\n", fake.address));
    kiln.build(context.path(), &[]).fails(&["does not match", &digest]);
    let good = Context::new(&format!("FROM {}/some/image\nRUN echo from a plain server\n", server.address));
    kiln.build(good.path(), &[]).ok();
    still_works(&kiln);
}

/// A small file system of its own, unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(directory.path()));
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_while_unpacking_is_an_error_that_loses_nothing() {
    let registry = Registry::with_busybox();
    let context = Context::new("FROM busybox\nRUN dd if=/dev/zero of=/zeros bs=1M count=80\n");
    let image = format!("{}/test/zeros:latest", registry.address);
    Kiln::new(&registry).build(context.path(), &["-t", &image, "--push"]).ok();

    let disk = SmallDisk::new("64m");
    let mut kiln = Kiln::with_root(&disk.0.path().join("state"), &registry.address);
    let small = Context::new("FROM busybox\nRUN echo kept > /kept\n");
    kiln.build(small.path(), &[]).ok();
    let context = Context::new(&format!("FROM {image}\nRUN true\n"));
    kiln.build(context.path(), &[]).fails(&["No space left on device", "write zeros"]);
    assert_eq!(kiln.build(small.path(), &[]).ok().cached(), 1, "what was built before is still cached");
    kiln.stop();
    assert_eq!(kiln.build(small.path(), &[]).ok().cached(), 1, "also for a new daemon");
    kiln.stop();
}

#[test]
fn a_full_disk_can_be_pruned_also_by_a_daemon_that_starts_on_it() {
    let registry = Registry::with_busybox();
    let disk = SmallDisk::new("96m");
    let mut kiln = Kiln::with_root(&disk.0.path().join("state"), &registry.address);
    kiln.configure("[worker.oci]\n  gc = false\n");
    let large = Context::new("FROM busybox\nRUN dd if=/dev/zero of=/zeros bs=1M count=30\n");
    kiln.build(large.path(), &[]).ok();
    let fill = || {
        let mut file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(disk.0.path().join("filler"))
            .expect("a file");
        while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    };
    fill();
    let other = Context::new("FROM busybox\nRUN dd if=/dev/zero of=/other bs=1M count=8\n");
    kiln.build(other.path(), &[]).fails(&["No space left on device"]);
    assert!(kiln.run(&["du"]).ok().stdout.contains("Total:"));
    kiln.stop();
    // The trash of the failed build is free by now.
    fill();
    assert!(kiln.run(&["du"]).ok().stdout.contains("Total:"));
    kiln.run(&["prune", "--all"]).ok();
    kiln.build(other.path(), &[]).ok();
    kiln.stop();
}
