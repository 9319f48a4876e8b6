//! Changes sources of a definition: what uses them gets new digests.

use std::collections::HashMap;

use prost::Message;

use super::{LoadError, digest, encode_op};
use crate::pb::{self, op};

/// The sources of a definition, each with its place in it.
///
/// # Errors
/// Some operation cannot be read.
pub fn sources(definition: &pb::Definition) -> Result<Vec<(usize, pb::Op)>, LoadError> {
    let ops = definition.def.iter().map(|bytes| decode(bytes)).enumerate();
    let sources = ops.filter_map(|(at, op)| match op {
        Ok(op) => matches!(op.op, Some(op::Op::Source(_))).then_some(Ok((at, op))),
        Err(error) => Some(Err(error)),
    });
    sources.collect()
}

fn decode(bytes: &[u8]) -> Result<pb::Op, LoadError> {
    pb::Op::decode(bytes).map_err(|error| LoadError::Decode(error.to_string()))
}

/// The definition with some operations, given by their places, replaced. Metadata and source map follow.
///
/// # Errors
/// Some operation cannot be read, or its inputs are not there.
pub fn replace(
    definition: &pb::Definition,
    mut changed: HashMap<usize, pb::Op>,
) -> Result<pb::Definition, LoadError> {
    let mut out = definition.clone();
    let old: Vec<String> = definition.def.iter().map(|bytes| digest(bytes)).collect();
    let places: HashMap<&str, usize> =
        old.iter().enumerate().map(|(at, digest)| (digest.as_str(), at)).collect();
    let mut users: Vec<Vec<usize>> = vec![Vec::new(); old.len()];
    let mut waits = vec![0_usize; old.len()];
    let mut ops = Vec::with_capacity(old.len());
    for (at, bytes) in definition.def.iter().enumerate() {
        let op = decode(bytes)?;
        for input in &op.inputs {
            let place = places.get(input.digest.as_str());
            let &place = place.ok_or_else(|| LoadError::MissingInput(input.digest.clone()))?;
            users[place].push(at);
            waits[at] += 1;
        }
        ops.push(op);
    }
    let mut new: HashMap<String, String> = HashMap::new();
    let mut ready: Vec<usize> = (0..ops.len()).filter(|at| waits[*at] == 0).collect();
    while let Some(at) = ready.pop() {
        let mut op = changed.remove(&at);
        if ops[at].inputs.iter().any(|input| new.contains_key(&input.digest)) {
            let op = op.get_or_insert_with(|| std::mem::take(&mut ops[at]));
            for input in &mut op.inputs {
                if let Some(digest) = new.get(&input.digest) {
                    input.digest.clone_from(digest);
                }
            }
        }
        if let Some(op) = op {
            out.def[at] = encode_op(&op);
            new.insert(old[at].clone(), digest(&out.def[at]));
        }
        for &user in &users[at] {
            waits[user] -= 1;
            if waits[user] == 0 {
                ready.push(user);
            }
        }
    }
    let renamed = |key: String| new.get(&key).cloned().unwrap_or(key);
    out.metadata = out.metadata.into_iter().map(|(key, value)| (renamed(key), value)).collect();
    if let Some(source) = &mut out.source {
        let locations = std::mem::take(&mut source.locations);
        source.locations = locations.into_iter().map(|(key, value)| (renamed(key), value)).collect();
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::llb::load;

    fn source(identifier: &str) -> pb::Op {
        let source = pb::SourceOp { identifier: identifier.into(), ..Default::default() };
        pb::Op { op: Some(op::Op::Source(source)), ..Default::default() }
    }

    #[test]
    fn what_uses_a_changed_source_changes_too() {
        let bytes = |op: &pb::Op| encode_op(op);
        let (a, b) = (bytes(&source("local://a")), bytes(&source("local://b")));
        let input = |bytes: &[u8]| pb::Input { digest: digest(bytes), index: 0 };
        let merge = |inputs: Vec<pb::Input>| {
            let count = inputs.len() as i64;
            let merged = (0..count).map(|input| pb::MergeInput { input }).collect();
            let op = op::Op::Merge(pb::MergeOp { inputs: merged });
            bytes(&pb::Op { inputs, op: Some(op), ..Default::default() })
        };
        let both = merge(vec![input(&a), input(&b)]);
        let last = bytes(&pb::Op { inputs: vec![input(&both)], ..Default::default() });
        let metadata = |bytes: &[u8], name: &str| {
            let description = [("llb.customname".to_owned(), name.to_owned())].into();
            (digest::<String>(bytes), pb::OpMetadata { description, ..Default::default() })
        };
        let definition = pb::Definition {
            // Users may come before what they use; the result is the last one.
            def: vec![both.clone(), a.clone(), b.clone(), last],
            metadata: [metadata(&a, "a"), metadata(&b, "b"), metadata(&both, "both")].into(),
            source: Some(pb::Source {
                locations: [(digest::<String>(&both), pb::Locations::default())].into(),
                ..Default::default()
            }),
        };
        let found = sources(&definition).expect("reads");
        assert_eq!(found.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [1, 2]);
        let changed = replace(&definition, [(1, source("local://c"))].into()).expect("reads");
        let loaded = load(&changed).expect("loads");
        let names: Vec<&str> = loaded.vertices.iter().map(|vertex| &*vertex.name).collect();
        assert_eq!(names, ["a", "b", "both"]);
        assert!(loaded.vertices.iter().any(|v| {
            matches!(&v.op.op, Some(op::Op::Source(source)) if source.identifier == "local://c")
        }));
        let of =
            |name: &str| loaded.vertices.iter().find(|v| &*v.name == name).expect(name).digest.to_string();
        assert_eq!(of("b"), digest::<String>(&b));
        assert_ne!(of("both"), digest::<String>(&both));
        assert!(loaded.source.locations.contains_key(&of("both")));
        assert_eq!(replace(&definition, HashMap::new()).expect("reads"), definition);
    }
}
