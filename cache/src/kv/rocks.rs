//! The engine of the product: RocksDB, tuned to be small. A daemon holds some ten thousand
//! records of a few hundred bytes; what matters is a short open, little memory, and no thread
//! that wakes up while nothing happens.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, Direction,
    ErrorKind, IteratorMode, LogLevel, Options, ReadOptions, WriteBatch, WriteOptions,
};

use super::reserve::Reserve;
use super::{Batch, Cf, Change, Kv, Visit};
use crate::error::{Result, StoreError};
use crate::fsx;

const BLOCK_CACHE: usize = 2 << 20;
/// Memory is taken as records come, and given back by [`Kv::settle`]: these are for bursts.
const MEMTABLE: usize = 8 << 20;
const MEMTABLES_TOTAL: usize = 16 << 20;
const WAL_TOTAL: u64 = 64 << 20;
/// From this many deletions on, and this part of all, it is worth while to write tables without what was deleted.
const DELETIONS: u64 = 1000;
const DELETED_PART: u64 = 4;
/// From this many bytes in memory on they are written to tables when there is nothing else to do.
const SETTLE: u64 = 1 << 20;
/// Each open begins a new log, and short ones may wait long to be written to tables: from this many on they are.
const LOGS: usize = 24;
/// Bytes that must be free on the disk for tables to be written: with less, a write that has to wait for them fails.
const TABLE_ROOM: u64 = 16 << 20;
/// How long a write waits for tables to be written while there is room.
const STALL: Duration = Duration::from_secs(30);

/// How long a write waits on a full disk, and how long none waits again after one has waited in vain.
const ROOM: Duration = Duration::from_secs(1);
const STILL_FULL: Duration = Duration::from_secs(10);
/// How long it is waited for readers to leave a database that must be opened anew.
const LEAVE: Duration = Duration::from_secs(2);

/// A RocksDB database.
pub struct RocksKv {
    /// Nothing only if it had to be closed and could not be opened again; the next to ask for it tries again.
    db: RwLock<Option<Arc<DB>>>,
    dir: PathBuf,
    reserve: Reserve,
    /// When it was last waited in vain for room.
    full: Mutex<Option<Instant>>,
}

/// Which writes may use the last room on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Right {
    Ordinary,
    Reserve,
}

