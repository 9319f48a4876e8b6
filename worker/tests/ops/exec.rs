//! Steps in sandboxes, their mounts and their cache keys.

use std::time::{Duration, Instant};

use kiln_proto::pb;
use kiln_proto::pb::file_action::Action;
use kiln_session::client::{Attachables, Secret};
use kiln_worker::ops::{BuildContext, SessionGroup};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use crate::common;
use crate::world::{World, action, bind, copy, exec, file, layer, sh, top, vertex, walk};

pub(crate) async fn a_step_writes_a_layer_and_reports_its_output(world: &World) {
    let base = world.busybox();
    let op = sh("echo out; echo err >&2; mkdir -p /made/here; echo text > /made/here/file; rm /etc/group");
    let result = world.run(exec(op), &[&base]).await.unwrap().remove(0);
    assert_eq!((world.log(1).as_str(), world.log(2).as_str()), ("out\n", "err\n"));
    assert_eq!(world.read(&result, "/made/here/file").await.as_deref(), Some("text\n"));
    assert_eq!(world.read(&result, "/etc/group").await, None);
    assert!(world.read(&base, "/etc/group").await.is_some());
    assert_eq!(top(&result).parent(), base);
}

pub(crate) async fn nothing_but_the_change_is_in_the_layer(world: &World) {
    let base = world.busybox();
    let nothing = world.run(exec(sh("true")), &[&base]).await.unwrap().remove(0);
    assert_eq!(layer(&nothing), Vec::<String>::new());
    let one = world.run(exec(sh("echo x > /etc/conf")), &[&base]).await.unwrap().remove(0);
    assert_eq!(layer(&one), ["etc", "etc/conf"]);
    let bare = world.snapshot(|root| {
        std::fs::create_dir(root.join("bin")).unwrap();
        std::fs::copy(top(&base).dir().join("bin/busybox"), root.join("bin/sh")).unwrap();
    });
    let nothing = world.run(exec(sh(":")), &[&bare]).await.unwrap().remove(0);
    assert_eq!(layer(&nothing), Vec::<String>::new(), "directories made as mount points are gone");
}

pub(crate) async fn a_failing_step_tells_its_exit_code(world: &World) {
    let base = world.busybox();
    let error = world.run(exec(sh("exit 7")), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "process \"/bin/sh -c exit 7\" did not complete successfully: exit code: 7");
    assert_eq!(error.exit_code, Some(7));
    let mut allowed = sh("exit 7");
    allowed.meta.as_mut().unwrap().valid_exit_codes = vec![7];
    world.run(exec(allowed.clone()), &[&base]).await.unwrap();
    allowed.meta.as_mut().unwrap().args[2] = "exit 0".into();
    assert_eq!(world.run(exec(allowed), &[&base]).await.unwrap_err().exit_code, Some(0));
    let mut missing = sh("");
    missing.meta.as_mut().unwrap().args = vec!["/no/such/program".into()];
    let error = world.run(exec(missing), &[&base]).await.unwrap_err();
    assert!(error.message.contains("/no/such/program"), "{error}");
}

pub(crate) async fn users_environment_and_hosts(world: &World) {
    let base = world.busybox();
    let mut op =
        sh("id -u; id -g; id -G; echo $HOME $HTTP_PROXY $http_proxy $A; pwd; cat /etc/hosts; hostname");
    let meta = op.meta.as_mut().unwrap();
    meta.user = "ann".into();
    meta.env = vec!["A=b".into()];
    meta.cwd = "/tmp".into();
    meta.hostname = "builder".into();
    meta.proxy_env = Some(pb::ProxyEnv { http_proxy: "http://p".into(), ..Default::default() });
    meta.extra_hosts = vec![pb::HostIp { host: "db".into(), ip: "10.1.2.3".into() }];
    world.run(exec(op), &[&base]).await.unwrap();
    let log = world.log(1);
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines[..2], ["1000", "1001"]);
    assert!(lines[2].split(' ').any(|group| group == "50"), "{log}");
    assert_eq!(lines[3..5], ["/home/ann http://p http://p b", "/tmp"]);
    assert!(log.contains("10.1.2.3\tdb") && log.contains("127.0.0.1\tlocalhost builder"), "{log}");
    assert_eq!(lines.last(), Some(&"builder"));
    let mut unknown = sh("true");
    unknown.meta.as_mut().unwrap().user = "nobody-here".into();
    let error = world.run(exec(unknown), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "unable to find user nobody-here: no matching entries in passwd file");
}

