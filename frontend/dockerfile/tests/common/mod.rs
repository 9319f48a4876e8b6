//! A resolver with a few made-up images, and a readable form of definitions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use futures::future::BoxFuture;
use kiln_dockerfile::{
    CompileError, CompileInput, Compiled, CompiledTarget, ContextSource, ImageResolver, LintReport,
    NamedContext, Options, Outline, ResolveError, ResolveMode, ResolvedImage,
};
use kiln_proto::{llb, pattern, pb, platform};
use serde_json::{Value, json};

/// The digest of every image here.
pub(crate) const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Knows the images given to it, and what it was asked.
#[derive(Default)]
pub(crate) struct Images {
    configs: HashMap<String, Value>,
    input: pb::Definition,
    pub(crate) asked: Mutex<Vec<String>>,
}

impl Images {
    /// One base image, `alpine`, as on Docker Hub.
    pub(crate) fn new() -> Self {
        Self::default().with("docker.io/library/alpine:latest", base(json!({"Cmd": ["/bin/sh"]})))
    }

    pub(crate) fn with(mut self, reference: &str, config: Value) -> Self {
        self.configs.insert(reference.to_string(), config);
        self
    }

    /// `input` is what named contexts are that are inputs.
    pub(crate) fn with_input(self, input: pb::Definition) -> Self {
        Self { input, ..self }
    }
}

/// The configuration of an amd64 image with one layer.
pub(crate) fn base(mut config: Value) -> Value {
    config["Env"] = json!(["PATH=/usr/bin:/bin"]);
    json!({
        "created": "2024-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "ADD rootfs"}]
    })
}

impl ImageResolver for Images {
    fn resolve<'a>(
        &'a self,
        reference: &'a str,
        platform: &'a pb::Platform,
        mode: ResolveMode,
        log_name: &'a str,
    ) -> BoxFuture<'a, Result<ResolvedImage, ResolveError>> {
        Box::pin(async move {
            let asked = format!("{} {} {log_name}", platform::format(platform), mode.as_str());
            self.asked.lock().map_err(|e| e.to_string())?.push(asked);
            match self.configs.get(reference) {
                Some(config) => Ok(ResolvedImage {
                    digest: DIGEST.into(),
                    config: config.to_string().into_bytes(),
                    reference: reference.into(),
                }),
                None => {
                    Err(format!("failed to resolve source metadata for {reference}: {reference}: not found")
                        .into())
                }
            }
        })
    }

    /// `local:NAME` has an ignore file, `input:NAME` is the given definition, and nothing else is there.
    fn context<'a>(
        &'a self,
        key: &'a str,
        value: &'a str,
        _: &'a pb::Platform,
    ) -> BoxFuture<'a, Result<NamedContext, ResolveError>> {
        Box::pin(async move {
            match value.split_once(':') {
                Some(("local", name)) => Ok(NamedContext {
                    source: ContextSource::Local {
                        name: name.into(),
                        session: "sess".into(),
                        shared_key_hint: format!("context:{key}-"),
                    },
                    ignore_patterns: Some(vec!["junk".into()]),
                    config: None,
                }),
                Some(("input", _)) => Ok(NamedContext {
                    source: ContextSource::Definition(self.input.clone()),
                    ignore_patterns: None,
                    config: Some(base(json!({"User": "maker"})).to_string().into_bytes()),
                }),
                _ => Err(format!("no context {key}={value}").into()),
            }
        })
    }
}

/// Compiles with attributes as a client sends them.
pub(crate) fn try_compile(
    images: &Images,
    dockerfile: &str,
    attrs: &[(&str, &str)],
) -> Result<Compiled, CompileError> {
    compile_with_ignore(images, dockerfile, attrs, None)
}

pub(crate) fn compile_with_ignore(
    images: &Images,
    dockerfile: &str,
    attrs: &[(&str, &str)],
    ignore: Option<&str>,
) -> Result<Compiled, CompileError> {
    let options = options(attrs);
    let input = input(dockerfile, &options, ignore);
    futures::executor::block_on(kiln_dockerfile::compile(input, images))
}

/// What the checks find.
pub(crate) fn lint(dockerfile: &str, attrs: &[(&str, &str)]) -> LintReport {
    let options = options(attrs);
    let input = input(dockerfile, &options, None);
    futures::executor::block_on(kiln_dockerfile::lint(input, &Images::new()))
}

/// What can be given to a target.
pub(crate) fn outline(dockerfile: &str, attrs: &[(&str, &str)]) -> Result<Outline, CompileError> {
    let options = options(attrs);
    let input = input(dockerfile, &options, None);
    futures::executor::block_on(kiln_dockerfile::outline(input, &Images::new()))
}

