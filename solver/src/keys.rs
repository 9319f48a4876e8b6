//! How keys are made: blake3 over an operation's digest and what each input contributes. Every
//! field is tagged and of fixed or stated length, so no two different lists hash the same bytes.

use crate::op::Key;

/// Domain of definition keys: inputs count by their own definition keys.
pub(crate) const DEFINITION_KEY: &str = "kiln.definition.v1";
/// Domain of content keys: inputs count by content that is read, else by their own content keys.
pub(crate) const CONTENT_KEY: &str = "kiln.content.v1";
/// Domain of output keys: inputs count by content that is read, else by digests of their outputs.
pub(crate) const OUTPUT_KEY: &str = "kiln.output.v1";

/// What one input contributes to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// An output of a vertex that has this key itself.
    Edge(Key, u32),
    /// Content that the operation reads.
    Query(Key),
    /// Digest of the whole output.
    Output(Key),
}

/// The key of a vertex. `domain` keeps the kinds of keys apart; a selector counts only where the
/// input isn't already represented by the content it selects.
pub(crate) fn vertex_key<'a>(
    domain: &str,
    op: &Key,
    inputs: impl Iterator<Item = (Part, Option<&'a str>)>,
) -> Key {
    // Short, mostly: hashed in one go that costs a third of feeding a hasher.
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(domain.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(op.as_bytes());
    for (part, selector) in inputs {
        let selector = match part {
            Part::Edge(key, output) => {
                bytes.push(b'e');
                bytes.extend_from_slice(key.as_bytes());
                bytes.extend_from_slice(&output.to_le_bytes());
                selector
            }
            Part::Query(key) => {
                bytes.push(b'q');
                bytes.extend_from_slice(key.as_bytes());
                None
            }
            Part::Output(key) => {
                bytes.push(b'o');
                bytes.extend_from_slice(key.as_bytes());
                selector
            }
        };
        match selector {
            Some(text) => {
                bytes.push(b's');
                bytes.extend_from_slice(&(text.len() as u64).to_le_bytes());
                bytes.extend_from_slice(text.as_bytes());
            }
            None => bytes.push(b'-'),
        }
    }
    blake3::hash(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_in_each_thing_that_matters() {
        let a = blake3::hash(b"a");
        let b = blake3::hash(b"b");
        let one = |domain, op, part, selector| vertex_key(domain, op, [(part, selector)].into_iter());
        let keys = [
            vertex_key("x", &a, [].into_iter()),
            one("x", &a, Part::Edge(b, 0), None),
            one("y", &a, Part::Edge(b, 0), None),
            one("x", &b, Part::Edge(b, 0), None),
            one("x", &a, Part::Edge(a, 0), None),
            one("x", &a, Part::Edge(b, 1), None),
            one("x", &a, Part::Edge(b, 0), Some("")),
            one("x", &a, Part::Edge(b, 0), Some("s")),
            one("x", &a, Part::Query(b), None),
            one("x", &a, Part::Output(b), None),
        ];
        for (i, left) in keys.iter().enumerate() {
            for right in &keys[i + 1..] {
                assert_ne!(left, right);
            }
        }
        assert_eq!(one("x", &a, Part::Query(b), None), one("x", &a, Part::Query(b), Some("s")));
    }
}
