//! What a client is told when something goes wrong.

use kiln_proto::pb;
use kiln_solver::op::Remains;

use crate::world::{Graph, World, chain, recipe};

#[tokio::test]
async fn a_failure_names_its_vertex_and_keeps_its_details() {
    let world = World::new();
    let text = "process \"/bin/false\" did not complete successfully: exit code: 7";
    world.set("bad", recipe("bad").fails(text));
    let (build, record) = world.build(&world.solver());
    let error = build.solve(&chain(&["image", "bad", "after"])).await.unwrap_err();
    assert_eq!(error.to_string(), text);
    assert_eq!(&*error.name, "bad");
    assert_eq!(error.vertex.as_deref(), Some(&*record.states("bad")[0].digest));
    assert_eq!(error.error.exit_code, Some(7));
    assert!(!error.is_canceled());
    let image = build.solve(&chain(&["image"])).await.unwrap().unwrap();
    let left = Remains::Run { inputs: vec![image], states: vec![] };
    assert_eq!(error.remains.as_deref(), Some(&left));
    assert_eq!(record.words("bad"), ["announced", "started", &format!("error: {text}")]);
    assert_eq!(record.words("after"), ["announced"]);
    assert_eq!(world.take_runs(), ["image", "bad"]);
}

#[tokio::test]
async fn a_vertex_fails_once_in_a_build_and_is_tried_again_in_the_next() {
    let world = World::new();
    let solver = world.solver();
    world.set("bad", recipe("bad").fails("no"));
    let (build, _) = world.build(&solver);
    let handle = build.load(&chain(&["image", "bad"])).await.unwrap();
    handle.result().await.unwrap_err();
    handle.result().await.unwrap_err();
    build.solve(&chain(&["image", "bad", "more"])).await.unwrap_err();
    assert_eq!(world.take_runs(), ["image", "bad"]);
    world.set("bad", recipe("bad"));
    drop((build, handle));
    world.run(&solver, &chain(&["image", "bad"])).await.unwrap();
    assert_eq!(world.take_runs(), ["bad"]);
}

#[tokio::test]
async fn what_is_read_but_not_there_fails_the_reader() {
    let world = World::new();
    world.set("copy", recipe("copy").reads(1, "/nope"));
    let mut graph = Graph::new();
    let (base, context) = (graph.source("base"), graph.source("context"));
    let copy = graph.step("copy", &[&base, &context]);
    let (build, record) = world.build(&world.solver());
    let error = build.solve(&graph.finish(&copy)).await.unwrap_err();
    assert_eq!(error.to_string(), "failed to compute cache key: \"/nope\": not found");
    assert_eq!(&*error.name, "copy");
    let context = build.solve(&chain(&["context"])).await.unwrap().unwrap();
    assert_eq!(error.remains.as_deref(), Some(&Remains::Key { input: context, index: 1 }));
    assert_eq!(
        record.words("copy"),
        ["announced", "error: failed to compute cache key: \"/nope\": not found"]
    );
}

#[tokio::test]
async fn a_source_that_cannot_be_resolved_fails_all_above_now_and_later() {
    let world = World::new();
    world.set("image", recipe("image").map_fails("no such image"));
    let (build, _) = world.build(&world.solver());
    for definition in [chain(&["image", "a", "b"]), chain(&["image", "a"]), chain(&["image", "a", "b", "c"])]
    {
        let error = build.solve(&definition).await.unwrap_err();
        assert_eq!(error.to_string(), "failed to load cache key: no such image");
        assert_eq!(&*error.name, "image");
    }
    assert_eq!(world.take_runs(), [""; 0]);
}

#[tokio::test]
async fn an_operation_that_panics_fails_its_vertex() {
    let world = World::new();
    world.set("bug", recipe("bug").panics());
    let error = world.run(&world.solver(), &chain(&["image", "bug"])).await.unwrap_err();
    assert_eq!(error.to_string(), "operation panicked: boom");
    assert_eq!(&*error.name, "bug");
    // Some operations are asked when they are loaded, others when they are wanted.
    for name in ["bug 1", "bug 2", "bug 3", "bug 4", "bug 5", "bug 6", "bug 7", "bug 8"] {
        world.set(name, recipe(name).map_panics());
        let error = world.run(&world.solver(), &chain(&["image", name])).await.unwrap_err();
        assert!(error.to_string().ends_with("operation panicked: boom"), "{error}");
        assert_eq!(&*error.name, name);
    }
}

#[tokio::test]
async fn definitions_are_refused_with_a_reason() {
    let world = World::new();
    let (build, record) = world.build(&world.solver());
    let error = build.solve(&chain(&["image", "forbidden"])).await.unwrap_err();
    assert_eq!(error.to_string(), "failed to load LLB: security.insecure is not allowed");
    assert_eq!(&*error.name, "forbidden");
    let mut definition = chain(&["image", "a"]);
    definition.def.remove(0);
    let error = build.solve(&definition).await.unwrap_err();
    assert!(
        error.to_string().starts_with("failed to load LLB: invalid missing input digest sha256:"),
        "{error}"
    );
    assert!(record.0.lock().unwrap().is_empty());
    // What was refused does not stand in the way of what is not.
    build.solve(&chain(&["image", "a"])).await.unwrap();
    assert_eq!(record.words("image")[0], "announced");
}

#[tokio::test]
async fn the_empty_definition_is_scratch() {
    let world = World::new();
    let (build, _) = world.build(&world.solver());
    let handle = build.load(&pb::Definition::default()).await.unwrap();
    assert!(handle.is_scratch());
    assert!(handle.result().await.unwrap().is_none());
}

#[tokio::test]
async fn an_output_that_an_operation_does_not_have_is_an_error() {
    let world = World::new();
    let solver = world.solver();
    let mut graph = Graph::new();
    let mut image = graph.source("image");
    image.index = 3;
    let error = world.run(&solver, &graph.finish(&image)).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid output index 3: image has 1 outputs");
    let step = graph.step("step", &[&image]);
    let error = world.run(&solver, &graph.finish(&step)).await.unwrap_err();
    assert_eq!(error.to_string(), "invalid output index 3: image has 1 outputs");
}