fn options(attrs: &[(&str, &str)]) -> Options {
    let attrs = attrs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    Options::from_attrs(&attrs).unwrap_or_else(|e| panic!("{e}"))
}

fn input<'a>(dockerfile: &'a str, options: &'a Options, ignore: Option<&str>) -> CompileInput<'a> {
    CompileInput {
        dockerfile: dockerfile.as_bytes(),
        filename: "Dockerfile",
        options,
        ignore_patterns: ignore.map(|text| pattern::parse_ignore_file(text.as_bytes())),
        context: ContextSource::Local {
            name: "context".into(),
            session: "sess".into(),
            shared_key_hint: "context".into(),
        },
        build_platform: platform::parse("linux/amd64").unwrap_or_else(|e| panic!("{e}")),
        dockerfile_definition: None,
    }
}

pub(crate) fn compile(dockerfile: &str, attrs: &[(&str, &str)]) -> Compiled {
    try_compile(&Images::new(), dockerfile, attrs).unwrap_or_else(|e| panic!("{}: {e}", e.position()))
}

/// The error of a file that does not compile, as `file:line:column: text`.
pub(crate) fn error(dockerfile: &str, attrs: &[(&str, &str)]) -> String {
    match try_compile(&Images::new(), dockerfile, attrs) {
        Ok(_) => panic!("compiles: {dockerfile}"),
        Err(e) => format!("{}: {e}", e.position()),
    }
}

/// The configuration of the first target.
pub(crate) fn config(compiled: &Compiled) -> Value {
    serde_json::from_slice(&compiled.targets[0].image_config).unwrap_or_else(|e| panic!("{e}"))
}

/// `created_by` of each history entry, `*` in front where there is a layer.
pub(crate) fn history(compiled: &Compiled) -> Vec<String> {
    let config = config(compiled);
    let entries = config["history"].as_array().cloned().unwrap_or_default();
    entries
        .iter()
        .map(|h| {
            let text = h["created_by"].as_str().unwrap_or_default();
            if h["empty_layer"] == true { text.to_string() } else { format!("* {text}") }
        })
        .collect()
}

/// Names of the vertices of the first target, inputs first.
pub(crate) fn names(compiled: &Compiled) -> Vec<String> {
    loaded(&compiled.targets[0]).vertices.into_iter().map(|v| v.name.to_string()).collect()
}

pub(crate) fn loaded(target: &CompiledTarget) -> llb::Loaded {
    let def = target.definition.as_ref().unwrap_or_else(|| panic!("scratch"));
    llb::load(def).unwrap_or_else(|e| panic!("{e}"))
}

/// A definition with vertices numbered instead of hashed.
pub(crate) fn render(target: &CompiledTarget) -> Value {
    let Some(def) = &target.definition else { return json!("scratch") };
    let loaded = llb::load(def).unwrap_or_else(|e| panic!("{e}"));
    let vertices: Vec<Value> = loaded
        .vertices
        .iter()
        .enumerate()
        .map(|(n, v)| {
            let mut out = json!({
                "#": n,
                "name": *v.name,
                "inputs": v.inputs.iter().map(|(at, output)| format!("{at}:{output}")).collect::<Vec<_>>(),
                "op": op(&v.op),
            });
            if let Some(p) = &v.op.platform {
                out["platform"] = json!(platform::format(p));
            }
            if v.metadata.ignore_cache {
                out["ignore_cache"] = json!(true);
            }
            if let Some(lines) = loaded.source.locations.get(&*v.digest) {
                let lines = lines.locations.iter().flat_map(|l| &l.ranges).filter_map(|r| r.start.as_ref());
                out["lines"] = json!(lines.map(|p| p.line).collect::<Vec<_>>());
            }
            out
        })
        .collect();
    json!({ "vertices": vertices, "root": format!("{:?}", loaded.root) })
}

fn op(op: &pb::Op) -> Value {
    match &op.op {
        Some(pb::op::Op::Source(s)) => json!({ "source": s.identifier, "attrs": s.attrs }),
        Some(pb::op::Op::Exec(e)) => exec(e),
        Some(pb::op::Op::File(f)) => json!({ "file": f.actions.iter().map(action).collect::<Vec<_>>() }),
        Some(pb::op::Op::Merge(m)) => {
            json!({ "merge": m.inputs.iter().map(|i| i.input).collect::<Vec<_>>() })
        }
        other => panic!("unexpected {other:?}"),
    }
}

