//! Registries, base images and build contexts for tests.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
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

/// Directory with the base images as OCI layouts, made on first use.
pub fn images() -> &'static Path {
    static IMAGES: OnceLock<PathBuf> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let out = run(Command::new(repository().join("tools/base-images.sh")).arg("busybox"));
        PathBuf::from(String::from_utf8(out).expect("a path").trim())
    })
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
        let registry = Self::start();
        registry.push_layout(&images().join("busybox"), "latest", "library/busybox:latest");
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
