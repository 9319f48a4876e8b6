//! Reads a received [`pb::Definition`] into an arena in topological order and refuses malformed
//! ones. Linear in vertices and edges, without recursion; knows nothing of limits or policy.

use std::collections::HashMap;
use std::sync::Arc;

use prost::Message;
use rustc_hash::FxBuildHasher;

use super::{CUSTOM_NAME, EMPTY, default_name, digest};
use crate::parallel::{MANY, each};
use crate::pb::{self, file_action::Action, op, user_opt};

/// A definition after [`load`].
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    /// What the output needs, inputs before the vertices that use them; nothing else.
    pub vertices: Vec<LoadedVertex>,
    /// Vertex and output index of the result; `None` for an empty definition (scratch).
    pub root: Option<(usize, u32)>,
    /// The source map as received.
    pub source: pb::Source,
}

/// One operation of a loaded definition.
#[derive(Debug, Clone)]
pub struct LoadedVertex {
    /// `sha256:…` of the bytes as received.
    pub digest: Arc<str>,
    /// The decoded operation; but the digests of its inputs are in [`Self::input_digests`].
    pub op: Box<pb::Op>,
    /// Its metadata; empty if none was sent.
    pub metadata: Arc<pb::OpMetadata>,
    /// For each input: its index in [`Loaded::vertices`] and its output number.
    pub inputs: Vec<(usize, u32)>,
    /// For each input: the digest of its vertex.
    pub input_digests: Arc<[Arc<str>]>,
    /// Display name: the sender's, or the operation's default.
    pub name: Arc<str>,
}

