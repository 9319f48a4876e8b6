//! Adding builds, asking for them and forgetting them.

use std::sync::{Mutex, mpsc};
use std::time::Duration;

use futures::FutureExt;
use kiln_cache::{Store, StoreOptions};
use tempfile::TempDir;
use tokio::sync::Notify;
use tonic::Code;

use super::super::{Ended, Explanations, GRAPHS, OUTLINES, RECORDS, WAITING};
use super::*;

const LIMIT: Duration = Duration::from_secs(20);

fn open(facts: Arc<dyn Facts>) -> (TempDir, Arc<Store>, Arc<Explanations>) {
    let dir = TempDir::new().expect("a directory");
    let store = Store::open(dir.path(), StoreOptions::default()).expect("a store");
    let explanations = Explanations::over(store.values(), facts);
    (dir, store, explanations)
}

fn ended(vertices: Vec<VertexExplanation>) -> Ended {
    Ended { project: b"project".to_vec(), vertices }
}

/// The usual steps, of which one reads `content`.
fn reading(content: &str) -> Vec<VertexExplanation> {
    let mut made = vertices(BASE);
    made[1].inputs[0].content = Some(blake3::hash(content.as_bytes()));
    made
}

/// Facts that take until the other end of the gate has gone.
struct Slow {
    asked: Notify,
    gate: Mutex<mpsc::Receiver<()>>,
}

impl Slow {
    fn new() -> (Arc<Self>, mpsc::Sender<()>) {
        let (open, gate) = mpsc::channel();
        (Arc::new(Self { asked: Notify::new(), gate: Mutex::new(gate) }), open)
    }

    fn take_long(&self) {
        self.asked.notify_one();
        self.gate.lock().expect("not poisoned").recv().expect_err("nothing is sent");
    }
}

impl Facts for Slow {
    fn changes(&self, _: &[u8], _: &[u8]) -> Option<Vec<ContentChange>> {
        self.take_long();
        None
    }

    fn eviction(&self, _: &str) -> Option<Eviction> {
        self.take_long();
        None
    }

    fn forget_contents(&self, _: &HashSet<[u8; 32]>) -> Result<(), StoreError> {
        Ok(())
    }
}

#[tokio::test]
async fn of_two_builds_with_one_ref_the_later_one_counts() {
    let (_dir, _store, explanations) = open(Arc::new(NoFacts));
    for steps in [BASE, &BASE[..2]] {
        let expected = explanations.expect("a");
        explanations.add(expected, ended(vertices(steps))).await;
    }
    assert_eq!(explanations.get("a").await.expect("explained").total, 2);
}

#[tokio::test]
async fn the_end_of_a_former_build_does_not_end_the_waiting_for_the_next() {
    let (_dir, _store, explanations) = open(Arc::new(NoFacts));
    let former = explanations.expect("a");
    let expected = explanations.expect("a");
    drop(former);
    let mut asked = Box::pin(explanations.get("a"));
    assert!((&mut asked).now_or_never().is_none(), "it may still come");
    explanations.add(expected, ended(vertices(BASE))).await;
    assert_eq!(asked.await.expect("explained").total, 4);
}

#[tokio::test]
async fn what_is_forgotten_before_it_is_added_is_not_kept() {
    let (_dir, store, explanations) = open(Arc::new(NoFacts));
    let expected = explanations.expect("a");
    explanations.forget("a").expect("forget");
    explanations.add(expected, ended(vertices(BASE))).await;
    explanations.idle().await;
    assert_eq!(explanations.get("a").await.expect_err("forgotten").to_rpc().code, Code::NotFound as i32);
    explanations.forget("b").expect("forget");
    explanations.drop_loose().expect("drop");
    for namespace in [RECORDS, OUTLINES, GRAPHS] {
        assert!(store.values().names(namespace).expect("names").is_empty(), "{namespace}");
    }
}

