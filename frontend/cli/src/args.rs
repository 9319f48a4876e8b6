//! The commands and flags. Names and meanings follow `docker buildx build` and `buildctl`, so that people need not
//! learn new ones. Only shapes are checked here.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::caches::CacheArgs;
use crate::progress::units;
use crate::solve::SolveArgs;
use crate::tls::TlsArgs;
use crate::workers::WorkersArgs;

/// Builds container images.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, about, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: Connection,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which daemon to talk to, and how to start one.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Connection {
    /// Address of the daemon: unix://PATH or tcp://HOST:PORT
    #[arg(long, global = true, env = "KILN_HOST", value_name = "ADDRESS")]
    pub(crate) addr: Option<String>,
    /// Directory in which a daemon started by this command keeps its state
    #[arg(long, global = true, env = "KILN_ROOT", value_name = "DIR", value_parser = any_path())]
    pub(crate) root: Option<PathBuf>,
    /// Configuration of the daemon, in buildkitd.toml's format
    #[arg(long, global = true, env = "KILN_CONFIG", value_name = "FILE", value_parser = any_path())]
    pub(crate) config: Option<PathBuf>,
    /// Time without work after which the daemon leaves, e.g. 10m; 0 means never
    #[arg(long, global = true, env = "KILN_IDLE_TIMEOUT", value_name = "DURATION", value_parser = duration)]
    pub(crate) idle_timeout: Option<Duration>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
    /// Only a daemon that runs already will do.
    #[arg(skip)]
    pub(crate) existing: bool,
}

impl Connection {
    /// Takes what is set to nothing, as environments often have it, for not set.
    pub(crate) fn without_empty(mut self) -> Self {
        self.addr = self.addr.filter(|addr| !addr.is_empty());
        self.root = self.root.filter(|root| !root.as_os_str().is_empty());
        self.config = self.config.filter(|config| !config.as_os_str().is_empty());
        self
    }
}

/// The parser for paths that may be empty.
fn any_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build a Dockerfile
    Build(Box<BuildArgs>),
    /// Build an LLB definition read from standard input, or with any frontend
    Solve(Box<SolveArgs>),
    /// Run the daemon in the foreground
    Daemon(DaemonArgs),
    /// Show what the cache holds
    Du(DuArgs),
    /// Free disk space of the cache
    Prune(PruneArgs),
    /// Look at builds that ended
    History(HistoryArgs),
    /// Look into builds
    Debug(Box<DebugArgs>),
    /// Stop the daemon
    Shutdown,
    /// Print the version
    Version,
}

/// How progress is shown, on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    /// A live view on a terminal, plain lines otherwise
    Auto,
    /// A live view
    Tty,
    /// Numbered lines
    Plain,
    /// Nothing but errors
    Quiet,
    /// One JSON object for each status message
    Rawjson,
}

