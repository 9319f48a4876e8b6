//! The daemon in buildkitd's place: called by its name, with its flags and its configuration.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use kiln_integration::kiln::binary;
use kiln_integration::tools::run;
use kiln_integration::{Built, Context, Registry, free_port, wait_until};
use tempfile::TempDir;

/// A directory with a `buildkitd` that is Kiln, and the process that was started of it.
struct Buildkitd {
    dir: TempDir,
    child: Option<Child>,
}

impl Buildkitd {
    fn new(config: &str) -> Self {
        let dir = TempDir::new().expect("temporary directory");
        std::os::unix::fs::symlink(binary(), dir.path().join("buildkitd")).expect("link");
        fs::write(dir.path().join("buildkitd.toml"), config).expect("configuration");
        Self { dir, child: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unix(&self) -> String {
        format!("unix://{}", self.path("buildkitd.sock").display())
    }

    /// The arguments that every test needs.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.path("buildkitd"));
        command.arg("--config").arg(self.path("buildkitd.toml")).arg("--root").arg(self.path("state"));
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(self.path("log")).expect("log"));
        command
    }

    fn start(&mut self, args: &[&str]) {
        let address = self.unix();
        self.child = Some(self.command(args).args(["--addr", &address]).spawn().expect("start"));
        let socket = self.path("buildkitd.sock");
        wait_until("buildkitd to answer", Duration::from_secs(20), || UnixStream::connect(&socket).is_ok());
    }

    /// Stops it as init systems do.
    fn stop(&mut self) {
        let mut child = self.child.take().expect("running");
        run(Command::new("kill").arg(child.id().to_string()));
        assert!(child.wait().expect("wait").success(), "{}", self.log());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// `kiln --addr ADDRESS ARGS`
    fn client(&self, address: &str, args: &[&str]) -> Built {
        let mut command = Command::new(binary());
        command.args(["--addr", address]).args(args).env("HOME", self.dir.path()).stdin(Stdio::null());
        command.output().expect("kiln").into()
    }
}

impl Drop for Buildkitd {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- daemon's log\n{}", self.log());
        }
    }
}

#[test]
fn it_builds_and_pushes_as_buildkitds_own_tests_configure_it() {
    let registry = Registry::with_busybox();
    let address = registry.address.replace("127.0.0.1", "localhost");
    let mut buildkitd = Buildkitd::new(&format!(
        "provenanceEnvDir = \"/nonexistent\"\n[registry.\"docker.io\"]\n  mirrors = [\"{address}\"]\n\
         [otel]\n  socketPath = \"/nonexistent/otel.sock\"\n[cdi]\n  specDirs = [\"/nonexistent\"]\n\
         [dns]\n  nameservers = [\"203.0.113.7\"]\n\
         [worker.oci]\n  networkMode = \"host\"\n  cniConfigPath = \"/nonexistent\"\n  max-parallelism = 1\n\
         [worker.containerd]\n  networkMode = \"cni\"\n"
    ));
    buildkitd.start(&[
        "--oci-worker=true",
        "--containerd-worker=false",
        "--oci-worker-gc=false",
        "--oci-worker-labels=org.mobyproject.buildkit.worker.sandbox=true",
        "--debug",
    ]);
    let workers = buildkitd.client(&buildkitd.unix(), &["debug", "workers", "-v"]).ok().stdout;
    assert!(workers.contains("org.mobyproject.buildkit.worker.sandbox:  true"), "{workers}");
    let context = Context::new("FROM busybox\nRUN cat /etc/resolv.conf\n");
    let image = format!("{address}/made:1");
    let args = ["build", "--progress=plain", "--push", "-t", &image, context.path().to_str().expect("UTF-8")];
    let built = buildkitd.client(&buildkitd.unix(), &args).ok();
    assert!(built.stderr.contains("nameserver 203.0.113.7"), "{}", built.stderr);
    kiln_integration::tools::digest(&format!("{}/made:1", registry.address));
    assert!(buildkitd.log().contains("DEBUG"), "{}", buildkitd.log());
    buildkitd.stop();
    assert!(!buildkitd.path("buildkitd.sock").exists());
}

