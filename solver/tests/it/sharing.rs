//! What builds of one solver do for each other.

use std::sync::atomic::Ordering;

use kiln_proto::pb;
use kiln_solver::op::OpError;

use crate::world::{Graph, Tree, World, chain, gate, recipe};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixteen_builds_of_one_definition_run_each_vertex_once() {
    let world = World::new();
    let solver = world.solver();
    for name in ["image", "a", "b", "c"] {
        world.set(name, recipe(name).yields(20));
    }
    let builds = (0..16).map(|_| {
        let (build, _) = world.build(&solver);
        tokio::spawn(async move { build.solve(&chain(&["image", "a", "b", "c"])).await.unwrap().unwrap().id })
    });
    let ids: Vec<String> = futures::future::join_all(builds).await.into_iter().map(Result::unwrap).collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!(world.take_runs(), ["image", "a", "b", "c"]);
}

#[tokio::test]
async fn every_asker_sees_the_output_also_when_it_comes_late() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("step", recipe("step").logs("said early").gate(&gate));
    let definition = chain(&["image", "step"]);
    let (first, first_record) = world.build(&solver);
    let one = tokio::spawn({
        let definition = definition.clone();
        async move { first.solve(&definition).await.map(|_| ()) }
    });
    world.until("step runs", |running| running == ["step"]).await;
    let (second, second_record) = world.build(&solver);
    let two = tokio::spawn(async move { second.solve(&definition).await.map(|_| ()) });
    while second_record.log("step").is_empty() {
        tokio::task::yield_now().await;
    }
    gate.add_permits(1);
    one.await.unwrap().unwrap();
    two.await.unwrap().unwrap();
    for record in [first_record, second_record] {
        assert_eq!(record.log("step"), "said early");
        assert_eq!(record.words("step"), ["announced", "started", "completed"]);
    }
    assert_eq!(world.take_runs(), ["image", "step"]);
}

#[tokio::test]
async fn failure_reaches_all() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("bad", recipe("bad").gate(&gate).fails("it broke"));
    let builds: Vec<_> = (0..5)
        .map(|_| {
            let (build, record) = world.build(&solver);
            (tokio::spawn(async move { build.solve(&chain(&["image", "bad"])).await.map(|_| ()) }), record)
        })
        .collect();
    for (_, record) in &builds {
        while record.words("bad") != ["announced", "started"] {
            tokio::task::yield_now().await;
        }
    }
    gate.add_permits(5);
    for (solving, record) in builds {
        assert_eq!(solving.await.unwrap().unwrap_err().to_string(), "it broke");
        assert_eq!(record.words("bad"), ["announced", "started", "error: it broke"]);
    }
    assert_eq!(world.take_runs(), ["image", "bad"]);
}

/// Starts a build of `image -> slow` with `slow` held, and as many again that wait for it.
async fn builds_of_one_held_step(
    count: usize,
    slow: crate::world::Recipe,
) -> (std::sync::Arc<World>, kiln_solver::Solver<crate::world::Tree>, Vec<Solving>) {
    let world = World::new();
    let solver = world.solver();
    world.set("slow", slow);
    let mut builds = Vec::new();
    for _ in 0..count {
        let (build, record) = world.build(&solver);
        builds.push(tokio::spawn(async move { build.solve(&chain(&["image", "slow"])).await.map(|_| ()) }));
        while !record.words("slow").contains(&"started".to_owned()) {
            tokio::task::yield_now().await;
        }
    }
    assert_eq!(world.running(), ["slow"]);
    (world, solver, builds)
}

type Solving = tokio::task::JoinHandle<Result<(), kiln_solver::SolveError<Tree>>>;

#[tokio::test]
async fn work_goes_on_while_anyone_wants_it() {
    let gate = gate();
    let (world, _solver, mut builds) = builds_of_one_held_step(3, recipe("slow").gate(&gate)).await;
    for leaving in builds.drain(..2) {
        leaving.abort();
        assert!(leaving.await.unwrap_err().is_cancelled());
    }
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    assert_eq!(world.running(), ["slow"]);
    gate.add_permits(1);
    builds.pop().unwrap().await.unwrap().unwrap();
    assert_eq!(world.take_runs(), ["image", "slow"]);
}