#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    /// Build context: a directory; the URL of a git repository (`…#REF:DIRECTORY`), of an archive or of a Dockerfile
    /// alone; - reads one of the latter from standard input
    #[arg(value_name = "PATH")]
    pub(crate) context: String,
    /// Name and optionally tag of the image (may be repeated)
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    pub(crate) tags: Vec<String>,
    /// Dockerfile (default: PATH/Dockerfile); - reads it from standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// Stage to build
    #[arg(long, value_name = "STAGE")]
    pub(crate) target: Option<String>,
    /// Value of an ARG; without =VALUE it is taken from the environment
    #[arg(long = "build-arg", value_name = "KEY[=VALUE]")]
    pub(crate) build_args: Vec<String>,
    /// Directory, docker-image://NAME, oci-layout://DIR:TAG, or URL of a git repository or file that takes the place of a stage or image of that name (may be repeated)
    #[arg(long = "build-context", value_name = "NAME=VALUE")]
    pub(crate) build_contexts: Vec<String>,
    /// Label of the image
    #[arg(long = "label", value_name = "KEY=VALUE")]
    pub(crate) labels: Vec<String>,
    /// Annotation of the image's manifest
    #[arg(long = "annotation", value_name = "[TYPE:]KEY=VALUE")]
    pub(crate) annotations: Vec<String>,
    /// Target platform (may be repeated or comma-separated)
    #[arg(long = "platform", value_name = "OS/ARCH", value_delimiter = ',')]
    pub(crate) platforms: Vec<String>,
    /// Run every step anew
    #[arg(long)]
    pub(crate) no_cache: bool,
    /// Run every step of these stages anew
    #[arg(
        long = "no-cache-filter",
        value_name = "STAGE",
        value_delimiter = ',',
        conflicts_with = "no_cache"
    )]
    pub(crate) no_cache_filter: Vec<String>,
    /// Ask the registry for newer base images
    #[arg(long)]
    pub(crate) pull: bool,
    /// How progress is shown
    #[arg(long, value_enum, env = "BUILDKIT_PROGRESS", default_value = "auto")]
    pub(crate) progress: ProgressMode,
    /// Show nothing but errors; print the image's id
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Where the result goes, e.g. type=oci,dest=app.tar (may be repeated)
    #[arg(short, long = "output", value_name = "SPEC")]
    pub(crate) outputs: Vec<String>,
    /// Push the image to its registry
    #[arg(long)]
    pub(crate) push: bool,
    /// Secret for RUN --mount=type=secret: id=ID[,src=FILE|,env=NAME]
    #[arg(long = "secret", value_name = "SPEC")]
    pub(crate) secrets: Vec<String>,
    /// ssh agent for RUN --mount=type=ssh: default or ID=SOCKET
    #[arg(long = "ssh", value_name = "ID[=SOCKET]", num_args = 0..=1, default_missing_value = "default")]
    pub(crate) ssh: Vec<String>,
    /// Line for /etc/hosts of the steps: HOST:IP
    #[arg(long = "add-host", value_name = "HOST:IP")]
    pub(crate) add_hosts: Vec<String>,
    /// Network of the steps
    #[arg(long, value_name = "MODE", value_parser = ["default", "none", "host", "sandbox"])]
    pub(crate) network: Option<String>,
    /// What the build may use beyond the usual, e.g. network.host, security.insecure
    #[arg(long = "allow", value_name = "ENTITLEMENT", value_delimiter = ',')]
    pub(crate) allow: Vec<String>,
    /// Size of /dev/shm, e.g. 128m
    #[arg(long, value_name = "BYTES")]
    pub(crate) shm_size: Option<String>,
    /// Limit of the steps' processes, e.g. nofile=1024:2048
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]")]
    pub(crate) ulimits: Vec<String>,
    /// Parent of the steps' cgroups
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_parent: Option<String>,
    /// Say of each step that was not cached why
    #[arg(long)]
    pub(crate) explain: bool,
    /// Form of what --explain says; JSON goes to standard output
    #[arg(long, value_enum, requires = "explain", default_value = "text")]
    pub(crate) format: Format,
    /// Write the image's id to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Write the build's result as JSON to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) attests: AttestArgs,
    #[command(flatten)]
    pub(crate) absent: Absent,
    #[command(flatten)]
    pub(crate) caches: CacheArgs,
}

#[derive(Debug, Args)]
pub(crate) struct AttestArgs {
    /// Attest what was built, e.g. type=provenance,mode=max (may be repeated)
    #[arg(long = "attest", value_name = "SPEC")]
    pub(crate) attest: Vec<String>,
    /// The same as --attest type=provenance: true, false, or more of SPEC
    #[arg(
        long,
        value_name = "SPEC",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub(crate) provenance: Option<String>,
    /// The same as --attest type=sbom, which the daemon does not make
    #[arg(
        long,
        value_name = "SPEC",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true"
    )]
    pub(crate) sbom: Option<String>,
}

/// Flags that people pass by habit or script and that Kiln does not do: refused by name instead of as unknown.
#[derive(Debug, Args)]
pub(crate) struct Absent {
    #[arg(long, hide = true)]
    pub(crate) load: bool,
}

