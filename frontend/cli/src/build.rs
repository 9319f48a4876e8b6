//! `kiln build`: flags become a solve request for the Dockerfile frontend, and what it shares with the daemon.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_proto::control::SolveRequest;
use kiln_session::client::Attachables;
use serde_json::Value;

use crate::args::{BuildArgs, Connection};
use crate::auth::DockerConfig;
use crate::caches::Caches;
use crate::contexts::{self, NamedContext};
use crate::error::CliError;
use crate::inputs::Inputs;
use crate::outputs::{self, OutputSpec};
use crate::progress::Display;
use crate::run::{self, Job, Response};
use crate::{attach, attest, explain, layout, stdout};

/// The daemon's own frontend.
const FRONTEND: &str = "dockerfile.v0";

/// Builds a Dockerfile.
pub(crate) fn main(connection: &Connection, args: BuildArgs) -> Result<(), CliError> {
    let plan = Plan::new(args)?;
    let outputs = outputs::parse(&plan.args.outputs, outputs::Docker::Load)?;
    let outputs = outputs::complete(outputs, plan.args.push, &plan.args.tags, &plan.args.annotations)?;
    if outputs.is_empty() && !plan.args.tags.is_empty() && !plan.args.quiet {
        eprintln!(
            "WARNING: no output given, the image stays in the build cache; use --push or -o to get it out"
        );
    }
    let display = Display::new(plan.args.progress, plan.args.quiet)?;
    let mut reference = String::new();
    let response = run::solve(connection, display, || {
        let job = plan.job(&outputs)?;
        reference.clone_from(&job.request.r#ref);
        Ok(job)
    });
    let explains =
        plan.args.explain && !matches!(response, Err(CliError::Interrupted(_) | CliError::Connect(_)));
    let finished = response.and_then(|response| {
        layout::record(&outputs, &response)?;
        plan.caches.record(&response)?;
        finish(&response, &plan.args)
    });
    if plan.args.explain && matches!(finished, Err(CliError::Interrupted(_))) && !reference.is_empty() {
        eprintln!("why steps were not cached: kiln history explain {reference}");
    }
    if explains {
        let explained = explain::build(connection, &reference, plan.args.format);
        // The outcome of the build itself is what counts.
        return finished.and(explained);
    }
    finished
}

/// What to build, with everything from this machine looked up.
pub(crate) struct Plan {
    pub(crate) args: BuildArgs,
    inputs: Inputs,
    named: Vec<NamedContext>,
    caches: Caches,
}

impl Plan {
    pub(crate) fn new(args: BuildArgs) -> Result<Self, CliError> {
        if let Some(flag) = args.absent.given() {
            return Err(CliError::usage(format!("unsupported: {flag}")));
        }
        let named = contexts::parse(&args.build_contexts)?;
        let inputs = Inputs::find(&args.context, args.file.as_deref())?;
        let caches = Caches::parse(&args.caches)?;
        Ok(Self { args, inputs, named, caches })
    }

    /// One attempt at building it.
    pub(crate) fn job(&self, outputs: &[OutputSpec]) -> Result<Job, CliError> {
        let args = &self.args;
        let mut attachables = self.attachables(outputs)?;
        attachables.secrets(attach::secrets(&args.secrets)?);
        if !args.ssh.is_empty() {
            attachables.ssh(attach::agents(&args.ssh)?);
        }
        let mut entitlements = args.allow.clone();
        if args.network.as_deref() == Some("host") && !entitlements.iter().any(|name| name == "network.host")
        {
            entitlements.push("network.host".into());
        }
        let request = SolveRequest {
            r#ref: kiln_session::new_id(),
            frontend: FRONTEND.into(),
            frontend_attrs: self.attrs()?,
            exporters: outputs::exporters(outputs),
            entitlements,
            cache: Some(self.caches.options()),
            ..Default::default()
        };
        Ok(Job { request, attachables, shared_key: self.shared_key() })
    }

    /// What the frontend reads, what outputs go into, and credentials for registries.
    pub(crate) fn attachables(&self, outputs: &[OutputSpec]) -> Result<Attachables, CliError> {
        let mut attachables = Attachables::new();
        let mut shared = self.inputs.share(&mut attachables)?;
        shared.extend(self.named.iter().filter_map(NamedContext::shared));
        attachables.share(shared);
        let layouts = self.named.iter().filter_map(NamedContext::store);
        outputs::attach(outputs, &self.caches, layouts, &mut attachables);
        attachables.auth(DockerConfig);
        Ok(attachables)
    }

    /// What the daemon keeps its copy of the context by.
    pub(crate) fn shared_key(&self) -> String {
        self.inputs.shared_key()
    }

    /// The frontend's options.
    pub(crate) fn attrs(&self) -> Result<HashMap<String, String>, CliError> {
        let args = &self.args;
        let mut attrs = self.inputs.attrs();
        attrs.extend(self.named.iter().flat_map(NamedContext::attrs));
        let mut set = |key: &str, value: String| {
            attrs.insert(key.to_owned(), value);
        };
        if let Some(target) = &args.target {
            set("target", target.clone());
        }
        for flag in &args.build_args {
            match flag.split_once('=') {
                Some((key, value)) => set(&format!("build-arg:{key}"), value.to_owned()),
                None => {
                    if let Ok(value) = std::env::var(flag) {
                        set(&format!("build-arg:{flag}"), value);
                    }
                }
            }
        }
        for flag in &args.labels {
            let (key, value) = flag.split_once('=').unwrap_or((flag, ""));
            set(&format!("label:{key}"), value.to_owned());
        }
        if !args.platforms.is_empty() {
            set("platform", args.platforms.join(","));
        }
        if args.no_cache {
            set("no-cache", String::new());
        } else if !args.no_cache_filter.is_empty() {
            set("no-cache", args.no_cache_filter.join(","));
        }
        if args.pull {
            set("image-resolve-mode", "pull".into());
        }
        if let Some(network) = args.network.as_ref().filter(|network| *network != "default") {
            set("force-network-mode", network.clone());
        }
        if !args.add_hosts.is_empty() {
            set("add-hosts", add_hosts(&args.add_hosts)?);
        }
        if let Some(size) = &args.shm_size {
            set("shm-size", shm_size(size)?.to_string());
        }
        if !args.ulimits.is_empty() {
            set("ulimit", args.ulimits.join(","));
        }
        if let Some(parent) = &args.cgroup_parent {
            set("cgroup-parent", parent.clone());
        }
        attrs.extend(self.caches.attr());
        attrs.extend(attest::attrs(&args.attests)?);
        Ok(attrs)
    }
}

/// `HOST:IP` or `HOST=IP`; the address may be an IPv6 one, with or without brackets.
fn add_hosts(flags: &[String]) -> Result<String, CliError> {
    let mut all = Vec::new();
    for flag in flags {
        let parts = flag.split_once('=').or_else(|| flag.split_once(':'));
        let (host, ip) =
            parts.ok_or_else(|| CliError::usage(format!("invalid --add-host {flag:?}: expected HOST:IP")))?;
        let ip = ip.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || (ip != "host-gateway" && ip.parse::<std::net::IpAddr>().is_err()) {
            return Err(CliError::usage(format!("invalid --add-host {flag:?}: {ip:?} is not an address")));
        }
        all.push(format!("{host}={ip}"));
    }
    Ok(all.join(","))
}

/// Sizes of memory are binary whatever their unit is called.
fn shm_size(text: &str) -> Result<u64, CliError> {
    let invalid = || CliError::usage(format!("invalid --shm-size {text:?}: expected e.g. 128m"));
    let lower = text.to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit()).unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return Err(invalid()),
    };
    let number: u64 = number.parse().map_err(|_| invalid())?;
    number.checked_mul(1 << shift).ok_or_else(invalid)
}

