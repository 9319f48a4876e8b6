//! The repository's Dockerfile: Kiln makes an image of itself that others can start in buildkitd's place.

use std::path::Path;
use std::process::Command;

use kiln_integration::tools::run;
use kiln_integration::{Context, Kiln, Registry, kiln};
use tempfile::TempDir;

#[test]
fn kiln_builds_its_own_image_which_is_a_buildkitd() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    // What this test runs is the binary that the first stage would compile, on this machine's libraries.
    let (built, base) = (TempDir::new().expect("directory"), TempDir::new().expect("directory"));
    std::fs::create_dir(built.path().join("out")).expect("directory");
    std::fs::copy(kiln::binary(), built.path().join("out/kiln")).expect("the binary");
    let libraries = run(Command::new("ldd").arg(kiln::binary()));
    let libraries = String::from_utf8_lossy(&libraries);
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let target = base.path().join(&library[1..]);
        std::fs::create_dir_all(target.parent().expect("a directory")).expect("directory");
        std::fs::copy(library, target).expect("a library");
    }
    let libraries = Context::new("FROM busybox\nCOPY --from=libraries / /\n");
    let image = format!("{}/test/base", registry.address);
    let libraries_at = format!("libraries={}", base.path().display());
    kiln.build(libraries.path(), &["--build-context", &libraries_at, "-t", &image, "--push"]).ok();

    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the repository");
    let (debian, build) = (format!("DEBIAN={image}"), format!("build={}", built.path().display()));
    let own = format!("{}/test/kiln", registry.address);
    let args = ["--build-arg", &debian, "--build-arg", "PACKAGES=", "--build-context", &build];
    kiln.build(repository, &[&args[..], &["-t", &own, "--push"]].concat()).ok();

    let config = run(Command::new("skopeo")
        .args(["inspect", "--config", "--tls-verify=false"])
        .arg(format!("docker://{own}")));
    let config: serde_json::Value = serde_json::from_slice(&config).expect("a config");
    assert_eq!(config["config"]["Entrypoint"], serde_json::json!(["buildkitd"]));
    assert!(config["config"]["Volumes"]["/var/lib/buildkit"].is_object());
    let started = Context::new(&format!(
        "FROM {own}\nRUN buildkitd --version > /version && buildctl --help > /help\n\
         FROM scratch\nCOPY --from=0 /version /help /\n"
    ));
    let out = TempDir::new().expect("directory");
    let to = format!("type=local,dest={}", out.path().display());
    kiln.build(started.path(), &["-o", &to]).ok();
    let read = |name: &str| std::fs::read_to_string(out.path().join(name)).expect("an output");
    assert!(read("version").starts_with("buildkitd "), "{}", read("version"));
    assert!(read("help").contains("prune-histories"), "{}", read("help"));
}
