//! Reading a cache: a manifest of its own, or images whose configs hold records. All of it is somebody else's word: it
//! is checked for sense and size, and blobs against their digests.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use futures::future::BoxFuture;
use jiff::Timestamp;
use kiln_cache::remote::{self, RemoteCache};
use kiln_cache::{LayerBlob, LazyLayer, RecordType, Ref, SnapshotMeta};
use kiln_proto::reference::check_digest;
use kiln_solver::import::{ImportedCache, RecordDigest, RemoteLink};
use kiln_solver::op::OpError;
use serde::Deserialize;

use super::push::sha256;
use super::{CREATED, DESCRIPTION, ImportError, Place, UNCOMPRESSED};
use crate::export::config::CACHE;
use crate::image::{Access, ImageError, Images, chain_ids};
use crate::layer::media_compression;

/// Larger manifests are not read.
const MAX_MANIFEST: u64 = 4 << 20;
/// Images of one index that are looked at.
const MAX_IMAGES: usize = 64;
/// Indexes within indexes.
const MAX_DEPTH: usize = 4;

/// One cache, its layers still where they are.
pub struct Imported {
    images: Arc<Images>,
    place: Place,
    records: RemoteCache,
    layers: HashMap<String, Layer>,
}

/// What is said of a layer.
#[derive(Debug, Clone)]
struct Layer {
    blob: LayerBlob,
    created: SystemTime,
    description: String,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Descriptor {
    #[serde(default, rename = "mediaType")]
    media_type: String,
    #[serde(default)]
    digest: String,
    #[serde(default)]
    size: u64,
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads what is at `place`: one cache, or one for each image that holds one.
///
/// # Errors
/// It is not there, can't be had, or makes no sense.
pub async fn read(
    images: &Arc<Images>,
    place: &Place,
    access: &Access,
) -> Result<Vec<Imported>, ImportError> {
    let source = Source { images, place, access };
    let manifest = source.top().await?;
    let (config, layers) = match manifest {
        Manifest { manifests: Some(entries), .. } => {
            let (configs, layers): (Vec<_>, Vec<_>) =
                entries.into_iter().partition(|entry| entry.media_type == remote::MEDIA_TYPE);
            match configs.into_iter().next_back() {
                Some(config) => (config, layers),
                None => return source.images_of(layers).await,
            }
        }
        Manifest { config: Some(config), layers, .. } if config.media_type == remote::MEDIA_TYPE => {
            (config, layers.unwrap_or_default())
        }
        manifest => return Ok(source.image(manifest).await?.into_iter().collect()),
    };
    let records = RemoteCache::parse(&source.blob(&config, remote::MAX_DOCUMENT).await?)?;
    let layers = layers.into_iter().filter_map(|descriptor| {
        let annotations = descriptor.annotations.clone().unwrap_or_default();
        let text = |key: &str| annotations.get(key).map(String::as_str).unwrap_or_default();
        layer(descriptor, text(UNCOMPRESSED), text(CREATED), text(DESCRIPTION))
    });
    Ok(vec![source.imported(records, layers)])
}

/// A layer, if what is said of it makes it usable.
fn layer(descriptor: Descriptor, diff_id: &str, created: &str, description: &str) -> Option<Layer> {
    let Descriptor { media_type, digest, size, .. } = descriptor;
    let usable = |digest: &str| digest.starts_with("sha256:") && check_digest(digest).is_ok();
    media_compression(&media_type).filter(|_| usable(&digest) && usable(diff_id))?;
    let created = created.parse::<Timestamp>().map_or_else(|_| SystemTime::now(), SystemTime::from);
    let blob = LayerBlob { digest, size, media_type, diff_id: diff_id.to_owned() };
    Some(Layer { blob, created, description: description.to_owned() })
}

/// Where blobs are read from.
#[derive(Clone, Copy)]
struct Source<'a> {
    images: &'a Arc<Images>,
    place: &'a Place,
    access: &'a Access,
}

impl Source<'_> {
    fn imported(&self, records: RemoteCache, layers: impl Iterator<Item = Layer>) -> Imported {
        Imported {
            images: self.images.clone(),
            place: self.place.clone(),
            records,
            layers: layers.map(|layer| (layer.blob.digest.clone(), layer)).collect(),
        }
    }

