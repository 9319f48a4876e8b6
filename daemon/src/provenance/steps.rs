//! The steps of a build in a predicate: the definition's operations in the JSON that Go makes of their messages
//! (fields by their names in the protocol, without what has its zero value), and where they stand in sources.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_cache::Ref;
use kiln_proto::llb::{self, Loaded, LoadedVertex};
use kiln_proto::pb;
use serde_json::{Map, Value, json};

use super::sources::redacted;

/// Attributes of sources that are of one run only.
const OF_THE_RUN: [&str; 2] = ["local.session", "local.unique"];

fn id(at: usize) -> String {
    format!("step{at}")
}

/// The operations, inputs first, the last one naming the result; and which digest is which step.
fn steps(loaded: &Loaded) -> Option<(Vec<Value>, Map<String, Value>)> {
    let root = loaded.root?;
    let input = |(vertex, output): &(usize, u32)| format!("{}:{output}", id(*vertex));
    let mut steps: Vec<Value> = loaded
        .vertices
        .iter()
        .enumerate()
        .map(|(at, vertex)| {
            let mut step = json!({"id": id(at), "op": op(&vertex.op)});
            if !vertex.inputs.is_empty() {
                step["inputs"] = vertex.inputs.iter().map(input).collect();
            }
            step
        })
        .collect();
    steps.push(json!({"id": id(steps.len()), "op": {"Op": {}}, "inputs": [input(&root)]}));
    let digest = |(at, vertex): (usize, &LoadedVertex)| (vertex.digest.to_string(), id(at).into());
    let digests: BTreeMap<String, Value> = loaded.vertices.iter().enumerate().map(digest).collect();
    Some((steps, digests.into_iter().collect()))
}

/// What the steps made, by step and output. A step that was not reached, because the cache answered for one above it,
/// made what lies below that one's layer.
pub(super) fn results(loaded: &Loaded, made: &HashMap<Arc<str>, Vec<Ref>>) -> BTreeMap<String, Ref> {
    let mut results: BTreeMap<(usize, u32), Ref> = BTreeMap::new();
    for (at, vertex) in loaded.vertices.iter().enumerate() {
        let outputs = made.get(&vertex.digest).into_iter().flatten();
        results.extend((0..).zip(outputs).map(|(output, result)| ((at, output), result.clone())));
    }
    // Inputs come before who uses them.
    for (at, vertex) in loaded.vertices.iter().enumerate().rev() {
        for (output, input) in layered(vertex) {
            let Some(below) = results.get(&(at, output)).map(|result| result.as_ref()?.parent()) else {
                continue;
            };
            let known = !made.get(&loaded.vertices[input.0].digest).is_none_or(Vec::is_empty);
            if !known && below.is_some() {
                results.entry(input).or_insert(below);
            }
        }
    }
    results.into_iter().map(|((at, output), result)| (format!("{}:{output}", id(at)), result)).collect()
}

/// The outputs of an operation that are its input's files with one layer upon them.
fn layered(vertex: &LoadedVertex) -> Vec<(u32, (usize, u32))> {
    use pb::op::Op;
    let input = |index: i64| vertex.inputs.get(usize::try_from(index).ok()?).copied();
    match &vertex.op.op {
        Some(Op::Exec(exec)) => {
            let mounts = exec.mounts.iter().filter(|mount| mount.dest == "/");
            mounts
                .filter_map(|mount| Some((u32::try_from(mount.output).ok()?, input(mount.input)?)))
                .collect()
        }
        Some(Op::File(file)) => {
            let below = |action: &pb::FileAction| {
                let mut next = action.input;
                // At most through all the actions before it.
                for _ in &file.actions {
                    match usize::try_from(next).ok()?.checked_sub(vertex.inputs.len()) {
                        None => break,
                        Some(action) => next = file.actions.get(action)?.input,
                    }
                }
                Some((u32::try_from(action.output).ok()?, input(next)?))
            };
            file.actions.iter().filter_map(below).collect()
        }
        _ => Vec::new(),
    }
}

/// The result's definition.
pub(super) fn config(loaded: &Loaded) -> Option<Value> {
    let (steps, digests) = steps(loaded)?;
    Some(json!({"llbDefinition": steps, "digestMapping": digests}))
}

