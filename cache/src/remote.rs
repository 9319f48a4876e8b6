//! The document by which builders tell each other what is in a cache: BuildKit's `cacheconfig` v0. Reads what others
//! wrote, bit by bit in doubt, and writes what they can read. Fetches and stores nothing.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Media type of the document.
pub const MEDIA_TYPE: &str = "application/vnd.buildkit.cacheconfig.v0";

/// Larger documents are not read.
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// A result of more layers than this is none.
const MAX_CHAIN: usize = 4096;

/// Digest of a record.
pub type RecordDigest = [u8; 32];

/// The digest of the record for output `output` of an operation with this digest; of content, if -1.
pub fn record_digest(of: &str, output: i64) -> RecordDigest {
    Sha256::digest(format!("{of}@{output}")).into()
}

/// What is wrong with a document.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RemoteError {
    /// It is too large.
    #[error("cache config of {0} bytes is too large")]
    TooLarge(usize),
    /// It is no such document.
    #[error("malformed cache config: {0}")]
    Malformed(String),
    /// A record's digest is none.
    #[error("invalid digest {0:?} in cache config")]
    Digest(String),
    /// It names a layer or record that it does not have.
    #[error("invalid {0} index {1} in cache config")]
    Index(&'static str, i64),
    /// A record's input has no alternative.
    #[error("invalid empty input of cache record {0}")]
    EmptyInput(usize),
    /// Records or layers stand on themselves.
    #[error("invalid loop of {0}s in cache config")]
    Loop(&'static str),
}

/// The document as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// Layers that results are made of.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<Layer>,
    /// Records.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub records: Vec<Record>,
}

/// A layer on top of another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of its blob.
    #[serde(default)]
    pub blob: String,
    /// Index of the layer below; -1 for none. What is not said is 0.
    #[serde(default)]
    pub parent: i64,
}

/// What is known under one key.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `sha256:…`, see [`record_digest`].
    #[serde(default)]
    pub digest: String,
    /// Results: a layer with all below it.
    #[serde(
        default,
        rename = "layers",
        deserialize_with = "nullable",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub results: Vec<LayerResult>,
    /// Results: exactly these layers.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub chains: Vec<ChainResult>,
    /// For each input, what it may be.
    #[serde(default, deserialize_with = "nullable", skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<Vec<Link>>,
}

/// A result by its topmost layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerResult {
    /// Index of the layer.
    #[serde(default)]
    pub layer: i64,
    /// When it was made.
    #[serde(default, rename = "createdAt", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

/// A result layer by layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainResult {
    /// Indices of the layers, bottom first.
    #[serde(default, deserialize_with = "nullable")]
    pub layers: Vec<i64>,
    /// When it was made.
    #[serde(default, rename = "createdAt", skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

/// One thing that an input may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Which part of it is read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub selector: String,
    /// Index of its record.
    #[serde(default)]
    pub link: i64,
}

/// Go writes empty lists as `null`.
fn nullable<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Ok(Option::<Vec<T>>::deserialize(from)?.unwrap_or_default())
}

/// A document in which every index is right and nothing stands on itself.
#[derive(Debug, Clone)]
pub struct RemoteCache {
    layers: Vec<(String, Option<u32>)>,
    records: Vec<Known>,
    by_digest: HashMap<RecordDigest, Vec<u32>>,
}

#[derive(Debug, Clone)]
struct Known {
    digest: RecordDigest,
    inputs: Vec<Vec<RemoteLink>>,
    results: Vec<Made>,
}

#[derive(Debug, Clone)]
enum Made {
    Top(u32),
    Chain(Vec<u32>),
}

/// One thing that an input of a record may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteLink {
    /// Which part of it is read; empty if the record says that or it is read as a whole.
    pub selector: String,
    /// Its record.
    pub record: u32,
}

