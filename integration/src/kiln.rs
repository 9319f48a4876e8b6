//! A Kiln of one's own: its state directory, socket and configuration, and the commands run against it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::lab::{Registry, repository, wait_until};

/// The binary under test: `KILN`, or the one that was built with this program, which stands beside it or, as a test,
/// one directory below.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("KILN") {
        return PathBuf::from(path);
    }
    let program = std::env::current_exe().expect("path of this program");
    let found = program.ancestors().skip(1).take(2).map(|dir| dir.join("kiln")).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("no kiln beside {}: build the workspace first", program.display()))
}

/// State, socket and configuration of one daemon; stopped when dropped.
pub struct Kiln {
    directory: TempDir,
    root: PathBuf,
    daemon: Option<Child>,
}

/// What a build printed and how it ended.
#[derive(Debug)]
pub struct Built {
    /// Exit code; -1 if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error: progress and errors.
    pub stderr: String,
}

/// How many instructions other than FROM plain progress shows as cached.
pub fn cached(progress: &str) -> usize {
    let bases: Vec<&str> = progress
        .lines()
        .filter(|line| line.contains("] FROM "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    progress
        .lines()
        .filter_map(|line| line.strip_suffix(" CACHED"))
        .filter(|number| number.starts_with('#') && !bases.contains(number))
        .count()
}

impl From<Output> for Built {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Built {
    /// The build must have succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "build failed:\n{}\n{}", self.stdout, self.stderr);
        self
    }

    /// The build must have failed with exit code 1, saying all of `texts`.
    #[track_caller]
    pub fn fails(self, texts: &[&str]) -> Self {
        assert_eq!(self.code, 1, "exit code of a failed build:\n{}\n{}", self.stdout, self.stderr);
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in:\n{}", self.stderr);
        }
        self
    }

    /// How many instructions other than FROM were answered by the cache.
    pub fn cached(&self) -> usize {
        cached(&self.stderr)
    }
}

impl Kiln {
    /// A Kiln whose Docker Hub is the loopback registry.
    pub fn new(registry: &Registry) -> Self {
        Self::with_mirror(&registry.address)
    }

    /// A Kiln whose Docker Hub is at `address` (plain http).
    pub fn with_mirror(address: &str) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let root = directory.path().join("state");
        Self::at(directory, root, address)
    }

    /// The same, with its state at `root` (e.g. on a small file system).
    pub fn with_root(root: &Path, address: &str) -> Self {
        Self::at(TempDir::new().expect("temporary directory"), root.to_path_buf(), address)
    }

    fn at(directory: TempDir, root: PathBuf, address: &str) -> Self {
        fs::write(
            directory.path().join("kilnd.toml"),
            format!("[registry.\"docker.io\"]\n  mirrors = [\"{address}\"]\n[registry.\"{address}\"]\n  http = true\n"),
        )
        .expect("write the configuration");
        Self { directory, root, daemon: None }
    }

    /// Where the daemon keeps its state.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("kilnd.sock")
    }

    /// `kiln ARGS…` against this daemon.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command
            .args(args)
            .env("KILN_HOST", format!("unix://{}", self.socket().display()))
            .env("KILN_ROOT", &self.root)
            .env("KILN_CONFIG", self.directory.path().join("kilnd.toml"))
            .env("HOME", self.directory.path())
            .env_remove("DOCKER_CONFIG")
            .stdin(Stdio::null());
        command
    }

    /// Runs `kiln ARGS…` to its end.
    pub fn run(&self, args: &[&str]) -> Built {
        self.command(args).output().expect("run kiln").into()
    }

    /// `kiln build --progress plain ARGS… CONTEXT`
    pub fn build(&self, context: &Path, args: &[&str]) -> Built {
        let context = context.to_str().expect("a path in UTF-8");
        let mut all = vec!["build", "--progress", "plain"];
        all.extend_from_slice(args);
        all.push(context);
        self.run(&all)
    }

    /// Adds lines to the daemon's configuration.
    pub fn configure(&self, lines: &str) {
        let path = self.directory.path().join("kilnd.toml");
        let before = fs::read_to_string(&path).expect("read the configuration");
        fs::write(path, before + lines).expect("write the configuration");
    }

    /// What `kiln du` lists.
    pub fn usage(&self) -> Vec<serde_json::Value> {
        let listed = self.run(&["du", "--format", "json"]).ok();
        serde_json::from_str(&listed.stdout).expect("a list of records")
    }

    /// Starts the daemon in the foreground of this test and waits until it answers.
    pub fn start(&mut self) -> u32 {
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("daemon.log"))
            .expect("open the daemon's log");
        let child =
            self.command(&["daemon"]).stdout(Stdio::null()).stderr(log).spawn().expect("start the daemon");
        let pid = child.id();
        self.daemon = Some(child);
        let socket = self.socket();
        wait_until("the daemon to answer", Duration::from_secs(20), || {
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        pid
    }

    /// `kill -9` of the daemon that [`Kiln::start`] started.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.daemon.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// What the daemon that [`Kiln::start`] started said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("daemon.log")).unwrap_or_default()
    }

    /// Process ids of daemons that use this state directory.
    pub fn daemons(&self) -> Vec<u32> {
        self.processes().into_iter().filter(|(_, line)| line.contains("daemon")).map(|(pid, _)| pid).collect()
    }

    /// Processes whose environment names this Kiln's socket: its daemon, helpers and clients.
    pub fn processes(&self) -> Vec<(u32, String)> {
        let needle = self.socket().display().to_string();
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
                let environ = fs::read(entry.path().join("environ")).ok()?;
                String::from_utf8_lossy(&environ).contains(&needle).then(|| {
                    let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                    (pid, String::from_utf8_lossy(&line).replace('\0', " "))
                })
            })
            .collect()
    }

    /// Mounts on this machine that have to do with this Kiln.
    pub fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("the mount table");
        let state = self.root.display().to_string();
        let own = format!(" {state} ");
        table
            .lines()
            .filter(|line| line.contains(&state) && !line.contains(&own))
            .map(str::to_owned)
            .collect()
    }

    /// Stops every daemon of this Kiln and waits until it is gone.
    pub fn stop(&mut self) {
        for pid in self.daemons() {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
        if let Some(mut child) = self.daemon.take() {
            let _ = child.wait();
        }
        wait_until("the daemon to stop", Duration::from_secs(20), || self.daemons().is_empty());
    }
}

impl Drop for Kiln {
    fn drop(&mut self) {
        for (pid, _) in self.processes() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        if let Some(mut child) = self.daemon.take() {
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            if !log.is_empty() {
                eprintln!("--- daemon's log\n{log}");
            }
        }
    }
}

/// An example of the repository.
pub fn example(name: &str) -> PathBuf {
    repository().join("examples").join(name)
}
