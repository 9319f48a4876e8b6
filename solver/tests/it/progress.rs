//! The progress stream of a build.

use crate::world::{Graph, World, chain, gate, recipe};

#[tokio::test]
async fn each_vertex_is_announced_once_before_anything_starts() {
    let world = World::new();
    let (build, record) = world.build(&world.solver());
    let handle = build.load(&chain(&["image", "a", "b"])).await.unwrap();
    for name in ["image", "a", "b"] {
        assert_eq!(record.words(name), ["announced"]);
    }
    assert_eq!(world.take_runs(), [""; 0]);
    build.load(&chain(&["image", "a", "b"])).await.unwrap();
    handle.result().await.unwrap();
    for name in ["image", "a", "b"] {
        assert_eq!(record.words(name), ["announced", "started", "completed"]);
    }
    let b = &record.states("b")[0];
    assert_eq!(*b.inputs, [record.states("a")[0].digest.clone()]);
}

#[tokio::test]
async fn everything_below_a_hit_is_shown_as_cached_once() {
    let world = World::new();
    let solver = world.solver();
    let definition = chain(&["image", "a", "b"]);
    world.run(&solver, &definition).await.unwrap();
    let (build, record) = world.build(&solver);
    for _ in 0..3 {
        build.solve(&definition).await.unwrap();
    }
    for name in ["image", "a", "b"] {
        assert_eq!(record.words(name), ["announced", "cached"]);
    }
}

#[tokio::test]
async fn what_was_found_before_a_failure_is_shown_as_cached() {
    let world = World::new();
    let solver = world.solver();
    world.run(&solver, &chain(&["image", "a", "b"])).await.unwrap();
    world.set("bad", recipe("bad").fails("no"));
    let (build, record) = world.build(&solver);
    build.solve(&chain(&["image", "a", "b", "bad"])).await.unwrap_err();
    for name in ["image", "a", "b"] {
        assert_eq!(record.words(name), ["announced", "cached"]);
    }
}

#[tokio::test]
async fn output_comes_after_the_start() {
    let world = World::new();
    world.set("a", recipe("a").logs("hello ").logs("world"));
    let (build, record) = world.build(&world.solver());
    build.solve(&chain(&["image", "a"])).await.unwrap();
    assert_eq!(record.log("a"), "hello world");
    let events = record.0.lock().unwrap();
    let started = events.iter().position(
        |e| matches!(e, kiln_solver::progress::Event::Vertex(s) if &*s.name == "a" && s.started.is_some()),
    );
    let logged = events.iter().position(|e| matches!(e, kiln_solver::progress::Event::Log(_)));
    assert!(started < logged, "{started:?} {logged:?}");
}

#[tokio::test]
async fn a_build_that_is_dropped_ends_what_it_showed_as_running() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("slow", recipe("slow").gate(&gate));
    let (build, record) = world.build(&solver);
    let handle = build.load(&chain(&["image", "slow", "after"])).await.unwrap();
    let solving = tokio::spawn(async move { handle.result().await });
    world.until("slow runs", |running| running == ["slow"]).await;
    solving.abort();
    assert!(solving.await.unwrap_err().is_cancelled());
    drop(build);
    solver.idle().await;
    assert_eq!(world.running(), [""; 0]);
    assert_eq!(record.words("slow"), ["announced", "started", "error: context canceled"]);
    assert_eq!(record.words("after"), ["announced"]);
}

#[tokio::test]
async fn a_withdrawn_request_cancels_and_may_come_again() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("slow", recipe("slow").gate(&gate));
    let (build, record) = world.build(&solver);
    let handle = build.load(&chain(&["image", "slow"])).await.unwrap();
    let again = handle.clone();
    let solving = tokio::spawn(async move { handle.result().await });
    world.until("slow runs", |running| running == ["slow"]).await;
    solving.abort();
    world.until("slow is gone", |running| running.is_empty()).await;
    gate.add_permits(1);
    again.result().await.unwrap();
    assert_eq!(world.take_runs(), ["image", "slow", "slow"]);
    let words = ["announced", "started", "error: context canceled", "started", "completed"];
    assert_eq!(record.words("slow"), words);
}

#[tokio::test]
async fn a_vertex_in_several_definitions_runs_once_in_a_build() {
    let world = World::new();
    let (build, record) = world.build(&world.solver());
    let mut graph = Graph::new();
    let image = graph.source("image");
    let a = graph.step("a", &[&image]);
    let b = graph.step("b", &[&image]);
    let (a, b) = (graph.finish(&a), graph.finish(&b));
    let (one, two) = tokio::join!(build.solve(&a), build.solve(&b));
    one.unwrap();
    two.unwrap();
    build.solve(&a).await.unwrap();
    assert_eq!(record.words("image"), ["announced", "started", "completed"]);
    assert_eq!(world.take_runs().len(), 3);
}
