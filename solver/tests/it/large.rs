//! Graphs far larger than real ones: nothing may touch the stack or grow worse than the graph.

use std::time::Duration;

use kiln_proto::pb;

use crate::world::{Files, Graph, World, recipe};

/// Runs on a thread whose stack would not survive a recursion over the graph.
fn on_a_small_stack(test: impl Future<Output = ()> + Send + 'static) {
    let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(300), test).await.expect("in time") });
    });
    thread.unwrap().join().unwrap();
}

/// Without optimisation the full length takes minutes; this one is as deadly for a recursion.
const LENGTH: usize = if cfg!(debug_assertions) { 20_000 } else { 100_000 };

/// A chain in which each step only passes its input on, on top of a source with one file.
fn long_chain(world: &World) -> pb::Definition {
    let mut graph = Graph::new();
    let mut last = graph.source("image");
    let mut recipes = world.recipes.lock().unwrap();
    for i in 0..LENGTH {
        let name = format!("s{i}");
        recipes.insert(name.clone(), recipe(&name).makes(|inputs: &[Files]| inputs.to_vec()));
        last = graph.step(&name, &[&last]);
    }
    graph.finish(&last)
}

#[test]
fn a_long_chain_is_built_and_found_again() {
    on_a_small_stack(async {
        let world = World::new();
        let definition = long_chain(&world);
        let solver = world.limited_solver(2);
        world.run(&solver, &definition).await.unwrap();
        assert_eq!(world.take_runs().len(), LENGTH + 1);
        world.run(&solver, &definition).await.unwrap();
        assert_eq!(world.take_runs(), [""; 0]);
    });
}

#[test]
fn a_failure_below_a_long_chain_comes_up() {
    on_a_small_stack(async {
        let world = World::new();
        let definition = long_chain(&world);
        world.set("image", recipe("image").fails("no"));
        let solver = world.solver();
        assert_eq!(world.run(&solver, &definition).await.unwrap_err().to_string(), "no");
        world.set("image", recipe("image").map_fails("unresolved"));
        let error = world.run(&solver, &definition).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to load cache key: unresolved");
    });
}

#[test]
fn a_wide_join_is_linear() {
    on_a_small_stack(async {
        let world = World::new();
        let mut graph = Graph::new();
        let image = graph.source("image");
        let steps: Vec<pb::Input> = (0..LENGTH)
            .map(|i| {
                let name = format!("s{i}");
                world.set(&name, recipe(&name).io().files(&[("/f", "same")]));
                graph.step(&name, &[&image])
            })
            .collect();
        let steps: Vec<&pb::Input> = steps.iter().collect();
        let join = graph.step("join", &steps);
        let definition = graph.finish(&join);
        let solver = world.solver();
        world.run(&solver, &definition).await.unwrap();
        assert_eq!(world.take_runs().len(), LENGTH + 2);
        world.run(&solver, &definition).await.unwrap();
        assert_eq!(world.take_runs(), [""; 0]);
    });
}