#[tokio::test]
async fn the_last_build_of_a_project_outlives_the_history() {
    let (_dir, store, explanations) = open(Arc::new(NoFacts));
    let build = async |id: &str, project: &str, content: &str| {
        let ended = Ended { project: project.into(), vertices: reading(content) };
        explanations.add(explanations.expect(id), ended).await;
        explanations.idle().await;
    };
    for (id, project, content) in [("a1", "a", "1"), ("a2", "a", "2"), ("b1", "b", "3")] {
        build(id, project, content).await;
    }
    for id in ["a1", "a2", "b1"] {
        explanations.retire(id).expect("retire");
        assert_eq!(explanations.get(id).await.expect_err("gone").to_rpc().code, Code::NotFound as i32);
    }
    let known = || {
        let mut names = store.values().names(RECORDS).expect("names");
        names.sort();
        names
    };
    assert_eq!(known(), ["a2", "b1"]);
    build("a3", "a", "4").await;
    assert_eq!(explanations.get("a3").await.expect("explained").compared_with, "a2");
    explanations.retire("a3").expect("retire");
    assert_eq!(known(), ["a3", "b1"]);
    for n in 0..200 {
        let id = format!("c{n}");
        build(&id, &id, &id).await;
        explanations.retire(&id).expect("retire");
    }
    assert_eq!(known().len(), 128);
    assert!(!known().contains(&"b1".to_owned()), "the oldest went");
    explanations.drop_loose().expect("drop");
    assert_eq!(store.values().names(GRAPHS).expect("names").len(), 128);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_comparison_holds_nothing_up() {
    let (facts, open_gate) = Slow::new();
    let (_dir, _store, explanations) = open(facts.clone());
    for (id, content) in [("a", "1"), ("b", "2")] {
        let expected = explanations.expect(id);
        explanations.add(expected, ended(reading(content))).await;
    }
    explanations.idle().await;
    let long = tokio::spawn({
        let explanations = explanations.clone();
        async move { explanations.get("b").await }
    });
    tokio::time::timeout(LIMIT, facts.asked.notified()).await.expect("compared");
    explanations.forget("a").expect("forget");
    let dropping = tokio::task::spawn_blocking({
        let explanations = explanations.clone();
        move || explanations.drop_loose()
    });
    let dropped = tokio::time::timeout(LIMIT, dropping).await;
    let expected = explanations.expect("c");
    explanations.add(expected, ended(vertices(BASE))).await;
    let added = tokio::time::timeout(LIMIT, explanations.idle()).await;
    drop(open_gate);
    dropped.expect("in time").expect("no panic").expect("dropped");
    added.expect("in time");
    assert_eq!(long.await.expect("no panic").expect("explained").compared_with, "a");
}

#[tokio::test]
async fn only_so_much_waits_to_be_added() {
    let (facts, open_gate) = Slow::new();
    let (_dir, _store, explanations) = open(facts.clone());
    let mut many = vec![vertices(BASE).swap_remove(0); WAITING];
    many[0].lookups = vec![Lookup {
        kind: KeyKind::Definition,
        key: blake3::hash(b"key"),
        found: Found::Gone(vec!["result".into()]),
    }];
    let expected = explanations.expect("a");
    explanations.add(expected, ended(many)).await;
    facts.asked.notified().await;
    let mut next = Box::pin(explanations.add(explanations.expect("b"), ended(vertices(BASE))));
    assert!((&mut next).now_or_never().is_none(), "there is no room");
    drop(open_gate);
    next.await;
    assert_eq!(explanations.get("b").await.expect("explained").total, 4);
}

#[tokio::test]
async fn a_build_is_compared_with_the_closest_of_all() {
    let (_dir, _store, explanations) = open(Arc::new(NoFacts));
    let add = async |id: &str, vertices| {
        let expected = explanations.expect(id);
        explanations.add(expected, ended(vertices)).await;
    };
    // To a sketch all variants of a step look alike.
    let variant = |b: &'static str, c: &'static str| {
        vertices(&[BASE[0], BASE[1], ("[3/4] RUN b", b, &[1]), ("[4/4] RUN c", c, &[2])])
    };
    add("near", variant("b", "c")).await;
    add("like it", variant("B", "C")).await;
    for other in 0..40 {
        let step = format!("[1/1] RUN {other}");
        add(&format!("other {other}"), vertices(&[(&step, &step, &[])])).await;
    }
    add("new", variant("b", "x")).await;
    let said = explanations.get("new").await.expect("explained");
    assert_eq!(said.compared_with, "near");
    add("newer", variant("B", "y")).await;
    assert_eq!(explanations.get("newer").await.expect("explained").compared_with, "like it");
    // However many variants were built since.
    for other in 0..40 {
        add(&format!("variant {other}"), variant(format!("B{other}").leak(), format!("c{other}").leak()))
            .await;
    }
    add("newest", variant("b", "z")).await;
    assert_eq!(explanations.get("newest").await.expect("explained").compared_with, "new");
}
