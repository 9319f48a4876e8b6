//! Clients that send what makes no sense: each is answered, and the daemon serves the next one. Runs for a moment;
//! `KILN_FUZZ_SECONDS` makes it longer, and `KILN_FUZZ_SEED` begins where a failure was.

use std::time::{Duration, Instant};

use kiln_proto::control::{BytesMessage, InfoRequest, SolveRequest};
use kiln_proto::{llb, pb};
use prost::Message;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request};

use crate::common::{Daemon, chain, request};

const PATIENCE: Duration = Duration::from_secs(30);

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Runs `round` with one seed after another until the time is over.
async fn rounds(mut round: impl AsyncFnMut(StdRng, String)) {
    let until = Instant::now() + Duration::from_secs(number("KILN_FUZZ_SECONDS", 1));
    let mut seed = number("KILN_FUZZ_SEED", 0);
    while Instant::now() < until {
        round(StdRng::seed_from_u64(seed), format!("KILN_FUZZ_SEED={seed}")).await;
        seed += 1;
    }
}

/// The daemon still does what it is there for.
async fn serves(daemon: &Daemon, name: &str) {
    daemon.control().await.info(InfoRequest {}).await.expect("info");
    let built = daemon.build(request(name, chain(&[("/fine", name)]).0)).await.0;
    built.unwrap_or_else(|error| panic!("{name}: {error}"));
}

/// Bytes with some of them changed, dropped, doubled or added.
fn damage(bytes: &mut Vec<u8>, random: &mut StdRng) {
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = random.random(),
            2 => bytes.truncate(at),
            3 => bytes.extend_from_within(at..),
            _ => bytes.insert(at, random.random()),
        }
    }
}

/// A graph of operations that need no process.
fn graph(random: &mut StdRng) -> pb::Definition {
    use pb::file_action::Action;
    let mut builder = llb::Builder::new();
    let mut made: Vec<pb::Input> = Vec::new();
    let paths = ["/a", "/a/b", "../..", "/", "", "/x/../../y", "\0", "*"];
    for _ in 0..random.random_range(1..6) {
        let (path, other) = (*paths.choose(random).expect("some"), *paths.choose(random).expect("some"));
        let odd = *[-1, 0, 0, 0, 1, 7, i64::MAX].choose(random).expect("some");
        let inputs: Vec<pb::Input> = made.choose_multiple(random, 2).cloned().collect();
        let op = match random.random_range(0..7) {
            0 => pb::op::Op::Merge(pb::MergeOp {
                inputs: (0..3).map(|input| pb::MergeInput { input: odd.wrapping_add(input) }).collect(),
            }),
            1 => pb::op::Op::Diff(pb::DiffOp {
                lower: Some(pb::LowerDiffInput { input: odd }),
                upper: Some(pb::UpperDiffInput { input: 0 }),
            }),
            2 => {
                let schemes = [
                    "local://x",
                    "http://127.0.0.1:1/x",
                    "made-up://x",
                    "git://",
                    "no scheme",
                    "oci-layout://x",
                ];
                let identifier = (*schemes.choose(random).expect("some")).to_owned();
                pb::op::Op::Source(pb::SourceOp { identifier, ..pb::SourceOp::default() })
            }
            kind => {
                let action = match kind {
                    3 => Action::Mkdir(pb::FileActionMkDir {
                        path: path.into(),
                        make_parents: true,
                        ..Default::default()
                    }),
                    4 => Action::Rm(pb::FileActionRm {
                        path: path.into(),
                        allow_wildcard: true,
                        ..Default::default()
                    }),
                    5 => Action::Copy(
                        pb::FileActionCopy { src: path.into(), dest: other.into(), ..Default::default() }
                            .into(),
                    ),
                    _ => Action::Mkfile(
                        pb::FileActionMkFile { path: path.into(), timestamp: odd, ..Default::default() }
                            .into(),
                    ),
                };
                let action =
                    pb::FileAction { input: odd, secondary_input: 1, output: 0, action: Some(action) };
                pb::op::Op::File(pb::FileOp { actions: vec![action] })
            }
        };
        let op = pb::Op { op: Some(op), inputs, ..pb::Op::default() };
        made.push(pb::Input { digest: builder.add(&op, pb::OpMetadata::default()), index: odd });
    }
    builder.finish(made.last().expect("at least one"))
}

