//! What survives a power cut. Records are stamped with the epoch in which their files came to
//! rest; from time to time the file system is synced and the epoch before is declared durable.
//! After a start on another boot without a clean stop, records of later epochs are not trusted.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Result, StoreError};
use crate::kv::{Batch, Cf, Kv};

const BOOT: &[u8] = b"boot";
const CLEAN: &[u8] = b"clean";
const DURABLE: &[u8] = b"durable";

/// The clock of epochs.
pub(crate) struct Epochs {
    current: AtomicU64,
}

/// What a start found.
pub(crate) struct Startup {
    pub(crate) epochs: Epochs,
    /// If set, records with a later stamp than this may be torn.
    pub(crate) trusted_until: Option<u64>,
}

impl Epochs {
    /// Reads what the last owner left and marks the store as being in use on this boot.
    pub(crate) fn start(kv: &dyn Kv, boot: &str) -> Result<Startup> {
        let last_boot = kv.get(Cf::Meta, BOOT)?;
        let clean = kv.get(Cf::Meta, CLEAN)?.is_some();
        let durable = match kv.get(Cf::Meta, DURABLE)? {
            None => 0,
            Some(bytes) => u64::from_le_bytes(bytes.try_into().map_err(|_| StoreError::Corrupt {
                what: "epoch",
                key: "durable".to_owned(),
                reason: "not 8 bytes".to_owned(),
            })?),
        };
        let same_boot = last_boot.as_deref().is_none_or(|last| last == boot.as_bytes());
        let trusted_until = (!clean && !same_boot).then_some(durable);
        Ok(Startup { epochs: Self { current: AtomicU64::new(durable + 1) }, trusted_until })
    }

    /// Notes that this boot uses the store; to be called when everything untrusted is gone.
    pub(crate) fn mark_in_use(kv: &dyn Kv, boot: &str) -> Result<()> {
        let mut batch = Batch::new();
        batch.put(Cf::Meta, BOOT, boot.as_bytes()).delete(Cf::Meta, CLEAN);
        kv.write_durable(batch)
    }

    /// The stamp for a record whose files are complete and in their final place *before* this is called.
    pub(crate) fn stamp(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// Makes everything stamped so far durable.
    pub(crate) fn advance(&self, kv: &dyn Kv, root: &Path, clean_stop: bool) -> Result<()> {
        // Whoever still read the old number had its files in place before this moment, so the
        // sync below covers them.
        let ended = self.current.fetch_add(1, Ordering::SeqCst);
        crate::fsx::sync_filesystem(root)?;
        let mut batch = Batch::new();
        batch.put(Cf::Meta, DURABLE, ended.to_le_bytes());
        if clean_stop {
            batch.put(Cf::Meta, CLEAN, [1]);
        }
        kv.write_durable(batch)
    }
}

/// Identifies the time since the machine was started.
pub(crate) fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|e| StoreError::io("read", path, e))?;
    Ok(text.trim().to_owned())
}