/// The files that the definition was written in, and which lines became which step.
pub(super) fn source_map(loaded: &Loaded) -> Option<Value> {
    if loaded.source.infos.is_empty() {
        return None;
    }
    let infos: Vec<Value> = loaded.source.infos.iter().map(info).collect();
    let mut locations = Map::new();
    for (at, vertex) in loaded.vertices.iter().enumerate() {
        if let Some(places) = loaded.source.locations.get(&*vertex.digest) {
            let places: Vec<Value> = places.locations.iter().map(location).collect();
            locations.insert(id(at), compact(json!({"locations": places})));
        }
    }
    Some(json!({"locations": locations, "infos": infos}))
}

fn info(info: &pb::SourceInfo) -> Value {
    let definition = info.definition.as_ref().and_then(|definition| llb::load(definition).ok());
    let (steps, digests) = definition.as_ref().and_then(steps).unwrap_or_default();
    compact(json!({
        "filename": info.filename, "language": info.language, "data": STANDARD.encode(&info.data),
        "llbDefinition": steps, "digestMapping": (!digests.is_empty()).then_some(digests),
    }))
}

fn location(location: &pb::Location) -> Value {
    let position =
        |position: &pb::Position| compact(json!({"line": position.line, "character": position.character}));
    let ranges: Vec<Value> = location
        .ranges
        .iter()
        .map(|range| {
            let (start, end) = (range.start.as_ref().map(position), range.end.as_ref().map(position));
            compact(json!({"start": start, "end": end}))
        })
        .collect();
    compact(json!({"sourceIndex": location.source_index, "ranges": ranges}))
}

/// Without fields of zero value. Messages that are there stay, even empty.
fn compact(mut value: Value) -> Value {
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|_, value| match value {
            Value::Null => false,
            Value::Bool(value) => *value,
            Value::Number(number) => number.as_f64() != Some(0.0),
            Value::String(text) => !text.is_empty(),
            Value::Array(items) => !items.is_empty(),
            Value::Object(_) => true,
        });
    }
    value
}

fn op(op: &pb::Op) -> Value {
    use pb::op::Op;
    let wrapped = match &op.op {
        Some(Op::Exec(exec)) => json!({"exec": exec_op(exec)}),
        Some(Op::Source(source)) => {
            let kept = source.attrs.iter().filter(|(name, _)| !OF_THE_RUN.contains(&name.as_str()));
            let attrs: BTreeMap<_, _> = kept.map(|(name, value)| (name, redacted(value))).collect();
            let attrs = (!attrs.is_empty()).then_some(attrs);
            json!({"source": compact(json!({"identifier": redacted(&source.identifier), "attrs": attrs}))})
        }
        Some(Op::File(file)) => {
            let actions: Vec<Value> = file.actions.iter().map(action).collect();
            json!({"file": compact(json!({"actions": actions}))})
        }
        Some(Op::Build(build)) => json!({"build": compact(json!({"builder": build.builder}))}),
        Some(Op::Merge(merge)) => {
            let inputs: Vec<Value> =
                merge.inputs.iter().map(|input| compact(json!({"input": input.input}))).collect();
            json!({"merge": compact(json!({"inputs": inputs}))})
        }
        Some(Op::Diff(diff)) => {
            let lower = diff.lower.as_ref().map(|lower| compact(json!({"input": lower.input})));
            let upper = diff.upper.as_ref().map(|upper| compact(json!({"input": upper.input})));
            json!({"diff": compact(json!({"lower": lower, "upper": upper}))})
        }
        Some(Op::Passthrough(pass)) => {
            json!({"passthrough": compact(json!({"id": pass.id, "outputs": pass.outputs}))})
        }
        None => json!({}),
    };
    let platform = op.platform.as_ref().map(|platform| {
        compact(json!({
            "Architecture": platform.architecture, "OS": platform.os, "Variant": platform.variant,
            "OSVersion": platform.os_version, "OSFeatures": platform.os_features,
        }))
    });
    let constraints =
        op.constraints.as_ref().map(|constraints| compact(json!({"filter": constraints.filter})));
    compact(json!({"Op": wrapped, "platform": platform, "constraints": constraints}))
}