impl RemoteCache {
    /// Reads a document.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, RemoteError> {
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(RemoteError::TooLarge(bytes.len()));
        }
        let document = serde_json::from_slice(bytes).map_err(|e| RemoteError::Malformed(e.to_string()))?;
        Self::new(document)
    }

    /// Reads the records of an image's config, whose layers are those of the image.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn inline(bytes: &[u8], layers: &[String]) -> Result<Self, RemoteError> {
        if bytes.len() as u64 > MAX_DOCUMENT {
            return Err(RemoteError::TooLarge(bytes.len()));
        }
        let records: Option<Vec<Record>> =
            serde_json::from_slice(bytes).map_err(|e| RemoteError::Malformed(e.to_string()))?;
        let layer = |(at, blob): (usize, &String)| Layer { blob: blob.clone(), parent: at as i64 - 1 };
        let layers = layers.iter().enumerate().map(layer).collect();
        Self::new(Document { layers, records: records.unwrap_or_default() })
    }

    /// Checks a document.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(document: Document) -> Result<Self, RemoteError> {
        let Document { layers, records } = document;
        let count = (layers.len(), records.len());
        let layer_at = |index: i64| place("layer", index, count.0);
        let layers = layers
            .into_iter()
            .map(|layer| {
                let parent = (layer.parent != -1).then(|| layer_at(layer.parent)).transpose()?;
                Ok((layer.blob, parent))
            })
            .collect::<Result<Vec<_>, RemoteError>>()?;
        in_order("layer", count.0, |at| layers[at].1.iter().copied().collect())?;
        let records = records
            .into_iter()
            .enumerate()
            .map(|(at, record)| {
                let digest = parse_digest(&record.digest)?;
                let link = |link: Link| {
                    let record = place("record", link.link, count.1)?;
                    Ok(RemoteLink { selector: link.selector, record })
                };
                let input = |links: Vec<Link>| match links.is_empty() {
                    true => Err(RemoteError::EmptyInput(at)),
                    false => links.into_iter().map(link).collect(),
                };
                let inputs = record.inputs.into_iter().map(input).collect::<Result<Vec<Vec<_>>, _>>()?;
                let mut results = Vec::with_capacity(record.results.len() + record.chains.len());
                for result in record.results {
                    results.push(Made::Top(layer_at(result.layer)?));
                }
                for chain in record.chains {
                    let chain = chain.layers.into_iter().map(layer_at).collect::<Result<Vec<_>, _>>()?;
                    results.push(Made::Chain(chain));
                }
                Ok(Known { digest, inputs, results })
            })
            .collect::<Result<Vec<_>, RemoteError>>()?;
        in_order("record", count.1, |at| records[at].inputs.iter().flatten().map(|l| l.record).collect())?;
        let mut by_digest: HashMap<RecordDigest, Vec<u32>> = HashMap::new();
        for (at, record) in records.iter().enumerate() {
            by_digest.entry(record.digest).or_default().push(at as u32);
        }
        Ok(Self { layers, records, by_digest })
    }

    /// All records with a digest.
    pub fn records(&self, digest: &RecordDigest) -> &[u32] {
        self.by_digest.get(digest).map_or(&[], Vec::as_slice)
    }

    /// The digest of a record.
    pub fn digest(&self, record: u32) -> Option<RecordDigest> {
        self.records.get(record as usize).map(|known| known.digest)
    }

    /// For each input of a record, what it may be.
    pub fn inputs(&self, record: u32) -> &[Vec<RemoteLink>] {
        self.records.get(record as usize).map_or(&[], |known| known.inputs.as_slice())
    }

    /// The results of a record: blobs of layers, bottom first.
    pub fn results(&self, record: u32) -> impl Iterator<Item = Vec<&str>> {
        let known = self.records.get(record as usize);
        known.into_iter().flat_map(|known| &known.results).filter_map(|made| self.chain(made))
    }

    fn chain(&self, made: &Made) -> Option<Vec<&str>> {
        let mut chain = Vec::new();
        match made {
            Made::Chain(layers) => chain.extend(layers.iter().rev().copied()),
            Made::Top(top) => {
                let mut next = Some(*top);
                while let Some(layer) = next.filter(|_| chain.len() <= MAX_CHAIN) {
                    chain.push(layer);
                    next = self.layers[layer as usize].1;
                }
            }
        }
        if chain.len() > MAX_CHAIN {
            return None;
        }
        Some(chain.into_iter().rev().map(|layer| self.layers[layer as usize].0.as_str()).collect())
    }
}

fn place(what: &'static str, index: i64, count: usize) -> Result<u32, RemoteError> {
    match u32::try_from(index) {
        Ok(place) if (place as usize) < count => Ok(place),
        _ => Err(RemoteError::Index(what, index)),
    }
}

fn parse_digest(text: &str) -> Result<RecordDigest, RemoteError> {
    let wrong = || RemoteError::Digest(text.to_owned());
    let mut digest = [0; 32];
    let digits = text.strip_prefix("sha256:").ok_or_else(wrong)?;
    hex::decode_to_slice(digits, &mut digest).map_err(|_| wrong())?;
    Ok(digest)
}