#[tokio::test]
async fn when_the_last_asker_leaves_the_work_is_cancelled_and_can_start_anew() {
    let gate = gate();
    let (world, solver, builds) = builds_of_one_held_step(3, recipe("slow").gate(&gate)).await;
    for leaving in builds {
        leaving.abort();
    }
    solver.idle().await;
    assert_eq!(world.running(), [""; 0]);
    gate.add_permits(1);
    world.run(&solver, &chain(&["image", "slow"])).await.unwrap();
    assert_eq!(world.take_runs(), ["image", "slow", "slow"]);
}

#[tokio::test]
async fn a_failure_after_the_starter_left_is_tried_again_by_who_stayed() {
    let gate = gate();
    let (world, _solver, mut builds) =
        builds_of_one_held_step(2, recipe("slow").gate(&gate).fails("no session")).await;
    let starter = builds.remove(0);
    starter.abort();
    assert!(starter.await.unwrap_err().is_cancelled());
    gate.add_permits(2);
    // Its own try fails, too: that is final.
    assert_eq!(builds.pop().unwrap().await.unwrap().unwrap_err().to_string(), "no session");
    assert_eq!(world.take_runs(), ["image", "slow", "slow"]);
}

#[tokio::test]
async fn a_process_that_failed_by_itself_is_not_run_again_for_who_stayed() {
    let gate = gate();
    let slow = recipe("slow").gate(&gate).fails("exit code: 7").needs_no_client();
    let (world, _solver, mut builds) = builds_of_one_held_step(2, slow).await;
    let starter = builds.remove(0);
    starter.abort();
    assert!(starter.await.unwrap_err().is_cancelled());
    gate.add_permits(2);
    assert_eq!(builds.pop().unwrap().await.unwrap().unwrap_err().to_string(), "exit code: 7");
    assert_eq!(world.take_runs(), ["image", "slow"]);
}

#[tokio::test]
async fn a_failure_of_the_others_connection_is_not_ours() {
    let gate = gate();
    let gone = OpError { code: Some(14), ..OpError::new("the client went away") };
    let (world, _solver, mut builds) =
        builds_of_one_held_step(2, recipe("slow").gate(&gate).fails_with(gone)).await;
    gate.add_permits(2);
    builds.remove(0).await.unwrap().unwrap_err();
    // The second build tried by itself.
    builds.remove(0).await.unwrap().unwrap_err();
    assert_eq!(world.take_runs(), ["image", "slow", "slow"]);
}

fn copy(context: &str) -> pb::Definition {
    let mut graph = Graph::new();
    let (base, context) = (graph.source("base"), graph.source(context));
    let copy = graph.step("copy", &[&base, &context]);
    let run = graph.step("run", &[&copy]);
    graph.finish(&run)
}

#[tokio::test]
async fn builds_with_equal_contents_share_work_though_their_sources_differ() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("copy", recipe("copy").reads(1, "/main").logs("copying").gate(&gate));
    let mut builds = Vec::new();
    for i in 0..4 {
        let name = format!("context{i}");
        world.set(&name, recipe(&name).ephemeral().files(&[("/main", "m"), ("/who", &name)]));
        let (build, record) = world.build(&solver);
        builds.push((
            tokio::spawn(async move { build.solve(&copy(&name)).await.unwrap().unwrap().id }),
            record,
        ));
    }
    for (_, record) in &builds {
        while record.log("copy").is_empty() {
            tokio::task::yield_now().await;
        }
    }
    gate.add_permits(1);
    let mut ids = Vec::new();
    for (solving, record) in builds {
        ids.push(solving.await.unwrap());
        assert_eq!(record.log("copy"), "copying");
        assert_eq!(record.words("copy"), ["announced", "started", "completed"]);
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let mut runs = world.take_runs();
    runs.sort();
    assert_eq!(runs, ["base", "context0", "context1", "context2", "context3", "copy", "run"]);
}

