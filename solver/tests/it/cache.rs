//! What is found again, by which key, and what has to run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_cache::kv::MemKv;
use kiln_cache::{KeyChange, KeyRecord, KeyStorage, KeyStore, OpRecord, StoreError};
use kiln_solver::explain::{Found, KeyKind, Outcome};

use crate::world::{Files, Graph, World, chain, recipe};

#[tokio::test]
async fn a_second_build_runs_nothing_and_loads_only_the_result() {
    let world = World::new();
    let definition = chain(&["image", "a", "b", "c"]);
    let first = world.run(&world.solver(), &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["image", "a", "b", "c"]);
    assert_eq!(world.loads.load(Ordering::Relaxed), 0);
    let second = world.run(&world.solver(), &definition).await.unwrap();
    assert_eq!(world.take_runs(), [""; 0]);
    assert_eq!(world.loads.load(Ordering::Relaxed), 1);
    assert_eq!(first, second);
}

#[tokio::test]
async fn a_changed_step_runs_with_all_that_follows_and_nothing_before() {
    let world = World::new();
    let solver = world.solver();
    world.run(&solver, &chain(&["image", "a", "b", "c"])).await.unwrap();
    world.take_runs();
    world.run(&solver, &chain(&["image", "a", "b2", "c"])).await.unwrap();
    assert_eq!(world.take_runs(), ["b2", "c"]);
}

#[tokio::test]
async fn vertices_that_the_result_does_not_need_are_not_built() {
    let world = World::new();
    let mut graph = Graph::new();
    let image = graph.source("image");
    let unused = graph.step("unused", &[&image]);
    graph.step("unused2", &[&unused]);
    let used = graph.step("used", &[&image]);
    world.run(&world.solver(), &graph.finish(&used)).await.unwrap();
    assert_eq!(world.take_runs(), ["image", "used"]);
}

/// base + context -> copy (reads /main) -> run
fn copy_definition() -> kiln_proto::pb::Definition {
    let mut graph = Graph::new();
    let base = graph.source("base");
    let context = graph.source("context");
    let copy = graph.step("copy", &[&base, &context]);
    let run = graph.step("run", &[&copy]);
    graph.finish(&run)
}

fn context(world: &World, session: &str, files: &[(&str, &str)]) {
    world.set("context", recipe(session).ephemeral().io().files(files));
    world.set("copy", recipe("copy").reads(1, "/main").io());
}

#[tokio::test]
async fn a_source_that_changed_elsewhere_keeps_its_reader_cached() {
    let world = World::new();
    let solver = world.solver();
    context(&world, "session 1", &[("/main", "m"), ("/other", "1")]);
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(sorted(world.take_runs()), ["base", "context", "copy", "run"]);
    context(&world, "session 2", &[("/main", "m"), ("/other", "2")]);
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(world.take_runs(), ["context"]);
    context(&world, "session 3", &[("/main", "changed"), ("/other", "2")]);
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(world.take_runs(), ["context", "copy", "run"]);
}

#[tokio::test]
async fn content_keys_are_looked_up_from_the_result_downwards() {
    let world = World::new();
    let solver = world.solver();
    let mut graph = Graph::new();
    let (base, source) = (graph.source("base"), graph.source("context"));
    let mut last = graph.step("copy", &[&base, &source]);
    for name in ["r1", "r2", "r3"] {
        last = graph.step(name, &[&last]);
    }
    let definition = graph.finish(&last);
    context(&world, "session 1", &[("/main", "m"), ("/other", "1")]);
    world.run(&solver, &definition).await.unwrap();
    world.take_runs();
    context(&world, "session 2", &[("/main", "m"), ("/other", "2")]);
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["context"]);
    // `base`, which was known before the context was, and the result.
    assert_eq!(world.loads.load(Ordering::Relaxed), 2);
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

#[tokio::test]
async fn a_hit_by_content_is_remembered_by_definition() {
    let world = World::new();
    let solver = world.solver();
    world.set("copy", recipe("copy").reads(1, "/main"));
    world.set("context", recipe("commit 1").files(&[("/main", "m"), ("/other", "1")]));
    world.run(&solver, &copy_definition()).await.unwrap();
    world.set("context", recipe("commit 2").files(&[("/main", "m"), ("/other", "2")]));
    world.take_runs();
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(world.take_runs(), ["context"]);
    let digests = world.content_digests.load(Ordering::Relaxed);
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(world.take_runs(), [""; 0]);
    assert_eq!(world.content_digests.load(Ordering::Relaxed), digests);
}

