//! Clients that are not Kiln's own, against a Kiln: `docker buildx` and `buildctl`, where `BUILDX` and `BUILDCTL` name
//! the binaries.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::kiln::{Built, Kiln, binary};

/// The `docker-buildx` binary.
pub struct Buildx {
    binary: PathBuf,
    home: TempDir,
}

impl Buildx {
    /// With a builder that is this Kiln; `None` if there is no binary.
    pub fn new(kiln: &Kiln) -> Option<Self> {
        let binary = PathBuf::from(std::env::var_os("BUILDX")?);
        let buildx = Self { binary, home: TempDir::new().expect("temporary directory") };
        let address = format!("unix://{}", kiln.socket().display());
        buildx.run(&["create", "--name", "kiln", "--driver", "remote", "--use", &address]).ok();
        Some(buildx)
    }

    /// `docker-buildx ARGS…`
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .env("DOCKER_CONFIG", self.home.path())
            .env("HOME", self.home.path())
            .env_remove("BUILDX_BUILDER")
            .stdin(Stdio::null());
        command
    }

    /// Runs `docker-buildx ARGS…` to its end.
    pub fn run(&self, args: &[&str]) -> Built {
        self.command(args).output().expect("run docker-buildx").into()
    }

    /// `docker-buildx build --progress plain ARGS… CONTEXT`
    pub fn build(&self, context: &Path, args: &[&str]) -> Built {
        let context = context.to_str().expect("a path in UTF-8");
        self.run(&[&["build", "--progress", "plain"], args, &[context]].concat())
    }
}

/// All clients that are called buildctl, against this Kiln: Kiln's own, and the binary if there is one.
pub fn buildctls(kiln: &Kiln) -> Vec<impl Fn(&[&str]) -> Command> {
    let address = format!("unix://{}", kiln.socket().display());
    let peer = std::env::var_os("BUILDCTL").map(PathBuf::from);
    let programs = std::iter::once((binary(), &["buildctl"][..])).chain(peer.map(|peer| (peer, &[][..])));
    let client = |(program, first): (PathBuf, &'static [&'static str])| {
        let address = address.clone();
        move |args: &[&str]| {
            let mut command = Command::new(&program);
            command.args(first).arg("--addr").arg(&address).args(args).stdin(Stdio::null());
            command
        }
    };
    programs.map(client).collect()
}

/// `buildctl ARGS…` against this Kiln; `None` if there is no binary.
pub fn buildctl(kiln: &Kiln, args: &[&str]) -> Option<Command> {
    let mut command = Command::new(std::env::var_os("BUILDCTL")?);
    command.arg("--addr").arg(format!("unix://{}", kiln.socket().display())).args(args).stdin(Stdio::null());
    Some(command)
}
