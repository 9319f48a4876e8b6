use super::*;
use kiln_solver::progress::{VertexInfo, VertexLog};

fn vertex(digest: &str, inputs: &[&str]) -> VertexState {
    VertexState::from(VertexInfo {
        digest: digest.into(),
        name: digest.into(),
        inputs: inputs.iter().map(|input| Arc::from(*input)).collect(),
        group: None,
    })
}

fn started(mut vertex: VertexState) -> VertexState {
    vertex.started = Some(SystemTime::now());
    vertex
}

fn flat(messages: &[control::StatusResponse]) -> Vec<&control::Vertex> {
    messages.iter().flat_map(|message| &message.vertexes).collect()
}

#[tokio::test]
async fn late_reader_sees_everything_and_the_end() {
    let log = ProgressLog::new();
    log.event(Event::Vertex(vertex("a", &[])));
    let mut early = log.read();
    assert_eq!(flat(&early.next().await.expect("announced")).len(), 1);
    let waiting = tokio::spawn(async move {
        let mut all = Vec::new();
        while let Some(messages) = early.next().await {
            all.extend(messages);
        }
        all
    });
    log.event(Event::Vertex(started(vertex("a", &[]))));
    log.close(false);
    log.event(Event::Vertex(vertex("late", &[])));
    let all = waiting.await.expect("reader ends");
    let last = flat(&all).last().copied().cloned().expect("an end");
    assert_eq!(last.error, "context canceled");
    assert!(last.completed.is_some());

    let mut late = log.read();
    let replayed = late.next().await.expect("history");
    assert_eq!(flat(&replayed), [&last], "of one message's states of a vertex the last one says all");
    assert!(late.next().await.is_none());
    assert_eq!(log.replay(), replayed);
}

#[test]
fn inputs_nobody_looked_at_are_cached() {
    let log = ProgressLog::new();
    log.event(Event::Vertex(vertex("a", &[])));
    log.event(Event::Vertex(vertex("b", &["a"])));
    log.event(Event::Vertex(started(vertex("b", &["a"]))));
    assert_eq!(log.counts(), Counts { total: 2, cached: 1, completed: 1, warnings: 0 });
    log.close(true);
    let messages = log.replay();
    let end = flat(&messages).into_iter().rfind(|vertex| vertex.digest == "b").cloned().expect("b");
    assert_eq!(end.error, "", "a build that succeeded leaves no canceled vertex");
}

#[test]
fn each_run_of_a_vertex_is_told_to_its_end() {
    let log = ProgressLog::new();
    let at = |seconds: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    let run = |from: u64, to: Option<u64>| VertexState {
        started: Some(at(from)),
        completed: to.map(at),
        ..vertex("a", &[])
    };
    for state in [vertex("a", &[]), run(1, None), run(1, Some(2)), run(3, None), run(3, Some(4))] {
        log.event(Event::Vertex(state));
    }
    let messages = log.replay();
    let seconds = |time: &Option<prost_types::Timestamp>| time.map(|time| time.seconds);
    let runs: Vec<_> = flat(&messages).iter().map(|v| (seconds(&v.started), seconds(&v.completed))).collect();
    assert_eq!(runs, [(Some(1), Some(2)), (Some(3), Some(4))]);
}

#[test]
fn vertices_stay_in_the_order_of_the_graph() {
    let log = ProgressLog::new();
    for id in ["a", "b", "c"] {
        log.event(Event::Vertex(vertex(id, &[])));
    }
    for id in ["c", "a", "b"] {
        log.event(Event::Vertex(started(vertex(id, &[]))));
    }
    let messages = log.replay();
    assert_eq!(flat(&messages).iter().map(|v| v.digest.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
}

#[test]
fn output_is_split_over_messages() {
    let log = ProgressLog::new();
    log.lock().limits = LogLimits::new(-1, -1);
    for _ in 0..5 {
        log.event(Event::Log(VertexLog {
            vertex: "a".into(),
            stream: 1,
            data: vec![b'x'; 700 << 10],
            timestamp: SystemTime::now(),
        }));
    }
    let messages = log.replay();
    let sizes: Vec<usize> =
        messages.iter().map(|message| message.logs.iter().map(|log| log.msg.len()).sum()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 5 * (700 << 10));
    assert!(sizes.iter().all(|size| *size <= 1 << 20), "{sizes:?}");
}

#[test]
fn running_statuses_are_thinned_out() {
    let log = ProgressLog::new();
    let progress = kiln_solver::progress::VertexProgress::new("a".into(), log.clone());
    let mut status = progress.status("sha256:00", "downloading", 1000);
    for current in 0..1000 {
        status.update(current);
    }
    status.done();
    let messages = log.replay();
    let statuses: Vec<_> = messages.iter().flat_map(|message| &message.statuses).collect();
    assert!(statuses.len() < 50, "{}", statuses.len());
    assert!(statuses.last().is_some_and(|status| status.completed.is_some() && status.current == 1000));
}

#[test]
fn an_abandoned_step_is_canceled() {
    let log = ProgressLog::new();
    drop(Step::start(log.clone(), "sha256:01", "exporting to image"));
    let messages = log.replay();
    assert_eq!(flat(&messages).last().map(|vertex| vertex.error.as_str()), Some("context canceled"));
}