pub(crate) async fn user_files_that_are_no_files_are_left_alone(world: &World) {
    let base = world.busybox();
    let pipe = world.snapshot(|root| {
        std::fs::create_dir(root.join("etc")).unwrap();
        let mode = Mode::from_raw_mode(0o644);
        mknodat(CWD, root.join("etc/passwd"), FileType::Fifo, mode, 0).unwrap();
    });
    let inputs = [0, 1].map(|input| pb::MergeInput { input }).to_vec();
    let merged = pb::op::Op::Merge(pb::MergeOp { inputs });
    let merged = world.run(merged, &[&base, &pipe]).await.unwrap().remove(0);
    // Goes on as soon as anybody opens the pipe.
    let place = top(&pipe).dir().join("etc/passwd");
    let writer = std::thread::spawn({
        let place = place.clone();
        move || std::fs::File::options().write(true).open(place).unwrap()
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut op = sh("stat -c %u /proc/self/status");
    op.meta.as_mut().unwrap().user = "7".into();
    world.run(exec(op), &[&merged]).await.unwrap();
    assert_eq!(world.log(1), "7\n");
    let opened = writer.is_finished();
    drop(rustix::fs::open(&place, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap());
    writer.join().unwrap();
    assert!(!opened, "the pipe was opened");
}

pub(crate) async fn mounts_show_inputs_and_scratch_space(world: &World) {
    let base = world.busybox();
    let data = world.snapshot(|root| {
        common::write(root, "dir/file", "text");
        common::write(root, "other", "o");
    });
    let mut op = sh("cat /in/file; cat /one; echo more >> /rw/other; cat /rw/other; \
        touch /in/x 2>/dev/null && echo bad; df -t tmpfs /scratch | tail -1 | awk '{print $2}'; test ! -e /in/other");
    op.mounts.push(pb::Mount { selector: "/dir".into(), ..bind(1, "/in", -1, true) });
    op.mounts.push(pb::Mount { selector: "/dir/file".into(), ..bind(1, "one", -1, true) });
    op.mounts.push(bind(1, "/rw", -1, false));
    op.mounts.push(pb::Mount {
        mount_type: pb::MountType::Tmpfs as i32,
        tmpfs_opt: Some(pb::TmpfsOpt { size: 1 << 20 }),
        ..bind(-1, "/scratch", -1, false)
    });
    let result =
        world.run(exec(op), &[&base, &data]).await.unwrap_or_else(|err| panic!("{err} {}", world.log(2)));
    assert_eq!(world.log(1), "texttextomore\n1024\n");
    assert_eq!(layer(&result[0]), Vec::<String>::new());
    assert_eq!(world.read(&data, "/other").await.as_deref(), Some("o"));
}

pub(crate) async fn several_outputs_are_numbered_by_mount(world: &World) {
    let (base, data) = (world.busybox(), world.snapshot(|root| common::write(root, "f", "1")));
    let mut op = sh("echo 2 > /second/g; echo r > /r");
    op.mounts = vec![bind(1, "/second", 0, false), bind(0, "/", 1, false), bind(1, "/third", 2, true)];
    let results = world.run(exec(op), &[&base, &data]).await.unwrap();
    assert_eq!((layer(&results[0]), layer(&results[1])), (vec!["g".to_owned()], vec!["r".to_owned()]));
    assert_eq!(results[2], data);
    let mut scratch = sh("echo s > /out/s");
    scratch.mounts.push(bind(-1, "/out", 1, false));
    let results = world.run(exec(scratch), &[&base]).await.unwrap();
    assert_eq!(world.read(&results[1], "/s").await.as_deref(), Some("s\n"));
    assert_eq!(top(&results[1]).layers().len(), 1);
}

pub(crate) fn cache(id: &str, sharing: pb::CacheSharingOpt) -> pb::Mount {
    let options = pb::CacheOpt { id: id.into(), sharing: sharing as i32 };
    pb::Mount {
        mount_type: pb::MountType::Cache as i32,
        cache_opt: Some(options),
        ..bind(-1, "/cache", -1, false)
    }
}

pub(crate) async fn cache_mounts_persist_and_locked_ones_wait(world: &World) {
    let base = world.busybox();
    let step = |text: &str, mount: pb::Mount| {
        let mut op = sh(text);
        op.mounts.push(mount);
        exec(op)
    };
    let shared = pb::CacheSharingOpt::Shared;
    world.run(step("echo kept > /cache/f", cache("one", shared)), &[&base]).await.unwrap();
    world.run(step("cat /cache/f", cache("one", shared)), &[&base]).await.unwrap();
    assert_eq!(world.log(1), "kept\n");
    assert!(world.run(step("cat /cache/f", cache("two", shared)), &[&base]).await.is_err());
    let initial = world.snapshot(|root| common::write(root, "f", "initial"));
    let with_content = pb::Mount { input: 1, ..cache("three", shared) };
    world.run(step("cat /cache/f; rm /cache/f", with_content.clone()), &[&base, &initial]).await.unwrap();
    assert_eq!(world.log(1), "initial");
    let gone = world.run(step("test ! -e /cache/f", with_content), &[&base, &initial]).await;
    gone.expect("content is given once");

    // Each of these fails if another is inside at the same time.
    let alone = "mkdir /cache/inside && sleep 0.2 && rmdir /cache/inside";
    let inputs = [&base];
    let locked = || world.run(step(alone, cache("lock", pb::CacheSharingOpt::Locked)), &inputs);
    // A private one sees no other.
    let private = || world.run(step(alone, cache("private", pb::CacheSharingOpt::Private)), &inputs);
    let (a, b, c, d) = tokio::join!(locked(), locked(), private(), private());
    for result in [a, b, c, d] {
        result.unwrap();
    }
}

pub(crate) async fn secrets_come_from_the_client(world: &World) {
    let base = world.busybox();
    let (manager, mut control) = common::daemon().await;
    let mut offer = Attachables::new();
    offer.secrets(vec![Secret::Value { id: "token".into(), value: b"s3cret".to_vec() }]);
    let _client = offer.attach(&mut control, "client", "").await.unwrap();
    let context =
        BuildContext { sessions: SessionGroup::new(manager, vec!["client".into()]), ..world.context(&[]) };
    let secret = |id: &str, optional| pb::Mount {
        mount_type: pb::MountType::Secret as i32,
        secret_opt: Some(pb::SecretOpt { id: id.into(), uid: 1000, gid: 0, mode: 0o400, optional }),
        ..bind(-1, "/run/secrets/token", 0, false)
    };
    let mut op = sh("cat /run/secrets/token; stat -c ' %u %a' /run/secrets/token; echo $TOKEN; \
                     mount | grep -o 'on /run/secrets/token type tmpfs'");
    op.mounts.push(secret("token", false));
    op.secretenv = vec![pb::SecretEnv { id: "token".into(), name: "TOKEN".into(), optional: false }];
    let result = world.run_in(&context, exec(op.clone()), &[&base]).await.unwrap();
    assert_eq!(world.log(1), "s3cret 1000 400\ns3cret\non /run/secrets/token type tmpfs\n");
    assert_eq!(layer(&result[0]), Vec::<String>::new());
    op.mounts[1] = secret("zz", false);
    let error = world.run_in(&context, exec(op.clone()), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "secret zz: not found");
    let mut optional = sh("test ! -e /run/secrets/token");
    optional.mounts.push(secret("zz", true));
    world.run_in(&context, exec(optional), &[&base]).await.unwrap();
    let mut agent = sh("true");
    agent.mounts.push(pb::Mount {
        mount_type: pb::MountType::Ssh as i32,
        ssh_opt: Some(pb::SshOpt { id: "x".into(), mode: 0o600, ..Default::default() }),
        ..bind(-1, "/run/agent", 0, false)
    });
    let error = world.run_in(&context, exec(agent), &[&base]).await.unwrap_err();
    assert_eq!(error.message, "no SSH key \"x\" forwarded from the client");
    let left: Vec<_> = walk(&world.dir.path().join("run")).filter(|path| path.is_file()).collect();
    assert!(left.is_empty(), "{left:?}");
}

pub(crate) async fn a_dropped_step_leaves_nothing(world: &World) {
    let base = world.busybox();
    let staging = || std::fs::read_dir(world.dir.path().join("store/staging")).unwrap().count();
    let before = staging();
    let marker = format!("31{}", std::process::id());
    let running = || {
        let processes = std::fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter(|entry| {
                let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                command.windows(marker.len()).any(|part| part == marker.as_bytes())
            })
            .count()
    };
    let op = exec(sh(&format!("echo started; exec sleep {marker}")));
    let inputs = [&base];
    let run = world.run(op, &inputs);
    tokio::select! {
        result = run => panic!("{result:?}"),
        () = async {
            while world.logs.0.lock().unwrap().is_empty() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        } => {}
    }
    world.worker.idle().await;
    assert_eq!(running(), 0);
    // Directories are removed in the background.
    let deadline = Instant::now() + Duration::from_secs(10);
    while staging() > before && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(staging(), before);
}

pub(crate) async fn forbidden_things_are_refused(world: &World) {
    let refused = |op: pb::ExecOp, inputs| {
        let factory = world.worker.factory(world.context(&[]));
        factory.op(vertex(exec(op), inputs)).err().map(|err| err.message).unwrap_or_default()
    };
    let mut op = sh("true");
    op.network = pb::NetMode::Host as i32;
    assert_eq!(refused(op, 1), "network.host is not allowed");
    let mut op = sh("true");
    op.security = pb::SecurityMode::Insecure as i32;
    assert_eq!(refused(op, 1), "security.insecure is not allowed");
    let mut op = sh("true");
    op.security = 2;
    assert_eq!(refused(op, 1), "invalid security mode 2");
    assert_eq!(refused(sh("true"), 0), "invalid input index 0 in an operation with 0 inputs");
    let mut op = sh("true");
    op.mounts[0].dest = "/elsewhere".into();
    assert_eq!(refused(op, 1), "invalid exec op with no rootfs");
    let mut op = sh("true");
    op.mounts.push(pb::Mount {
        selector: "/part".into(),
        content_cache: pb::MountContentCache::On as i32,
        ..bind(1, "/rw", 1, false)
    });
    assert_eq!(refused(op, 2), "invalid mount cache content for /rw");
}

pub(crate) async fn keys_leave_out_what_does_not_matter(world: &World) {
    let base = world.key(exec(sh("make")), 1).await;
    let mut same = sh("make");
    let meta = same.meta.as_mut().unwrap();
    meta.proxy_env = Some(pb::ProxyEnv { https_proxy: "http://p".into(), ..Default::default() });
    assert_eq!(world.key(exec(same), 1).await.digest, base.digest);
    let hosts = |ip: &str| {
        let mut op = sh("make");
        op.meta.as_mut().unwrap().extra_hosts = vec![pb::HostIp { host: "db".into(), ip: ip.into() }];
        exec(op)
    };
    assert_eq!(world.key(hosts("1.1.1.1"), 1).await.digest, world.key(hosts("2.2.2.2"), 1).await.digest);
    assert_ne!(world.key(hosts("1.1.1.1"), 1).await.digest, base.digest);
    assert_ne!(world.key(exec(sh("make all")), 1).await.digest, base.digest);
    let mut env = sh("make");
    env.meta.as_mut().unwrap().env = vec!["A=1".into()];
    let env = world.key(exec(env), 1).await;
    assert_ne!(env.digest, base.digest);
    assert!(env.parts.list().contains(&("env A".into(), "1".into())));
    assert!(base.inputs[0].content.is_none(), "the root counts whole");

    let mut mounted = sh("make");
    mounted.mounts.push(pb::Mount { selector: "/src".into(), ..bind(1, "/src", -1, true) });
    let mounted = world.key(exec(mounted), 2).await;
    assert_eq!(mounted.inputs[1].content.as_ref().unwrap().paths[0].path, "/src");

    // What is shown where counts, also where the same paths are shown in other places.
    let shown = |sources: [&str; 2]| {
        let mut op = sh("make");
        for (source, dest) in sources.into_iter().zip(["/x", "/y"]) {
            op.mounts.push(pb::Mount { selector: source.into(), ..bind(1, dest, -1, true) });
        }
        exec(op)
    };
    let mut seen = Vec::new();
    for sources in [["/a", "/b"], ["/b", "/a"], ["/a", "/a"], ["/a", "/a/b"]] {
        let key = world.key(shown(sources), 2).await;
        let paths = key.inputs[1].content.clone().unwrap().paths.into_iter().map(|path| path.path);
        seen.push(paths.collect::<Vec<_>>());
        assert_eq!(seen.last().unwrap(), &sources);
    }
    let copies = |sources: &[&str]| {
        let actions = sources.iter().enumerate().map(|(at, source)| {
            let base = if at == 0 { 0 } else { 1 + at as i64 };
            let output = if at + 1 == sources.len() { 0 } else { -1 };
            action(base, 1, output, Action::Copy(copy(source, "/d/").into()))
        });
        file(actions.collect())
    };
    let (ends, starts) = (copies(&["/p/f", "/q/f", "/p/f"]), copies(&["/p/f", "/q/f", "/q/f"]));
    assert_ne!(world.key(ends, 2).await.inputs[1].content, world.key(starts, 2).await.inputs[1].content);

    let from = |src: &str| file(vec![action(0, 1, 0, Action::Copy(copy(src, "/x").into()))]);
    let (one, other) = (world.key(from("/a/f"), 2).await, world.key(from("/b/f"), 2).await);
    assert_eq!(one.digest, other.digest, "only the name of the source shows");
    assert_ne!(one.inputs[1], other.inputs[1]);
    assert!(one.inputs[0].content.is_none());
    assert_ne!(world.key(from("/a/g"), 2).await.digest, one.digest);
}
