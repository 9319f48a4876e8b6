//! A client's directories, and what follows from their content.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use futures::stream::BoxStream;
use kiln_cache::Ref;
use kiln_proto::filesync::file_sync_server::{FileSync, FileSyncServer};
use kiln_proto::fsutil::Packet;
use kiln_proto::fsutil::packet::PacketType;
use kiln_proto::pb::file_action::Action;
use kiln_proto::{llb, pb};
use kiln_session::client::{Attachables, ClientSession, SharedDir};
use kiln_session::fsutil::{self, Subtree};
use kiln_solver::op::ResultStore;
use kiln_solver::progress::{Event, ProgressSink};
use kiln_solver::{BuildOptions, Solver, SolverOptions};
use kiln_worker::ops::{BuildContext, SessionGroup};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::common;
use crate::world::{World, action, copy, file, mkfile, top};

pub(crate) fn local(name: &str, session: &str) -> pb::op::Op {
    let attrs = [("local.session".to_owned(), session.to_owned())].into_iter().collect();
    pb::op::Op::Source(pb::SourceOp { identifier: format!("local://{name}"), attrs })
}

/// A client, in session `s`, that shares a directory as `context`; and a build for it.
async fn client_of(world: &World, dir: &Path) -> (ClientSession, BuildContext) {
    let mut offer = Attachables::new();
    offer.share(vec![SharedDir { name: "context".into(), path: dir.to_owned() }]);
    attached(world, offer).await
}

/// A client with the session `s`.
async fn attached(world: &World, offer: Attachables) -> (ClientSession, BuildContext) {
    let (manager, mut control) = common::daemon().await;
    let client = offer.attach(&mut control, "s", "key").await.unwrap();
    let sessions = SessionGroup::new(manager, vec!["s".into()]);
    (client, BuildContext { sessions, ..world.context(&[]) })
}

pub(crate) async fn a_clients_directory_is_transferred_once(world: &World) {
    let from = world.dir.path().join("context");
    common::write(&from, "src/main", "1");
    common::write(&from, "other", "o");
    std::fs::set_permissions(from.join("other"), std::fs::Permissions::from_mode(0o640)).unwrap();
    let (_client, context) = client_of(world, &from).await;
    let fetch = || world.run_in(&context, local("context", "s"), &[]);
    let first = fetch().await.unwrap().remove(0);
    assert_eq!(world.read(&first, "src/main").await.as_deref(), Some("1"));
    assert_eq!(top(&first).dir().join("other").metadata().unwrap().mode() & 0o7777, 0o640);
    assert_eq!(fetch().await.unwrap(), std::slice::from_ref(&first), "nothing changed");
    common::write(&from, "src/main", "two");
    let second = fetch().await.unwrap().remove(0);
    assert_ne!(second, first);
    assert_eq!(world.read(&second, "src/main").await.as_deref(), Some("two"));
    assert_eq!(world.read(&first, "src/main").await.as_deref(), Some("1"), "a snapshot never changes");
    std::fs::remove_file(from.join("other")).unwrap();
    let third = fetch().await.unwrap().remove(0);
    assert_eq!(world.read(&third, "other").await, None);
    assert_eq!(world.read(&second, "other").await.as_deref(), Some("o"));
    let (a, b) = tokio::join!(fetch(), fetch());
    assert_eq!(world.read(&a.unwrap()[0], "src/main").await, world.read(&b.unwrap()[0], "src/main").await);
    let error = world.run_in(&context, local("secrets", "s"), &[]).await.unwrap_err();
    assert!(error.message.contains("no access allowed to dir \"secrets\""), "{error}");
}

/// Shares a directory, and breaks off once the first file is sent.
struct BreaksOff(PathBuf);

#[tonic::async_trait]
impl FileSync for BreaksOff {
    type DiffCopyStream = BoxStream<'static, Result<Packet, Status>>;
    type TarStreamStream = BoxStream<'static, Result<Packet, Status>>;

