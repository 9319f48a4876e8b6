//! Every output holds the same files.

use std::process::Command;

use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry};
use serde_json::Value;
use tempfile::TempDir;

const DOCKERFILE: &str = "FROM busybox AS base\nRUN echo hello > /hello\nFROM scratch\nCOPY --from=base /hello /bin/busybox /d/\nCMD [\"/d/busybox\"]\n";

#[test]
fn oci_docker_tar_and_local_outputs_agree() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    let directory = TempDir::new().expect("temporary directory");
    let at = |name: &str| directory.path().join(name).display().to_string();

    kiln.build(
        context.path(),
        &["-t", "example.org/out:v1", "-o", &format!("type=oci,dest={}", at("oci.tar"))],
    )
    .ok();
    kiln.build(
        context.path(),
        &["-t", "example.org/out:v1", "-o", &format!("type=docker,dest={}", at("docker.tar"))],
    )
    .ok();
    kiln.build(context.path(), &["-o", &format!("type=tar,dest={}", at("root.tar"))]).ok();
    kiln.build(context.path(), &["-o", &format!("type=local,dest={}", at("local"))]).ok();
    kiln.build(context.path(), &[]).ok();

    for (archive, transport) in [("oci.tar", "oci-archive"), ("docker.tar", "docker-archive")] {
        let out = run(Command::new("skopeo").args([
            "inspect",
            "--config",
            &format!("{transport}:{}", at(archive)),
        ]));
        let config: Value = serde_json::from_slice(&out).expect("JSON");
        assert_eq!(config["config"]["Cmd"], serde_json::json!(["/d/busybox"]), "{archive}");
        run(Command::new("skopeo").args(["copy", "-q"]).args([
            format!("{transport}:{}", at(archive)),
            format!("oci:{}:v1", at(&format!("{archive}.layout"))),
        ]));
        tools::unpack(
            &directory.path().join(format!("{archive}.layout")),
            "v1",
            &directory.path().join(format!("{archive}.bundle")),
        );
        let root = directory.path().join(format!("{archive}.bundle/rootfs"));
        assert_eq!(std::fs::read_to_string(root.join("d/hello")).expect("hello"), "hello\n", "{archive}");
    }
    let listing = tools::tar_listing(&directory.path().join("root.tar"));
    assert_eq!(listing, ["drwxr-xr-x 0/0 d/", "-rwxr-xr-x 0/0 d/busybox", "-rw-r--r-- 0/0 d/hello"]);
    assert_eq!(std::fs::read_to_string(directory.path().join("local/d/hello")).expect("hello"), "hello\n");
    assert_eq!(
        std::fs::read(directory.path().join("local/d/busybox")).expect("busybox"),
        std::fs::read("/bin/busybox").expect("busybox")
    );
}

#[test]
fn outputs_to_standard_output_and_to_several_places() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    let directory = TempDir::new().expect("temporary directory");
    let tar = kiln
        .command(&[
            "build",
            "--progress",
            "plain",
            "-o",
            "type=tar,dest=-",
            context.path().to_str().expect("UTF-8"),
        ])
        .output()
        .expect("run kiln");
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    let file = directory.path().join("stdout.tar");
    std::fs::write(&file, tar.stdout).expect("write");
    assert!(tools::tar_listing(&file).contains(&"-rw-r--r-- 0/0 d/hello".to_owned()));

    let image = format!("{}/test/several:latest", registry.address);
    let local = format!("type=local,dest={}", directory.path().join("tree").display());
    let push = format!("type=image,name={image},push=true");
    kiln.build(context.path(), &["-o", &local, "-o", &push]).ok();
    assert!(directory.path().join("tree/d/hello").exists());
    assert_eq!(tools::manifest(&image)["layers"].as_array().map(Vec::len), Some(1));
}

#[test]
fn zstd_and_uncompressed_layers_hold_the_same_files() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    let mut diff_ids = Vec::new();
    for (compression, suffix) in [("gzip", "tar+gzip"), ("zstd", "tar+zstd"), ("uncompressed", "tar")] {
        let image = format!("{}/test/{compression}:latest", registry.address);
        let output = format!(
            "type=image,name={image},push=true,oci-mediatypes=true,compression={compression},force-compression=true"
        );
        kiln.build(context.path(), &["-o", &output]).ok();
        let manifest = tools::manifest(&image);
        assert_eq!(
            manifest["layers"][0]["mediaType"],
            format!("application/vnd.oci.image.layer.v1.{suffix}")
        );
        diff_ids.push(tools::config(&image)["rootfs"]["diff_ids"].clone());
    }
    assert_eq!(diff_ids[0], diff_ids[1]);
    assert_eq!(diff_ids[0], diff_ids[2]);
}

#[test]
fn an_unknown_output_is_refused_by_name() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    let built = kiln.build(context.path(), &["-o", "type=floppy,dest=/dev/null"]);
    assert_ne!(built.code, 0);
    assert!(built.stderr.contains("floppy"), "{}", built.stderr);
}
