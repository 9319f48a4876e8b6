//! Names of users and groups, looked up in a root file system's own `/etc/passwd` and `/etc/group`.
//!
//! Those files come from images: they are read beneath their root, up to a limit, and lines that
//! make no sense are skipped.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use kiln_proto::pb;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::file::root::{Owner, PathError, Root, reopen_file};

/// More than any real file holds, little enough to keep in memory.
const MAX_BYTES: u64 = 10 << 20;

/// Whom a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessUser {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Home directory; `/` where none is recorded.
    pub home: String,
}

struct Passwd<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn passwd(text: &str) -> impl Iterator<Item = Passwd<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let uid = fields.next()?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        Some(Passwd { name, uid, gid, home })
    })
}

fn group(text: &str) -> impl Iterator<Item = Group<'_>> {
    text.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let _password = fields.next()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Group { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Content of a file of the root; empty where there is none.
pub(crate) fn read(root: Root<'_>, path: &str) -> Result<String, PathError> {
    let failed = |errno| PathError::new("open", path, errno);
    match root.open(path, OFlags::PATH, 0) {
        Ok(found) => read_found(found.as_fd()).map_err(failed),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(String::new()),
        Err(errno) => Err(failed(errno)),
    }
}

/// Content of what was found (opened with `O_PATH`) in an image; empty if it is no regular file.
pub(crate) fn read_found(found: BorrowedFd<'_>) -> Result<String, Errno> {
    let Some(fd) = reopen_file(found, OFlags::RDONLY)? else { return Ok(String::new()) };
    let mut bytes = Vec::new();
    let read = File::from(fd).take(MAX_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|err| Errno::from_io_error(&err).unwrap_or(Errno::IO))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Errno::FBIG);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The owner that a file action asks for; `None` if it asks for none. Names are looked up in
/// the roots given; a user that is not there is 0:0, a group that is not there changes nothing.
pub(crate) fn action_owner(
    chown: Option<&pb::ChownOpt>,
    user_root: Option<Root<'_>>,
    group_root: Option<Root<'_>>,
) -> Result<Option<Owner>, PathError> {
    use pb::user_opt::User;
    let Some(chown) = chown else { return Ok(None) };
    let mut owner = Owner { uid: 0, gid: 0 };
    match chown.user.as_ref().and_then(|user| user.user.as_ref()) {
        Some(User::ById(id)) => owner = Owner { uid: *id, gid: *id },
        Some(User::ByName(named)) => {
            let text = user_root.map(|root| read(root, "/etc/passwd")).transpose()?.unwrap_or_default();
            if let Some(entry) = passwd(&text).find(|entry| entry.name == named.name) {
                owner = Owner { uid: entry.uid, gid: entry.gid };
            }
        }
        None => {}
    }
    match chown.group.as_ref().and_then(|group| group.user.as_ref()) {
        Some(User::ById(id)) => owner.gid = *id,
        Some(User::ByName(named)) => {
            let text = group_root.map(|root| read(root, "/etc/group")).transpose()?.unwrap_or_default();
            if let Some(entry) = group(&text).find(|entry| entry.name == named.name) {
                owner.gid = entry.gid;
            }
        }
        None => {}
    }
    Ok(Some(owner))
}

/// Resolves `name|uid[:group|gid]` (empty is root) by the texts of the two user files.
pub(crate) fn process_user(passwd_text: &str, group_text: &str, spec: &str) -> Result<ProcessUser, String> {
    let (user, group_spec) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let id: Option<u32> = user.parse().ok();
    let entry = passwd(passwd_text).find(|entry| entry.name == user || id == Some(entry.uid));
    let mut found = match (&entry, id) {
        (Some(entry), _) => {
            ProcessUser { uid: entry.uid, gid: entry.gid, groups: Vec::new(), home: entry.home.into() }
        }
        (None, Some(uid)) => ProcessUser { uid, gid: 0, groups: Vec::new(), home: String::new() },
        (None, None) => {
            return Err(format!("unable to find user {user}: no matching entries in passwd file"));
        }
    };
    if found.home.is_empty() {
        found.home = "/".into();
    }
    match group_spec {
        Some(name) => {
            let id: Option<u32> = name.parse().ok();
            let listed = group(group_text).find(|entry| entry.name == name || id == Some(entry.gid));
            found.gid = match (listed, id) {
                (Some(entry), _) => entry.gid,
                (None, Some(gid)) => gid,
                (None, None) => {
                    return Err(format!("unable to find group {name}: no matching entries in group file"));
                }
            };
        }
        None => {
            if let Some(entry) = &entry {
                let member =
                    |group: &Group<'_>| group.members.split(',').any(|member| member.trim() == entry.name);
                found.groups = group(group_text).filter(member).map(|group| group.gid).collect();
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\n# note\nbad line\napp:x:1000:1001:App:/home/app:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nwheel:x:10:root,app\napp:x:1001:\nvideo:x:44:app\n";

    fn user(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        process_user(PASSWD, GROUP, spec).map(|user| (user.uid, user.gid, user.groups, user.home))
    }

    #[test]
    fn finds_users_by_name_and_number() {
        let app = (1000, 1001, vec![10, 44], "/home/app".to_owned());
        assert_eq!(user("app"), Ok(app.clone()));
        assert_eq!(user("1000"), Ok(app));
        assert_eq!(user(""), Ok((0, 0, vec![10], "/root".to_owned())));
        assert_eq!(user("app:video"), Ok((1000, 44, vec![], "/home/app".to_owned())));
        assert_eq!(user("77:88"), Ok((77, 88, vec![], "/".to_owned())));
        assert_eq!(
            user("nobody").unwrap_err(),
            "unable to find user nobody: no matching entries in passwd file"
        );
        assert_eq!(
            user("app:none").unwrap_err(),
            "unable to find group none: no matching entries in group file"
        );
    }

    #[test]
    fn root_needs_no_files() {
        let user = process_user("", "", "").expect("root");
        assert_eq!((user.uid, user.gid, user.home.as_str()), (0, 0, "/"));
    }
}
