//! `RUN --mount=…`: the fields and what fits together.

use kiln_proto::pb;

use crate::error::{Fault, Result};
use crate::gofmt;
use crate::suggest::with_suggestion;

const KEYS: &[&str] = &[
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];
const TYPES: &[&str] = &["bind", "cache", "tmpfs", "secret", "ssh"];
const SHARING: &[&str] = &["shared", "private", "locked"];

/// Kind of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum MountKind {
    #[default]
    Bind,
    Cache,
    Tmpfs,
    Secret,
    Ssh,
}

impl MountKind {
    fn name(self) -> &'static str {
        match self {
            Self::Bind => "bind",
            Self::Cache => "cache",
            Self::Tmpfs => "tmpfs",
            Self::Secret => "secret",
            Self::Ssh => "ssh",
        }
    }
}

/// One `--mount`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) kind: MountKind,
    /// Stage or image; empty is the build context.
    pub(crate) from: String,
    pub(crate) source: String,
    pub(crate) target: String,
    pub(crate) readonly: bool,
    /// Bytes; 0 is the default.
    pub(crate) size: i64,
    pub(crate) id: String,
    pub(crate) sharing: Option<pb::CacheSharingOpt>,
    pub(crate) required: bool,
    pub(crate) env: Option<String>,
    pub(crate) mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// The stage or image that a mount reads from, without expanding variables (there they are not allowed).
pub(crate) fn source_stage(text: &str) -> Result<String> {
    let mut from = String::new();
    for field in fields(text)? {
        let Some((key, value)) = field.split_once('=') else { continue };
        if key.eq_ignore_ascii_case("from") {
            if value.find('$').is_some_and(|at| at + 1 != value.len()) {
                return Err("'from' doesn't support variable expansion, define alias stage instead".into());
            }
            from = value.to_string();
        }
    }
    Ok(from)
}

fn fields(text: &str) -> Result<Vec<String>> {
    gofmt::csv_fields(text).map_err(|e| Fault::new(format!("failed to parse csv mounts: {e}")))
}

/// Reads one mount; `expand` replaces variables in values.
pub(crate) fn parse(text: &str, expand: &mut dyn FnMut(&str) -> Result<String>) -> Result<Mount> {
    let mut mount = Mount::default();
    let mut readonly = None;
    for field in fields(text)? {
        let (key, value) = match field.split_once('=') {
            Some((key, value)) => (key.to_ascii_lowercase(), Some(expand(value)?)),
            None => (field.to_ascii_lowercase(), None),
        };
        let flag = |value: &Option<String>| match value {
            None => Ok(true),
            Some(v) => {
                gofmt::parse_bool(v).ok_or_else(|| Fault::new(format!("invalid value for {key}: {v}")))
            }
        };
        match key.as_str() {
            "readonly" | "ro" => {
                readonly = Some(flag(&value)?);
                continue;
            }
            "readwrite" | "rw" => {
                readonly = Some(!flag(&value)?);
                continue;
            }
            "required" if matches!(mount.kind, MountKind::Secret | MountKind::Ssh) => {
                mount.required = flag(&value)?;
                continue;
            }
            "required" => return Err(unexpected(&key, mount.kind)),
            _ => {}
        }
        let Some(value) = value else {
            return Err(Fault::new(format!("invalid field '{field}' must be a key=value pair")));
        };
        mount.set(&key, value, &field)?;
    }
    let writable = matches!(mount.kind, MountKind::Cache | MountKind::Tmpfs);
    mount.readonly = readonly.unwrap_or(!writable);
    mount.check()?;
    Ok(mount)
}

fn unexpected(key: &str, kind: MountKind) -> Fault {
    Fault::new(format!("unexpected key '{key}' for mount type '{}'", kind.name()))
}