/// Writes the files that the flags ask for, and the image's id if progress is quiet.
fn finish(response: &Response, args: &BuildArgs) -> Result<(), CliError> {
    let id = response.get("containerimage.config.digest").or_else(|| response.get("containerimage.digest"));
    if args.quiet
        && let Some(id) = id
    {
        stdout::print(&format!("{id}\n"))?;
    }
    if let Some(path) = &args.iidfile {
        let id = id.ok_or_else(|| CliError::usage("--iidfile: this output has no image"))?;
        std::fs::write(path, id).map_err(|error| CliError::file("write", path, error))?;
    }
    if let Some(path) = &args.metadata_file {
        metadata_file(path, response)?;
    }
    Ok(())
}

/// Writes the response as JSON; values that are JSON in base64 are embedded.
pub(crate) fn metadata_file(path: &Path, response: &Response) -> Result<(), CliError> {
    let sorted: BTreeMap<&String, Value> = response.iter().map(|(key, value)| (key, embed(value))).collect();
    let text =
        serde_json::to_string_pretty(&sorted).map_err(|error| CliError::file("write", path, error.into()))?;
    std::fs::write(path, text).map_err(|error| CliError::file("write", path, error))
}

fn embed(value: &str) -> Value {
    let decoded = STANDARD.decode(value).ok().and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    match decoded {
        Some(object @ Value::Object(_)) => object,
        _ => Value::String(value.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn plan(flags: &[&str]) -> Result<Plan, CliError> {
        let parsed = Cli::try_parse_from(["kiln", "build"].iter().chain(flags)).unwrap();
        let Command::Build(args) = parsed.command else { panic!("not a build") };
        Plan::new(*args)
    }

    #[test]
    fn flags_become_the_frontends_options() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("x.Dockerfile"), "").unwrap();
        let file = dir.path().join("x.Dockerfile");
        let plan = plan(&[
            "-f",
            file.to_str().unwrap(),
            "--target",
            "t",
            "--build-arg",
            "A=1=2",
            "--build-arg",
            "KILN_NOT_SET",
            "--label",
            "l=v",
            "--platform",
            "linux/amd64,linux/arm64",
            "--no-cache",
            "--pull",
            "--network",
            "none",
            "--add-host",
            "h:1.2.3.4",
            "--add-host",
            "six=[::1]",
            "--shm-size",
            "2m",
            "--ulimit",
            "nofile=1:2",
            path,
        ])
        .unwrap();
        let attrs: BTreeMap<_, _> = plan.attrs().unwrap().into_iter().collect();
        let expected = [
            ("add-hosts", "h=1.2.3.4,six=::1"),
            ("build-arg:A", "1=2"),
            ("filename", "x.Dockerfile"),
            ("force-network-mode", "none"),
            ("image-resolve-mode", "pull"),
            ("label:l", "v"),
            ("no-cache", ""),
            ("platform", "linux/amd64,linux/arm64"),
            ("shm-size", "2097152"),
            ("target", "t"),
            ("ulimit", "nofile=1:2"),
        ];
        let expected: BTreeMap<_, _> =
            expected.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
        assert_eq!(attrs, expected);
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let refused = plan(&["--load", "/"]).err().expect("refused");
        assert!(refused.to_string().contains("unsupported: --load"));
        let plan = plan(&["--add-host", "h", "/"]).unwrap();
        assert!(plan.attrs().unwrap_err().to_string().contains("--add-host"));
    }

    #[test]
    fn the_metadata_file_embeds_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta.json");
        let descriptor = STANDARD.encode(r#"{"size":3}"#);
        let response = HashMap::from([
            ("d".to_owned(), descriptor),
            ("n".to_owned(), "plain".to_owned()),
            ("x".to_owned(), "MTIz".to_owned()),
        ]);
        metadata_file(&path, &response).unwrap();
        let read: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(read, serde_json::json!({"d": {"size": 3}, "n": "plain", "x": "MTIz"}));
        // Scripts read it whatever was built.
        metadata_file(&path, &HashMap::new()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"{}");
    }
}
