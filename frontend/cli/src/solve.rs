//! `kiln solve`, and `build` under the name `buildctl`: builds an LLB definition from standard input, or has a frontend
//! build what its options say.

use std::collections::HashMap;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use kiln_proto::control::SolveRequest;
use kiln_proto::{llb, pb};
use kiln_session::client::{Attachables, ContentDir};
use prost::Message;

use crate::args::{Connection, ProgressMode};
use crate::auth::DockerConfig;
use crate::caches::{CacheArgs, Caches};
use crate::error::CliError;
use crate::progress::Display;
use crate::run::{self, Job};
use crate::{attach, build, inputs, layout, outputs, policy};

/// Variables that are build arguments without being named.
const PASSED_ON: [&str; 1] = ["SOURCE_DATE_EPOCH"];

#[derive(Debug, Args)]
pub(crate) struct SolveArgs {
    /// Frontend that makes the definition, e.g. dockerfile.v0 or gateway.v0 (default: it is on standard input)
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub(crate) frontend: String,
    /// Option for the frontend, e.g. target=NAME or build-arg:KEY[=VALUE] (may be repeated)
    #[arg(long = "opt", alias = "frontend-opt", value_name = "KEY=VALUE")]
    pub(crate) opts: Vec<String>,
    /// Where the result goes, e.g. type=oci,dest=app.tar (may be repeated)
    #[arg(short, long = "output", value_name = "SPEC")]
    pub(crate) outputs: Vec<String>,
    /// Directory that the build reads as local://NAME
    #[arg(long = "local", value_name = "NAME=DIR")]
    pub(crate) locals: Vec<String>,
    /// Image layout that the build reads as oci-layout://NAME
    #[arg(long = "oci-layout", value_name = "NAME=DIR")]
    pub(crate) layouts: Vec<String>,
    /// Secret: id=ID[,src=FILE|,env=NAME]
    #[arg(long = "secret", value_name = "SPEC")]
    pub(crate) secrets: Vec<String>,
    /// ssh agent: default or ID=SOCKET
    #[arg(long = "ssh", value_name = "ID[=SOCKET]")]
    pub(crate) ssh: Vec<String>,
    /// What the build may use beyond the usual
    #[arg(long = "allow", value_name = "ENTITLEMENT", value_delimiter = ',')]
    pub(crate) allow: Vec<String>,
    /// Run every step anew
    #[arg(long)]
    pub(crate) no_cache: bool,
    #[command(flatten)]
    pub(crate) caches: CacheArgs,
    /// JSON file with rules that change or refuse sources
    #[arg(long, value_name = "FILE")]
    pub(crate) source_policy_file: Option<PathBuf>,
    /// How progress is shown
    #[arg(long, value_enum, env = "BUILDKIT_PROGRESS", default_value = "auto")]
    pub(crate) progress: ProgressMode,
    /// Append all progress as JSON lines to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
    /// Write the build's result as JSON to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Write the build's ref to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) ref_file: Option<PathBuf>,
    #[command(flatten)]
    absent: Absent,
}

/// Flags of buildctl that Kiln does not do: refused by name instead of as unknown.
#[derive(Debug, Args)]
struct Absent {
    #[arg(long, hide = true)]
    proxy_network: bool,
    #[arg(long, hide = true)]
    registry_auth_tlscontext: Vec<String>,
    #[arg(long, hide = true)]
    debug_json_cache_metrics: Option<String>,
}

impl Absent {
    fn check(&self) -> Result<(), CliError> {
        let given = [
            (self.proxy_network, "--proxy-network"),
            (!self.registry_auth_tlscontext.is_empty(), "--registry-auth-tlscontext"),
            (self.debug_json_cache_metrics.is_some(), "--debug-json-cache-metrics"),
        ];
        match given.into_iter().find(|(given, _)| *given) {
            Some((_, name)) => Err(CliError::usage(format!("unsupported: {name}"))),
            None => Ok(()),
        }
    }
}

