//! Records over a store, without builds.

use std::time::Duration;

use futures::FutureExt;
use kiln_cache::{Store, StoreOptions};
use tempfile::TempDir;

use super::*;

fn open(config: HistoryConfig) -> (TempDir, Arc<Store>, Arc<History>) {
    let dir = TempDir::new().expect("a directory");
    let store = Store::open(dir.path(), StoreOptions::default()).expect("a store");
    let explanations = Explanations::without_facts(store.values());
    let history = History::new(store.values(), explanations, config);
    (dir, store, history)
}

fn begun(history: &Arc<History>, id: &str) -> BuildHistoryRecord {
    let request = control::SolveRequest { r#ref: id.into(), ..Default::default() };
    history.begin(&request, ProgressLog::new(), None).record
}

fn build(history: &Arc<History>, id: &str, error: Option<&BuildError>) {
    let record = begun(history, id);
    finish(history, record, error);
}

fn finish(history: &History, mut record: BuildHistoryRecord, error: Option<&BuildError>) {
    recording::end(&mut record, SystemTime::now(), error);
    history.finish(record, &[], Vec::new(), error).expect("finish");
}

fn listed(history: &History, filter: &[&str]) -> Vec<(String, &'static str)> {
    let filter = filter.iter().map(|text| (*text).to_owned()).collect();
    let request = BuildHistoryRequest { early_exit: true, filter, ..Default::default() };
    let records = history.listen(&request).expect("listen").0.into_iter().filter_map(|event| event.record);
    records.map(|record| (record.r#ref.clone(), build_status(&record))).collect()
}

fn update(id: &str) -> UpdateBuildHistoryRequest {
    UpdateBuildHistoryRequest { r#ref: id.into(), ..Default::default() }
}

#[test]
fn a_build_is_listed_once_while_it_ends_and_while_it_runs_again() {
    let (_dir, _store, history) = open(HistoryConfig::default());
    let record = begun(&history, "a");
    assert_eq!(listed(&history, &[]), [("a".to_owned(), "Running")]);
    finish(&history, record.clone(), None);
    // As a listener finds it that looks at running builds, then waits for its turn, then looks at the others.
    history.active.insert("a".into(), record.clone());
    assert_eq!(listed(&history, &[]), [("a".to_owned(), "Completed")]);
    let later = SystemTime::now() + Duration::from_secs(1);
    history.active.insert("a".into(), BuildHistoryRecord { created_at: Some(later.into()), ..record });
    assert_eq!(listed(&history, &[]), [("a".to_owned(), "Running")]);
    assert_eq!(listed(&history, &["status==running"]).len(), 1);
    assert!(listed(&history, &["status==completed"]).is_empty());
}

#[test]
fn a_trace_is_made_when_it_is_asked_for() {
    let (_dir, store, history) = open(HistoryConfig::default());
    build(&history, "a", None);
    let finalize = || history.update(&UpdateBuildHistoryRequest { finalize: true, ..update("a") });
    finalize().expect("finalize");
    let record = history.record("a").expect("read").expect("there");
    let trace = record.trace.expect("a trace");
    assert_eq!((trace.media_type.as_str(), record.generation), ("application/vnd.buildkit.otlp.json.v0", 2));
    let bytes = history.content(&trace.digest).expect("read").expect("there");
    assert_eq!(i64::try_from(bytes.len()).ok(), Some(trace.size));
    finalize().expect("finalize again");
    assert_eq!(history.record("a").expect("read").expect("there").generation, 2);
    history.update(&UpdateBuildHistoryRequest { delete: true, ..update("a") }).expect("delete");
    assert!(store.values().names(CONTENT).expect("names").is_empty());
    finalize().expect("of nothing");
}

#[test]
fn what_builds_share_stays_until_the_last_of_them_goes() {
    let (_dir, store, history) = open(HistoryConfig { max_entries: 3, ..HistoryConfig::default() });
    let contents = || store.values().names(CONTENT).expect("names").len();
    for id in ["a", "b", "c"] {
        build(&history, id, Some(&BuildError::build("broken")));
    }
    assert_eq!((listed(&history, &[]).len(), contents()), (3, 2));
    history.update(&UpdateBuildHistoryRequest { pinned: true, ..update("a") }).expect("pin");
    // As after a start of the daemon.
    let history = History::new(store.values(), history.explanations.clone(), history.config);
    for id in ["d", "e", "f"] {
        build(&history, id, None);
    }
    let mut left = listed(&history, &[]);
    left.sort();
    assert_eq!(left.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["a", "d", "e", "f"]);
    assert_eq!(contents(), 2, "the error is the pinned build's");
    // Another build of the same ref takes the record's place.
    build(&history, "a", None);
    assert_eq!(contents(), 1, "nothing names the error any more");
    for (id, _) in listed(&history, &[]) {
        history.update(&UpdateBuildHistoryRequest { delete: true, ..update(&id) }).expect("delete");
    }
    assert_eq!((listed(&history, &[]).len(), contents()), (0, 0));
    let again = history.update(&UpdateBuildHistoryRequest { delete: true, ..update("d") });
    assert_eq!(again.expect_err("it is gone").to_rpc().code, Code::NotFound as i32);
}

#[test]
fn a_build_that_is_stored_late_does_not_replace_a_later_one() {
    let (_dir, _store, history) = open(HistoryConfig::default());
    let first = begun(&history, "a");
    build(&history, "a", None);
    let error = BuildError::build("broken");
    finish(&history, first, Some(&error));
    assert_eq!(listed(&history, &[]), [("a".to_owned(), "Completed")]);
}

#[test]
fn a_build_whose_log_was_not_stored_any_more_is_known_and_what_nothing_names_is_dropped() {
    let (_dir, store, history) = open(HistoryConfig::default());
    assert_eq!(history.last().expect("read"), None);
    build(&history, "a", Some(&BuildError::build("broken")));
    let mut ended = begun(&history, "b");
    recording::end(&mut ended, SystemTime::now() + Duration::from_secs(1), None);
    history.note(&ended).expect("note");
    let values = store.values();
    values.put(CONTENT, "sha256:log", b"of a build that was killed").expect("put");
    values.put(RECORDS, "c", b"\xff in another form").expect("put");
    // As after a kill of the daemon.
    let history = History::new(values, history.explanations.clone(), history.config);
    assert_eq!(history.last().expect("read").as_deref(), Some("b"));
    let mut found = listed(&history, &[]);
    found.sort();
    assert_eq!(found, [("a".to_owned(), "Error"), ("b".to_owned(), "Completed")]);
    assert!(history.replay("b").expect("read").is_none());
    assert_eq!(store.values().names(CONTENT).expect("names").len(), 2, "the log and the error of the first");
    assert_eq!(store.values().names(RECORDS).expect("names"), ["a", "b"]);
    // Before it is known what there is, records that can't be read are no hindrance either.
    history.update(&UpdateBuildHistoryRequest { delete: true, ..update("b") }).expect("delete");
    assert_eq!(history.last().expect("read").as_deref(), Some("a"));
}

#[test]
fn a_late_note_does_not_replace_a_later_build() {
    let (_dir, _store, history) = open(HistoryConfig::default());
    let mut first = begun(&history, "a");
    build(&history, "a", Some(&BuildError::build("broken")));
    recording::end(&mut first, SystemTime::now(), None);
    history.note(&first).expect("note");
    assert_eq!(listed(&history, &[]), [("a".to_owned(), "Error")]);
}

#[tokio::test]
async fn who_asks_waits_for_builds_that_have_ended_and_for_no_later_ones() {
    let (_dir, _store, history) = open(HistoryConfig::default());
    history.settled().await;
    let (first, second) = (history.ending(), history.ending());
    let mut asking = std::pin::pin!(history.settled());
    assert!((&mut asking).now_or_never().is_none());
    let _later = history.ending();
    drop(second);
    assert!((&mut asking).now_or_never().is_none());
    drop(first);
    asking.now_or_never().expect("both are stored");
}
