//! How a build's progress is shown. Everything goes to standard error; a reader that went away does not stop the build.

mod json;
mod model;
mod plain;
mod tty;
pub(crate) mod units;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use kiln_proto::control::StatusResponse;

use crate::args::ProgressMode;
use crate::error::CliError;
use model::Model;
use plain::Plain;
use tty::Tty;

/// The display of one command.
pub(crate) struct Display {
    view: View,
    /// Where all of it goes, too.
    trace: Option<File>,
    started: bool,
    finished: bool,
}

enum View {
    Plain(Plain),
    Tty(Box<Tty>),
    Json,
    /// Only remembers what failed.
    Quiet(Model),
}

impl Display {
    /// The display that the flags and the terminal ask for.
    pub(crate) fn new(mode: ProgressMode, quiet: bool) -> Result<Self, CliError> {
        let terminal = std::io::stderr().is_terminal();
        let capable = std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let view = match mode {
            _ if quiet => View::Quiet(Model::new()),
            ProgressMode::Quiet => View::Quiet(Model::new()),
            ProgressMode::Rawjson => View::Json,
            ProgressMode::Tty if !terminal => {
                return Err(CliError::usage("--progress tty needs a terminal on standard error"));
            }
            ProgressMode::Tty => View::Tty(Box::new(Tty::new())),
            ProgressMode::Auto if terminal && capable => View::Tty(Box::new(Tty::new())),
            ProgressMode::Auto | ProgressMode::Plain => View::Plain(Plain::new()),
        };
        Ok(Self { view, trace: None, started: false, finished: false })
    }

    /// Appends everything to a file, too, as JSON lines.
    pub(crate) fn trace(&mut self, path: &Path) -> Result<(), CliError> {
        let open = File::options().create(true).append(true).mode(0o600).open(path);
        self.trace = Some(open.map_err(|error| CliError::file("write", path, error))?);
        Ok(())
    }

    /// Whether anything arrived yet.
    pub(crate) fn started(&self) -> bool {
        self.started
    }

    /// Takes a status message.
    pub(crate) fn update(&mut self, message: &StatusResponse) {
        self.started = true;
        if let Some(trace) = &mut self.trace {
            // The build goes on without its trace.
            let _ = trace.write_all(json::line(message).as_bytes());
        }
        let text = match &mut self.view {
            View::Plain(plain) => plain.update(message),
            View::Tty(tty) => tty.update(message),
            View::Json => json::line(message),
            View::Quiet(model) => {
                model.apply(message);
                String::new()
            }
        };
        write(&text);
    }

    /// Time passed.
    pub(crate) fn refresh(&mut self) {
        let text = match &mut self.view {
            View::Plain(plain) => plain.refresh(),
            View::Tty(tty) => tty.refresh(),
            View::Json | View::Quiet(_) => String::new(),
        };
        write(&text);
    }

    /// Nothing more comes: shows the rest and the last output of what failed. Only the first call does anything.
    pub(crate) fn finish(&mut self) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let text = match &mut self.view {
            View::Plain(plain) => plain.finish(),
            View::Tty(tty) => tty.finish(),
            View::Json => String::new(),
            View::Quiet(model) => model.failures(),
        };
        write(&text);
    }
}

fn write(text: &str) {
    if !text.is_empty() {
        let mut stderr = std::io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    }
}
