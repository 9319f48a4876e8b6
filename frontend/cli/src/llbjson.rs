//! LLB vertices as JSON for people: the wire's field names, without what has its default value.

use kiln_proto::llb::LoadedVertex;
use kiln_proto::pb;
use serde_json::{Map, Value, json};

/// One vertex.
pub(crate) fn vertex(vertex: &LoadedVertex) -> Value {
    let inputs = vertex.inputs.iter().zip(&*vertex.input_digests);
    let inputs: Vec<Value> =
        inputs.map(|((_, output), digest)| json!({"digest": &**digest, "index": output})).collect();
    let mut out = Map::new();
    out.insert("digest".into(), (*vertex.digest).into());
    out.insert("name".into(), (*vertex.name).into());
    out.insert("inputs".into(), inputs.into());
    out.insert("op".into(), op(&vertex.op));
    if let Some(platform) = &vertex.op.platform {
        out.insert("platform".into(), kiln_proto::platform::format_all(platform).into());
    }
    let metadata = json!({
        "ignoreCache": vertex.metadata.ignore_cache, "description": texts(&vertex.metadata.description),
    });
    out.insert("metadata".into(), metadata);
    compact(Value::Object(out))
}

fn op(op: &pb::Op) -> Value {
    use pb::op::Op;
    match &op.op {
        Some(Op::Exec(exec)) => json!({"exec": exec_op(exec)}),
        Some(Op::Source(source)) => {
            json!({"source": {"identifier": source.identifier, "attrs": texts(&source.attrs)}})
        }
        Some(Op::File(file)) => {
            json!({"file": {"actions": file.actions.iter().map(action).collect::<Vec<_>>()}})
        }
        Some(Op::Build(build)) => json!({"build": {"builder": build.builder, "attrs": texts(&build.attrs)}}),
        Some(Op::Merge(merge)) => {
            json!({"merge": {"inputs": merge.inputs.iter().map(|i| i.input).collect::<Vec<_>>()}})
        }
        Some(Op::Diff(diff)) => {
            let lower = diff.lower.as_ref().map(|lower| lower.input);
            let upper = diff.upper.as_ref().map(|upper| upper.input);
            json!({"diff": {"lower": lower, "upper": upper}})
        }
        Some(Op::Passthrough(pass)) => json!({"passthrough": {"id": pass.id, "outputs": pass.outputs}}),
        None => Value::Null,
    }
}

fn exec_op(exec: &pb::ExecOp) -> Value {
    let meta = exec.meta.clone().unwrap_or_default();
    let hosts: Vec<String> =
        meta.extra_hosts.iter().map(|host| format!("{}={}", host.host, host.ip)).collect();
    let limits: Vec<String> =
        meta.ulimit.iter().map(|limit| format!("{}={}:{}", limit.name, limit.soft, limit.hard)).collect();
    let proxy = meta.proxy_env.map(|proxy| {
        json!({
            "httpProxy": proxy.http_proxy, "httpsProxy": proxy.https_proxy, "ftpProxy": proxy.ftp_proxy,
            "noProxy": proxy.no_proxy, "allProxy": proxy.all_proxy,
        })
    });
    let secrets: Vec<Value> = exec
        .secretenv
        .iter()
        .map(|secret| json!({"id": secret.id, "name": secret.name, "optional": secret.optional}))
        .collect();
    json!({
        "args": meta.args, "env": meta.env, "cwd": meta.cwd, "user": meta.user, "hostname": meta.hostname,
        "extraHosts": hosts, "ulimit": limits, "cgroupParent": meta.cgroup_parent, "proxyEnv": proxy,
        "validExitCodes": meta.valid_exit_codes, "secretEnv": secrets,
        "network": lower(pb::NetMode::try_from(exec.network).map(|mode| mode.as_str_name())),
        "security": lower(pb::SecurityMode::try_from(exec.security).map(|mode| mode.as_str_name())),
        "mounts": exec.mounts.iter().map(mount).collect::<Vec<_>>(),
    })
}

fn mount(mount: &pb::Mount) -> Value {
    let cache = mount.cache_opt.as_ref().map(|cache| json!({"id": cache.id, "sharing": cache.sharing}));
    let secret = mount.secret_opt.as_ref().map(
        |secret| json!({"id": secret.id, "uid": secret.uid, "gid": secret.gid, "mode": secret.mode, "optional": secret.optional}),
    );
    let ssh = mount
        .ssh_opt
        .as_ref()
        .map(|ssh| json!({"id": ssh.id, "uid": ssh.uid, "gid": ssh.gid, "mode": ssh.mode, "optional": ssh.optional}));
    let tmpfs = mount.tmpfs_opt.as_ref().map(|tmpfs| json!({"size": tmpfs.size}));
    let mut out = compact(json!({
        "dest": mount.dest, "selector": mount.selector, "readonly": mount.readonly,
        "type": lower(pb::MountType::try_from(mount.mount_type).map(|kind| kind.as_str_name())),
        "cache": cache, "secret": secret, "ssh": ssh, "tmpfs": tmpfs,
    }));
    // Zero is an index here, not an absence.
    out["input"] = mount.input.into();
    out["output"] = mount.output.into();
    out
}