    async fn diff_copy(
        &self,
        request: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::DiffCopyStream>, Status> {
        let (sender, mut packets) = mpsc::channel(fsutil::SEND_QUEUE);
        let tree = Subtree { reset_ids: true, ..Subtree::open(&self.0).unwrap() };
        tokio::spawn(fsutil::send(vec![tree], request.into_inner().boxed(), sender, None));
        let (broken, stream) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(packet) = packets.recv().await {
                let ends = packet.r#type() == PacketType::PacketData && packet.data.is_empty();
                let _ = broken.send(Ok(packet));
                if ends {
                    let _ = broken.send(Err(Status::aborted("broken off")));
                    return;
                }
            }
        });
        Ok(Response::new(UnboundedReceiverStream::new(stream).boxed()))
    }

    async fn tar_stream(
        &self,
        _: Request<Streaming<Packet>>,
    ) -> Result<Response<Self::TarStreamStream>, Status> {
        Err(Status::unimplemented("tar stream"))
    }
}

pub(crate) async fn a_broken_transfer_is_not_taken_for_the_present_state(world: &World) {
    let from = world.dir.path().join("context");
    common::write(&from, "a", "1");
    let (_client, context) = client_of(world, &from).await;
    let first = world.run_in(&context, local("context", "s"), &[]).await.unwrap().remove(0);
    common::write(&from, "a", "22");
    let mut offer = Attachables::new();
    offer.add(FileSyncServer::new(BreaksOff(from)), &["/moby.filesync.v1.FileSync/DiffCopy"]);
    let (_breaking, broken) = attached(world, offer).await;
    let error = world.run_in(&broken, local("context", "s"), &[]).await.unwrap_err();
    assert!(error.message.contains("broken off"), "{error}");
    let last = world.run_in(&context, local("context", "s"), &[]).await.unwrap().remove(0);
    assert_ne!(last, first);
    assert_eq!(world.read(&last, "a").await.as_deref(), Some("22"));
}

pub(crate) async fn unknown_sources_are_refused_by_name(world: &World) {
    let source = pb::op::Op::Source(pb::SourceOp { identifier: "ipfs://x".into(), ..Default::default() });
    let error = world.run(source, &[]).await.unwrap_err();
    assert_eq!(error.message, "unsupported: source scheme ipfs (ipfs://x)");
}

/// Counts what ran.
#[derive(Default)]
pub(crate) struct Ran(pub(crate) Mutex<Vec<String>>);

impl ProgressSink for Ran {
    fn event(&self, event: Event) {
        if let Event::Vertex(vertex) = event
            && vertex.completed.is_some()
            && !vertex.cached
            && vertex.error.is_empty()
        {
            self.0.lock().unwrap().push(vertex.name.to_string());
        }
    }
}

pub(crate) async fn an_unchanged_file_keeps_the_steps_that_read_it(world: &World) {
    let solver: Solver<Ref> =
        Solver::new(world.worker.store().keys(), world.worker.clone(), SolverOptions::default());
    let definition = |read: &str, unread: &str| {
        let mut builder = llb::Builder::new();
        let mut add = |inputs: Vec<pb::Input>, op: pb::op::Op| {
            builder.add(&pb::Op { inputs, op: Some(op), ..Default::default() }, pb::OpMetadata::default())
        };
        let edge = |digest: &String| pb::Input { digest: digest.clone(), index: 0 };
        let made = action(-1, -1, -1, mkfile("/read", read));
        let source = add(vec![], file(vec![made, action(0, -1, 0, mkfile("/unread", unread))]));
        let copied =
            add(vec![edge(&source)], file(vec![action(-1, 0, 0, Action::Copy(copy("/read", "/x").into()))]));
        let last = add(vec![edge(&copied)], file(vec![action(0, -1, 0, mkfile("/after", "a"))]));
        builder.finish(&edge(&last))
    };
    let build = async |read: &str, unread: &str| {
        let ran = Arc::new(Ran::default());
        let factory = world.worker.factory(world.context(&[]));
        let build = solver.build(BuildOptions { factory, progress: ran.clone() });
        let result = build.solve(&definition(read, unread)).await.unwrap().flatten();
        drop(build);
        solver.idle().await;
        let mut names = ran.0.lock().unwrap().clone();
        names.sort();
        names.dedup();
        (ResultStore::id(&*world.worker, &result), names.len())
    };
    let (first, ran) = build("1", "a").await;
    assert_eq!(ran, 3);
    assert_eq!(build("1", "a").await, (first.clone(), 0));
    assert_eq!(build("1", "b").await, (first.clone(), 1), "only the source itself runs again");
    let (changed, ran) = build("2", "b").await;
    assert!(changed != first && ran == 3, "{ran}");
}
