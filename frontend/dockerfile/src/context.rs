//! Where files of the client come from: the build context and named contexts that are directories.
//! Their operations are made last, when it is known which files are read.

use std::collections::{BTreeMap, BTreeSet};

use kiln_proto::{llb, pb};

use crate::compile::Compiler;
use crate::error::Result;
use crate::gofmt;
use crate::graph::{Graph, Meta, Out};
use crate::{ContextSource, NamedContext};

/// A directory of the client, with an operation reserved for it.
#[derive(Debug)]
pub(crate) struct Directory {
    out: Out,
    title: String,
    name: String,
    session: String,
    shared_key_hint: String,
    ignored: Vec<String>,
    /// What is read, absolute; nothing and `/` mean everything.
    paths: BTreeSet<String>,
}

/// Takes a context into the graph; the answer is `None` if it is empty.
pub(crate) fn take(
    graph: &mut Graph,
    directories: &mut Vec<Directory>,
    source: &ContextSource,
    ignored: Option<&[String]>,
    title: String,
) -> Result<Option<Out>> {
    match source {
        ContextSource::Definition(definition) => graph.import(definition),
        ContextSource::Local { name, session, shared_key_hint } => {
            if let Some(known) = directories.iter().find(|directory| directory.title == title) {
                return Ok(Some(known.out));
            }
            let out = graph.reserve();
            directories.push(Directory {
                out,
                title,
                name: name.clone(),
                session: session.clone(),
                shared_key_hint: shared_key_hint.clone(),
                ignored: ignored.unwrap_or_default().to_vec(),
                paths: BTreeSet::new(),
            });
            Ok(Some(out))
        }
    }
}

impl Compiler<'_> {
    /// Takes a named context, which `key` names, into the graph.
    pub(crate) fn take_context(&mut self, key: &str, context: &NamedContext) -> Result<Option<Out>> {
        let title = format!("[context {key}] load from client");
        let ignored = context.ignore_patterns.as_deref();
        take(&mut self.graph, &mut self.directories, &context.source, ignored, title)
            .map_err(|fault| fault.context(format_args!("named context {key}")))
    }

    /// Notes that `path` is read from `tree`, in case that is a directory of the client.
    pub(crate) fn reads(&mut self, tree: Option<Out>, path: String) {
        if let Some(directory) = self.directories.iter_mut().find(|directory| Some(directory.out) == tree) {
            directory.paths.insert(path);
        }
    }

    /// Makes the operations that were reserved.
    pub(crate) fn fill_directories(&mut self) {
        for directory in std::mem::take(&mut self.directories) {
            let Directory { out, title, name, session, shared_key_hint, ignored, paths } = directory;
            let mut attrs = BTreeMap::new();
            let mut caps = vec![llb::caps::SOURCE_LOCAL];
            let mut set = |key: &str, value: String, cap: &'static str| {
                attrs.insert(key.to_string(), value);
                caps.push(cap);
            };
            if !session.is_empty() {
                set("local.session", session, llb::caps::SOURCE_LOCAL_SESSION_ID);
            }
            if !ignored.is_empty() {
                let patterns = gofmt::json_list(&ignored);
                set("local.excludepatterns", patterns, llb::caps::SOURCE_LOCAL_EXCLUDE_PATTERNS);
            }
            if !paths.is_empty() && !paths.contains("/") {
                let mut paths: Vec<String> =
                    paths.iter().map(|path| path.trim_start_matches('/').to_string()).collect();
                paths.sort();
                set("local.followpaths", gofmt::json_list(&paths), llb::caps::SOURCE_LOCAL_FOLLOW_PATHS);
            }
            if !shared_key_hint.is_empty() {
                set("local.sharedkeyhint", shared_key_hint, llb::caps::SOURCE_LOCAL_SHARED_KEY_HINT);
            }
            let op = pb::op::Op::Source(pb::SourceOp { identifier: format!("local://{name}"), attrs });
            self.graph.fill(out, op, Meta::named(title, &caps));
        }
    }
}
