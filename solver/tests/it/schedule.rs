//! What runs at the same time, and in which order.

use std::sync::atomic::Ordering;
use std::time::Duration;

use kiln_cache::{KeyChange, OpRecord};
use kiln_proto::pb;

use crate::world::{Graph, World, chain, gate, recipe};

fn wide(names: &[String]) -> pb::Definition {
    let mut graph = Graph::new();
    let image = graph.source("image");
    let steps: Vec<pb::Input> = names.iter().map(|name| graph.step(name, &[&image])).collect();
    let all = graph.step("all", &steps.iter().collect::<Vec<_>>());
    graph.finish(&all)
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("s{i}")).collect()
}

#[tokio::test]
async fn independent_vertices_run_at_the_same_time() {
    let world = World::new();
    let gate = gate();
    for name in names(128) {
        world.set(&name, recipe(&name).gate(&gate));
    }
    let (build, _) = world.build(&world.solver());
    let solving = tokio::spawn(async move { build.solve(&wide(&names(128))).await });
    world.until("all 128 run", |running| running.len() == 128).await;
    gate.add_permits(128);
    solving.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_processes_run_than_allowed_over_all_builds() {
    let world = World::new();
    let solver = world.limited_solver(3);
    for name in names(40) {
        world.set(&name, recipe(&name).yields(5));
    }
    let builds = (0..4).map(|i| {
        let (build, _) = world.build(&solver);
        let definition = wide(&names(40)[i * 10..i * 10 + 10]);
        async move { build.solve(&definition).await.map(|_| ()) }
    });
    for result in futures::future::join_all(builds).await {
        result.unwrap();
    }
    assert_eq!(world.most_running.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn a_build_of_many_steps_does_not_hold_up_one_of_few() {
    let own = ["one", "two", "three"];
    few_steps_beside_many(
        |world| own.iter().for_each(|name| world.set(name, recipe(name))),
        &chain(&["image", "one", "two", "three"]),
    )
    .await;
}

#[tokio::test]
async fn steps_that_a_small_build_shares_with_a_large_one_come_when_it_is_the_small_ones_turn() {
    few_steps_beside_many(|_| {}, &wide(&names(500)[497..])).await;
}

/// A build of 500 steps has both slots when another one asks for `few`.
async fn few_steps_beside_many(prepare: impl FnOnce(&World), few: &pb::Definition) {
    let world = World::new();
    let solver = world.limited_solver(2);
    let gate = gate();
    world.set("image", recipe("image").io());
    for name in names(500) {
        world.set(&name, recipe(&name).gate(&gate));
    }
    let (large, _) = world.build(&solver);
    let large = tokio::spawn(async move { large.solve(&wide(&names(500))).await });
    world.until("the large build has both slots", |running| running.len() == 2).await;
    prepare(&world);
    let (small, _) = world.build(&solver);
    let few = few.clone();
    let small = tokio::spawn(async move { small.solve(&few).await });
    // Each slot that gets free lets one more step run. Of the next ones the small build needs three; some may
    // get free before it asks.
    let runs = std::cell::RefCell::new(world.take_runs());
    let mut freed = 0;
    while !small.is_finished() {
        freed += 1;
        assert!(freed <= 12, "{:?}", runs.borrow());
        let before = runs.borrow().len();
        gate.add_permits(1);
        let more = |_: &[String]| {
            runs.borrow_mut().extend(world.take_runs());
            runs.borrow().len() > before
        };
        world.until("another step runs", more).await;
    }
    small.await.unwrap().unwrap();
    gate.add_permits(500);
    large.await.unwrap().unwrap();
}

#[tokio::test]
async fn transfers_do_not_count_against_the_limit() {
    let world = World::new();
    let gate = gate();
    world.set("image", recipe("image").io());
    for name in names(20) {
        world.set(&name, recipe(&name).io().gate(&gate));
    }
    let (build, _) = world.build(&world.limited_solver(1));
    let solving = tokio::spawn(async move { build.solve(&wide(&names(20))).await });
    world.until("all 20 run", |running| running.len() == 20).await;
    gate.add_permits(20);
    solving.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_start_of_the_longest_path_runs_first() {
    let world = World::new();
    world.set("image", recipe("image").io());
    // Steps that were never timed count alike, so the longest chain is the longest path.
    let mut graph = Graph::new();
    let image = graph.source("image");
    let short = graph.step("short", &[&image]);
    let first = graph.step("first", &[&image]);
    let second = graph.step("second", &[&first]);
    let third = graph.step("third", &[&second]);
    let middle = graph.step("middle", &[&image]);
    let end = graph.step("end", &[&middle]);
    let all = graph.step("all", &[&short, &end, &third]);
    let (build, _) = world.build(&world.limited_solver(1));
    build.solve(&graph.finish(&all)).await.unwrap();
    let runs = world.take_runs();
    assert_eq!(runs[0], "image");
    // Whatever was ready first may have taken the free slot; of those that waited, `first` leads.
    let waited: Vec<&String> =
        runs[2..].iter().filter(|n| ["short", "first", "middle"].contains(&n.as_str())).collect();
    if runs[1] != "first" {
        assert_eq!(waited[0], "first", "{runs:?}");
    }
    let place = |name: &str| runs.iter().position(|n| n == name).unwrap();
    assert!(place("second") < place("end"), "{runs:?}");
}

#[tokio::test]
async fn remembered_durations_decide_what_is_long() {
    let world = World::new();
    let solver = world.limited_solver(1);
    for (name, seconds) in [("first", 1000), ("slow", 100), ("quick", 1), ("fast", 1), ("all", 1)] {
        let record = OpRecord { duration: Duration::from_secs(seconds), follows_outputs: false };
        let digest = *blake3::hash(name.as_bytes()).as_bytes();
        world.keys.write(&[KeyChange::Op { digest, record }]).unwrap();
    }
    // Held until all others wait, so that the order is the queue's.
    let gate = gate();
    world.set("first", recipe("first").gate(&gate));
    world.set("image", recipe("image").io());
    let mut graph = Graph::new();
    let image = graph.source("image");
    let steps: Vec<pb::Input> =
        ["first", "quick", "fast", "slow"].map(|name| graph.step(name, &[&image])).into();
    let all = graph.step("all", &steps.iter().collect::<Vec<_>>());
    let definition = graph.finish(&all);
    let (build, _) = world.build(&solver);
    let solving = tokio::spawn(async move { build.solve(&definition).await });
    world.until("one runs", |running| running.len() == 1 && running[0] != "image").await;
    gate.add_permits(1);
    solving.await.unwrap().unwrap();
    let runs = world.take_runs();
    let place = |name: &str| runs.iter().position(|n| n == name).unwrap();
    let last_two = place("quick").max(place("fast"));
    assert!(place("slow") < last_two, "{runs:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_what_gets_ready_together_the_longest_path_gets_the_free_slot() {
    let world = World::new();
    let solver = world.limited_solver(1);
    for name in names(20) {
        let record = OpRecord { duration: Duration::from_secs(1), follows_outputs: false };
        let digest = *blake3::hash(name.as_bytes()).as_bytes();
        world.keys.write(&[KeyChange::Op { digest, record }]).unwrap();
    }
    let record = OpRecord { duration: Duration::from_secs(100), follows_outputs: false };
    world.keys.write(&[KeyChange::Op { digest: *blake3::hash(b"slow").as_bytes(), record }]).unwrap();
    world.set("base", recipe("base").yields(3));
    let mut graph = Graph::new();
    let image = graph.source("image");
    let base = graph.step("base", &[&image]);
    let mut all: Vec<String> = names(20);
    all.insert(10, "slow".into());
    let steps: Vec<pb::Input> = all.iter().map(|name| graph.step(name, &[&base])).collect();
    let join = graph.step("join", &steps.iter().collect::<Vec<_>>());
    world.run(&solver, &graph.finish(&join)).await.unwrap();
    assert_eq!(world.take_runs()[2], "slow");
}
