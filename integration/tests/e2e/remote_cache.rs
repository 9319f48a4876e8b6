//! What one builder leaves in a registry, in an image or in a directory, another one finds.

use std::fs;

use kiln_integration::{Context, Kiln, Registry};
use tempfile::TempDir;

/// Steps whose outcome tells whether they ran again.
const DOCKERFILE: &str = "FROM busybox AS base\nRUN head -c 16 /dev/urandom | sha256sum > /first\nCOPY note /note\nRUN cat /first /note > /second\nFROM scratch\nCOPY --from=base /second /out\n";

/// Builds with a builder of its own; gives the file and how many steps were answered by caches.
fn build(registry: &Registry, context: &Context, args: &[&str]) -> (String, String) {
    let kiln = Kiln::new(registry);
    let directory = TempDir::new().expect("temporary directory");
    let output = format!("type=local,dest={}", directory.path().display());
    let mut all = vec!["-o", &output];
    all.extend_from_slice(args);
    let built = kiln.build(context.path(), &all).ok();
    (fs::read_to_string(directory.path().join("out")).expect("out"), built.stderr)
}

fn exchanged(registry: &Registry, to: &str, from: &str) {
    let context = Context::new(DOCKERFILE);
    context.file("note", "one\n");
    let (first, _) = build(registry, &context, &["--cache-to", to]);
    let (second, progress) = build(registry, &context, &["--cache-from", from]);
    assert_eq!(first, second, "{progress}");
    // With mode=max the step below the change is found, too.
    context.file("note", "two\n");
    let (third, progress) = build(registry, &context, &["--cache-from", from]);
    assert_eq!(first.lines().next(), third.lines().next(), "{progress}");
    assert!(third.ends_with("two\n"), "{third}");
}

#[test]
fn caches_in_a_registry_are_found() {
    let registry = Registry::with_busybox();
    let reference = format!("{}/cache", registry.address);
    for (tag, form) in [
        ("a", ""),
        ("b", ",image-manifest=false"),
        ("c", ",oci-mediatypes=false"),
        ("d", ",compression=zstd"),
    ] {
        let to = format!("type=registry,ref={reference}:{tag},mode=max{form}");
        exchanged(&registry, &to, &format!("{reference}:{tag}"));
    }
}

#[test]
fn caches_in_a_directory_are_found() {
    let registry = Registry::with_busybox();
    let directory = TempDir::new().expect("temporary directory");
    let path = directory.path().join("cache").display().to_string();
    exchanged(&registry, &format!("type=local,dest={path},mode=max"), &format!("type=local,src={path}"));
}

#[test]
fn images_tell_of_themselves() {
    let registry = Registry::with_busybox();
    let context =
        Context::new("FROM busybox\nRUN head -c 16 /dev/urandom | sha256sum > /out\nRUN cp /out /copy\n");
    let name = format!("{}/app:v1", registry.address);
    let output = format!("type=image,push=true,name={name}");
    let kiln = Kiln::new(&registry);
    kiln.build(context.path(), &["-o", &output, "--cache-to", "type=inline"]).ok();
    let (first, progress) = build(&registry, &context, &["--cache-from", &name]);
    let (second, _) = build(&registry, &context, &["--cache-from", &name]);
    assert_eq!(first, second, "{progress}");
    assert!(progress.contains(&format!("importing cache manifest from {name}")), "{progress}");
}

#[test]
fn caches_that_can_not_be_had_fail_no_build() {
    let registry = Registry::with_busybox();
    let context = Context::new("FROM busybox\nRUN echo x > /out\n");
    let nowhere = format!("{}/nowhere:v1", registry.address);
    let (_, progress) = build(&registry, &context, &["--cache-from", &nowhere]);
    assert!(progress.contains("not found"), "{progress}");
    let kiln = Kiln::new(&registry);
    let to = "type=registry,ref=127.0.0.1:1/x,mode=max";
    kiln.build(context.path(), &["--cache-to", to]).fails(&["127.0.0.1:1/x"]);
    kiln.build(context.path(), &["--cache-to", &format!("{to},ignore-error=true")]).ok();
    kiln.build(context.path(), &["--cache-to", "type=s3,bucket=x"])
        .fails(&["unsupported: cache export of type s3"]);
}