/// Builds what standard input defines or a frontend makes.
pub(crate) fn main(connection: &Connection, args: &SolveArgs) -> Result<(), CliError> {
    args.absent.check()?;
    let mut attrs = options(&args.opts)?;
    let caches = Caches::parse(&args.caches)?;
    let outputs = outputs::parse(&args.outputs, outputs::Docker::Archive)?;
    let outputs = outputs::complete(outputs, false, &[], &[])?;
    let layouts = layouts(&args.layouts)?;
    let source_policy = args.source_policy_file.as_deref().map(policy::read).transpose()?;
    let definition = match args.frontend.is_empty() {
        true => Some(definition(args.no_cache)?),
        false => {
            if args.no_cache {
                attrs.insert("no-cache".into(), String::new());
            }
            attrs.extend(caches.attr());
            None
        }
    };
    let mut display = Display::new(args.progress, false)?;
    if let Some(path) = &args.trace {
        display.trace(path)?;
    }
    let mut reference = String::new();
    let response = run::solve(connection, display, || {
        let mut attachables = Attachables::new();
        attachables.share(inputs::locals(&args.locals)?);
        attachables.auth(DockerConfig);
        attachables.secrets(attach::secrets(&args.secrets)?);
        if !args.ssh.is_empty() {
            attachables.ssh(attach::agents(&args.ssh)?);
        }
        outputs::attach(&outputs, &caches, layouts.iter().cloned(), &mut attachables);
        reference = kiln_session::new_id();
        let request = SolveRequest {
            r#ref: reference.clone(),
            definition: definition.clone(),
            frontend: args.frontend.clone(),
            frontend_attrs: attrs.clone(),
            exporters: outputs::exporters(&outputs),
            entitlements: args.allow.clone(),
            cache: Some(caches.options()),
            source_policy: source_policy.clone(),
            ..Default::default()
        };
        Ok(Job { request, attachables, shared_key: String::new() })
    });
    if let Some(path) = args.ref_file.as_ref().filter(|_| !reference.is_empty()) {
        std::fs::write(path, &reference).map_err(|error| CliError::file("write", path, error))?;
    }
    let response = response?;
    layout::record(&outputs, &response)?;
    caches.record(&response)?;
    args.metadata_file.as_ref().map_or(Ok(()), |path| build::metadata_file(path, &response))
}

/// The definition on standard input.
fn definition(no_cache: bool) -> Result<pb::Definition, CliError> {
    if std::io::stdin().is_terminal() {
        return Err(CliError::usage("give --frontend, or pipe an LLB definition into standard input"));
    }
    let mut input = Vec::new();
    std::io::stdin()
        .read_to_end(&mut input)
        .map_err(|error| CliError::file("read", "standard input", error))?;
    if input.is_empty() {
        return Err(CliError::usage("no LLB definition on standard input; is --frontend missing?"));
    }
    let mut definition = pb::Definition::decode(input.as_slice())
        .map_err(|error| CliError::usage(format!("standard input is no LLB definition: {error}")))?;
    if no_cache {
        ignore_cache(&mut definition);
    }
    Ok(definition)
}

/// Every vertex runs anew: the wish stands in the metadata, so digests stay as they are.
fn ignore_cache(definition: &mut pb::Definition) {
    for bytes in &definition.def {
        definition.metadata.entry(llb::digest(bytes)).or_default().ignore_cache = true;
    }
}

/// `KEY=VALUE` flags; a build argument without a value is taken from the environment, if it is there.
fn options(flags: &[String]) -> Result<HashMap<String, String>, CliError> {
    let from_environment = |name: &str| Some((format!("build-arg:{name}"), std::env::var(name).ok()?));
    let mut all: HashMap<_, _> = PASSED_ON.into_iter().filter_map(from_environment).collect();
    for flag in flags {
        match (flag.split_once('='), flag.strip_prefix("build-arg:")) {
            (Some((key, value)), _) => {
                all.insert(key.to_owned(), value.to_owned());
            }
            (None, Some(name)) if !name.is_empty() => all.extend(from_environment(name)),
            (None, _) => return Err(CliError::usage(format!("invalid --opt {flag:?}: expected KEY=VALUE"))),
        }
    }
    Ok(all)
}

/// `NAME=DIR` flags.
fn layouts(flags: &[String]) -> Result<Vec<ContentDir>, CliError> {
    let one = |flag: &String| {
        let (name, path) = flag
            .split_once('=')
            .ok_or_else(|| CliError::usage(format!("invalid --oci-layout {flag:?}: expected NAME=DIR")))?;
        let path = PathBuf::from(path);
        inputs::directory(&path, "read image layout")?;
        Ok(ContentDir { name: format!("oci:{name}"), path })
    };
    flags.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignoring_the_cache_marks_every_vertex() {
        let mut definition = pb::Definition { def: vec![vec![1], vec![2]], ..Default::default() };
        ignore_cache(&mut definition);
        assert_eq!(definition.metadata.len(), 2);
        assert!(definition.metadata.values().all(|metadata| metadata.ignore_cache));
        assert_eq!(definition.def, [vec![1], vec![2]]);
    }

    #[test]
    fn options_have_values_or_are_in_the_environment() {
        let of = |flags: &[&str]| options(&flags.iter().map(|flag| (*flag).to_owned()).collect::<Vec<_>>());
        let all = of(&["target=a=b", "build-arg:PATH", "build-arg:KILN_NOT_SET", "build-arg:X="]).unwrap();
        assert_eq!(all["target"], "a=b");
        assert_eq!(all["build-arg:PATH"], std::env::var("PATH").unwrap());
        assert_eq!(all["build-arg:X"], "");
        assert!(!all.contains_key("build-arg:KILN_NOT_SET"));
        assert!(of(&["target"]).unwrap_err().to_string().contains("expected KEY=VALUE"));
        assert!(layouts(&["x".to_owned()]).is_err());
        assert_eq!(layouts(&["x=/tmp".to_owned()]).unwrap()[0].name, "oci:x");
    }
}