#[tokio::test(flavor = "multi_thread")]
async fn definitions_without_sense_are_answered() {
    let mut daemon = Daemon::start().await;
    rounds(async |mut random, shown| {
        let mut definition = graph(&mut random);
        if random.random_bool(0.5) {
            let mut bytes = definition.encode_to_vec();
            damage(&mut bytes, &mut random);
            definition = pb::Definition::decode(bytes.as_slice()).unwrap_or(definition);
        }
        let answer = tokio::time::timeout(PATIENCE, daemon.build(request(&shown, definition))).await;
        let (answer, _) = answer.unwrap_or_else(|_| panic!("{shown}: no answer"));
        let code = answer.err().map(|error| error.code());
        assert!(!matches!(code, Some(Code::Unavailable | Code::Internal)), "{shown}: {code:?}");
    })
    .await;
    serves(&daemon, "after").await;
    daemon.stop().await;
}

/// Frames of HTTP/2, or what looks like them.
fn frames(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..random.random_range(0..6) {
        let length: u8 = random.random_range(0..40);
        bytes.extend([
            0,
            0,
            length,
            random.random_range(0..12),
            random.random(),
            0,
            0,
            0,
            random.random_range(0..5),
        ]);
        bytes.extend((0..length).map(|_| random.random::<u8>()));
    }
    if random.random_bool(0.5) {
        damage(&mut bytes, random);
    }
    // Empty settings, as a server begins with.
    let hello = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    if random.random_bool(0.7) { [&hello[..], &bytes].concat() } else { bytes }
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_without_sense_are_closed() {
    let mut daemon = Daemon::start().await;
    rounds(async |mut random, shown| {
        let (sender, messages) = mpsc::channel(16);
        let mut session = Request::new(ReceiverStream::new(messages));
        let mut put = |key: &'static str, value: &str| {
            session.metadata_mut().append(key, value.parse().expect("a header"))
        };
        put("x-docker-expose-session-uuid", &shown);
        put("x-docker-expose-session-name", "hostile");
        for method in ["moby.filesync.v1.FileSync/DiffCopy", "grpc.health.v1.Health/Check"] {
            put("x-docker-expose-session-grpc-method", &format!("/{method}"));
        }
        let mut control = daemon.control().await;
        let serving = tokio::spawn(async move {
            let Ok(answers) = control.session(session).await else { return };
            let mut answers = answers.into_inner();
            while let Ok(Some(_)) = answers.message().await {}
        });
        let source = pb::SourceOp { identifier: "local://context".into(), ..pb::SourceOp::default() };
        let mut builder = llb::Builder::new();
        let op = pb::Op { op: Some(pb::op::Op::Source(source)), ..pb::Op::default() };
        let digest = builder.add(&op, pb::OpMetadata::default());
        let definition = builder.finish(&pb::Input { digest, index: 0 });
        let build = daemon.build(SolveRequest { session: shown.clone(), ..request(&shown, definition) });
        let feed = async {
            for _ in 0..random.random_range(0..4) {
                let data = frames(&mut random).into();
                if sender.send(BytesMessage { data }).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            drop(sender);
        };
        let answer = tokio::time::timeout(PATIENCE, async { tokio::join!(build, feed).0 }).await;
        let (answer, _) = answer.unwrap_or_else(|_| panic!("{shown}: no answer"));
        answer.err().unwrap_or_else(|| panic!("{shown}: there was no directory"));
        let ended = tokio::time::timeout(PATIENCE, serving).await;
        ended.unwrap_or_else(|_| panic!("{shown}: the tunnel stays open")).expect("task");
    })
    .await;
    serves(&daemon, "after").await;
    daemon.stop().await;
}