impl Mount {
    fn set(&mut self, key: &str, value: String, field: &str) -> Result<()> {
        let number = |radix: u32| {
            u32::from_str_radix(&value, radix)
                .map_err(|_| Fault::new(format!("invalid value {value} for {key}")))
        };
        match key {
            "type" => {
                self.kind = match value.to_ascii_lowercase().as_str() {
                    "bind" => MountKind::Bind,
                    "cache" => MountKind::Cache,
                    "tmpfs" => MountKind::Tmpfs,
                    "secret" => MountKind::Secret,
                    "ssh" => MountKind::Ssh,
                    _ => {
                        let message = format!("unsupported mount type {}", gofmt::quote(&value));
                        return Err(with_suggestion(message, &value, TYPES, true).into());
                    }
                }
            }
            "from" => self.from = value,
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "size" if self.kind == MountKind::Tmpfs => {
                self.size = gofmt::parse_size(&value)
                    .ok_or_else(|| Fault::new(format!("invalid value for {key}: {value}")))?;
            }
            "size" => return Err(unexpected(key, self.kind)),
            "id" => self.id = value,
            "sharing" => {
                self.sharing = Some(match value.to_ascii_lowercase().as_str() {
                    "shared" => pb::CacheSharingOpt::Shared,
                    "private" => pb::CacheSharingOpt::Private,
                    "locked" => pb::CacheSharingOpt::Locked,
                    _ => {
                        let message = format!("unsupported sharing value {}", gofmt::quote(&value));
                        return Err(with_suggestion(message, &value, SHARING, true).into());
                    }
                });
            }
            "mode" => self.mode = Some(number(8)?),
            "uid" => self.uid = Some(number(10)?),
            "gid" => self.gid = Some(number(10)?),
            "env" => self.env = Some(value),
            _ => {
                let message = format!("unexpected key '{key}' in '{field}'");
                return Err(with_suggestion(message, key, KEYS, true).into());
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let kind = self.kind.name();
        if !matches!(self.kind, MountKind::Secret | MountKind::Ssh | MountKind::Cache) {
            for (name, set) in [("mode", self.mode), ("uid", self.uid), ("gid", self.gid)] {
                if set.is_some() {
                    return Err(Fault::new(format!("{name} not allowed for \"{kind}\" type mounts")));
                }
            }
        }
        if self.sharing.is_some() && self.kind != MountKind::Cache {
            return Err(Fault::new(format!("invalid cache sharing set for {kind} mount")));
        }
        if self.kind == MountKind::Secret {
            if !self.from.is_empty() {
                return Err("secret mount should not have a from".into());
            }
            if self.source.is_empty() && self.target.is_empty() && self.id.is_empty() {
                return Err("invalid secret mount. one of source, target required".into());
            }
            if !self.source.is_empty() && !self.id.is_empty() {
                return Err("both source and id can't be set".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(text: &str) -> Result<Mount, String> {
        parse(text, &mut |s| Ok(s.replace("$V", "v"))).map_err(|f| f.message)
    }

    #[test]
    fn fields_and_defaults() {
        let m = mount("type=cache,target=/c,id=$V,sharing=Locked,uid=10,mode=0700").expect("parses");
        assert_eq!((m.kind, m.id.as_str(), m.readonly), (MountKind::Cache, "v", false));
        assert_eq!((m.sharing, m.uid, m.mode), (Some(pb::CacheSharingOpt::Locked), Some(10), Some(0o700)));
        assert!(mount("target=/x").expect("parses").readonly);
        assert!(!mount("target=/x,rw").expect("parses").readonly);
        assert!(mount("target=/x,rw=false").expect("parses").readonly);
        assert_eq!(mount("type=tmpfs,target=/x,size=1m").expect("parses").size, 1 << 20);
        assert!(mount("type=secret,id=a,required").expect("parses").required);
    }

    #[test]
    fn errors() {
        for (text, want) in [
            ("type=cach", "unsupported mount type \"cach\" (did you mean cache?)"),
            ("tarteg=/x", "unexpected key 'tarteg' in 'tarteg=/x' (did you mean target?)"),
            ("target", "invalid field 'target' must be a key=value pair"),
            ("type=bind,size=1", "unexpected key 'size' for mount type 'bind'"),
            ("type=bind,mode=1", "mode not allowed for \"bind\" type mounts"),
            ("type=secret", "invalid secret mount. one of source, target required"),
            ("type=secret,id=a,src=b", "both source and id can't be set"),
            ("type=ssh,sharing=shared", "invalid cache sharing set for ssh mount"),
            ("type=cache,mode=9", "invalid value 9 for mode"),
            ("ro=maybe", "invalid value for ro: maybe"),
            ("required", "unexpected key 'required' for mount type 'bind'"),
        ] {
            assert_eq!(mount(text).err().as_deref(), Some(want));
        }
        assert_eq!(source_stage("type=bind,from=a,target=/x").ok().as_deref(), Some("a"));
        assert!(source_stage("from=$X").is_err());
    }
}
