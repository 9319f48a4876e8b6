//! What an exec operation's result depends on.
//!
//! Left out are values that must not matter: proxies, values of secrets, addresses of extra hosts, and the names
//! of cache mounts where they were chosen on purpose.

use std::sync::Arc;

use kiln_proto::{pb, platform};
use kiln_solver::op::{CacheMap, ContentPath, ContentQuery, InputMap, OpError};
use prost::Message;

use super::mounts;
use crate::ops::file::root::clean;
use crate::ops::keys::{self, KeyBuilder};

/// The map of an operation with so many inputs, which is to run for `platform`.
pub(super) fn cache_map(
    op: &Arc<pb::ExecOp>,
    platform: Option<&pb::Platform>,
    inputs: usize,
) -> Result<CacheMap, OpError> {
    let inputs = self::inputs(op, inputs)?;
    let platform = platform::normalized(&platform.cloned().unwrap_or_else(platform::host));
    let op = op.clone();
    Ok(keys::described("kiln.exec.v1", inputs, move |key| describe(key, &op, &platform)))
}

fn describe(key: &mut KeyBuilder<'_>, op: &pb::ExecOp, platform: &pb::Platform) {
    let no_meta = pb::Meta::default();
    let meta = op.meta.as_ref().unwrap_or(&no_meta);
    for arg in &meta.args {
        key.part("arg", arg);
    }
    for variable in &meta.env {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        key.part(format!("env {name}"), value);
    }
    key.part("cwd", &meta.cwd);
    key.part("user", &meta.user);
    key.part("hostname", &meta.hostname);
    for host in &meta.extra_hosts {
        key.part("extra host", &host.host);
    }
    for limit in &meta.ulimit {
        key.part(format!("ulimit {}", limit.name), format!("{}:{}", limit.soft, limit.hard));
    }
    key.part("cgroup parent", &meta.cgroup_parent);
    for code in &meta.valid_exit_codes {
        key.part("valid exit code", code.to_string());
    }
    key.part("mount stubs removed recursively", meta.remove_mount_stubs_recursive.to_string());
    let network = match op.network() {
        pb::NetMode::Unset => "default",
        pb::NetMode::Host => "host",
        pb::NetMode::None => "none",
    };
    key.part("network", network);
    key.part("security", op.security().as_str_name().to_lowercase());
    for secret in &op.secretenv {
        key.part(
            format!("secret env {}", secret.name),
            format!("{} optional={}", secret.id, secret.optional),
        );
    }
    for device in &op.cdi_devices {
        key.part("device", &device.name);
    }
    for mount in &op.mounts {
        key.bytes(&format!("mount {}", mount.dest), &keyed_mount(mount).encode_to_vec());
        if key.notes() {
            describe_mount(key, mount);
        }
    }
    key.part("platform", platform::format(platform));
}

/// What people read of a mount. What it shows is told by the step's input.
fn describe_mount(key: &mut KeyBuilder<'_>, mount: &pb::Mount) {
    let mut note = |name: &str, value: String| key.note(format!("mount {} {name}", mount.dest), value);
    let kind = mount.mount_type();
    note("type", kind.as_str_name().to_lowercase());
    note("readonly", mount.readonly.to_string());
    if let Some(cache) = mount.cache_opt.as_ref().filter(|cache| !cache.id.is_empty()) {
        note("id", cache.id.clone());
        note("sharing", cache.sharing().as_str_name().to_lowercase());
    }
    if kind == pb::MountType::Tmpfs {
        note("size", mount.tmpfs_opt.unwrap_or_default().size.to_string());
    }
    if let Some(secret) = &mount.secret_opt {
        note("id", secret.id.clone());
        note("owner", format!("{}:{}", secret.uid, secret.gid));
        note("mode", format!("{:#o}", secret.mode));
        note("optional", secret.optional.to_string());
    }
    if let Some(agent) = &mount.ssh_opt {
        note("id", agent.id.clone());
        note("owner", format!("{}:{}", agent.uid, agent.gid));
        note("mode", format!("{:#o}", agent.mode));
        note("optional", agent.optional.to_string());
    }
}

/// A mount without what the inputs' own keys say, and without names that do not matter.
fn keyed_mount(mount: &pb::Mount) -> pb::Mount {
    let mut keyed = mount.clone();
    keyed.selector.clear();
    if let Some(cache) = &mut keyed.cache_opt {
        // A cache named after its place, perhaps in a namespace, is what is meant where none is named.
        let named = cache.id.split_once('/').map(|(_, rest)| rest);
        let by_place = cache.id == mount.dest || named == Some(mount.dest.as_str());
        if !by_place || cache.sharing() != pb::CacheSharingOpt::Shared {
            cache.id.clear();
            cache.sharing = 0;
        }
    }
    keyed
}

/// How each input counts. Content may stand for an input where the step can't hand on what it did not select.
fn inputs(op: &pb::ExecOp, count: usize) -> Result<Vec<InputMap>, OpError> {
    let mut selectors: Vec<Vec<String>> = vec![Vec::new(); count];
    let mut by_content: Vec<Option<bool>> = vec![None; count];
    for mount in &op.mounts {
        if matches!(mount.mount_type(), pb::MountType::Secret | pb::MountType::Ssh | pb::MountType::Tmpfs) {
            continue;
        }
        let Some(index) = crate::ops::operand(mount.input, count)? else { continue };
        let selector = clean(&mount.selector);
        let safe = mount.output == -1 || mount.readonly || selector == "/";
        let content = match mount.content_cache() {
            pb::MountContentCache::Off => false,
            pb::MountContentCache::On if !safe => {
                return Err(OpError::new(format!("invalid mount cache content for {}", mount.dest)));
            }
            pb::MountContentCache::On => true,
            pb::MountContentCache::Default => safe && !mounts::is_root(mount),
        };
        selectors[index].push(selector);
        // Every use of the input has to allow it.
        by_content[index] = Some(by_content[index].unwrap_or(true) && content);
    }
    // One path for each mount, in their order, even if they overlap: what is shown where is in the step's own key
    // by the order of its mounts only.
    let map = |(selectors, content): (Vec<String>, Option<bool>)| {
        if selectors.is_empty() {
            return InputMap::default();
        }
        let selector = Some(selectors.join("\0"));
        let path =
            |path: String| ContentPath { path, follow_symlink: true, must_exist: true, ..Default::default() };
        let content = content
            .unwrap_or(false)
            .then(|| ContentQuery { paths: selectors.into_iter().map(path).collect() });
        InputMap { selector, content }
    };
    Ok(selectors.into_iter().zip(by_content).map(map).collect())
}
