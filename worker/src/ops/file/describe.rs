//! What a file action is made of, for its key and for people.

use std::borrow::Cow;

use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use prost::Message;

use super::plan::owner;
use crate::ops::keys::KeyBuilder;

/// Adds an action to its operation's key: all of it counts, and what people know by a name has one.
pub(super) fn action(key: &mut KeyBuilder<'_>, action: &pb::FileAction) {
    let summary = match &action.action {
        Some(Action::Copy(copy)) => format!("copy {} {}", copy.src, copy.dest),
        Some(Action::Mkfile(file)) => format!("mkfile {}", file.path),
        Some(Action::Mkdir(dir)) => format!("mkdir {}", dir.path),
        Some(Action::Rm(rm)) => format!("rm {}", rm.path),
        Some(Action::Symlink(link)) => format!("symlink {} -> {}", link.newpath, link.oldpath),
        None => "unknown action".into(),
    };
    key.bytes(&summary, &action.encode_to_vec());
    if !key.notes() {
        return;
    }
    match &action.action {
        Some(Action::Copy(copy)) => self::copy(key, copy, action.input < 0),
        Some(Action::Mkfile(file)) => {
            key.note("file", &file.path);
            key.note("mode", mode(file.mode));
            key.note_digest("content", &file.data);
        }
        Some(Action::Mkdir(dir)) => {
            key.note("directory", &dir.path);
            key.note("mode", mode(dir.mode));
        }
        Some(Action::Rm(rm)) => key.note("removed path", &rm.path),
        Some(Action::Symlink(link)) => {
            key.note("symlink", &link.newpath);
            key.note("symlink target", &link.oldpath);
        }
        None => {}
    }
    if let Some(owner) = owner(action) {
        key.note("owner", chown(owner));
    }
}

fn copy(key: &mut KeyBuilder<'_>, copy: &pb::FileActionCopy, alone: bool) {
    key.note("destination", &copy.dest);
    key.note("independent of what is below", truth(alone));
    match copy.mode_str.as_str() {
        "" => key.note("mode", mode(copy.mode)),
        text => key.note("mode", text),
    }
    for (name, on) in [
        ("follows symlinks", copy.follow_symlink),
        ("copies a directory's contents", copy.dir_copy_contents),
        ("unpacks archives", copy.attempt_unpack_docker_compatibility),
        ("makes the destination", copy.create_dest_path),
        ("replaces the destination", copy.always_replace_existing_dest_paths),
    ] {
        key.note(name, truth(on));
    }
    for (name, patterns) in [
        ("include pattern", &copy.include_patterns),
        ("exclude pattern", &copy.exclude_patterns),
        ("required path", &copy.required_paths),
    ] {
        for pattern in patterns {
            key.note(name, pattern);
        }
    }
}

fn truth(value: bool) -> &'static str {
    if value { "true" } else { "false" }
}

fn mode(mode: i32) -> Cow<'static, str> {
    if mode < 0 { "as it is".into() } else { format!("{mode:04o}").into() }
}

fn chown(owner: &pb::ChownOpt) -> String {
    let name = |option: Option<&pb::UserOpt>| match option.and_then(|option| option.user.as_ref()) {
        Some(pb::user_opt::User::ByName(named)) => named.name.clone(),
        Some(pb::user_opt::User::ById(id)) => id.to_string(),
        None => String::new(),
    };
    let (user, group) = (name(owner.user.as_ref()), name(owner.group.as_ref()));
    if group.is_empty() { user } else { format!("{user}:{group}") }
}
