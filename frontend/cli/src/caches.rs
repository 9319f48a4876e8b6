//! `--cache-from` and `--cache-to`: caches elsewhere that a build reads and writes, and those on this machine, which are
//! directories in the form of image layouts.

use std::collections::HashMap;
use std::path::Path;

use clap::Args;
use kiln_proto::control::{CacheOptions, CacheOptionsEntry};
use kiln_session::client::ContentDir;
use serde_json::{Value, json};

use crate::error::CliError;
use crate::run::Response;
use crate::{csv, layout};

/// The tag of a cache in a layout that says none.
const TAG: &str = "latest";
/// What tells daemons the stores of caches from others.
const STORE: &str = "local:";

/// The flags.
#[derive(Debug, Default, Args)]
pub(crate) struct CacheArgs {
    /// Cache to read: an image's name, type=registry,ref=NAME or type=local,src=DIR (may be repeated)
    #[arg(long = "cache-from", alias = "import-cache", value_name = "SPEC")]
    pub(crate) from: Vec<String>,
    /// Cache to write: type=inline, type=registry,ref=NAME or type=local,dest=DIR, each with mode=max for all steps
    /// (may be repeated)
    #[arg(long = "cache-to", alias = "export-cache", value_name = "SPEC")]
    pub(crate) to: Vec<String>,
}

/// The caches of one build.
#[derive(Debug, Default)]
pub(crate) struct Caches {
    options: CacheOptions,
    /// Directories that caches go into, and their tags there.
    written: Vec<(String, String)>,
    stores: Vec<ContentDir>,
}

impl Caches {
    /// Reads the flags, and the indexes of layouts that are read.
    pub(crate) fn parse(args: &CacheArgs) -> Result<Self, CliError> {
        let mut caches = Self::default();
        for flag in &args.from {
            caches.read(flag)?;
        }
        for flag in &args.to {
            caches.write(flag)?;
        }
        Ok(caches)
    }

