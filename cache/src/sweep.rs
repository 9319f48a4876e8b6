//! Bringing records and files into agreement when a store is opened: what was never committed
//! goes, what lost its files goes, what a power cut may have torn goes. Runs before anybody has a handle.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use crate::epoch::Startup;
use crate::error::{Result, StoreError};
use crate::kv::{Batch, Cf, Kv};
use crate::snapshots::record::{self, Record};
use crate::{blobs, codec, fsx, mutable};

pub(crate) fn sweep(root: &Path, kv: &dyn Kv, startup: &Startup) -> Result<()> {
    let trusted = |epoch: u64| startup.trusted_until.is_none_or(|limit| epoch <= limit);
    let trash = root.join("trash");
    let staging = root.join("staging");
    fsx::rename(&staging, &trash.join(fsx::random_id()))?;
    fsx::make_private_dir(&staging)?;

    let mut batch = Batch::new();
    let keep = snapshots(root, kv, &trusted, &mut batch)?;
    let kept_blobs = blobs(root, kv, &trusted, &mut batch)?;
    let kept_mutable = mutable_dirs(root, kv, &trusted, startup.epochs.stamp(), &mut batch)?;
    if !batch.is_empty() {
        kv.write_freeing(batch)?;
    }
    discard_others(&root.join("snapshots"), &trash, &keep)?;
    discard_others(&root.join("content/sha256"), &trash, &kept_blobs)?;
    discard_others(&root.join("mutable"), &trash, &kept_mutable)
}

/// Decides which snapshots stay; gives the names of their directories.
fn snapshots(
    root: &Path,
    kv: &dyn Kv,
    trusted: &dyn Fn(u64) -> bool,
    batch: &mut Batch,
) -> Result<HashSet<String>> {
    let present: HashSet<String> = fsx::list(&root.join("snapshots"))?.into_iter().collect();
    let mut records: HashMap<String, Record> = HashMap::new();
    record::each(kv, |id, record| {
        records.insert(id.to_owned(), record);
        Ok(())
    })?;
    let mut users: HashMap<&str, Vec<&str>> = HashMap::new();
    let mut lost: Vec<&str> = Vec::new();
    let mut emptied: Vec<&str> = Vec::new();
    for (id, record) in &records {
        for base in &record.bases {
            match records.contains_key(base) {
                true => users.entry(base).or_default().push(id),
                false => lost.push(id),
            }
        }
        let sound = trusted(record.epoch) && (!record.filled || present.contains(id));
        match (sound, &record.lazy) {
            (true, _) => {}
            // A pulled layer can be pulled again.
            (false, Some(lazy)) if !lazy.sources.is_empty() => emptied.push(id),
            (false, _) => lost.push(id),
        }
    }
    let mut gone: HashSet<&str> = HashSet::new();
    while let Some(id) = lost.pop() {
        if gone.insert(id) {
            lost.extend(users.get(id).into_iter().flatten());
        }
    }
    for id in &gone {
        records[*id].erase(kv, batch, id)?;
    }
    let mut keep: HashSet<String> = records
        .iter()
        .filter(|(id, record)| record.filled && !gone.contains(id.as_str()))
        .map(|(id, _)| id.clone())
        .collect();
    for id in emptied.into_iter().filter(|id| !gone.contains(id)) {
        let mut record = records[id].clone();
        record.filled = false;
        record.save(batch, id);
        keep.remove(id);
    }
    if !gone.is_empty() {
        crate::gone::note(batch);
        tracing::info!(count = gone.len(), "dropped snapshots that were not whole");
    }
    Ok(keep)
}

fn blobs(
    root: &Path,
    kv: &dyn Kv,
    trusted: &dyn Fn(u64) -> bool,
    batch: &mut Batch,
) -> Result<HashSet<String>> {
    let present: HashSet<String> = fsx::list(&root.join("content/sha256"))?.into_iter().collect();
    let mut keep = HashSet::new();
    kv.scan(Cf::Blobs, b"", &mut |key, value| {
        let record: blobs::Record = codec::decode("blob", key, value)?;
        let digest = String::from_utf8_lossy(key);
        let name = digest.trim_start_matches("sha256:");
        match trusted(record.epoch) && present.contains(name) {
            true => {
                keep.insert(name.to_owned());
            }
            false => blobs::erase(batch, &digest),
        }
        Ok(true)
    })?;
    Ok(keep)
}

/// As [`snapshots`]; those that a dead owner had open have come to rest by `now`.
fn mutable_dirs(
    root: &Path,
    kv: &dyn Kv,
    trusted: &dyn Fn(u64) -> bool,
    now: u64,
    batch: &mut Batch,
) -> Result<HashSet<String>> {
    let present: HashSet<String> = fsx::list(&root.join("mutable"))?.into_iter().collect();
    let mut keep = HashSet::new();
    mutable::each(kv, |key, mut record| {
        if !trusted(record.epoch) || !present.contains(&record.id) {
            return mutable::erase(kv, batch, key, &record.id);
        }
        if record.epoch == mutable::OPEN {
            record.epoch = now;
            batch.put(Cf::Mutable, key, codec::encode(&record));
        }
        keep.insert(record.id);
        Ok(())
    })?;
    Ok(keep)
}

fn discard_others(dir: &Path, trash: &Path, keep: &HashSet<String>) -> Result<()> {
    for name in fsx::list(dir)?.into_iter().filter(|name| !keep.contains(name)) {
        let path = dir.join(&name);
        std::fs::rename(&path, trash.join(fsx::random_id()))
            .map_err(|e| StoreError::io("discard", &path, e))?;
    }
    Ok(())
}