fn exec_op(exec: &pb::ExecOp) -> Value {
    let meta = exec.meta.as_ref().map(|meta| {
        let proxy = meta.proxy_env.as_ref().map(|proxy| {
            compact(json!({
                "http_proxy": redacted(&proxy.http_proxy), "https_proxy": redacted(&proxy.https_proxy),
                "ftp_proxy": redacted(&proxy.ftp_proxy), "no_proxy": proxy.no_proxy,
                "all_proxy": redacted(&proxy.all_proxy),
            }))
        });
        let hosts: Vec<Value> =
            meta.extra_hosts.iter().map(|host| compact(json!({"Host": host.host, "IP": host.ip}))).collect();
        let limits: Vec<Value> = meta
            .ulimit
            .iter()
            .map(|limit| compact(json!({"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard})))
            .collect();
        compact(json!({
            "args": meta.args, "env": meta.env, "cwd": meta.cwd, "user": meta.user, "proxy_env": proxy,
            "extraHosts": hosts, "hostname": meta.hostname, "ulimit": limits,
            "cgroupParent": meta.cgroup_parent,
            "removeMountStubsRecursive": meta.remove_mount_stubs_recursive,
            "validExitCodes": meta.valid_exit_codes,
        }))
    });
    let mounts: Vec<Value> = exec.mounts.iter().map(mount).collect();
    let secrets: Vec<Value> = exec
        .secretenv
        .iter()
        .map(|secret| compact(json!({"ID": secret.id, "name": secret.name, "optional": secret.optional})))
        .collect();
    compact(json!({
        "meta": meta, "mounts": mounts, "network": exec.network, "security": exec.security,
        "secretenv": secrets,
    }))
}

fn mount(mount: &pb::Mount) -> Value {
    let tmpfs = mount.tmpfs_opt.as_ref().map(|tmpfs| compact(json!({"size": tmpfs.size})));
    let cache = mount.cache_opt.as_ref();
    let cache = cache.map(|cache| compact(json!({"ID": cache.id, "sharing": cache.sharing})));
    let secret = mount.secret_opt.as_ref().map(|secret| {
        compact(json!({
            "ID": secret.id, "uid": secret.uid, "gid": secret.gid, "mode": secret.mode,
            "optional": secret.optional,
        }))
    });
    let ssh = mount.ssh_opt.as_ref().map(|ssh| {
        compact(json!({
            "ID": ssh.id, "uid": ssh.uid, "gid": ssh.gid, "mode": ssh.mode, "optional": ssh.optional,
        }))
    });
    compact(json!({
        "input": mount.input, "selector": mount.selector, "dest": mount.dest, "output": mount.output,
        "readonly": mount.readonly, "mountType": mount.mount_type, "TmpfsOpt": tmpfs, "cacheOpt": cache,
        "secretOpt": secret, "SSHOpt": ssh, "resultID": mount.result_id, "contentCache": mount.content_cache,
    }))
}

fn action(action: &pb::FileAction) -> Value {
    use pb::file_action::Action;
    let made = match &action.action {
        Some(Action::Copy(copy)) => json!({"copy": compact(json!({
            "src": copy.src, "dest": copy.dest, "owner": owner(&copy.owner), "mode": copy.mode,
            "followSymlink": copy.follow_symlink, "dirCopyContents": copy.dir_copy_contents,
            "attemptUnpackDockerCompatibility": copy.attempt_unpack_docker_compatibility,
            "createDestPath": copy.create_dest_path, "allowWildcard": copy.allow_wildcard,
            "allowEmptyWildcard": copy.allow_empty_wildcard, "timestamp": copy.timestamp,
            "include_patterns": copy.include_patterns, "exclude_patterns": copy.exclude_patterns,
            "alwaysReplaceExistingDestPaths": copy.always_replace_existing_dest_paths,
            "modeStr": copy.mode_str, "required_paths": copy.required_paths,
        }))}),
        Some(Action::Mkfile(file)) => json!({"mkfile": compact(json!({
            "path": file.path, "mode": file.mode, "data": STANDARD.encode(&file.data),
            "owner": owner(&file.owner), "timestamp": file.timestamp,
        }))}),
        Some(Action::Mkdir(dir)) => json!({"mkdir": compact(json!({
            "path": dir.path, "mode": dir.mode, "makeParents": dir.make_parents,
            "owner": owner(&dir.owner), "timestamp": dir.timestamp,
        }))}),
        Some(Action::Rm(rm)) => json!({"rm": compact(json!({
            "path": rm.path, "allowNotFound": rm.allow_not_found, "allowWildcard": rm.allow_wildcard,
        }))}),
        // The form has no place for links.
        Some(Action::Symlink(_)) | None => json!({}),
    };
    json!({
        "input": action.input, "secondaryInput": action.secondary_input, "output": action.output,
        "Action": made,
    })
}

fn owner(owner: &Option<pb::ChownOpt>) -> Value {
    use pb::user_opt::User;
    let Some(owner) = owner else { return Value::Null };
    let user = |user: &Option<pb::UserOpt>| {
        user.as_ref().map(|user| match &user.user {
            Some(User::ByName(named)) => {
                json!({"User": {"byName": compact(json!({"name": named.name, "input": named.input}))}})
            }
            Some(User::ById(id)) => json!({"User": compact(json!({"byId": id}))}),
            None => json!({"User": null}),
        })
    };
    compact(json!({"user": user(&owner.user), "group": user(&owner.group)}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loaded(ops: Vec<pb::Op>) -> Loaded {
        let mut builder = llb::Builder::new();
        let mut last = String::new();
        for (at, mut op) in ops.into_iter().enumerate() {
            if at > 0 {
                op.inputs = vec![pb::Input { digest: last, index: 0 }];
            }
            last = builder.add(&op, pb::OpMetadata::default());
        }
        llb::load(&builder.finish(&pb::Input { digest: last, index: 0 })).expect("a definition")
    }

    fn source() -> pb::Op {
        let source =
            pb::SourceOp { identifier: "docker-image://docker.io/library/a".into(), ..Default::default() };
        pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() }
    }

    fn run(output: i64) -> pb::Op {
        let mount = pb::Mount { dest: "/".into(), output, ..pb::Mount::default() };
        let meta = pb::Meta { args: vec!["true".into()], ..pb::Meta::default() };
        let exec = pb::ExecOp { meta: Some(meta), mounts: vec![mount], ..pb::ExecOp::default() };
        pb::Op { op: Some(pb::op::Op::Exec(exec.into())), ..pb::Op::default() }
    }

    fn copies() -> pb::Op {
        let action = |input, output| pb::FileAction {
            input,
            secondary_input: llb::EMPTY,
            output,
            action: Some(pb::file_action::Action::Mkdir(pb::FileActionMkDir::default())),
        };
        let file = pb::FileOp { actions: vec![action(0, -1), action(1, -1), action(2, 0)] };
        pb::Op { op: Some(pb::op::Op::File(file)), ..pb::Op::default() }
    }

    #[test]
    fn credentials_of_sources_are_masked() {
        let identifier = "https://user:word@example.invalid/a".to_owned();
        let attrs =
            [("git.fullurl".to_owned(), identifier.clone()), ("local.unique".to_owned(), "1".to_owned())];
        let source = pb::SourceOp { identifier, attrs: attrs.into() };
        let shown = op(&pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() });
        let masked = "https://xxxxx:xxxxx@example.invalid/a";
        assert_eq!(
            shown,
            json!({"Op": {"source": {"identifier": masked, "attrs": {"git.fullurl": masked}}}})
        );
    }

    #[test]
    fn layers_lie_on_the_first_input() {
        let loaded = loaded(vec![source(), run(0), copies(), run(-1)]);
        let of = |at: usize| layered(&loaded.vertices[at]);
        assert_eq!(of(0), []);
        assert_eq!(of(1), [(0, (0, 0))]);
        assert_eq!(of(2), [(0, (1, 0))]);
        assert_eq!(of(3), []);
    }

    #[test]
    fn what_lies_below_a_cached_step_is_known() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let store =
            kiln_cache::Store::open(directory.path(), kiln_cache::StoreOptions::default()).expect("open");
        let snapshots = store.snapshots();
        let layer = |parent: Option<&kiln_cache::SnapshotRef>| {
            let staged = snapshots.stage(parent).expect("stage");
            snapshots.commit(staged, kiln_cache::SnapshotMeta::new("step")).expect("commit")
        };
        let bottom = layer(None);
        let middle = layer(Some(&bottom));
        let top = layer(Some(&middle));
        let loaded = loaded(vec![source(), run(0), copies()]);
        let made = HashMap::from([(loaded.vertices[2].digest.clone(), vec![Some(top.clone())])]);
        let found = results(&loaded, &made);
        let ids: Vec<(&str, &str)> = found
            .iter()
            .map(|(name, result)| (name.as_str(), result.as_ref().map_or("", |r| r.id())))
            .collect();
        assert_eq!(ids, [("step0:0", bottom.id()), ("step1:0", middle.id()), ("step2:0", top.id())]);
    }
}