impl RocksKv {
    /// Opens or creates the database in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let reserve = Reserve::new(dir);
        reserve.open_up(0)?;
        let kv = Self {
            db: RwLock::new(Some(Arc::new(open(dir)?))),
            dir: dir.to_owned(),
            reserve,
            full: Mutex::default(),
        };
        if logs(dir)? > LOGS {
            kv.flush()?;
        }
        kv.reserve.fill()?;
        Ok(kv)
    }

    fn db(&self) -> Result<Arc<DB>> {
        if let Some(db) = &*self.db.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(Arc::clone(db));
        }
        let mut current = self.db.write().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some(db) => Ok(Arc::clone(db)),
            None => Ok(Arc::clone(current.insert(Arc::new(open(&self.dir)?)))),
        }
    }

    /// Opens the database anew after `failed` refused to write: RocksDB takes no writes after an error, and
    /// resumes by itself only when as much as all its write buffers is free. False if readers kept it open.
    fn reopen(&self, failed: Arc<DB>) -> Result<bool> {
        let mut current = self.db.write().unwrap_or_else(PoisonError::into_inner);
        if !current.as_ref().is_some_and(|db| Arc::ptr_eq(db, &failed)) {
            return Ok(true);
        }
        drop(failed);
        let began = Instant::now();
        let Some(mut db) = current.take() else { return Ok(true) };
        loop {
            match Arc::try_unwrap(db) {
                Ok(alone) => {
                    drop(alone);
                    break;
                }
                // A reader may itself be waiting for a write.
                Err(shared) if began.elapsed() > LEAVE => {
                    *current = Some(shared);
                    return Ok(false);
                }
                Err(shared) => db = shared,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        *current = Some(Arc::new(open(&self.dir)?));
        Ok(true)
    }

    /// Writes tables of what is in memory, if there is room for them.
    fn flush(&self) -> Result<()> {
        if !self.has_table_room()? {
            return Ok(());
        }
        let db = self.db()?;
        for cf in Cf::ALL {
            db.flush_cf(family(&db, cf)?)?;
        }
        Ok(())
    }

    fn write_with(&self, mut batch: Batch, sync: bool, right: Right) -> Result<()> {
        // A table in memory takes neighbours much faster than what is strewn about. Of changes to one key the last counts.
        batch.changes.sort_by(|a, b| a.place().cmp(&b.place()));
        let size = batch.size();
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        // RocksDB itself would wait on a full disk until somebody makes room, however long that takes.
        options.set_no_slowdown(true);
        let began = Instant::now();
        let mut reopened = false;
        loop {
            // Asked before, since an error of the log makes the database useless until it is opened anew.
            if !self.has_room(size, right)? && !self.wait_for_room(size, right)? {
                return Err(self.full());
            }
            let db = self.db()?;
            match db.write_opt(native(&db, &batch)?, &options) {
                Err(error) if error.kind() == ErrorKind::Incomplete => {
                    if !self.has_table_room()? {
                        return Err(self.full());
                    }
                    if began.elapsed() > STALL {
                        return Err(error.into());
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) if error.kind() == ErrorKind::IOError && !reopened => {
                    tracing::warn!(%error, "the database is opened anew");
                    reopened = self.has_room(size, right)? && self.reopen(db)?;
                    if !reopened {
                        return Err(error.into());
                    }
                }
                written => return Ok(written?),
            }
        }
    }

    fn has_room(&self, size: u64, right: Right) -> Result<bool> {
        match right {
            Right::Ordinary => self.reserve.has_room(size),
            Right::Reserve => {
                self.reserve.open_up(size)?;
                self.reserve.has_any_room(size)
            }
        }
    }

    /// What a failed step has left is being removed, perhaps: true if there is room in a moment.
    fn wait_for_room(&self, size: u64, right: Right) -> Result<bool> {
        let mut full = self.full.lock().unwrap_or_else(PoisonError::into_inner);
        if full.is_some_and(|at| at.elapsed() < STILL_FULL) {
            return Ok(false);
        }
        let began = Instant::now();
        while began.elapsed() < ROOM {
            std::thread::sleep(Duration::from_millis(10));
            if self.has_room(size, right)? {
                return Ok(true);
            }
        }
        *full = Some(Instant::now());
        Ok(false)
    }

    fn full(&self) -> StoreError {
        StoreError::io("write in", &self.dir, rustix::io::Errno::NOSPC)
    }

    fn has_table_room(&self) -> Result<bool> {
        Ok(fsx::free_space(&self.dir)? >= TABLE_ROOM)
    }
}

fn open(dir: &Path) -> Result<DB> {
    let cache = Cache::new_lru_cache(BLOCK_CACHE);
    let families = Cf::ALL.map(|cf| ColumnFamilyDescriptor::new(cf.name(), family_options(cf, &cache)));
    Ok(DB::open_cf_descriptors(&database_options()?, dir, families)?)
}

fn family(db: &DB, cf: Cf) -> Result<&ColumnFamily> {
    db.cf_handle(cf.name()).ok_or_else(|| StoreError::Kv(format!("column family {} is missing", cf.name())))
}

fn native(db: &DB, batch: &Batch) -> Result<WriteBatch> {
    let mut native = WriteBatch::default();
    for change in &batch.changes {
        match change {
            Change::Put(cf, key, value) => native.put_cf(family(db, *cf)?, key, value),
            Change::Delete(cf, key) => native.delete_cf(family(db, *cf)?, key),
        }
    }
    Ok(native)
}

/// Deletions that are in memory and in no table yet.
fn deletions_in_memory(db: &DB, cf: Cf) -> Result<u64> {
    let family = family(db, cf)?;
    let mut count = 0;
    for name in
        [rocksdb::properties::NUM_DELETES_ACTIVE_MEM_TABLE, rocksdb::properties::NUM_DELETES_IMM_MEM_TABLES]
    {
        count += db.property_int_value_cf(family, name)?.unwrap_or(0);
    }
    Ok(count)
}

fn logs(dir: &Path) -> Result<usize> {
    let listed = std::fs::read_dir(dir).map_err(|e| StoreError::io("list", dir, e))?;
    Ok(listed.flatten().filter(|entry| entry.path().extension().is_some_and(|name| name == "log")).count())
}

fn database_options() -> Result<Options> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_background_jobs(2);
    options.set_max_open_files(64);
    options.set_max_file_opening_threads(1);
    options.set_db_write_buffer_size(MEMTABLES_TOTAL);
    options.set_max_total_wal_size(WAL_TOTAL);
    options.set_skip_stats_update_on_db_open(true);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_keep_log_file_num(1);
    options.set_max_log_file_size(1 << 20);
    options.set_log_level(LogLevel::Error);
    // Replaying a short log is quicker than writing a table for each family on every open. Logs take no more of
    // the disk than is in them. The binding has no functions for these.
    Ok(options.get_options_from_string("avoid_flush_during_recovery=true;allow_fallocate=false")?)
}

fn family_options(cf: Cf, cache: &Cache) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_bloom_filter(10.0, false);
    table.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(MEMTABLE);
    options.set_arena_block_size(64 << 10);
    options.set_max_write_buffer_number(4);
    if matches!(cf, Cf::Keys | Cf::Ops) {
        // Most look-ups are for what is not there.
        options.set_memtable_whole_key_filtering(true);
        options.set_memtable_prefix_bloom_ratio(0.02);
    }
    options.set_target_file_size_base(8 << 20);
    options.set_compression_type(DBCompressionType::None);
    options
}