/// Whether everything comes before something in some order: nothing is below itself.
fn in_order(what: &'static str, count: usize, below: impl Fn(usize) -> Vec<u32>) -> Result<(), RemoteError> {
    let mut waiting = vec![0u32; count];
    let mut above: Vec<Vec<u32>> = vec![Vec::new(); count];
    for (at, waiting) in waiting.iter_mut().enumerate() {
        for lower in below(at) {
            *waiting += 1;
            above[lower as usize].push(at as u32);
        }
    }
    let mut free: Vec<usize> = (0..count).filter(|at| waiting[*at] == 0).collect();
    let mut done = 0;
    while let Some(at) = free.pop() {
        done += 1;
        for upper in std::mem::take(&mut above[at]) {
            waiting[upper as usize] -= 1;
            if waiting[upper as usize] == 0 {
                free.push(upper as usize);
            }
        }
    }
    if done == count { Ok(()) } else { Err(RemoteError::Loop(what)) }
}

/// Makes a document: records are added after those that they name. Equal ones are one.
#[derive(Debug, Default)]
pub struct Builder {
    records: Vec<Added>,
    by_id: HashMap<[u8; 32], usize>,
}

#[derive(Debug)]
struct Added {
    id: [u8; 32],
    digest: RecordDigest,
    inputs: Vec<Vec<(String, usize)>>,
    /// Blobs, bottom first, and when they were made.
    results: BTreeMap<Vec<String>, Option<String>>,
}

impl Builder {
    /// Adds a record whose inputs may be these records; gives its place.
    pub fn record(&mut self, digest: RecordDigest, mut inputs: Vec<Vec<(String, usize)>>) -> usize {
        let mut id = Sha256::new_with_prefix(digest);
        for links in &mut inputs {
            let key = |link: &(String, usize)| (link.0.clone(), self.records[link.1].id);
            links.sort_by_cached_key(key);
            links.dedup();
            id.update((links.len() as u64).to_le_bytes());
            for (selector, below) in links.iter() {
                id.update((selector.len() as u64).to_le_bytes());
                id.update(selector);
                id.update(self.records[*below].id);
            }
        }
        let id: [u8; 32] = id.finalize().into();
        if let Some(known) = self.by_id.get(&id) {
            return *known;
        }
        self.records.push(Added { id, digest, inputs, results: BTreeMap::new() });
        self.by_id.insert(id, self.records.len() - 1);
        self.records.len() - 1
    }

    /// Says what a record's result is: blobs of layers, bottom first.
    pub fn result(&mut self, record: usize, chain: Vec<String>, created_at: Option<String>) {
        if !chain.is_empty() {
            self.records[record].results.insert(chain, created_at);
        }
    }

    /// The document, without what leads to no result; the same records give the same one in whatever order they came.
    pub fn finish(self) -> Document {
        let mut wanted: Vec<bool> = self.records.iter().map(|record| !record.results.is_empty()).collect();
        for at in (0..self.records.len()).rev() {
            if wanted[at] {
                for (_, below) in self.records[at].inputs.iter().flatten() {
                    wanted[*below] = true;
                }
            }
        }
        let mut order: Vec<usize> = (0..self.records.len()).filter(|at| wanted[*at]).collect();
        order.sort_by_key(|at| (self.records[*at].digest, self.records[*at].id));
        let mut places = vec![0i64; self.records.len()];
        for (place, at) in order.iter().enumerate() {
            places[*at] = place as i64;
        }
        // Each layer under the blobs up to it, so that shorter chains come first.
        let mut layers: BTreeMap<&[String], i64> = BTreeMap::new();
        for chain in order.iter().flat_map(|at| self.records[*at].results.keys()) {
            for end in 1..=chain.len() {
                layers.insert(&chain[..end], 0);
            }
        }
        for (place, at) in layers.values_mut().enumerate() {
            *at = place as i64;
        }
        let layer = |chain: &&[String]| {
            let (blob, below) = chain.split_last().map_or((String::new(), &[][..]), |(b, l)| (b.clone(), l));
            Layer { blob, parent: layers.get(below).copied().unwrap_or(-1) }
        };
        let record = |at: &usize| {
            let Added { digest, inputs, results, .. } = &self.records[*at];
            let result = |(chain, created_at): (&Vec<String>, &Option<String>)| LayerResult {
                layer: layers[chain.as_slice()],
                created_at: created_at.clone(),
            };
            let link = |(selector, below): &(String, usize)| Link {
                selector: selector.clone(),
                link: places[*below],
            };
            Record {
                digest: format!("sha256:{}", hex::encode(digest)),
                results: results.iter().map(result).collect(),
                chains: Vec::new(),
                inputs: inputs.iter().map(|links| links.iter().map(link).collect()).collect(),
            }
        };
        Document { layers: layers.keys().map(layer).collect(), records: order.iter().map(record).collect() }
    }
}

#[cfg(test)]
mod tests;
