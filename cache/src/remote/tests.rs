use super::*;

const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

fn refused(json: &str) -> RemoteError {
    RemoteCache::parse(json.as_bytes()).expect_err(json)
}

fn record(rest: &str) -> String {
    format!(r#"{{"layers":[{{"blob":"l0","parent":-1}}],"records":[{{"digest":"{A}"{rest}}}]}}"#)
}

#[test]
fn digests_of_records_are_buildkits() {
    let content = "sha256:0c23b903c6b177eed9bd56c34f4913bbdaf81295ea102f45f79493c2f755072a";
    let digest = hex::encode(record_digest(content, -1));
    assert_eq!(digest, "f2b80a3038eeef7649364c2d92ff6cf83c5fe95a450f76224b701005e80ce345");
}

#[test]
fn what_makes_no_sense_is_refused() {
    assert!(matches!(refused(""), RemoteError::Malformed(_)));
    assert!(matches!(refused("[]]"), RemoteError::Malformed(_)));
    assert!(matches!(refused(r#"{"records":[{"digest":7}]}"#), RemoteError::Malformed(_)));
    assert_eq!(refused(r#"{"records":[{}]}"#), RemoteError::Digest(String::new()));
    assert_eq!(refused(r#"{"records":[{"digest":"sha256:ab"}]}"#), RemoteError::Digest("sha256:ab".into()));
    for index in [1, -1, i64::MAX, i64::MIN] {
        assert_eq!(
            refused(&record(&format!(r#","layers":[{{"layer":{index}}}]"#))),
            RemoteError::Index("layer", index)
        );
        assert_eq!(
            refused(&record(&format!(r#","chains":[{{"layers":[0,{index}]}}]"#))),
            RemoteError::Index("layer", index)
        );
        assert_eq!(
            refused(&record(&format!(r#","inputs":[[{{"link":{index}}}]]"#))),
            RemoteError::Index("record", index)
        );
    }
    assert_eq!(refused(&record(r#","inputs":[[]]"#)), RemoteError::EmptyInput(0));
    assert_eq!(refused(&record(r#","inputs":[[{"link":0}]]"#)), RemoteError::Loop("record"));
    assert_eq!(refused(r#"{"layers":[{"blob":"a","parent":1},{"blob":"b"}]}"#), RemoteError::Loop("layer"));
    assert_eq!(refused(r#"{"layers":[{"blob":"a","parent":-2}]}"#), RemoteError::Index("layer", -2));
    let large = vec![b' '; MAX_DOCUMENT as usize + 1];
    assert!(matches!(RemoteCache::parse(&large), Err(RemoteError::TooLarge(_))));
}

#[test]
fn long_chains_need_no_stack_and_are_no_results() {
    let layers = (0..20_000).map(|at| Layer { blob: String::new(), parent: at - 1 }).collect();
    let results = vec![LayerResult { layer: 19_999, created_at: None }];
    let records = vec![Record { digest: A.into(), results, ..Record::default() }];
    let cache = RemoteCache::new(Document { layers, records }).expect("valid");
    assert_eq!(cache.results(0).count(), 0);
    let link = |at: i64| vec![vec![Link { selector: String::new(), link: at - 1 }]];
    let record = |at: i64| Record {
        digest: A.into(),
        inputs: if at == 0 { Vec::new() } else { link(at) },
        ..Record::default()
    };
    let records = (0..20_000).map(record).collect();
    RemoteCache::new(Document { layers: Vec::new(), records }).expect("valid");
}

#[test]
fn written_documents_are_read_again() {
    let build = |backwards: bool| {
        let mut builder = Builder::default();
        let mut leaves = [([1; 32], 0), ([2; 32], 0)];
        if backwards {
            leaves.reverse();
        }
        for leaf in &mut leaves {
            leaf.1 = builder.record(leaf.0, Vec::new());
        }
        leaves.sort_unstable();
        let links = vec![vec![("s".to_owned(), leaves[0].1), (String::new(), leaves[1].1)]];
        let top = builder.record([3; 32], links.clone());
        assert_eq!(builder.record([3; 32], links), top, "equal records are one");
        builder.result(top, vec!["x".into(), "y".into()], Some("2001-01-01T00:00:00Z".into()));
        builder.result(leaves[0].1, vec!["x".into()], None);
        builder.record([4; 32], vec![vec![(String::new(), top)]]);
        builder.finish()
    };
    let document = build(false);
    assert_eq!(document, build(true));
    assert_eq!(document.records.len(), 3, "what leads to no result is left out");
    let json = serde_json::to_vec(&document).expect("json");
    let cache = RemoteCache::parse(&json).expect("valid");
    let [top] = cache.records(&[3; 32]) else { panic!("{document:?}") };
    assert_eq!(cache.results(*top).collect::<Vec<_>>(), [vec!["x", "y"]]);
    assert_eq!(cache.digest(*top), Some([3; 32]));
    let links = &cache.inputs(*top)[0];
    assert_eq!(links.len(), 2);
    let selected = links.iter().find(|link| link.selector == "s").expect("with a selector");
    assert_eq!(cache.digest(selected.record), Some([1; 32]));
    assert_eq!(cache.results(selected.record).collect::<Vec<_>>(), [vec!["x"]]);
}

#[test]
fn records_of_an_image_use_its_layers() {
    let json = format!(
        r#"[{{"digest":"{A}","layers":[{{"layer":1}}],"chains":[{{"layers":[1,0]}}],"inputs":null}}]"#
    );
    let cache = RemoteCache::inline(json.as_bytes(), &["a".into(), "b".into()]).expect("valid");
    assert_eq!(cache.results(0).collect::<Vec<_>>(), [vec!["a", "b"], vec!["b", "a"]]);
    assert!(RemoteCache::inline(json.as_bytes(), &["a".into()]).is_err());
    assert!(RemoteCache::inline(b"null", &[]).is_ok());
}

proptest::proptest! {
    #[test]
    fn nothing_foreign_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
        let _ = RemoteCache::parse(&bytes);
        let _ = RemoteCache::inline(&bytes, &[]);
    }

    #[test]
    fn nor_do_foreign_indices(
        parents in proptest::collection::vec(-2i64..6, 0..6),
        links in proptest::collection::vec((-2i64..6, -2i64..6), 0..6),
    ) {
        let layers = parents.into_iter().map(|parent| Layer { blob: "b".into(), parent }).collect();
        let record = |(link, layer)| Record {
            digest: A.into(),
            results: vec![LayerResult { layer, created_at: None }],
            chains: vec![ChainResult { layers: vec![layer, link], created_at: None }],
            inputs: if link < 0 { Vec::new() } else { vec![vec![Link { selector: String::new(), link }]] },
        };
        let records: Vec<Record> = links.into_iter().map(record).collect();
        let count = records.len() as u32;
        if let Ok(cache) = RemoteCache::new(Document { layers, records }) {
            for at in 0..count {
                for chain in cache.results(at) {
                    proptest::prop_assert!(chain.len() <= 6);
                }
            }
        }
    }
}