impl Absent {
    /// The first flag that was given and is not supported.
    pub(crate) fn given(&self) -> Option<&'static str> {
        [(self.load, "--load (use -o type=docker,dest=FILE)")]
            .into_iter()
            .find_map(|(given, name)| given.then_some(name))
    }
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Another address to listen on (may be repeated)
    #[arg(long = "listen", value_name = "ADDRESS")]
    pub(crate) listen: Vec<String>,
    /// Log more
    #[arg(long)]
    pub(crate) debug: bool,
    /// Steps that may run at once
    #[arg(long, value_name = "N")]
    pub(crate) max_parallelism: Option<usize>,
    /// External OCI runtime (runc, crun) instead of the built-in sandbox
    #[arg(long, value_name = "BINARY")]
    pub(crate) runtime: Option<String>,
    /// Entitlement that builds may be granted
    #[arg(long = "allow-insecure-entitlement", value_name = "NAME")]
    pub(crate) entitlements: Vec<String>,
}

/// How records of the cache are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RecordFormat {
    /// The fields and names of buildctl's JSON.
    Json,
}

pub(crate) fn record_format(text: &str) -> Result<RecordFormat, String> {
    match text.replace(' ', "").as_str() {
        "json" | "{{json.}}" => Ok(RecordFormat::Json),
        _ => Err("unsupported: only json, which is {{json .}}".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct DuArgs {
    /// Only matching records, e.g. type==regular (may be repeated; one must match)
    #[arg(short, long = "filter", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Everything known of each record
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print the records as json
    #[arg(long, value_name = "FORMAT", value_parser = record_format)]
    pub(crate) format: Option<RecordFormat>,
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Only matching records, e.g. type==exec.cachemount (may be repeated; one must match)
    #[arg(short, long = "filter", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Internal and frontend records too
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Keep what was used within this time, e.g. 24h
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) keep_duration: Option<Duration>,
    /// Keep at least this much, e.g. 10gb; buildctl's name for it: --keep-storage-min, in MB
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes)]
    pub(crate) reserved_space: Option<i64>,
    /// Keep at most this much; buildctl: --keep-storage, in MB
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes)]
    pub(crate) max_used_space: Option<i64>,
    /// Leave this much free on the disk; buildctl: --free-storage, in MB
    #[arg(long, value_name = "BYTES", value_parser = units::parse_bytes)]
    pub(crate) min_free_space: Option<i64>,
    #[arg(long, hide = true, value_parser = megabytes, conflicts_with = "reserved_space")]
    pub(crate) keep_storage_min: Option<i64>,
    #[arg(long, hide = true, value_parser = megabytes, conflicts_with = "max_used_space")]
    pub(crate) keep_storage: Option<i64>,
    #[arg(long, hide = true, value_parser = megabytes, conflicts_with = "min_free_space")]
    pub(crate) free_storage: Option<i64>,
    /// Everything known of each record
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Print the records as json, one on each line
    #[arg(long, value_name = "FORMAT", value_parser = record_format)]
    pub(crate) format: Option<RecordFormat>,
}

/// Bytes; a number without a unit counts megabytes.
fn megabytes(text: &str) -> Result<i64, String> {
    match text.parse::<f64>() {
        Ok(_) => units::parse_bytes(&format!("{text}mb")),
        Err(_) => units::parse_bytes(text),
    }
}