fn exec(e: &pb::ExecOp) -> Value {
    let meta = e.meta.clone().unwrap_or_default();
    let mut out = json!({ "exec": meta.args, "env": meta.env, "cwd": meta.cwd });
    let mut set = |key: &str, value: Value, default: Value| {
        if value != default {
            out[key] = value;
        }
    };
    set("user", json!(meta.user), json!(""));
    set("hostname", json!(meta.hostname), json!(""));
    set("network", json!(e.network().as_str_name()), json!("UNSET"));
    set("security", json!(e.security().as_str_name()), json!("SANDBOX"));
    set("proxy", json!(meta.proxy_env.map(|p| p.http_proxy)), Value::Null);
    set(
        "hosts",
        json!(meta.extra_hosts.iter().map(|h| format!("{} {}", h.host, h.ip)).collect::<Vec<_>>()),
        json!([]),
    );
    set(
        "secretenv",
        json!(e.secretenv.iter().map(|s| format!("{}={} {}", s.name, s.id, s.optional)).collect::<Vec<_>>()),
        json!([]),
    );
    out["mounts"] = json!(
        e.mounts
            .iter()
            .map(|m| {
                let mut text =
                    format!("{} {} <- {} -> {}", m.mount_type().as_str_name(), m.dest, m.input, m.output);
                if !m.selector.is_empty() {
                    text.push_str(&format!(" selector={}", m.selector));
                }
                if m.readonly {
                    text.push_str(" ro");
                }
                if let Some(c) = &m.cache_opt {
                    text.push_str(&format!(" id={} {}", c.id, c.sharing().as_str_name()));
                }
                if let Some(s) = &m.secret_opt {
                    text.push_str(&format!(
                        " id={} {}:{} {:o} optional={}",
                        s.id, s.uid, s.gid, s.mode, s.optional
                    ));
                }
                if let Some(s) = &m.ssh_opt {
                    text.push_str(&format!(" id={} {:o} optional={}", s.id, s.mode, s.optional));
                }
                if let Some(t) = &m.tmpfs_opt {
                    text.push_str(&format!(" size={}", t.size));
                }
                text
            })
            .collect::<Vec<_>>()
    );
    out
}

fn action(a: &pb::FileAction) -> Value {
    use pb::file_action::Action;
    let io = format!("{},{} -> {}", a.input, a.secondary_input, a.output);
    let owner = |o: &Option<pb::ChownOpt>| {
        let user = |u: &Option<pb::UserOpt>| match u.as_ref().and_then(|u| u.user.clone()) {
            Some(pb::user_opt::User::ById(id)) => id.to_string(),
            Some(pb::user_opt::User::ByName(n)) => format!("{}@{}", n.name, n.input),
            None => "-".into(),
        };
        o.as_ref().map(|o| format!("{}:{}", user(&o.user), user(&o.group)))
    };
    let mut map: BTreeMap<&str, Value> = BTreeMap::new();
    map.insert("io", json!(io));
    match a.action.as_ref() {
        Some(Action::Copy(c)) => {
            map.insert("copy", json!(format!("{} {}", c.src, c.dest)));
            let mode = if c.mode_str.is_empty() { c.mode.to_string() } else { c.mode_str.clone() };
            map.insert("mode", json!(mode));
            map.insert("owner", json!(owner(&c.owner)));
            let flags = [
                ("follow", c.follow_symlink),
                ("contents", c.dir_copy_contents),
                ("unpack", c.attempt_unpack_docker_compatibility),
                ("mkdest", c.create_dest_path),
                ("wildcard", c.allow_wildcard),
            ];
            let flags: Vec<&str> = flags.into_iter().filter_map(|(n, on)| on.then_some(n)).collect();
            map.insert("flags", json!(flags.join(" ")));
            for (key, list) in [
                ("include", &c.include_patterns),
                ("exclude", &c.exclude_patterns),
                ("required", &c.required_paths),
            ] {
                if !list.is_empty() {
                    map.insert(key, json!(list));
                }
            }
        }
        Some(Action::Mkdir(m)) => {
            map.insert("mkdir", json!(m.path));
            map.insert("mode", json!(format!("{:o}", m.mode)));
            map.insert("parents", json!(m.make_parents));
            map.insert("owner", json!(owner(&m.owner)));
            map.insert("timestamp", json!(m.timestamp));
        }
        Some(Action::Mkfile(m)) => {
            map.insert("mkfile", json!(m.path));
            map.insert("mode", json!(format!("{:o}", m.mode)));
            map.insert("data", json!(String::from_utf8_lossy(&m.data)));
        }
        other => panic!("unexpected {other:?}"),
    }
    json!(map)
}