impl Kv for RocksKv {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Vec<u8>>> {
        let db = self.db()?;
        Ok(db.get_cf(family(&db, cf)?, key)?)
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Vec<u8>>>> {
        let db = self.db()?;
        let family = family(&db, cf)?;
        let found = db.multi_get_cf(keys.iter().map(|key| (family, key)));
        found.into_iter().map(|value| value.map_err(StoreError::from)).collect()
    }

    fn write(&self, batch: Batch) -> Result<()> {
        self.write_with(batch, false, Right::Ordinary)
    }

    fn write_freeing(&self, batch: Batch) -> Result<()> {
        self.write_with(batch, false, Right::Reserve)?;
        // Now there is something to wait for.
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    fn write_durable(&self, batch: Batch) -> Result<()> {
        self.write_with(batch, true, Right::Reserve)
    }

    fn reclaim(&self) -> Result<()> {
        if !self.has_table_room()? {
            return Ok(());
        }
        let db = self.db()?;
        for cf in Cf::ALL {
            if deletions_in_memory(&db, cf)? >= DELETIONS {
                db.flush_cf(family(&db, cf)?)?;
            }
        }
        let tables = db.live_files()?;
        for cf in Cf::ALL {
            let own = tables.iter().filter(|table| table.column_family_name == cf.name());
            let (all, deleted) = own.fold((0, 0), |(all, deleted), table| {
                (all + table.num_entries, deleted + table.num_deletions)
            });
            if deleted >= DELETIONS && deleted >= all / DELETED_PART {
                db.compact_range_cf(family(&db, cf)?, None::<&[u8]>, None::<&[u8]>);
            }
        }
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        self.reserve.fill()?;
        let db = self.db()?;
        let mut held = 0;
        for cf in Cf::ALL {
            let size =
                db.property_int_value_cf(family(&db, cf)?, rocksdb::properties::CUR_SIZE_ALL_MEM_TABLES)?;
            held += size.unwrap_or(0);
        }
        if held > SETTLE { self.flush() } else { Ok(()) }
    }

    fn scan(&self, cf: Cf, prefix: &[u8], visit: &mut Visit<'_>) -> Result<()> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        if let Some(end) = upper_bound(prefix) {
            options.set_iterate_upper_bound(end);
        }
        let db = self.db()?;
        let mode = IteratorMode::From(prefix, Direction::Forward);
        for entry in db.iterator_cf_opt(family(&db, cf)?, options, mode) {
            let (key, value) = entry?;
            if !visit(&key, &value)? {
                break;
            }
        }
        Ok(())
    }
}

/// The first key after all that start with `prefix`; `None` if there is no such key.
fn upper_bound(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|&byte| byte != 0xff)?;
    let mut bound = prefix[..=last].to_vec();
    bound[last] += 1;
    Some(bound)
}

impl From<rocksdb::Error> for StoreError {
    fn from(error: rocksdb::Error) -> Self {
        StoreError::Kv(error.to_string())
    }
}