fn action(action: &pb::FileAction) -> Value {
    use pb::file_action::Action;
    let mut out = Map::new();
    out.insert("input".into(), action.input.into());
    if action.secondary_input >= 0 {
        out.insert("secondaryInput".into(), action.secondary_input.into());
    }
    out.insert("output".into(), action.output.into());
    let (name, value) = match &action.action {
        Some(Action::Copy(copy)) => (
            "copy",
            json!({
                "src": copy.src, "dest": copy.dest, "owner": owner(copy.owner.as_ref()), "mode": mode(copy.mode),
                "modeStr": copy.mode_str, "followSymlink": copy.follow_symlink,
                "dirCopyContents": copy.dir_copy_contents, "createDestPath": copy.create_dest_path,
                "attemptUnpack": copy.attempt_unpack_docker_compatibility, "allowWildcard": copy.allow_wildcard,
                "allowEmptyWildcard": copy.allow_empty_wildcard, "includePatterns": copy.include_patterns,
                "excludePatterns": copy.exclude_patterns, "requiredPaths": copy.required_paths,
                "alwaysReplaceExistingDestPaths": copy.always_replace_existing_dest_paths,
                "timestamp": timestamp(copy.timestamp),
            }),
        ),
        Some(Action::Mkfile(file)) => (
            "mkfile",
            json!({
                "path": file.path, "mode": mode(file.mode), "data": String::from_utf8_lossy(&file.data),
                "owner": owner(file.owner.as_ref()), "timestamp": timestamp(file.timestamp),
            }),
        ),
        Some(Action::Mkdir(dir)) => (
            "mkdir",
            json!({
                "path": dir.path, "mode": mode(dir.mode), "makeParents": dir.make_parents,
                "owner": owner(dir.owner.as_ref()), "timestamp": timestamp(dir.timestamp),
            }),
        ),
        Some(Action::Rm(rm)) => (
            "rm",
            json!({"path": rm.path, "allowNotFound": rm.allow_not_found, "allowWildcard": rm.allow_wildcard}),
        ),
        Some(Action::Symlink(link)) => (
            "symlink",
            json!({
                "oldpath": link.oldpath, "newpath": link.newpath, "owner": owner(link.owner.as_ref()),
                "timestamp": timestamp(link.timestamp),
            }),
        ),
        None => ("none", Value::Null),
    };
    out.insert(name.into(), compact(value));
    Value::Object(out)
}

fn owner(owner: Option<&pb::ChownOpt>) -> Value {
    use pb::user_opt::User;
    let one = |user: &Option<pb::UserOpt>| match user.as_ref().and_then(|user| user.user.as_ref()) {
        Some(User::ByName(named)) => named.name.as_str().into(),
        Some(User::ById(id)) => json!(id.to_string()),
        None => Value::Null,
    };
    owner.map_or(Value::Null, |owner| json!({"user": one(&owner.user), "group": one(&owner.group)}))
}

/// -1 means that the mode is not changed.
fn mode(mode: i32) -> Value {
    if mode < 0 { Value::Null } else { format!("{mode:04o}").into() }
}

/// -1 means the time at which the action runs.
fn timestamp(timestamp: i64) -> Value {
    if timestamp < 0 { Value::Null } else { timestamp.into() }
}

fn lower<E>(name: Result<&str, E>) -> Value {
    match name {
        Ok("UNSET" | "SANDBOX" | "BIND") => Value::Null,
        Ok(name) => name.to_ascii_lowercase().into(),
        Err(_) => "unknown".into(),
    }
}

fn texts(map: &std::collections::BTreeMap<String, String>) -> Value {
    Value::Object(map.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect())
}

/// Leaves out nulls, false, empty strings, lists and objects, one level deep and below.
fn compact(value: Value) -> Value {
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .map(|(key, value)| (key, compact(value)))
                .filter(|(_, value)| match value {
                    Value::Null | Value::Bool(false) => false,
                    Value::String(text) => !text.is_empty(),
                    Value::Array(list) => !list.is_empty(),
                    Value::Object(map) => !map.is_empty(),
                    _ => true,
                })
                .collect(),
        ),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_proto::llb;

    #[test]
    fn operations_are_readable() {
        let source = pb::Op {
            op: Some(pb::op::Op::Source(pb::SourceOp {
                identifier: "docker-image://docker.io/library/busybox:latest".into(),
                ..Default::default()
            })),
            ..Default::default()
        };
        let mut builder = llb::Builder::new();
        let base = builder.add(&source, Default::default());
        let exec = pb::Op {
            inputs: vec![pb::Input { digest: base.clone(), index: 0 }],
            op: Some(pb::op::Op::Exec(Box::new(pb::ExecOp {
                meta: Some(pb::Meta { args: vec!["true".into()], cwd: "/".into(), ..Default::default() }),
                mounts: vec![pb::Mount { dest: "/".into(), ..Default::default() }],
                network: pb::NetMode::Host.into(),
                ..Default::default()
            }))),
            ..Default::default()
        };
        let run = builder.add(&exec, Default::default());
        let mkdir =
            pb::FileActionMkDir { path: "/d".into(), mode: 0o755, timestamp: -1, ..Default::default() };
        let file = pb::Op {
            inputs: vec![pb::Input { digest: run.clone(), index: 0 }],
            op: Some(pb::op::Op::File(pb::FileOp {
                actions: vec![pb::FileAction {
                    secondary_input: -1,
                    action: Some(pb::file_action::Action::Mkdir(mkdir)),
                    ..Default::default()
                }],
            })),
            ..Default::default()
        };
        let made = builder.add(&file, Default::default());
        let definition = builder.finish(&pb::Input { digest: made, index: 0 });
        let graph = llb::load(&definition).unwrap();
        let ops: Vec<Value> = graph.vertices.iter().map(|loaded| vertex(loaded)["op"].clone()).collect();
        assert_eq!(
            ops,
            [
                json!({"source": {"identifier": "docker-image://docker.io/library/busybox:latest"}}),
                json!({"exec": {
                    "args": ["true"], "cwd": "/", "network": "host",
                    "mounts": [{"dest": "/", "input": 0, "output": 0}],
                }}),
                json!({"file": {"actions": [{"input": 0, "output": 0, "mkdir": {"path": "/d", "mode": "0755"}}]}}),
            ]
        );
    }
}
