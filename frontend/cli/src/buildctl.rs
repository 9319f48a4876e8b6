//! The client under the name `buildctl`: what docker buildx and connection helpers call inside a builder's container,
//! and the commands that are Kiln's own under another name. It never starts a daemon.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::args::{Connection, DuArgs, PruneArgs};
use crate::connect::{self, Start};
use crate::error::CliError;
use crate::solve::SolveArgs;
use crate::tls::TlsArgs;
use crate::workers::WorkersArgs;
use crate::{history, solve, stdout, usage, workers};

const ADDRESS: &str = "unix:///run/buildkit/buildkitd.sock";
/// Between attempts to reach a daemon that is waited for.
const PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug, Parser)]
#[command(name = "buildctl", version = kiln_daemon::VERSION, about = "Kiln under buildctl's name")]
struct Cli {
    /// Address of the daemon (default: unix:///run/buildkit/buildkitd.sock)
    #[arg(long, global = true, env = "BUILDKIT_HOST", value_name = "ADDRESS")]
    addr: Option<String>,
    #[command(flatten)]
    tls: TlsArgs,
    /// Wait until the daemon answers
    #[arg(long, global = true)]
    wait: bool,
    /// Accepted: errors say all that is known of them
    #[arg(long, global = true)]
    debug: bool,
    /// Accepted: a local daemon answers at once or not at all
    #[arg(long, global = true, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Accepted: there is no log
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build with a frontend, or an LLB definition read from standard input
    #[command(visible_alias = "b")]
    Build(Box<SolveArgs>),
    /// Show what the cache holds
    Du(DuArgs),
    /// Free disk space of the cache
    Prune(Box<PruneArgs>),
    /// Forget builds that ended and are not pinned
    PruneHistories,
    /// Look into the daemon
    #[command(subcommand)]
    Debug(Debug),
    /// Connect standard input and output with the daemon
    #[command(hide = true)]
    DialStdio,
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

#[derive(Debug, Subcommand)]
enum Debug {
    /// List the daemon's workers
    Workers(WorkersArgs),
    #[command(external_subcommand)]
    Other(Vec<OsString>),
}

/// Runs one of the commands.
pub(crate) fn main(args: impl Iterator<Item = OsString>) -> Result<(), CliError> {
    let cli = Cli::parse_from(std::iter::once("buildctl".into()).chain(args));
    let addr = cli.addr.filter(|addr| !addr.is_empty()).unwrap_or_else(|| ADDRESS.to_owned());
    let connection = Connection { addr: Some(addr), tls: cli.tls, existing: true, ..Connection::default() };
    while cli.wait && matches!(connect::connect(&connection, Start::Never), Err(CliError::Connect(_))) {
        std::thread::sleep(PAUSE);
    }
    match cli.command {
        Command::Build(args) => solve::main(&connection, &args),
        Command::Du(args) => usage::du(&connection, &args),
        Command::Prune(args) => usage::prune(&connection, &args),
        Command::PruneHistories => prune_histories(&connection),
        Command::Debug(Debug::Workers(args)) => workers::main(&connection, &args),
        Command::DialStdio => dial_stdio(&connection),
        Command::Debug(Debug::Other(other)) => Err(unsupported("debug ", &other)),
        Command::Other(other) => Err(unsupported("", &other)),
    }
}

fn unsupported(group: &str, words: &[OsString]) -> CliError {
    let name = words.first().map(|word| word.display().to_string()).unwrap_or_default();
    CliError::usage(format!("unsupported: buildctl {group}{name}"))
}

/// Carries bytes until the daemon's side has ended.
fn dial_stdio(flags: &Connection) -> Result<(), CliError> {
    let failed = |error: io::Error| CliError::file("copy", "the connection", error);
    let stream = match connect::connect(flags, Start::Never)? {
        connect::Connection::Unix(stream) => OwnedFd::from(stream),
        connect::Connection::Tcp(stream, None) => OwnedFd::from(stream),
        connect::Connection::Tcp(_, Some(_)) => {
            return Err(CliError::usage("unsupported: buildctl dial-stdio with TLS"));
        }
    };
    // Plain files: standard output would hold back what does not end in a newline.
    let open = |descriptor: io::Result<OwnedFd>| descriptor.map(File::from).map_err(failed);
    let mut input = open(rustix::stdio::stdin().try_clone_to_owned())?;
    let mut output = open(rustix::stdio::stdout().try_clone_to_owned())?;
    let mut to_daemon = open(stream.try_clone())?;
    let mut from_daemon = File::from(stream);
    // Not waited for: a terminal's input does not end.
    std::thread::spawn(move || {
        let copied = carry(&mut input, &mut to_daemon);
        // If the daemon has gone, the other direction tells.
        let _ = rustix::net::shutdown(&to_daemon, rustix::net::Shutdown::Write);
        copied
    });
    carry(&mut from_daemon, &mut output).map(drop).map_err(failed)
}

/// Copies by reading and writing. Between files the library would splice, and a pipe's reader is not woken by what was
/// spliced before the call returns, which it does only when there is more.
fn carry(from: &mut dyn Read, to: &mut dyn Write) -> io::Result<u64> {
    io::copy(from, to)
}

fn prune_histories(flags: &Connection) -> Result<(), CliError> {
    let stream = connect::connect(flags, Start::Never)?;
    connect::runtime()?.block_on(async {
        let mut control = connect::control(stream.channel()?);
        let mut text = "TYPE\tREF\tCREATED\tCOMPLETED\tGENERATION\n".to_owned();
        for record in history::records(&mut control, &[]).await? {
            if record.pinned || !history::forget_ended(&mut control, &record).await? {
                continue;
            }
            let (created, completed) =
                (usage::time(record.created_at.as_ref()), usage::time(record.completed_at.as_ref()));
            let id = stdout::harmless(&record.r#ref);
            text += &format!("COMPLETE\t{id}\t{created}\t{completed}\t{}\n", record.generation);
        }
        stdout::print(&text)
    })
}
