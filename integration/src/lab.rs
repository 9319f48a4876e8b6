//! Registries, base images and build contexts for tests.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tools::run;

/// A port on loopback that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind a loopback port");
    listener.local_addr().expect("address of a bound socket").port()
}

/// Waits until `ready` holds; panics with `what` after `limit`.
pub fn wait_until(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < limit, "timed out after {limit:?} waiting for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The directory of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace root").to_path_buf()
}

/// A base image as an OCI layout, made on first use.
pub fn layout(name: &str) -> PathBuf {
    let out = run(Command::new(repository().join("tools/base-images.sh")).arg(name));
    Path::new(String::from_utf8(out).expect("a path").trim()).join(name)
}

/// Moments and choices that differ but are the same each time: a small linear congruential generator.
pub struct Moments(u64);

impl Moments {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number less than `below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    /// A time less than `limit`.
    pub fn up_to(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64))
    }
}

/// Debian's docker-registry on a free port, gone when dropped.
pub struct Registry {
    child: Child,
    /// `127.0.0.1:PORT`
    pub address: String,
    directory: TempDir,
}

impl Registry {
    /// Starts an empty registry.
    pub fn start() -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let address = format!("127.0.0.1:{}", free_port());
        let config = directory.path().join("config.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: {address}}}\n",
                directory.path().join("data").display()
            ),
        )
        .expect("write the registry's configuration");
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start docker-registry (Debian package docker-registry)");
        wait_until("docker-registry to answer", Duration::from_secs(20), || {
            TcpStream::connect(&address).is_ok()
        });
        Self { child, address, directory }
    }

    /// A registry that holds `library/busybox:latest`.
    pub fn with_busybox() -> Self {
        Self::with("busybox")
    }

    /// A registry that holds `library/NAME:latest`, one of the images that `tools/base-images.sh` makes.
    pub fn with(name: &str) -> Self {
        let registry = Self::start();
        registry.push_layout(&layout(name), "latest", &format!("library/{name}:latest"));
        registry
    }

    /// Copies an image from an OCI layout into the registry.
    pub fn push_layout(&self, layout: &Path, tag: &str, name: &str) {
        run(Command::new("skopeo")
            .args(["copy", "-q", "--dest-tls-verify=false"])
            .args([format!("oci:{}:{tag}", layout.display()), format!("docker://{}/{name}", self.address)]));
    }

    /// Path of a blob's data on disk.
    pub fn blob_path(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").expect("a sha256 digest");
        self.directory
            .path()
            .join("data/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A build context of one's own.
pub struct Context {
    directory: TempDir,
}

impl Context {
    /// A context with this Dockerfile.
    pub fn new(dockerfile: &str) -> Self {
        let context = Self { directory: TempDir::new().expect("temporary directory") };
        context.file("Dockerfile", dockerfile);
        context
    }

    /// Writes a file, with the directories above it.
    pub fn file(&self, path: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("create directories");
        fs::write(&path, content).expect("write a file of the context");
        self
    }

    /// Changes a file's permission bits.
    pub fn mode(&self, path: &str, mode: u32) -> &Self {
        fs::set_permissions(self.path().join(path), fs::Permissions::from_mode(mode)).expect("chmod");
        self
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}