#[test]
fn it_refuses_what_it_does_not_do() {
    let buildkitd = Buildkitd::new("");
    for (flag, message) in [
        ("--containerd-worker=true", "unsupported: --containerd-worker"),
        ("-oci-worker-snapshotter=native", "unsupported: --oci-worker-snapshotter=native"),
        ("--addr=npipe:////./pipe/x", "unsupported: addresses of kind npipe"),
        ("--addr=fd://", "no socket was handed over"),
    ] {
        let output = buildkitd.command(&[flag]).stderr(Stdio::piped()).output().expect("buildkitd");
        Built::from(output).fails(&[message]);
    }
    let version = Command::new(buildkitd.path("buildkitd")).arg("-version").output().expect("buildkitd");
    assert!(Built::from(version).ok().stdout.starts_with("buildkitd github.com/moby/buildkit v"));
}

#[test]
fn buildctl_is_its_client() {
    let registry = Registry::with_busybox();
    let mut buildkitd =
        Buildkitd::new(&format!("[registry.\"docker.io\"]\nmirrors = [\"{}\"]\n", registry.address));
    std::os::unix::fs::symlink(binary(), buildkitd.path("buildctl")).expect("link");
    let (program, address) = (buildkitd.path("buildctl"), buildkitd.unix());
    let buildctl = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("BUILDKIT_HOST", &address).stdin(Stdio::null());
        Built::from(command.output().expect("buildctl"))
    };
    buildctl(&["debug", "workers"]).fails(&["no daemon answers"]);
    buildkitd.start(&[]);
    assert!(buildctl(&["--wait", "debug", "workers"]).ok().stdout.starts_with("ID "));
    let workers = buildctl(&["debug", "workers", "--format", "{{json .}}"]).ok().stdout;
    let workers: serde_json::Value = serde_json::from_str(&workers).expect("JSON");
    assert_eq!(workers[0]["platforms"][0]["os"], "linux");

    // The pipe carries a whole connection: an HTTP/2 preface is answered with settings.
    let mut pipe = Command::new(&program)
        .args(["--addr", &address, "dial-stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("buildctl");
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    pipe.stdin.as_mut().expect("piped").write_all(preface).expect("write");
    let mut frame = [0; 9];
    pipe.stdout.as_mut().expect("piped").read_exact(&mut frame).expect("an answer");
    assert_eq!(frame[3], 4, "a settings frame");
    drop(pipe.stdin.take());
    assert!(pipe.wait().expect("wait").success());

    let context = Context::new("FROM busybox\nRUN echo made > /made\n");
    buildkitd.client(&address, &["build", context.path().to_str().expect("UTF-8")]).ok();
    assert!(buildctl(&["du", "-v"]).ok().stdout.contains("echo made > /made"));
    let forgotten = buildctl(&["prune-histories"]).ok().stdout;
    assert!(forgotten.lines().nth(1).is_some_and(|line| line.starts_with("COMPLETE\t")), "{forgotten}");
    assert_eq!(buildctl(&["prune-histories"]).ok().stdout.lines().count(), 1);
    assert!(buildctl(&["prune", "--all"]).ok().stdout.contains("Total:"));
    buildctl(&["debug", "dump-llb"]).fails(&["unsupported: buildctl debug dump-llb"]);
}

#[test]
fn its_socket_belongs_to_the_group() {
    let mut buildkitd = Buildkitd::new("");
    buildkitd.start(&["--group", "daemon"]);
    let meta = fs::metadata(buildkitd.path("buildkitd.sock")).expect("socket");
    let groups = fs::read_to_string("/etc/group").expect("groups");
    let line = groups.lines().find(|line| line.starts_with("daemon:")).expect("a group named daemon");
    assert_eq!(line.split(':').nth(2), Some(meta.gid().to_string().as_str()));
    assert_eq!(meta.permissions().mode() & 0o777, 0o660);
}

/// `NAME.pem` and `NAME-key.pem`, signed by `ca.pem`, which is made first.
fn certificate(dir: &Path, name: &str, names: &str) {
    let openssl = |args: &str| {
        run(Command::new("openssl").args(args.split(' ')).current_dir(dir).stderr(Stdio::null()));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    if !dir.join("ca.pem").exists() {
        openssl(&format!("req -x509 {key} -subj /CN=authority -keyout ca-key.pem -out ca.pem"));
    }
    openssl(&format!(
        "req -x509 {key} -subj /CN={name} -addext subjectAltName={names} -addext basicConstraints=critical,CA:FALSE \
         -CA ca.pem -CAkey ca-key.pem -keyout {name}-key.pem -out {name}.pem"
    ));
}

#[test]
fn tcp_takes_clients_with_a_certificate_only() {
    let mut buildkitd = Buildkitd::new("");
    let certs = buildkitd.path("certs");
    fs::create_dir(&certs).expect("directory");
    certificate(&certs, "server", "IP:127.0.0.1,DNS:builder.example");
    certificate(&certs, "client", "DNS:someone");
    let file = |name: &str| certs.join(name).display().to_string();
    let address = format!("tcp://127.0.0.1:{}", free_port());
    let (server, server_key, ca) = (file("server.pem"), file("server-key.pem"), file("ca.pem"));
    buildkitd.start(&["--addr", &address, "--tlscert", &server, "--tlskey", &server_key, "--tlscacert", &ca]);

    let (client, key) = (file("client.pem"), file("client-key.pem"));
    let shown = ["--tlscacert", &ca, "--tlscert", &client, "--tlskey", &key, "debug", "workers"];
    buildkitd.client(&address, &shown).ok();
    let named = [&["--tlsservername", "builder.example"], &shown[..]].concat();
    buildkitd.client(&address, &named).ok();
    let dir = buildkitd.path("dir");
    fs::create_dir(&dir).expect("directory");
    for (name, source) in [("ca.crt", "ca.pem"), ("tls.crt", "client.pem"), ("tls.key", "client-key.pem")] {
        fs::copy(certs.join(source), dir.join(name)).expect("copy");
    }
    buildkitd.client(&address, &["--tlsdir", dir.to_str().expect("UTF-8"), "debug", "workers"]).ok();

    buildkitd.client(&address, &["--tlscacert", &ca, "debug", "workers"]).fails(&["ERROR: "]);
    let other = [&["--tlsservername", "other.example"], &shown[..]].concat();
    buildkitd.client(&address, &other).fails(&["ERROR: "]);
    buildkitd.client(&address, &["debug", "workers"]).fails(&["ERROR: "]);
    // The unix socket needs none.
    buildkitd.client(&buildkitd.unix(), &["debug", "workers"]).ok();
}

#[test]
fn a_service_manager_hands_its_socket_over_and_is_told_when_it_answers() {
    let mut buildkitd = Buildkitd::new("");
    let listener = UnixListener::bind(buildkitd.path("handed.sock")).expect("socket");
    let manager = UnixDatagram::bind(buildkitd.path("notify")).expect("socket");
    manager.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
    let inner = buildkitd.command(&["--addr", "fd://"]);
    let child = Command::new("sh")
        .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .env("NOTIFY_SOCKET", buildkitd.path("notify"))
        .stdin(OwnedFd::from(listener))
        .stderr(fs::File::create(buildkitd.path("log")).expect("log"))
        .spawn();
    buildkitd.child = Some(child.expect("sh"));
    let mut said = [0; 64];
    let mut told = || {
        let size = manager.recv(&mut said).expect("a notification");
        String::from_utf8_lossy(&said[..size]).into_owned()
    };
    assert_eq!(told(), "READY=1");
    let address = format!("unix://{}", buildkitd.path("handed.sock").display());
    buildkitd.client(&address, &["debug", "workers"]).ok();
    buildkitd.stop();
    assert_eq!(told(), "STOPPING=1");
    assert!(buildkitd.path("handed.sock").exists(), "the socket is the manager's");
}
