//! Caches that clients and frontends want to be looked into: each is imported once in a build, before what it is wanted
//! for is loaded. One that can't be imported never fails a build; it is shown.

use std::collections::{BTreeMap, HashMap};

use kiln_proto::{control, gateway};
use serde::Deserialize;
use tonic::Code;

use super::{Bridge, text_digest};
use crate::engine::import_id;
use crate::error::BuildError;
use crate::progress::Step;

/// A cache as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct CacheEntry {
    /// `registry`, `local`.
    #[serde(default, rename = "Type")]
    pub(crate) kind: String,
    /// Where it is.
    #[serde(default, rename = "Attrs")]
    pub(crate) attrs: BTreeMap<String, String>,
}

impl From<&control::CacheOptionsEntry> for CacheEntry {
    fn from(entry: &control::CacheOptionsEntry) -> Self {
        let attrs = entry.attrs.iter().map(|(key, value)| (key.clone(), value.clone()));
        Self { kind: entry.r#type.clone(), attrs: attrs.collect() }
    }
}

impl CacheEntry {
    fn registry(reference: &str) -> Self {
        let attrs = [("ref".to_owned(), reference.to_owned())].into();
        Self { kind: "registry".to_owned(), attrs }
    }

    /// Those of a gateway's request.
    pub(super) fn all(request: &gateway::SolveRequest) -> Vec<Self> {
        let entry = |entry: &gateway::CacheOptionsEntry| Self {
            kind: entry.r#type.clone(),
            attrs: entry.attrs.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        };
        request.cache_imports.iter().map(entry).collect()
    }
}

/// Those that a frontend's attributes name.
pub(super) fn of_frontend(opts: &HashMap<String, String>) -> Result<Vec<CacheEntry>, BuildError> {
    let mut entries = Vec::new();
    if let Some(json) = opts.get("cache-imports").filter(|json| !json.is_empty()) {
        let parsed: Option<Vec<CacheEntry>> = serde_json::from_str(json).map_err(|error| {
            BuildError::new(Code::InvalidArgument, format!("failed to unmarshal cache-imports: {error}"))
        })?;
        entries.extend(parsed.unwrap_or_default());
    }
    let old = opts.get("cache-from").map(String::as_str).unwrap_or_default();
    for reference in old.split(',').filter(|reference| !reference.is_empty()) {
        let entry = CacheEntry::registry(reference);
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    Ok(entries)
}

impl Bridge {
    /// Imports caches that have not been imported yet, and waits for all of them.
    pub(crate) async fn import(&self, entries: impl IntoIterator<Item = CacheEntry>) {
        let import = |entry: CacheEntry| async move {
            let id = import_id(&entry);
            let cell = self.common.imports.entry(id.clone()).or_default().value().clone();
            cell.get_or_init(|| self.import_one(&id, &entry)).await;
        };
        // The same caches come with each call; an order of their own have those that are new.
        let all: Vec<_> = entries.into_iter().map(import).collect();
        futures::future::join_all(all).await;
    }

    async fn import_one(&self, id: &str, entry: &CacheEntry) {
        let name = format!("importing cache manifest from {id}");
        let step = Step::start(self.common.progress.clone(), &text_digest(&name), &name);
        let imported = self.common.build.import(entry, step.progress()).await;
        if let Err(error) = &imported {
            tracing::debug!(cache = id, %error, "a cache was not imported");
        }
        step.end(imported.err().map(|error| error.message).as_deref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_frontends() {
        let opts = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        let json = r#"[{"Type":"registry","Attrs":{"ref":"a/b"}},{"Type":"local"}]"#;
        let entries = of_frontend(&opts("cache-imports", json)).expect("valid");
        assert_eq!(entries[0], CacheEntry::registry("a/b"));
        assert_eq!(entries[1].kind, "local");
        assert_eq!(of_frontend(&opts("cache-imports", "null")).expect("valid"), []);
        of_frontend(&opts("cache-imports", "{")).expect_err("no JSON");
        let both = of_frontend(&opts("cache-from", "x,y,x")).expect("valid");
        assert_eq!(both, [CacheEntry::registry("x"), CacheEntry::registry("y")]);
    }
}
