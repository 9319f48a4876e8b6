//! What every key-value engine has to do, checked on each.

use kiln_cache::kv::{Batch, Cf, Kv, MemKv, RocksKv};
use proptest::prelude::*;
use std::collections::BTreeMap;

fn on_each(test: impl Fn(&dyn Kv)) {
    test(&MemKv::new());
    let dir = tempfile::tempdir().unwrap();
    test(&RocksKv::open(dir.path()).unwrap());
}

fn put(kv: &dyn Kv, cf: Cf, key: &[u8], value: &[u8]) {
    let mut batch = Batch::new();
    batch.put(cf, key, value);
    kv.write(batch).unwrap();
}

fn scan(kv: &dyn Kv, cf: Cf, prefix: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut out = Vec::new();
    kv.scan(cf, prefix, &mut |key, value| {
        out.push((key.to_vec(), value.to_vec()));
        Ok(true)
    })
    .unwrap();
    out
}

#[test]
fn families_do_not_share_keys() {
    on_each(|kv| {
        for (i, cf) in Cf::ALL.into_iter().enumerate() {
            put(kv, cf, b"key", &[i as u8]);
        }
        for (i, cf) in Cf::ALL.into_iter().enumerate() {
            assert_eq!(kv.get(cf, b"key").unwrap(), Some(vec![i as u8]));
            assert_eq!(scan(kv, cf, b"").len(), 1);
        }
    });
}

#[test]
fn a_batch_is_applied_in_order() {
    on_each(|kv| {
        put(kv, Cf::Keys, b"old", b"1");
        let mut batch = Batch::new();
        batch.put(Cf::Keys, *b"a", *b"1").delete(Cf::Keys, *b"a").put(Cf::Keys, *b"a", *b"2");
        batch.delete(Cf::Keys, *b"old").delete(Cf::Keys, *b"never there").put(Cf::Ops, *b"b", *b"3");
        kv.write_durable(batch).unwrap();
        assert_eq!(kv.get(Cf::Keys, b"a").unwrap().as_deref(), Some(&b"2"[..]));
        assert_eq!(kv.get(Cf::Keys, b"old").unwrap(), None);
        assert_eq!(kv.get(Cf::Ops, b"b").unwrap().as_deref(), Some(&b"3"[..]));
    });
}

#[test]
fn several_keys_come_back_in_the_order_asked() {
    on_each(|kv| {
        put(kv, Cf::Keys, b"a", b"1");
        put(kv, Cf::Keys, b"c", b"");
        let found = kv.multi_get(Cf::Keys, &[b"c", b"b", b"a", b"a"]).unwrap();
        assert_eq!(found, [Some(vec![]), None, Some(b"1".to_vec()), Some(b"1".to_vec())]);
        assert!(kv.multi_get(Cf::Keys, &[]).unwrap().is_empty());
    });
}

#[test]
fn a_scan_stops_when_told_and_passes_errors_on() {
    on_each(|kv| {
        for key in [b"a1", b"a2", b"a3", b"b1"] {
            put(kv, Cf::Keys, key, b"");
        }
        let mut seen = 0;
        kv.scan(Cf::Keys, b"a", &mut |_, _| {
            seen += 1;
            Ok(seen < 2)
        })
        .unwrap();
        assert_eq!(seen, 2);
        let failed = kv.scan(Cf::Keys, b"a", &mut |_, _| Err(kiln_cache::StoreError::Closed));
        assert!(matches!(failed, Err(kiln_cache::StoreError::Closed)));
    });
}

#[test]
fn a_scan_does_not_see_what_it_writes() {
    on_each(|kv| {
        put(kv, Cf::Keys, b"a", b"");
        put(kv, Cf::Keys, b"b", b"");
        let mut seen = 0;
        kv.scan(Cf::Keys, b"", &mut |key, _| {
            seen += 1;
            put(kv, Cf::Keys, &[key, b"+"].concat(), b"");
            Ok(true)
        })
        .unwrap();
        assert_eq!(seen, 2);
        assert_eq!(scan(kv, Cf::Keys, b"").len(), 4);
    });
}

#[test]
fn rocks_keeps_what_was_written_without_a_clean_close() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(dir.path()).unwrap();
    for i in 0..1000u32 {
        put(&kv, Cf::Keys, &i.to_be_bytes(), b"value");
    }
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let reopened = RocksKv::open(copy.path()).unwrap();
    assert_eq!(scan(&reopened, Cf::Keys, b"").len(), 1000);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]
    #[test]
    fn engines_agree_with_a_sorted_map(
        changes in prop::collection::vec((prop::collection::vec(prop::sample::select(vec![0u8, 1, 0x7f, 0xfe, 0xff]), 0..4), prop::option::of(any::<u8>())), 0..60),
        prefixes in prop::collection::vec(prop::collection::vec(prop::sample::select(vec![0u8, 1, 0x7f, 0xfe, 0xff]), 0..3), 1..8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mem, rocks) = (MemKv::new(), RocksKv::open(dir.path()).unwrap());
        let mut model = BTreeMap::new();
        for (key, value) in &changes {
            let mut batch = Batch::new();
            match value {
                Some(value) => {
                    model.insert(key.clone(), vec![*value]);
                    batch.put(Cf::Values, key.clone(), [*value]);
                }
                None => {
                    model.remove(key);
                    batch.delete(Cf::Values, key.clone());
                }
            }
            mem.write(batch.clone()).unwrap();
            rocks.write(batch).unwrap();
        }
        for prefix in prefixes {
            let expected: Vec<_> = model.iter().filter(|(key, _)| key.starts_with(&prefix)).map(|(k, v)| (k.clone(), v.clone())).collect();
            prop_assert_eq!(&scan(&mem, Cf::Values, &prefix), &expected);
            prop_assert_eq!(&scan(&rocks, Cf::Values, &prefix), &expected);
        }
    }
}

#[test]
fn logs_of_short_lives_do_not_pile_up() {
    let dir = tempfile::tempdir().unwrap();
    let logs = || {
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|name| name == "log")).count()
    };
    for life in 0..80_u32 {
        let kv = RocksKv::open(dir.path()).unwrap();
        put(&kv, Cf::ALL[life as usize % 3], &life.to_le_bytes(), b"v");
        assert!(logs() < 40, "{} logs", logs());
    }
    let kv = RocksKv::open(dir.path()).unwrap();
    for life in 0..80_u32 {
        assert!(kv.get(Cf::ALL[life as usize % 3], &life.to_le_bytes()).unwrap().is_some(), "{life}");
    }
}

#[test]
fn what_was_deleted_takes_no_space_once_it_is_reclaimed() {
    let dir = tempfile::tempdir().unwrap();
    let kv = RocksKv::open(dir.path()).unwrap();
    let key = |n: u32| n.to_be_bytes().to_vec();
    let used = || -> u64 {
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    };
    let before = used();
    let mut batch = Batch::new();
    for n in 0..20_000 {
        batch.put(Cf::Values, key(n), vec![b'x'; 500]);
    }
    kv.write(batch).unwrap();
    kv.settle().unwrap();
    assert!(used() > before + 10_000_000);
    let mut batch = Batch::new();
    for n in 1..20_000 {
        batch.delete(Cf::Values, key(n));
    }
    kv.write(batch).unwrap();
    kv.reclaim().unwrap();
    assert!(used() < before + 1_000_000, "{} bytes are used", used());
    assert_eq!(scan(&kv, Cf::Values, b"").len(), 1);
}