    /// The manifest that the place names.
    async fn top(&self) -> Result<Manifest, ImportError> {
        let bytes = match self.place {
            Place::Registry { reference, insecure } => {
                let registry = self.images.registry();
                let repository = registry.repository(reference, self.access.credentials.clone());
                repository.insecure(*insecure).manifest(reference.manifest_name()).await?.bytes
            }
            Place::Client { digest, .. } => {
                let digest = digest.clone().unwrap_or_default();
                self.fetch(&digest, None, MAX_MANIFEST).await?
            }
        };
        manifest(&bytes)
    }

    async fn blob(&self, of: &Descriptor, limit: u64) -> Result<Vec<u8>, ImportError> {
        if of.size > limit {
            let text = format!("blob {} is too large ({} > {limit})", of.digest, of.size);
            return Err(ImportError::Malformed(text));
        }
        self.fetch(&of.digest, Some(of.size), limit).await
    }

    /// A small blob, checked.
    async fn fetch(&self, digest: &str, size: Option<u64>, limit: u64) -> Result<Vec<u8>, ImportError> {
        if !digest.starts_with("sha256:") || check_digest(digest).is_err() {
            return Err(ImportError::Malformed(format!("invalid digest {digest:?}")));
        }
        match self.place {
            Place::Registry { reference, insecure } => {
                let mut bytes = Vec::new();
                let registry = self.images.registry();
                let repository = registry.repository(reference, self.access.credentials.clone());
                let mut stream = repository.insecure(*insecure).blob(digest, size.unwrap_or(limit));
                while let Some(chunk) = stream.chunk().await? {
                    bytes.extend_from_slice(&chunk);
                }
                let actual = sha256(&bytes);
                if actual != digest {
                    return Err(ImportError::Malformed(format!("expected {digest}, got {actual}")));
                }
                Ok(bytes)
            }
            Place::Client { store, .. } => Ok(store.read(digest, limit).await?),
        }
    }

    /// The caches of all images below an index.
    async fn images_of(&self, entries: Vec<Descriptor>) -> Result<Vec<Imported>, ImportError> {
        let mut caches = Vec::new();
        let mut pending: Vec<(Descriptor, usize)> = entries.into_iter().map(|entry| (entry, 1)).collect();
        let mut seen = 0;
        while let Some((entry, depth)) = pending.pop() {
            seen += 1;
            if seen > MAX_IMAGES || depth > MAX_DEPTH {
                break;
            }
            let bytes = match self.place {
                Place::Registry { reference, insecure } => {
                    let registry = self.images.registry();
                    let repository = registry.repository(reference, self.access.credentials.clone());
                    repository.insecure(*insecure).manifest(&entry.digest).await?.bytes
                }
                Place::Client { .. } => self.blob(&entry, MAX_MANIFEST).await?,
            };
            let manifest = manifest(&bytes)?;
            match manifest.manifests {
                Some(entries) => pending.extend(entries.into_iter().map(|entry| (entry, depth + 1))),
                None => caches.extend(self.image(manifest).await?),
            }
        }
        Ok(caches)
    }