#[tokio::test]
async fn work_that_holds_one_key_follows_who_holds_another() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    // Sources with lasting but different identity and the same content: the definition keys of
    // `copy` differ, its content keys do not.
    world.set("copy", recipe("copy").reads(1, "/main").logs("once").gate(&gate));
    let mut builds = Vec::new();
    for i in 0..6 {
        let name = format!("commit{i}");
        world.set(&name, recipe(&name).files(&[("/main", "m")]));
        for _ in 0..2 {
            let (build, record) = world.build(&solver);
            let definition = copy(&name);
            builds.push((tokio::spawn(async move { build.solve(&definition).await.map(|_| ()) }), record));
        }
    }
    for (_, record) in &builds {
        while record.log("copy").is_empty() {
            tokio::task::yield_now().await;
        }
    }
    gate.add_permits(1);
    for (solving, _) in builds {
        solving.await.unwrap().unwrap();
    }
    let copies = world.take_runs().iter().filter(|name| *name == "copy").count();
    assert_eq!(copies, 1);
    solver.idle().await;
    // All definitions are known now.
    for i in 0..6 {
        world.run(&solver, &copy(&format!("commit{i}"))).await.unwrap();
    }
    assert_eq!(world.take_runs(), [""; 0]);
}

#[tokio::test]
async fn forced_runs_are_not_shared_between_builds() {
    let world = World::new();
    let solver = world.solver();
    let gate = gate();
    world.set("fetch", recipe("fetch").gate(&gate));
    let forced = || {
        let mut graph = Graph::ignoring(&["fetch"]);
        let image = graph.source("image");
        let fetch = graph.step("fetch", &[&image]);
        graph.finish(&fetch)
    };
    let builds: Vec<_> = (0..2)
        .map(|_| {
            let (build, _) = world.build(&solver);
            let definition = forced();
            tokio::spawn(async move { build.solve(&definition).await.map(|_| ()) })
        })
        .collect();
    world.until("both fetch", |running| running == ["fetch", "fetch"]).await;
    gate.add_permits(2);
    for build in builds {
        build.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_slow_resolution_delays_only_what_needs_it() {
    let world = World::new();
    let solver = world.solver();
    let (map_gate, run_gate) = (gate(), gate());
    world.set("base", recipe("base").map_gate(&map_gate));
    world.set("context", recipe("session").ephemeral().gate(&run_gate).files(&[("/main", "m")]));
    world.set("copy", recipe("copy").reads(1, "/main"));
    let (build, _) = world.build(&solver);
    let solving = tokio::spawn(async move { build.solve(&copy("context")).await });
    world.until("the context is sent while the image resolves", |running| running == ["context"]).await;
    run_gate.add_permits(1);
    map_gate.add_permits(1);
    solving.await.unwrap().unwrap();
}

/// A record above was found and given up again: meanwhile the work below was nobody's.
#[tokio::test]
async fn work_that_is_joined_again_by_its_build_fails_once() {
    let world = World::new();
    let solver = world.solver();
    world.set("files", recipe("files").ephemeral().files(&[("/f", "1")]));
    world.set("top", recipe("top").reads(1, "/f"));
    let mut graph = Graph::new();
    let (slow, files) = (graph.source("slow"), graph.source("files"));
    let top = graph.step("top", &[&slow, &files]);
    let definition = graph.finish(&top);
    world.run(&solver, &definition).await.unwrap();
    world.take_runs();

    world.forgetful.store(true, Ordering::Relaxed);
    let (slow_gate, files_gate) = (gate(), gate());
    world.set("slow", recipe("slow").gate(&slow_gate).fails("it broke"));
    world.set("files", recipe("files").ephemeral().files(&[("/f", "1")]).gate(&files_gate));
    let (build, record) = world.build(&solver);
    let building = tokio::spawn(async move { build.solve(&definition).await.map(|_| ()) });
    world.until("both run", |running| running.len() == 2).await;
    let loads = world.loads.load(Ordering::Relaxed);
    files_gate.add_permits(1);
    // The record of the last step is found by the content of its files.
    while world.loads.load(Ordering::Relaxed) == loads {
        tokio::task::yield_now().await;
    }
    while !record.shows_running("slow") {
        tokio::task::yield_now().await;
    }
    slow_gate.add_permits(2);
    let error = building.await.unwrap().unwrap_err();
    assert_eq!((&*error.name, &*error.error.message), ("slow", "it broke"));
    let mut runs = world.take_runs();
    runs.sort_unstable();
    assert_eq!(runs, ["files", "slow"]);
}