/// How answers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Text,
    /// For programs
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryArgs {
    #[command(subcommand)]
    pub(crate) command: HistoryCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HistoryCommand {
    /// List builds, running ones included
    Ls(HistoryLsArgs),
    /// Show what a build printed
    Logs(HistoryLogsArgs),
    /// Show what is known of a build
    Inspect(HistoryInspectArgs),
    /// Forget builds
    Rm(HistoryRmArgs),
    /// Say why steps of a build were not cached
    Explain(ExplainArgs),
}

#[derive(Debug, Args)]
pub(crate) struct HistoryLsArgs {
    /// Only matching builds, e.g. status==error (may be repeated; one must match)
    #[arg(short, long = "filter", value_name = "FILTER")]
    pub(crate) filters: Vec<String>,
    /// Print the builds as json, one on each line
    #[arg(long, value_name = "FORMAT", value_parser = record_format)]
    pub(crate) format: Option<RecordFormat>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryLogsArgs {
    /// The build, by the first letters of its ref (default: the one that began last)
    #[arg(value_name = "REF", default_value = "", hide_default_value = true)]
    pub(crate) reference: String,
    /// How it is shown
    #[arg(long, value_enum, default_value = "plain")]
    pub(crate) progress: ProgressMode,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryInspectArgs {
    /// The build, by the first letters of its ref (default: the one that began last)
    #[arg(value_name = "REF", default_value = "", hide_default_value = true)]
    pub(crate) reference: String,
    /// Print it as json
    #[arg(long, value_name = "FORMAT", value_parser = record_format)]
    pub(crate) format: Option<RecordFormat>,
}

#[derive(Debug, Args)]
pub(crate) struct HistoryRmArgs {
    /// The builds
    #[arg(value_name = "REF", required_unless_present = "all", conflicts_with = "all")]
    pub(crate) references: Vec<String>,
    /// All builds that ended
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// The build (default: the one that ended last)
    #[arg(value_name = "REF")]
    pub(crate) reference: Option<String>,
    /// Form of the answer
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) format: Format,
}

#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    #[command(subcommand)]
    pub(crate) command: DebugCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DebugCommand {
    /// Print the LLB that a Dockerfile compiles to
    DumpLlb(Box<DumpArgs>),
    /// List the daemon's workers
    Workers(WorkersArgs),
}

#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    /// Print the encoded definition instead of JSON
    #[arg(long)]
    pub(crate) raw: bool,
    #[command(flatten)]
    pub(crate) build: BuildArgs,
}

/// A duration as Go writes them: `90s`, `1h30m`, `250ms`; a bare 0 is allowed.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let invalid = || format!("invalid duration {text:?}: expected e.g. 90s, 10m or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(invalid());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(invalid)?;
        let (number, tail) = rest.split_at(digits);
        let number: f64 = number.parse().map_err(|_| invalid())?;
        let letters = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(letters);
        let seconds = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return Err(invalid()),
        };
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| invalid())?;
        total = total.checked_add(part).ok_or_else(invalid)?;
        rest = tail;
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations() {
        assert_eq!(duration("1h30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(duration("0").unwrap(), Duration::ZERO);
        for text in ["", "5", "s", "1d", "-1s", "1e400h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn buildctls_flags_of_prune_count_megabytes() {
        let flags = ["--keep-storage-min", "1.5", "--keep-storage", "2000", "--free-storage", "3gb"];
        let parsed = Cli::try_parse_from(["kiln", "prune"].into_iter().chain(flags)).unwrap();
        let Command::Prune(prune) = parsed.command else { panic!() };
        assert_eq!(prune.keep_storage_min, Some(1_500_000));
        assert_eq!(prune.keep_storage, Some(2_000_000_000));
        assert_eq!(prune.free_storage, Some(3_000_000_000));
        for both in [["--keep-storage=1", "--max-used-space=1"], ["--format={{.ID}}", "--all"]] {
            assert!(Cli::try_parse_from(["kiln", "prune"].into_iter().chain(both)).is_err(), "{both:?}");
        }
    }

    #[test]
    fn flags_of_buildx_are_refused_by_name() {
        let parsed = Cli::try_parse_from(["kiln", "build", "--load", "."]).unwrap();
        let Command::Build(build) = parsed.command else { panic!() };
        assert!(build.absent.given().is_some());
        let parsed = Cli::try_parse_from(["kiln", "build", "--provenance", "."]).unwrap();
        let Command::Build(build) = parsed.command else { panic!() };
        assert_eq!(build.absent.given(), None);
        assert_eq!(build.attests.provenance.as_deref(), Some("true"));
    }
}