    /// The cache that an image's config holds.
    async fn image(&self, manifest: Manifest) -> Result<Option<Imported>, ImportError> {
        let (Some(config), Some(layers)) = (manifest.config, manifest.layers) else { return Ok(None) };
        if layers.is_empty() {
            return Ok(None);
        }
        let bytes = self.blob(&config, 2 * remote::MAX_DOCUMENT).await?;
        let malformed =
            |error: &dyn std::fmt::Display| ImportError::Malformed(format!("image config: {error}"));
        let config: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| malformed(&error))?;
        let diff_ids: Vec<&str> = config["rootfs"]["diff_ids"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|id| id.as_str())
            .collect();
        let Some(records) = config[CACHE].as_str().filter(|_| diff_ids.len() == layers.len()) else {
            return Ok(None);
        };
        use base64::Engine;
        let records = base64::engine::general_purpose::STANDARD.decode(records);
        let records = records.map_err(|error| malformed(&error))?;
        let blobs: Vec<String> = layers.iter().map(|layer| layer.digest.clone()).collect();
        let records = RemoteCache::inline(&records, &blobs)?;
        let history: Vec<&serde_json::Value> = config["history"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|entry| !entry["empty_layer"].as_bool().unwrap_or_default())
            .collect();
        let layers = layers.into_iter().enumerate().filter_map(|(at, descriptor)| {
            let said = |key: &str| history.get(at).and_then(|entry| entry[key].as_str()).unwrap_or_default();
            layer(descriptor, diff_ids[at], said("created"), said("created_by"))
        });
        Ok(Some(self.imported(records, layers)))
    }
}

fn manifest(bytes: &[u8]) -> Result<Manifest, ImportError> {
    serde_json::from_slice(bytes).map_err(|error| ImportError::Malformed(format!("cache manifest: {error}")))
}

impl Imported {
    /// The layers of a record's first result that can be had.
    fn chain(&self, record: u32) -> Option<Vec<&Layer>> {
        let known = |chain: Vec<&str>| chain.into_iter().map(|blob| self.layers.get(blob)).collect();
        self.records.results(record).filter_map(known).find(|chain: &Vec<_>| !chain.is_empty())
    }

    async fn pull(&self, chain: Vec<&Layer>) -> Result<Ref, ImportError> {
        let mut sources = Vec::new();
        let mut held = Vec::new();
        match &self.place {
            Place::Registry { reference, .. } => {
                sources.push(reference.clone().without_tag_and_digest().to_string());
            }
            // The client leaves, and its blobs with it.
            Place::Client { store, .. } => {
                for layer in &chain {
                    held.push(store.receive(self.images.blobs(), &layer.blob).await?);
                }
            }
        }
        let chain: Vec<Layer> = chain.into_iter().cloned().collect();
        let images = self.images.clone();
        let pulled = tokio::task::spawn_blocking(move || {
            let ids: Vec<String> = chain.iter().map(|layer| layer.blob.diff_id.clone()).collect();
            let mut top: Ref = None;
            for (layer, chain_id) in chain.into_iter().zip(chain_ids(&ids)) {
                let Layer { blob, created, description } = layer;
                let lazy = LazyLayer { blob, chain_id, sources: sources.clone() };
                let meta = SnapshotMeta { record_type: RecordType::Regular, description, created };
                top = Some(images.snapshots().lazy_layer(top.as_ref(), lazy, meta)?);
            }
            drop(held);
            Ok::<Ref, ImageError>(top)
        });
        Ok(pulled.await.map_err(|error| ImageError::Internal(error.to_string()))??)
    }
}

impl ImportedCache<Ref> for Imported {
    fn records(&self, digest: &RecordDigest) -> &[u32] {
        self.records.records(digest)
    }

    fn digest(&self, record: u32) -> Option<RecordDigest> {
        self.records.digest(record)
    }

    fn inputs(&self, record: u32) -> &[Vec<RemoteLink>] {
        self.records.inputs(record)
    }

    fn has_result(&self, record: u32) -> bool {
        self.chain(record).is_some()
    }

    fn load(&self, record: u32) -> BoxFuture<'_, Result<Option<Ref>, OpError>> {
        Box::pin(async move {
            let Some(chain) = self.chain(record) else { return Ok(None) };
            self.pull(chain).await.map(Some).map_err(|error| OpError::new(error.to_string()))
        })
    }
}
