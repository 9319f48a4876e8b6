//! Roots and mounts.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::PathBuf;

use kiln_worker::sandbox::spec::{Bind, Tmpfs};
use kiln_worker::sandbox::{ExecutorChoice, LayeredMount, MemoryFile, RootSource, SandboxError};

use crate::world::World;

pub(crate) fn changes_go_to_the_upper_directory(world: &World) {
    let step = world.sh("echo new > /keep/new && echo more >> /keep/old && rm /keep/gone && mv /keep/sub /keep/moved && chown 5:6 /keep/new");
    let upper = step.upper();
    assert_eq!(step.run(world).out(), "");
    assert_eq!(fs::read_to_string(upper.join("keep/old")).unwrap(), "oldmore\n");
    assert_eq!(fs::metadata(upper.join("keep/new")).unwrap().uid(), 5);
    for gone in ["keep/gone", "keep/sub"] {
        let whiteout = fs::symlink_metadata(upper.join(gone)).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0, "{gone}");
    }
    assert!(upper.join("keep/moved").is_dir());
    assert_eq!(fs::read_to_string(world.root.join("keep/old")).unwrap(), "old");
    assert!(!upper.join("bin").exists());
}

pub(crate) fn mount_points_are_reported(world: &World) {
    let file = world.base.join("resolv.conf");
    fs::write(&file, "nameserver 127.0.0.1\n").unwrap();
    let mut step = world.sh("cat /etc/resolv.conf");
    step.params.binds.push(Bind { source: file, dest: "/etc/resolv.conf".into(), readonly: true });
    step.mounts.push(LayeredMount {
        dest: "/deep/er/dir".into(),
        source: RootSource::Dir(world.root.join("keep")),
        selector: None,
        readonly: true,
    });
    let upper = step.upper();
    let ran = step.run(world);
    assert_eq!(ran.out(), "nameserver 127.0.0.1");
    let mut stubs = ran.result.unwrap().stubs;
    stubs.sort();
    let wanted = ["/deep", "/deep/er", "/deep/er/dir", "/dev", "/etc/resolv.conf", "/proc", "/sys"];
    assert_eq!(stubs, wanted.map(PathBuf::from));
    assert_eq!(fs::read(upper.join("etc/resolv.conf")).unwrap(), b"");
    for stub in stubs.iter().rev() {
        let path = upper.join(stub.strip_prefix("/").unwrap());
        if path.is_dir() { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
}

pub(crate) fn layered_mounts(world: &World) {
    let layer = |name: &str, files: &[(&str, &str)]| {
        let dir = world.base.join(format!("layer-{name}"));
        for (path, text) in files {
            fs::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs::write(dir.join(path), text).unwrap();
        }
        dir
    };
    let low = layer("low", &[("a/x", "low"), ("a/y", "y"), ("f", "file")]);
    let high = layer("high", &[("a/x", "high")]);
    symlink("/a", high.join("link")).ok();
    let both = || RootSource::Overlay { lowers: vec![high.clone(), low.clone()], upper: None, work: None };
    let mount = |dest: &str, source: RootSource, selector: Option<&str>, readonly: bool| LayeredMount {
        dest: dest.into(),
        source,
        selector: selector.map(PathBuf::from),
        readonly,
    };
    let cache = world.base.join("cache");
    fs::create_dir_all(cache.join("sub")).unwrap();
    let mut step = world.sh("cat /m/all/a/x /m/dir/y /m/file /m/link/x /m/all/inner/old; ls /m/one; echo kept > /c/sub/kept; echo up > /w/up; ! touch /m/all/n; ! touch /m/dir/n; ! sh -c 'echo > /m/file'");
    let scratch = step.dir.join("scratch");
    for name in ["upper", "work"] {
        fs::create_dir_all(scratch.join(name)).unwrap();
    }
    let writable = RootSource::Overlay {
        lowers: vec![low.clone()],
        upper: Some(scratch.join("upper")),
        work: Some(scratch.join("work")),
    };
    step.mounts = vec![
        // Given before its parent: parents are mounted first all the same.
        mount("/m/all/a", both(), Some("a"), true),
        mount("/m/all", both(), None, true),
        mount("/m/dir", both(), Some("/a"), true),
        mount("/m/file", both(), Some("f"), true),
        mount("/m/link", both(), Some("link"), true),
        mount(
            "/m/one",
            RootSource::Overlay { lowers: vec![low.clone()], upper: None, work: None },
            None,
            false,
        ),
        mount("/w", writable, None, false),
        mount("/c", RootSource::Dir(cache.clone()), None, false),
    ];
    // A mount point inside a read-only mount has to exist.
    fs::create_dir_all(low.join("inner")).unwrap();
    step.mounts.push(mount("/m/all/inner", RootSource::Dir(world.root.join("keep")), None, true));
    let ran = step.run(world);
    assert_eq!(ran.out(), "highyfilehigholda\nf\ninner");
    assert_eq!(fs::read_to_string(cache.join("sub/kept")).unwrap(), "kept\n");
    assert_eq!(fs::read_to_string(scratch.join("upper/up")).unwrap(), "up\n");
}

pub(crate) fn plain_mounts(world: &World) {
    let mut step = world.sh("df -k /t /dev/shm | awk 'NR>1{print $2}'; echo x > /t/x; cat /secret; ! sh -c 'echo > /secret'; stat -c %t:%T /dev/null");
    let secret = world.base.join("secret");
    fs::write(&secret, "hush\n").unwrap();
    step.params.binds.push(Bind { source: secret, dest: "/secret".into(), readonly: true });
    step.params.tmpfs.push(Tmpfs { dest: "/t".into(), size: Some(2 << 20) });
    step.params.tmpfs.push(Tmpfs { dest: "/dev/shm".into(), size: Some(3 << 20) });
    assert_eq!(step.run(world).out(), "2048\n3072\nhush\n1:3");
    let mut step = world.sh("df -k /dev/shm | awk 'NR>1{print $2}'");
    step.params.shm_size = Some(1 << 20);
    assert_eq!(step.run(world).out(), "1024");
}

pub(crate) fn memory_files(world: &World) {
    let text = "cat /run/s/token; stat -c '%u %g %a' /run/s/token; /run/tool; ! sh -c 'echo > /run/s/token'; \
                ! rm /run/s/token; ls /run/s; mount | grep -e /run/s -e /run/tool; \
                echo $(awk '$5 == \"/\"' /proc/self/mountinfo | wc -l) root";
    let mut step = world.sh(text);
    let file = |dest: &str, content: &[u8], mode| MemoryFile {
        dest: dest.into(),
        content: content.into(),
        uid: 1000,
        gid: 7,
        mode,
    };
    step.files.push(file("/run/s/token", b"hush\n", 0o400));
    step.files.push(file("/run/tool", b"#!/bin/sh\necho ran\n", 0o755));
    let large = vec![b'x'; 3 << 20];
    step.files.push(file("/large", &large, 0o444));
    let upper = step.upper();
    let ran = step.run(world);
    let (said, mounts) = ran.out().split_once("token\n").expect("what ls printed");
    assert_eq!(said, "hush\n1000 7 400\nran\n");
    for (place, options) in
        [("/run/s/token", &["ro", "nosuid", "nodev", "noexec"][..]), ("/run/tool", &["ro"])]
    {
        let line = mounts.lines().find(|line| line.contains(&format!(" on {place} type tmpfs ")));
        let line = line.unwrap_or_else(|| panic!("{place} is not in memory: {mounts}"));
        for option in options {
            assert!(line.contains(option), "{line}");
        }
        assert_eq!(line.contains("noexec"), place == "/run/s/token", "{line}");
    }
    // runc unmounts no more than the topmost of what is parked on its old root.
    if world.choice != ExecutorChoice::Runtime("runc".into()) {
        assert!(mounts.trim_end().ends_with("\n1 root"), "the host's root is left on top: {mounts}");
    }
    assert_eq!(fs::read(upper.join("run/s/token")).unwrap(), b"", "the mount point alone is on the disk");
    let mut step = world.sh("true");
    step.files.push(file("relative", b"", 0));
    assert!(matches!(step.run(world).error(), SandboxError::Invalid(_)));
}

pub(crate) fn links_do_not_lead_out(world: &World) {
    let outside = world.base.join("outside");
    fs::create_dir_all(&outside).unwrap();
    let layer = world.base.join("hostile");
    fs::create_dir_all(layer.join("real")).unwrap();
    for (name, target) in [
        ("up", "../../../../../../../..".to_owned() + outside.to_str().unwrap()),
        ("abs", outside.to_str().unwrap().to_owned()),
        ("dangling", "real/../run/resolve/stub".to_owned()),
    ] {
        symlink(target, layer.join(name)).ok();
    }
    let file = world.base.join("content");
    fs::write(&file, "bound\n").unwrap();
    let mut step = world.sh("cat /dangling /abs/one /up/two");
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    lowers.insert(0, layer);
    for dest in ["/dangling", "/abs/one", "/up/two"] {
        step.params.binds.push(Bind { source: file.clone(), dest: dest.into(), readonly: true });
    }
    let upper = step.upper();
    let ran = step.run(world);
    assert_eq!(ran.out(), "bound\nbound\nbound");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    assert!(upper.join("run/resolve/stub").exists());
    assert!(upper.join(outside.strip_prefix("/").unwrap()).join("one").exists());
}
pub(crate) fn many_layers(world: &World) {
    let stack = world.base.join("stack");
    let layers = |count: usize| -> Vec<PathBuf> {
        let make = |n: usize| {
            // Longer than one configuration string of the kernel may be.
            let dir = stack.join(format!("{n:0>220}"));
            fs::create_dir_all(dir.join("d")).unwrap();
            fs::write(dir.join("d/top"), n.to_string()).unwrap();
            fs::write(dir.join(format!("d/{n}")), "").unwrap();
            dir
        };
        (0..count).rev().map(make).collect()
    };
    // runc reads the mount table by lines, and refuses one as long as that of hundreds of layers.
    let count = if world.choice == ExecutorChoice::Lean { 620 } else { 20 };
    let mut step = world.sh("echo $(cat /d/top) $(ls /d | wc -l)");
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    lowers.splice(0..0, layers(count));
    assert_eq!(step.run(world).out(), format!("{} {}", count - 1, count + 1));
    let mut step = world.program(&["true"]);
    let RootSource::Overlay { lowers, .. } = &mut step.rootfs else { unreachable!() };
    let one = lowers[0].clone();
    lowers.extend(std::iter::repeat_n(one, 1000));
    let ran = step.run(world);
    assert!(matches!(ran.error(), SandboxError::Unsupported(_)), "{}", ran.error());
}
