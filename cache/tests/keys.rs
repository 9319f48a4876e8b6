//! The key store, on both engines, and what it says to damaged records.

use std::sync::Arc;
use std::time::Duration;

use kiln_cache::kv::{Batch, Cf, Kv, MemKv, RocksKv};
use kiln_cache::{KeyChange, KeyRecord, KeyStorage, KeyStore, OpRecord, StoreError};

fn record() -> KeyRecord {
    KeyRecord {
        results: vec!["abc".into(), String::new()],
        name: "[2/2] RUN true".into(),
        content_key: Some([9; 32]),
    }
}

fn on_each(test: impl Fn(KeyStore)) {
    test(KeyStore::new(Arc::new(MemKv::new())));
    let dir = tempfile::tempdir().unwrap();
    test(KeyStore::new(Arc::new(RocksKv::open(dir.path()).unwrap())));
}

#[test]
fn one_record_is_found_under_all_its_keys() {
    on_each(|store| {
        let record_under = |keys: &[[u8; 32]], record| KeyChange::Record { keys: keys.to_vec(), record };
        store.write(&[record_under(&[[1; 32], [2; 32]], Arc::new(record()))]).unwrap();
        assert_eq!(store.get(&[1; 32]).unwrap(), Some(record()));
        assert_eq!(store.get(&[2; 32]).unwrap(), Some(record()));
        assert_eq!(store.get(&[3; 32]).unwrap(), None);
        assert!(!store.remove(&[1; 32], &["other".to_owned()]).unwrap(), "it names another result by now");
        assert!(store.get(&[1; 32]).unwrap().is_some());
        assert!(store.remove(&[1; 32], &record().results).unwrap());
        assert_eq!(store.get(&[1; 32]).unwrap(), None);
        assert_eq!(store.get(&[2; 32]).unwrap(), Some(record()));
    });
}

#[test]
fn an_operation_is_remembered_by_its_digest() {
    on_each(|store| {
        assert_eq!(store.op(&[1; 32]).unwrap(), None);
        for (ms, follows_outputs) in [(5, true), (7, false)] {
            let record = OpRecord { duration: Duration::from_millis(ms), follows_outputs };
            store.write(&[KeyChange::Op { digest: [1; 32], record }]).unwrap();
            assert_eq!(store.op(&[1; 32]).unwrap(), Some(record));
        }
        assert_eq!(store.op(&[2; 32]).unwrap(), None);
    });
}

#[test]
fn a_damaged_record_is_an_error_that_names_it() {
    let kv = Arc::new(MemKv::new());
    let store = KeyStore::new(kv.clone());
    for (value, wanted) in [(&b""[..], "empty"), (&[9, 1][..], "version 9"), (&[1, 0xff][..], "key")] {
        let mut batch = Batch::new();
        batch.put(Cf::Keys, [5; 32], value);
        kv.write(batch).unwrap();
        let error = store.get(&[5; 32]).unwrap_err();
        assert!(matches!(error, StoreError::Corrupt { .. }));
        assert!(
            error.to_string().contains(wanted) && error.to_string().contains(&"05".repeat(32)),
            "{error}"
        );
    }
}