/// Why a definition was refused. The texts are those that clients of LLB know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// An element of the definition is not an operation.
    #[error("failed to parse llb proto op: {0}")]
    Decode(String),
    /// An input names a negative output.
    #[error("invalid input {input} output index {index}")]
    OutputIndex {
        /// Position among the operation's inputs.
        input: usize,
        /// The index as sent.
        index: i64,
    },
    /// An input's operation was not sent.
    #[error("invalid missing input digest {0}")]
    MissingInput(String),
    /// Fewer than two distinct operations.
    #[error("invalid LLB with {0} vertexes")]
    TooSmall(usize),
    /// The terminal pseudo-operation names no result.
    #[error("invalid LLB with no inputs on last vertex")]
    NoResult,
    /// The terminal pseudo-operation names more than one result.
    #[error("invalid last vertex inputs: {0}")]
    ManyResults(usize),
    /// Operations that need each other (only possible with colliding digests).
    #[error("invalid LLB with a cycle at {0}")]
    Cycle(String),
    /// An operation whose fields do not fit together.
    #[error("{reason}")]
    Invalid {
        /// Digest of the vertex.
        digest: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Decodes and checks a definition. Operations that the result does not need must decode and have their inputs, no more.
pub fn load(def: &pb::Definition) -> Result<Loaded, LoadError> {
    let source = def.source.clone().unwrap_or_default();
    if def.def.is_empty() {
        return Ok(Loaded { source, ..Default::default() });
    }
    let many = def.def.len() >= MANY;
    let parsed = each(many, &def.def, |bytes| Parsed::decode(bytes))?;
    let mut by_digest: ByDigest = HashMap::with_capacity_and_hasher(parsed.len(), FxBuildHasher);
    for (at, parsed) in parsed.iter().enumerate() {
        by_digest.entry(parsed.digest.clone()).or_insert(at);
    }
    if by_digest.len() < 2 {
        return Err(LoadError::TooSmall(by_digest.len()));
    }
    let mut all = each(many, parsed, |parsed| parsed.resolve(&by_digest).map(Some))?;
    let last = all.last().and_then(Option::as_ref).map_or(&[][..], |last| &last.inputs);
    let &[(root, root_output)] = last else {
        return Err(match last.len() {
            0 => LoadError::NoResult,
            many => LoadError::ManyResults(many),
        });
    };
    let order = topological(&all, root)?;
    let no_metadata = Arc::new(pb::OpMetadata::default());
    let mut all_metadata: HashMap<usize, Arc<pb::OpMetadata>> = HashMap::new();
    for (digest, metadata) in def.metadata.iter().filter(|(_, metadata)| **metadata != *no_metadata) {
        if let Some(&at) = by_digest.get(digest.as_str()) {
            all_metadata.insert(at, Arc::new(metadata.clone()));
        }
    }
    drop(by_digest);

    let mut place = vec![usize::MAX; all.len()];
    for (new, &old) in order.iter().enumerate() {
        place[old] = new;
    }
    let mut vertices: Vec<LoadedVertex> = Vec::with_capacity(order.len());
    for &old in &order {
        let Some(Resolved { digest, op, mut inputs, input_digests, name, valid }) = all[old].take() else {
            continue;
        };
        valid.map_err(|reason| LoadError::Invalid { digest: digest.to_string(), reason })?;
        for (vertex, _) in &mut inputs {
            *vertex = place[*vertex];
        }
        let metadata = all_metadata.remove(&old).unwrap_or_else(|| no_metadata.clone());
        let name = match (metadata.description.get(CUSTOM_NAME), name) {
            (Some(name), _) => name.as_str().into(),
            (None, Some(name)) => name,
            (None, None) => {
                default_name(&op, |input| inputs.get(input).map_or("", |&(at, _)| &vertices[at].name)).into()
            }
        };
        vertices.push(LoadedVertex { digest, op, metadata, inputs, input_digests, name });
    }
    Ok(Loaded { vertices, root: Some((place[root], root_output)), source })
}

type ByDigest = HashMap<Arc<str>, usize, FxBuildHasher>;

/// An element of a definition. An operation is large: it is not moved about.
struct Parsed {
    digest: Arc<str>,
    op: Box<pb::Op>,
}

/// An element that has no place in the order yet.
struct Resolved {
    digest: Arc<str>,
    op: Box<pb::Op>,
    /// What it needs, by place among all elements.
    inputs: Vec<(usize, u32)>,
    input_digests: Arc<[Arc<str>]>,
    /// Its default name, where that says nothing of its inputs.
    name: Option<Arc<str>>,
    valid: Result<(), String>,
}

impl Parsed {
    fn decode(bytes: &[u8]) -> Result<Self, LoadError> {
        let op = Box::new(pb::Op::decode(bytes).map_err(|e| LoadError::Decode(e.to_string()))?);
        Ok(Self { digest: digest(bytes), op })
    }

    fn resolve(self, by_digest: &ByDigest) -> Result<Resolved, LoadError> {
        let Self { digest, mut op } = self;
        let mut inputs = Vec::with_capacity(op.inputs.len());
        let mut input_digests = Vec::with_capacity(op.inputs.len());
        for (i, input) in op.inputs.iter_mut().enumerate() {
            let output = u32::try_from(input.index)
                .map_err(|_| LoadError::OutputIndex { input: i, index: input.index })?;
            let named = std::mem::take(&mut input.digest);
            let Some((digest, &at)) = by_digest.get_key_value(named.as_str()) else {
                return Err(LoadError::MissingInput(named));
            };
            inputs.push((at, output));
            input_digests.push(digest.clone());
        }
        let name = match &op.op {
            Some(op::Op::Merge(_) | op::Op::Diff(_)) => None,
            _ => Some(default_name(&op, |_| "").into()),
        };
        let valid = validate(&op);
        Ok(Resolved { digest, op, inputs, input_digests: input_digests.into(), name, valid })
    }
}

/// What `root` needs, inputs first.
fn topological(all: &[Option<Resolved>], root: usize) -> Result<Vec<usize>, LoadError> {
    #[derive(Clone, Copy, PartialEq)]
    enum State {
        New,
        Open,
        Done,
    }
    let mut state = vec![State::New; all.len()];
    let mut order = Vec::new();
    let mut stack = vec![(root, 0)];
    state[root] = State::Open;
    while let Some((at, next)) = stack.pop() {
        let vertex = all[at].as_ref();
        let Some(&(input, _)) = vertex.and_then(|vertex| vertex.inputs.get(next)) else {
            state[at] = State::Done;
            order.push(at);
            continue;
        };
        stack.push((at, next + 1));
        match state[input] {
            State::Done => {}
            State::Open => {
                let digest = all[input].as_ref().map_or_else(String::new, |vertex| vertex.digest.to_string());
                return Err(LoadError::Cycle(digest));
            }
            State::New => {
                state[input] = State::Open;
                stack.push((input, 0));
            }
        }
    }
    Ok(order)
}

/// Checks that an operation is complete and that every index it holds points to something.
/// The error is the text for the client.
pub fn validate(op: &pb::Op) -> Result<(), String> {
    let count = op.inputs.len() as i64;
    let input_ok = |i: i64| i == EMPTY || (0..count).contains(&i);
    match &op.op {
        None => Err("invalid op: no operation set".into()),
        Some(op::Op::Source(source)) if source.identifier.is_empty() => {
            Err("invalid source op with no identifier".into())
        }
        Some(op::Op::Source(_)) => Ok(()),
        Some(op::Op::Exec(exec)) => validate_exec(exec, &input_ok),
        Some(op::Op::File(file)) => validate_file(file, count),
        Some(op::Op::Build(build)) => match build.inputs.values().find(|i| !(0..count).contains(&i.input)) {
            Some(i) => Err(format!("invalid build input index {}", i.input)),
            None => Ok(()),
        },
        Some(op::Op::Merge(merge)) => match merge.inputs.iter().find(|i| !input_ok(i.input)) {
            Some(i) => Err(format!("invalid merge input index {}", i.input)),
            None => Ok(()),
        },
        Some(op::Op::Diff(diff)) => {
            let (Some(lower), Some(upper)) = (&diff.lower, &diff.upper) else {
                return Err("invalid diff op with nil lower or upper input".into());
            };
            match [lower.input, upper.input].into_iter().find(|&i| !input_ok(i)) {
                Some(i) => Err(format!("invalid diff input index {i}")),
                None => Ok(()),
            }
        }
        Some(op::Op::Passthrough(pass)) => {
            if pass.id.is_empty() {
                return Err("invalid passthrough op with no id".into());
            }
            if pass.outputs.is_empty() {
                return Err("invalid passthrough op with no outputs".into());
            }
            match pass.outputs.iter().find(|i| !(0..count).contains(*i)) {
                Some(i) => Err(format!("invalid passthrough output input index {i}")),
                None => Ok(()),
            }
        }
    }
}

fn validate_exec(exec: &pb::ExecOp, input_ok: &dyn Fn(i64) -> bool) -> Result<(), String> {
    let Some(meta) = &exec.meta else {
        return Err("invalid exec op with no meta".into());
    };
    if meta.args.is_empty() {
        return Err("invalid exec op with no args".into());
    }
    if exec.mounts.is_empty() {
        return Err("invalid exec op with no mounts".into());
    }
    let Some(root) = exec.mounts.iter().find(|m| m.dest == "/") else {
        return Err("invalid exec op with no rootfs".into());
    };
    if root.mount_type() != pb::MountType::Bind {
        return Err(format!("invalid mount type {} for rootfs", root.mount_type().as_str_name()));
    }
    pb::NetMode::try_from(exec.network).map_err(|_| format!("unknown network mode {}", exec.network))?;
    exec.mounts.iter().try_for_each(|mount| validate_mount(mount, input_ok))
}

fn validate_mount(mount: &pb::Mount, input_ok: &dyn Fn(i64) -> bool) -> Result<(), String> {
    if !input_ok(mount.input) {
        return Err(format!("invalid mount input index {} at {}", mount.input, mount.dest));
    }
    let kind = pb::MountType::try_from(mount.mount_type)
        .map_err(|_| format!("invalid mount type {} at {}", mount.mount_type, mount.dest))?;
    match &mount.cache_opt {
        None if kind == pb::MountType::Cache => Err(format!("missing cache mount options at {}", mount.dest)),
        Some(options) if pb::CacheSharingOpt::try_from(options.sharing).is_err() => {
            Err(format!("invalid cache sharing option: {}", options.sharing))
        }
        _ => Ok(()),
    }
}

/// Indices below `count` are the operation's inputs, those from `count` on earlier actions.
fn validate_file(file: &pb::FileOp, count: i64) -> Result<(), String> {
    if file.actions.is_empty() {
        return Err("invalid file op with no actions".into());
    }
    let total = count + file.actions.len() as i64;
    let mut outputs = Vec::new();
    for (i, action) in file.actions.iter().enumerate() {
        let own = count + i as i64;
        let ok = |index: i64| index == EMPTY || ((0..total).contains(&index) && index != own);
        let owner = match &action.action {
            None => return Err("invalid file action with no action".into()),
            Some(Action::Copy(a)) => &a.owner,
            Some(Action::Mkfile(a)) => &a.owner,
            Some(Action::Mkdir(a)) => &a.owner,
            Some(Action::Symlink(a)) => &a.owner,
            Some(Action::Rm(_)) => &None,
        };
        let named = owner.iter().flat_map(|o| [&o.user, &o.group]).flatten().filter_map(|u| match &u.user {
            Some(user_opt::User::ByName(n)) => Some(n.input),
            _ => None,
        });
        for index in [action.input, action.secondary_input].into_iter().chain(named) {
            if !ok(index) {
                return Err(format!("invalid input index {index} in file action {i}"));
            }
        }
        if action.output != EMPTY {
            outputs.push(action.output);
        }
    }
    if outputs.is_empty() {
        return Err("no outputs specified".into());
    }
    outputs.sort_unstable();
    if outputs.iter().enumerate().any(|(i, &o)| o != i as i64) {
        return Err("invalid file op: outputs are not numbered from 0 without gaps".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Builder;
    use super::*;

    fn source(name: &str) -> pb::Op {
        pb::Op {
            op: Some(op::Op::Source(pb::SourceOp { identifier: name.into(), ..Default::default() })),
            ..Default::default()
        }
    }

    fn merge(digests: &[&str]) -> pb::Op {
        pb::Op {
            inputs: digests.iter().map(|d| pb::Input { digest: d.to_string(), index: 0 }).collect(),
            op: Some(op::Op::Merge(pb::MergeOp {
                inputs: (0..digests.len() as i64).map(|input| pb::MergeInput { input }).collect(),
            })),
            ..Default::default()
        }
    }

    fn edge(digest: &str) -> pb::Input {
        pb::Input { digest: digest.into(), index: 0 }
    }

    #[test]
    fn built_definitions_load_without_what_is_unused() {
        let mut b = Builder::new();
        let a = b.add(&source("local://a"), Default::default());
        b.add(&source("local://unused"), Default::default());
        let c = b.add(&source("local://c"), Default::default());
        assert_eq!(b.add(&source("local://a"), Default::default()), a);
        let m = b.add(&merge(&[&a, &c, &a]), Default::default());
        let loaded = load(&b.finish(&edge(&m))).expect("loads");
        let names: Vec<&str> = loaded.vertices.iter().map(|v| &*v.name).collect();
        assert_eq!(names, ["local://a", "local://c", "merge (local://a, local://c, local://a)"]);
        assert_eq!(loaded.root, Some((2, 0)));
        assert_eq!(loaded.vertices[2].inputs, [(0, 0), (1, 0), (0, 0)]);
        assert_eq!(*loaded.vertices[2].digest, *m);
    }

    #[test]
    fn any_order_and_repetition_of_operations_is_fine() {
        let mut b = Builder::new();
        let a = b.add(&source("local://a"), Default::default());
        let m = b.add(&merge(&[&a]), Default::default());
        let mut def = b.finish(&edge(&m));
        def.def = vec![def.def[1].clone(), def.def[0].clone(), def.def[0].clone(), def.def[2].clone()];
        let loaded = load(&def).expect("loads");
        assert_eq!(loaded.vertices.iter().map(|v| &*v.digest).collect::<Vec<_>>(), [&a, &m]);
    }

    #[test]
    fn malformed_definitions_are_refused() {
        let empty = load(&pb::Definition::default()).expect("scratch");
        assert_eq!(empty.root, None);
        let mut b = Builder::new();
        let a = b.add(&source("local://a"), Default::default());
        let good = b.finish(&edge(&a));
        let text = |def: Vec<Vec<u8>>| {
            load(&pb::Definition { def, ..Default::default() }).map(|_| ()).map_err(|e| e.to_string())
        };
        let op = |op: pb::Op| op.encode_to_vec();
        let fail = |s: &str| Err(s.to_string());
        assert_eq!(text(vec![good.def[0].clone()]), fail("invalid LLB with 1 vertexes"));
        assert_eq!(
            text(vec![good.def[1].clone(), good.def[0].clone()]),
            fail("invalid LLB with no inputs on last vertex")
        );
        assert!(text(vec![vec![0xff]]).is_err_and(|e| e.starts_with("failed to parse llb proto op")));
        let missing = op(pb::Op { inputs: vec![edge("sha256:00")], ..Default::default() });
        assert_eq!(text(vec![good.def[0].clone(), missing]), fail("invalid missing input digest sha256:00"));
        let negative = pb::Input { digest: a.clone(), index: -1 };
        let negative = op(pb::Op { inputs: vec![negative], ..Default::default() });
        assert_eq!(text(vec![good.def[0].clone(), negative]), fail("invalid input 0 output index -1"));

        let twice = op(pb::Op { inputs: vec![edge(&a), edge(&a)], ..Default::default() });
        assert_eq!(text(vec![good.def[0].clone(), twice]), fail("invalid last vertex inputs: 2"));
    }

    #[test]
    fn executions_that_mean_nothing_are_refused() {
        let meta = || Some(pb::Meta { args: vec!["x".into()], ..Default::default() });
        let mounts = |more: &[pb::Mount]| {
            let root = pb::Mount { dest: "/".into(), input: -1, ..Default::default() };
            [&[root], more].concat()
        };
        let mount = |mount_type, sharing: Option<i32>| pb::Mount {
            dest: "/m".into(),
            input: -1,
            mount_type,
            cache_opt: sharing.map(|sharing| pb::CacheOpt { id: "c".into(), sharing }),
            ..Default::default()
        };
        let cache = pb::MountType::Cache as i32;
        let exec = |network, more: &[pb::Mount]| pb::ExecOp {
            meta: meta(),
            network,
            mounts: mounts(more),
            ..Default::default()
        };
        let cases = [
            (pb::ExecOp::default(), Err("invalid exec op with no meta")),
            (exec(0, &[mount(cache, Some(1))]), Ok(())),
            (exec(7, &[]), Err("unknown network mode 7")),
            (exec(0, &[mount(42, None)]), Err("invalid mount type 42 at /m")),
            (exec(0, &[mount(cache, None)]), Err("missing cache mount options at /m")),
            (exec(0, &[mount(cache, Some(77))]), Err("invalid cache sharing option: 77")),
        ];
        for (exec, expected) in cases {
            let mut b = Builder::new();
            let op = pb::Op { op: Some(op::Op::Exec(Box::new(exec))), ..Default::default() };
            let vertex = b.add(&op, Default::default());
            let loaded = load(&b.finish(&edge(&vertex))).map(|_| ()).map_err(|e| e.to_string());
            assert_eq!(loaded, expected.map_err(str::to_owned));
        }
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let mut b = Builder::new();
        let mut last = b.add(&source("local://a"), Default::default());
        for _ in 0..100_000 {
            last = b.add(&merge(&[&last]), Default::default());
        }
        let def = b.finish(&edge(&last));
        let loaded =
            std::thread::Builder::new().stack_size(256 << 10).spawn(move || load(&def)).expect("spawns");
        assert_eq!(loaded.join().expect("no overflow").expect("loads").vertices.len(), 100_001);
    }
}
