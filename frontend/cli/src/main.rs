//! The command line. It builds by talking to a daemon over the same API as every other client, and starts one in the
//! background when none answers; `kiln daemon` is that daemon, and so is this binary under the name
//! `buildkitd`. Decides nothing about builds itself.

mod address;
mod args;
mod attach;
mod attest;
mod auth;
mod build;
mod buildctl;
mod buildkitd;
mod caches;
mod connect;
mod contexts;
mod csv;
mod daemon;
mod debug;
mod error;
mod explain;
mod failure;
mod history;
mod inputs;
mod layout;
mod llbjson;
mod outputs;
mod policy;
mod progress;
mod record;
mod run;
mod shutdown;
mod solve;
mod start;
mod stdout;
mod tls;
mod usage;
mod workers;

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::error::CliError;

#[global_allocator]
static ALLOCATOR: kiln_alloc::Allocator = kiln_alloc::Allocator;

fn main() {
    // The sandbox helper is this binary re-executed; it must take over before any thread exists.
    kiln_worker::sandbox::zygote::run_if_requested();
    let code = match run() {
        Ok(()) => 0,
        Err(CliError::Interrupted(code)) => i32::from(code),
        Err(error) => {
            eprintln!("ERROR: {error}");
            1
        }
    };
    exit(code)
}

/// Ends the process without what is registered for its exit: the allocator would give back page by page what the
/// system takes at once, which is a tenth of a cached build's time.
fn exit(code: i32) -> ! {
    // Nobody reads what cannot be written any more.
    let _ = std::io::stdout().flush();
    // SAFETY: no handler that is passed over writes anything; standard error has no buffer.
    unsafe { libc::_exit(code) }
}

fn run() -> Result<(), CliError> {
    let mut args = std::env::args_os();
    let called = args.next().unwrap_or_default();
    let first = std::env::args_os().nth(1).unwrap_or_default();
    match (Path::new(&called).file_name().and_then(OsStr::to_str), first.to_str()) {
        (Some("buildkitd"), _) => return buildkitd::main(args),
        (Some("buildctl"), _) => return buildctl::main(args),
        (_, Some("buildkitd")) => return buildkitd::main(args.skip(1)),
        (_, Some("buildctl")) => return buildctl::main(args.skip(1)),
        _ => {}
    }
    let cli = Cli::parse();
    let connection = cli.connection.without_empty();
    match cli.command {
        Command::Build(args) => build::main(&connection, *args),
        Command::Solve(args) => solve::main(&connection, &args),
        Command::Daemon(args) => daemon::main(&connection, args),
        Command::Du(args) => usage::du(&connection, &args),
        Command::Prune(args) => usage::prune(&connection, &args),
        Command::History(args) => history::main(&connection, args.command),
        Command::Debug(args) => debug::main(&connection, args.command),
        Command::Shutdown => shutdown::main(&connection),
        Command::Version => {
            println!("kiln {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}
