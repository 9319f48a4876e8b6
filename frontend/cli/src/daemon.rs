//! `kiln daemon`: configuration file and flags become the daemon's configuration.

use std::path::Path;

use kiln_daemon::{Config, LogLevel};

use crate::address::Address;
use crate::args::{Connection, DaemonArgs};
use crate::error::CliError;

/// Read if it exists and no other is named.
const DEFAULT_CONFIG: &str = "/etc/kiln/kilnd.toml";

/// Runs the daemon until it is stopped.
pub(crate) fn main(connection: &Connection, args: DaemonArgs) -> Result<(), CliError> {
    let mut config = match &connection.config {
        Some(path) => Config::load(path)?,
        None if Path::new(DEFAULT_CONFIG).exists() => Config::load(Path::new(DEFAULT_CONFIG))?,
        None => Config::default(),
    };
    if let Some(root) = &connection.root {
        config.root.clone_from(root);
    }
    if connection.addr.is_some() {
        config.addresses = vec![Address::parse(connection.addr.as_deref())?.url()];
    }
    for address in &args.listen {
        config.addresses.push(Address::parse(Some(address))?.url());
    }
    if let Some(tls) = connection.tls.server()? {
        config.tls = Some(tls);
    }
    if let Some(idle) = connection.idle_timeout {
        config.idle_exit = (!idle.is_zero()).then_some(idle);
    }
    if args.debug {
        config.log_level = LogLevel::Debug;
    }
    if let Some(parallelism) = args.max_parallelism {
        config.max_parallelism = parallelism;
    }
    if args.runtime.is_some() {
        config.runtime_binary = args.runtime;
    }
    config.entitlements.extend(args.entitlements);
    Ok(kiln_daemon::run(config)?)
}