#[tokio::test]
async fn content_keys_reach_through_steps_that_were_found_by_definition() {
    let world = World::new();
    let solver = world.solver();
    world.set("copy", recipe("copy").reads(1, "/main"));
    world.set("context", recipe("commit 1").files(&[("/main", "m"), ("/other", "1")]));
    world.run(&solver, &copy_definition()).await.unwrap();
    // `run` changes: it is recorded on top of a `copy` that was found by its definition.
    world.set("run", recipe("run 2"));
    world.run(&solver, &copy_definition()).await.unwrap();
    // Now the context changes where nobody looks.
    world.set("context", recipe("commit 2").files(&[("/main", "m"), ("/other", "2")]));
    world.take_runs();
    world.run(&solver, &copy_definition()).await.unwrap();
    assert_eq!(world.take_runs(), ["context"]);
}

#[tokio::test]
async fn a_step_that_makes_the_same_again_leaves_what_follows_cached() {
    let world = World::new();
    let solver = world.solver();
    world.set("make", recipe("make 1").files(&[("/out", "same")]));
    let definition = chain(&["image", "make", "next", "last"]);
    world.run(&solver, &definition).await.unwrap();
    world.take_runs();
    world.set("make", recipe("make 2").files(&[("/out", "same")]));
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["make"]);
    // Now it is known by definition, too.
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), [""; 0]);
    world.set("make", recipe("make 3").files(&[("/out", "other")]));
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["make", "next", "last"]);
}

#[tokio::test]
async fn the_first_build_waits_for_no_output_digest() {
    let world = World::new();
    let solver = world.solver();
    let gate = crate::world::gate();
    world.set("next", recipe("next").gate(&gate));
    let (build, _) = world.build(&solver);
    let solving = tokio::spawn(async move { build.solve(&chain(&["image", "make", "next"])).await });
    world.until("next runs", |running| running == ["next"]).await;
    // The background may have digested what `make` read, but no one asks for what it made before
    // `next` is done.
    assert!(world.output_digests.load(Ordering::Relaxed) <= 1);
    gate.add_permits(1);
    solving.await.unwrap().unwrap();
    solver.idle().await;
    assert_eq!(world.output_digests.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn an_ephemeral_source_read_as_a_whole_is_recognised_by_its_content() {
    let world = World::new();
    let solver = world.solver();
    let definition = chain(&["context", "run", "more"]);
    world.set("context", recipe("session 1").ephemeral().files(&[("/f", "1")]));
    world.run(&solver, &definition).await.unwrap();
    world.take_runs();
    world.set("context", recipe("session 2").ephemeral().files(&[("/f", "1")]));
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["context"]);
    world.set("context", recipe("session 3").ephemeral().files(&[("/f", "2")]));
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), ["context", "run", "more"]);
}

#[tokio::test]
async fn a_forced_step_runs_again_and_its_new_output_decides_what_follows() {
    let world = World::new();
    let solver = world.solver();
    let forced = || {
        let mut graph = Graph::ignoring(&["fetch"]);
        let image = graph.source("image");
        let fetch = graph.step("fetch", &[&image]);
        let next = graph.step("next", &[&fetch]);
        graph.finish(&next)
    };
    world.set("fetch", recipe("fetch").files(&[("/f", "1")]));
    world.run(&solver, &forced()).await.unwrap();
    assert_eq!(world.take_runs(), ["image", "fetch", "next"]);
    // The same bytes come again.
    world.run(&solver, &forced()).await.unwrap();
    assert_eq!(world.take_runs(), ["fetch"]);
    // Others come: an earlier record under the same definition must not stand for them.
    world.set("fetch", recipe("fetch").files(&[("/f", "2")]));
    let files = world.run(&solver, &forced()).await.unwrap();
    assert_eq!(world.take_runs(), ["fetch", "next"]);
    assert_eq!(files["/f"], "2");
    // Without force the newest is found.
    let files = world.run(&solver, &chain(&["image", "fetch", "next"])).await.unwrap();
    assert_eq!(world.take_runs(), [""; 0]);
    assert_eq!(files["/f"], "2");
}

