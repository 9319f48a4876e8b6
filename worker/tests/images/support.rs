//! A real registry, a scripted one, and small file trees.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_cache::{Store, StoreOptions};
use kiln_worker::image::Images;
use kiln_worker::layer::{Compression, PackOptions, PackStats, pack_layer};
use kiln_worker::registry::{Registry, RegistryConfig};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

/// Whether devices, owners and trusted xattrs can be made.
pub(crate) fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().expect("command starts");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn sh(dir: &Path, script: &str) -> String {
    run(Command::new("sh").arg("-ec").arg(script).current_dir(dir))
}

/// Docker's registry on a port of its own.
pub(crate) struct RealRegistry {
    child: Child,
    pub(crate) host: String,
    _dir: tempfile::TempDir,
}

impl RealRegistry {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("port").port();
            let config = dir.path().join("config.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n",
                dir.path().join("data").display()
            );
            std::fs::write(&config, text).expect("config");
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("docker-registry starts");
            let until = Instant::now() + Duration::from_secs(30);
            while Instant::now() < until && child.try_wait().expect("status").is_none() {
                if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Self { child, host: format!("127.0.0.1:{port}"), _dir: dir };
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        panic!("docker-registry does not answer");
    }
}

impl Drop for RealRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A request as the scripted registry saw it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map(String::as_str).unwrap_or_default()
    }
}

/// An answer of the scripted registry.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The connection breaks after this much of the body.
    pub(crate) cut: Option<usize>,
}

pub(crate) fn answer(status: u16, body: impl Into<Vec<u8>>) -> Answer {
    Answer { status, body: body.into(), ..Answer::default() }
}

impl Answer {
    pub(crate) fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.to_string(), value.to_string()));
        self
    }
}

/// A registry that does what the test says.
pub(crate) struct Scripted {
    pub(crate) host: String,
    pub(crate) seen: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Scripted {
    pub(crate) async fn start(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let host = listener.local_addr().expect("address").to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script = Arc::new(script);
        let log = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (script, log) = (script.clone(), log.clone());
                // Head and body are written apart, and the second must not wait for the first to be confirmed.
                stream.set_nodelay(true).expect("no delay");
                tokio::spawn(async move { serve(stream, &*script, &log).await });
            }
        });
        Self { host, seen, task }
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.seen.lock().expect("log").iter().map(|r| format!("{} {}", r.method, r.path)).collect()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    stream: tokio::net::TcpStream,
    script: &(dyn Fn(&Request) -> Answer + Send + Sync),
    log: &Mutex<Vec<Request>>,
) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next()?.to_string(), words.next()?.to_string());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await.ok()?;
            let Some((name, value)) = line.trim().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
        }
        let length = headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        let request = Request { method, path, headers, body };
        log.lock().expect("log").push(request.clone());
        let answer = script(&request);
        let mut head = format!("HTTP/1.1 {} X\r\n", answer.status);
        if !answer.headers.iter().any(|(name, _)| name == "content-length") {
            head.push_str(&format!("content-length: {}\r\n", answer.body.len()));
        }
        for (name, value) in &answer.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await.ok()?;
        if request.method != "HEAD" {
            let cut = answer.cut.unwrap_or(answer.body.len());
            stream.write_all(&answer.body[..cut]).await.ok()?;
            stream.flush().await.ok()?;
            if answer.cut.is_some() {
                return None;
            }
        }
    }
}

/// A store in a directory of its own, and the images in it.
pub(crate) struct World {
    pub(crate) store: Arc<Store>,
    pub(crate) images: Arc<Images>,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn world(config: RegistryConfig) -> World {
    let dir = tempfile::tempdir().expect("temp dir");
    let store = Store::open(&dir.path().join("root"), StoreOptions::default()).expect("store");
    let images = Images::new(Registry::new(config), &store);
    World { store, images, dir }
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    use sha2::Digest;
    format!("sha256:{}", hex::encode(sha2::Sha256::digest(bytes)))
}

/// A layer directory as a blob.
pub(crate) fn pack(dir: &Path, compression: Compression) -> (Vec<u8>, PackStats) {
    let options = PackOptions { overlay: true, ..PackOptions::default() };
    pack_layer(dir, &options, compression, None, Vec::new()).expect("pack")
}

/// What a person would see of a tree: one line for each entry.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = dir.join(&path);
        let meta = std::fs::symlink_metadata(&full).expect("stat");
        let kind = meta.file_type();
        let content = if kind.is_symlink() {
            format!("-> {}", std::fs::read_link(&full).expect("link").display())
        } else if kind.is_file() {
            digest(&std::fs::read(&full).expect("read"))[7..15].to_string()
        } else {
            format!("{}", meta.rdev())
        };
        if kind.is_char_device() && meta.rdev() == 0 {
            lines.push(format!("{} whiteout", path.display()));
            continue;
        }
        let mode = meta.permissions().mode();
        let links = if kind.is_dir() { 0 } else { meta.nlink() };
        lines.push(format!("{} {mode:o} {}:{} {links} {content}", path.display(), meta.uid(), meta.gid()));
        if kind.is_dir() {
            for entry in std::fs::read_dir(&full).expect("read dir") {
                pending.push(path.join(entry.expect("entry").file_name()));
            }
        }
    }
    lines.sort();
    lines
}

/// One entry of a hand-made archive.
pub(crate) struct Member<'a> {
    pub(crate) path: &'a str,
    pub(crate) kind: tar::EntryType,
    pub(crate) link: &'a str,
    pub(crate) data: &'a [u8],
    pub(crate) pax: &'a [(&'a str, &'a [u8])],
}

impl<'a> Member<'a> {
    pub(crate) fn file(path: &'a str, data: &'a [u8]) -> Self {
        Self { path, kind: tar::EntryType::Regular, link: "", data, pax: &[] }
    }

    pub(crate) fn dir(path: &'a str) -> Self {
        Self { kind: tar::EntryType::Directory, ..Self::file(path, b"") }
    }

    pub(crate) fn link(path: &'a str, kind: tar::EntryType, link: &'a str) -> Self {
        Self { kind, link, ..Self::file(path, b"") }
    }
}

/// An archive of exactly these entries, with whatever names they have.
pub(crate) fn archive(members: &[Member<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for member in members {
        if !member.pax.is_empty() {
            let mut data = Vec::new();
            for (key, value) in member.pax {
                let rest = key.len() + value.len() + 3;
                let mut length = rest + 1;
                while length != rest + length.to_string().len() {
                    length = rest + length.to_string().len();
                }
                write!(data, "{length} {key}=").expect("write");
                data.extend_from_slice(value);
                data.push(b'\n');
            }
            raw(&mut out, "pax", tar::EntryType::XHeader, "", &data);
        }
        raw(&mut out, member.path, member.kind, member.link, member.data);
    }
    out.extend_from_slice(&[0; 1024]);
    out
}

fn raw(out: &mut Vec<u8>, path: &str, kind: tar::EntryType, link: &str, data: &[u8]) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_mode(if kind == tar::EntryType::Directory { 0o755 } else { 0o644 });
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    let old = header.as_old_mut();
    old.name[..path.len()].copy_from_slice(path.as_bytes());
    old.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out.extend(std::iter::repeat_n(0, data.len().wrapping_neg() % 512));
}