    fn read(&mut self, flag: &str) -> Result<(), CliError> {
        let (kind, mut attrs) = spec("--cache-from", flag)?;
        if kind == "local" {
            let missing = || CliError::usage(format!("invalid --cache-from {flag:?}: no src"));
            let source = attrs.get("src").filter(|src| !src.is_empty()).cloned().ok_or_else(missing)?;
            let tag = attrs.remove("tag").unwrap_or_else(|| TAG.to_owned());
            if !attrs.contains_key("digest") {
                let Some(digest) = layout::tagged(Path::new(&source), &tag) else {
                    // It may only come to be with this build.
                    eprintln!("WARNING: no cache {tag} in {source}");
                    return Ok(());
                };
                attrs.insert("digest".into(), digest);
            }
            self.offer(&source);
        }
        self.options.imports.push(CacheOptionsEntry { r#type: kind, attrs });
        Ok(())
    }

    fn write(&mut self, flag: &str) -> Result<(), CliError> {
        let (kind, mut attrs) = spec("--cache-to", flag)?;
        if kind == "local" {
            if attrs.get("reset").is_some_and(|reset| reset != "false") {
                return Err(CliError::usage("unsupported: --cache-to with reset"));
            }
            let missing = || CliError::usage(format!("invalid --cache-to {flag:?}: no dest"));
            let dest = attrs.get("dest").filter(|dest| !dest.is_empty()).cloned().ok_or_else(missing)?;
            let tag = attrs.remove("tag").unwrap_or_else(|| TAG.to_owned());
            self.offer(&dest);
            self.written.push((dest, tag));
        }
        self.options.exports.push(CacheOptionsEntry { r#type: kind, attrs });
        Ok(())
    }

    fn offer(&mut self, dir: &str) {
        let name = format!("{STORE}{dir}");
        if self.stores.iter().all(|store| store.name != name) {
            self.stores.push(ContentDir { name, path: dir.into() });
        }
    }

    /// For the request.
    pub(crate) fn options(&self) -> CacheOptions {
        self.options.clone()
    }

    /// For the frontend, which decides what the caches are read for.
    pub(crate) fn attr(&self) -> Option<(String, String)> {
        let entry = |entry: &CacheOptionsEntry| json!({"Type": entry.r#type, "Attrs": sorted(&entry.attrs)});
        let entries: Vec<Value> = self.options.imports.iter().map(entry).collect();
        (!entries.is_empty()).then(|| ("cache-imports".to_owned(), Value::Array(entries).to_string()))
    }

    /// The directories that the daemon reads and writes.
    pub(crate) fn stores(&self) -> &[ContentDir] {
        &self.stores
    }

    /// Enters the cache that a build answered into the layouts that it went into.
    pub(crate) fn record(&self, response: &Response) -> Result<(), CliError> {
        let descriptor = response.get("cache.manifest");
        let Some(descriptor) = descriptor.and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
            return Ok(());
        };
        for (dest, tag) in &self.written {
            let path = Path::new(dest);
            layout::tag(path, &descriptor, tag)
                .map_err(|error| CliError::file("write index of", path, error))?;
        }
        Ok(())
    }
}

fn sorted(attrs: &HashMap<String, String>) -> std::collections::BTreeMap<&String, &String> {
    attrs.iter().collect()
}

/// The type and attributes of a flag; a bare name is that of an image.
fn spec(name: &str, flag: &str) -> Result<(String, HashMap<String, String>), CliError> {
    if !flag.contains('=') && !flag.contains(',') {
        return Ok(("registry".into(), [("ref".to_owned(), flag.to_owned())].into()));
    }
    let mut attrs = HashMap::new();
    for field in csv::fields(flag)? {
        let pair = field.split_once('=');
        let (key, value) = pair
            .ok_or_else(|| CliError::usage(format!("invalid {name} {flag:?}: {field:?} is not KEY=VALUE")))?;
        attrs.insert(key.trim().to_lowercase(), value.to_owned());
    }
    let kind = attrs.remove("type");
    let kind = kind.ok_or_else(|| CliError::usage(format!("invalid {name} {flag:?}: no type")))?;
    Ok((kind, attrs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caches(from: &[&str], to: &[&str]) -> Result<Caches, CliError> {
        let own = |flags: &[&str]| flags.iter().map(|flag| (*flag).to_owned()).collect();
        Caches::parse(&CacheArgs { from: own(from), to: own(to) })
    }

    #[test]
    fn flags_become_entries() {
        let caches =
            caches(&["a/b:c", "type=registry,ref=d"], &["type=inline", "type=local,dest=/x,tag=t,mode=max"]);
        let caches = caches.unwrap();
        let [first, second] = &caches.options.imports[..] else { panic!() };
        assert_eq!((first.r#type.as_str(), first.attrs["ref"].as_str()), ("registry", "a/b:c"));
        assert_eq!(second.attrs["ref"], "d");
        let (key, value) = caches.attr().unwrap();
        assert_eq!(key, "cache-imports");
        let expected = json!([{"Type": "registry", "Attrs": {"ref": "a/b:c"}}, {"Type": "registry", "Attrs": {"ref": "d"}}]);
        assert_eq!(serde_json::from_str::<Value>(&value).unwrap(), expected);
        assert_eq!(caches.options.exports.len(), 2);
        assert!(!caches.options.exports[1].attrs.contains_key("tag"), "that is the client's affair");
        assert_eq!(caches.stores[0].name, "local:/x");
        assert_eq!(caches.written, [("/x".to_owned(), "t".to_owned())]);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for to in ["type=local", "mode=max", "type=local,dest=x,reset=true", "type=inline,x"] {
            assert!(caches(&[], &[to]).is_err(), "{to}");
        }
        assert!(caches(&["type=local"], &[]).is_err());
    }

    #[test]
    fn layouts_are_read_by_tag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let from = format!("type=local,src={path}");
        assert!(caches(&[&from], &[]).unwrap().options.imports.is_empty(), "nothing is there yet");
        let written = caches(&[], &[&format!("type=local,dest={path}")]).unwrap();
        let response =
            |digest: &str| [("cache.manifest".to_owned(), format!(r#"{{"digest":"{digest}"}}"#))].into();
        written.record(&response("sha256:1")).unwrap();
        written.record(&response("sha256:2")).unwrap();
        let read = caches(&[&from], &[]).unwrap();
        assert_eq!(read.options.imports[0].attrs["digest"], "sha256:2");
        assert_eq!(read.stores[0].name, format!("local:{path}"));
        assert!(caches(&[&format!("{from},tag=other")], &[]).unwrap().options.imports.is_empty());
    }
}