#[tokio::test]
async fn a_record_whose_result_is_gone_is_dropped_and_made_anew() {
    let world = World::new();
    let solver = world.solver();
    let definition = chain(&["image", "a"]);
    world.run(&solver, &definition).await.unwrap();
    world.take_runs();
    world.forgetful.store(true, Ordering::Relaxed);
    let (build, _) = world.build(&solver);
    build.solve(&definition).await.unwrap();
    assert_eq!(world.take_runs(), ["image", "a"]);
    let explained = build.explain().await;
    let a = explained.iter().find(|vertex| &*vertex.name == "a").unwrap();
    let found: Vec<_> = a.lookups.iter().map(|lookup| (lookup.kind, lookup.found.clone())).collect();
    assert_eq!(found[0], (KeyKind::Definition, Found::Record));
    assert!(
        matches!(&found[1], (KeyKind::Definition, Found::Gone(results)) if results.len() == 1),
        "{found:?}"
    );
    assert_eq!(a.outcome, Outcome::Made);
    assert_eq!(a.map.as_ref().unwrap().parts.list(), [("text".to_owned(), "a".to_owned())]);
    let image = explained.iter().position(|vertex| &*vertex.name == "image");
    assert_eq!(a.inputs.iter().map(|input| input.vertex).collect::<Vec<_>>(), Vec::from_iter(image));
    drop(build);
    solver.idle().await;
    world.forgetful.store(false, Ordering::Relaxed);
    world.run(&solver, &definition).await.unwrap();
    assert_eq!(world.take_runs(), [""; 0]);
}

/// A store whose reads or writes can be made to fail.
struct Faulty {
    inner: KeyStore,
    reads: AtomicBool,
    writes: AtomicBool,
}

impl Faulty {
    fn check(&self, flag: &AtomicBool) -> kiln_cache::Result<()> {
        if flag.load(Ordering::Relaxed) {
            Err(StoreError::Kv("no space left on device".to_owned()))
        } else {
            Ok(())
        }
    }
}

impl KeyStorage for Faulty {
    fn get(&self, key: &[u8; 32]) -> kiln_cache::Result<Option<KeyRecord>> {
        self.check(&self.reads)?;
        self.inner.get(key)
    }
    fn op(&self, digest: &[u8; 32]) -> kiln_cache::Result<Option<OpRecord>> {
        self.check(&self.reads)?;
        self.inner.op(digest)
    }
    fn blocks(&self) -> bool {
        self.inner.blocks()
    }
    fn write(&self, changes: &[KeyChange]) -> kiln_cache::Result<()> {
        self.check(&self.writes)?;
        self.inner.write(changes)
    }
    fn remove(&self, key: &[u8; 32], results: &[String]) -> kiln_cache::Result<bool> {
        self.check(&self.writes)?;
        self.inner.remove(key, results)
    }
}

#[tokio::test]
async fn a_key_store_that_fails_costs_time_but_no_build() {
    let store = Arc::new(Faulty {
        inner: KeyStore::new(Arc::new(MemKv::new())),
        reads: AtomicBool::new(false),
        writes: AtomicBool::new(true),
    });
    let world = World::with_keys(store.clone());
    let solver = world.limited_solver(2);
    let definition = chain(&["image", "a", "b"]);
    let expected = world.run(&solver, &definition).await.unwrap();
    store.writes.store(false, Ordering::Relaxed);
    store.reads.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(world.run(&solver, &definition).await.unwrap(), expected);
    }
    assert_eq!(world.take_runs().len(), 9);
    store.reads.store(false, Ordering::Relaxed);
    assert_eq!(world.run(&solver, &definition).await.unwrap(), expected);
    assert_eq!(world.take_runs(), [""; 0]);
}

#[tokio::test]
async fn outputs_are_told_apart() {
    let world = World::new();
    let solver = world.solver();
    let file = |name: &str| Files::from([(format!("/{name}"), name.to_owned())]);
    world.set("two", recipe("two").makes(move |_| vec![file("first"), file("second")]));
    for round in 0..2 {
        for (output, name) in [(0, "/first"), (1, "/second")] {
            let mut graph = Graph::new();
            let image = graph.source("image");
            let mut two = graph.step("two", &[&image]);
            two.index = output;
            let use_it = graph.step("use", &[&two]);
            let files = world.run(&solver, &graph.finish(&use_it)).await.unwrap();
            assert!(files.contains_key(name), "output {output} gave {files:?}");
            let files = world.run(&solver, &graph.finish(&two)).await.unwrap();
            assert_eq!(files.keys().collect::<Vec<_>>(), [name]);
        }
        let expected: &[&str] = if round == 0 { &["image", "two", "use", "use"] } else { &[] };
        assert_eq!(world.take_runs(), expected);
    }
}
