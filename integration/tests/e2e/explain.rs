//! Every step that was not cached is explained by what changed, and by nothing else.

use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::symlink;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use kiln_integration::kiln::Built;
use kiln_integration::lab::wait_until;
use kiln_integration::tools::{self, run};
use kiln_integration::{Context, Kiln, Registry};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const DOCKERFILE: &str = "\
FROM busybox AS tools
ARG TOOL=1
RUN mkdir -p /out && echo $TOOL > /out/tool && echo same > /out/other
FROM busybox
ARG VERSION=1
ENV MODE=a
WORKDIR /srv
COPY dir /d/
COPY one two /files/
RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo $VERSION
COPY --from=tools /out /out
RUN echo last
";

/// One change of a build that is otherwise as before.
struct Case {
    name: &'static str,
    change: fn(&Context),
    args: &'static [&'static str],
    /// What the explanation says, without steps that had to follow another one.
    says: &'static [&'static str],
}

fn context() -> Context {
    let context = Context::new(DOCKERFILE);
    fill(&context);
    context
}

fn fill(context: &Context) {
    context
        .file("Dockerfile", DOCKERFILE)
        .file("dir/a", "a")
        .file("dir/b", "bb")
        .file("dir/sub/c", "ccc")
        .file("one", "1")
        .file("two", "2")
        .file("bound/x", "x")
        .file("elsewhere/one", "another");
    symlink("a", context.path().join("dir/link")).expect("symlink");
}

/// Replaces text of the Dockerfile.
fn edit(context: &Context, from: &str, to: &str) {
    let path = context.path().join("Dockerfile");
    let text = fs::read_to_string(&path).expect("Dockerfile");
    assert!(text.contains(from), "no {from:?}");
    fs::write(&path, text.replace(from, to)).expect("Dockerfile");
}

fn put(context: &Context, path: &str, content: &str) {
    context.file(path, content);
}

fn chmod(context: &Context, path: &str, mode: u32) {
    context.mode(path, mode);
}

fn rename(context: &Context, from: &str, to: &str) {
    fs::rename(context.path().join(from), context.path().join(to)).expect("rename");
}

fn relink(context: &Context, target: &str, link: &str) {
    let link = context.path().join(link);
    fs::remove_file(&link).expect("remove");
    symlink(target, link).expect("symlink");
}

fn unchanged(_: &Context) {}

const CASES: &[Case] = &[
    Case {
        name: "a byte of a file",
        change: |context| put(context, "dir/a", "A"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/a: content changed",
        ],
    },
    Case {
        name: "a file's mode",
        change: |context| chmod(context, "dir/b", 0o755),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/b: mode 0644 became 0755",
        ],
    },
    Case {
        name: "a file renamed",
        change: |context| rename(context, "dir/b", "dir/z"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/z: renamed from dir/b",
        ],
    },
    Case {
        name: "a file added",
        change: |context| put(context, "dir/sub/new", "new"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/sub/new: added",
        ],
    },
    Case {
        name: "a file removed",
        change: |context| fs::remove_file(context.path().join("dir/sub/c")).expect("remove"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/sub/c: removed",
        ],
    },
    Case {
        name: "a symlink's target",
        change: |context| relink(context, "b", "dir/link"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    1 file of [internal] load build context changed:",
            "        dir/link: target a became b",
        ],
    },
    Case {
        name: "a file that became a directory",
        change: |context| {
            fs::remove_file(context.path().join("dir/a")).expect("remove");
            context.file("dir/a/in", "in");
        },
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    2 files of [internal] load build context changed:",
            "        dir/a: type changed",
            "        dir/a/in: added",
        ],
    },
    Case {
        name: "many files",
        change: |context| (0..25).for_each(|n| put(context, &format!("dir/many/{n:02}"), &n.to_string())),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    26 files of [internal] load build context changed:",
            "        dir/many: added",
            "        dir/many/00: added",
            "        dir/many/01: added",
            "        dir/many/02: added",
            "        dir/many/03: added",
            "        dir/many/04: added",
            "        dir/many/05: added",
            "        dir/many/06: added",
            "        dir/many/07: added",
            "        dir/many/08: added",
            "        and 16 more",
        ],
    },
    Case {
        name: "a file of one copy of many",
        change: |context| put(context, "two", "II"),
        args: &[],
        says: &[
            "[stage-1 4/7] COPY one two /files/",
            "    1 file of [internal] load build context changed:",
            "        two: content changed",
        ],
    },
    Case {
        name: "a bind mount's source",
        change: |context| put(context, "bound/x", "X"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1",
            "    1 file of [internal] load build context changed:",
            "        bound/x: content changed",
        ],
    },
    Case {
        name: "an ignored file",
        change: |context| put(context, ".dockerignore", "dir/b\n"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY dir /d/",
            "    exclude pattern of [internal] load build context: \"dir/b\" is new",
            "    1 file of [internal] load build context changed:",
            "        dir/b: removed",
        ],
    },
    Case {
        name: "an argument by flag",
        change: unchanged,
        args: &["--build-arg", "VERSION=2"],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 2: env VERSION: \"1\" became \"2\"",
            "[stage-1 7/7] RUN echo last: env VERSION: \"1\" became \"2\"",
        ],
    },
    Case {
        name: "an argument's default",
        change: |context| edit(context, "ARG VERSION=1", "ARG VERSION=3"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 3: env VERSION: \"1\" became \"3\"",
            "[stage-1 7/7] RUN echo last: env VERSION: \"1\" became \"3\"",
        ],
    },
    Case {
        name: "an argument of another stage",
        change: unchanged,
        args: &["--build-arg", "TOOL=2"],
        says: &[
            "[tools 2/2] RUN mkdir -p /out && echo 2 > /out/tool && echo same > /out/other: env TOOL: \"1\" became \"2\"",
            "[stage-1 6/7] COPY --from=tools /out /out",
            "    1 file of [tools 2/2] RUN mkdir -p /out && echo 2 > /out/tool && echo same > /out/other changed:",
            "        out/tool: content changed",
        ],
    },
    Case {
        name: "an environment variable",
        change: |context| edit(context, "MODE=a", "MODE=b"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: env MODE: \"a\" became \"b\"",
            "[stage-1 7/7] RUN echo last: env MODE: \"a\" became \"b\"",
        ],
    },
    Case {
        name: "an environment variable added",
        change: |context| edit(context, "MODE=a", "MODE=a EXTRA=x"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: env EXTRA: \"x\" is new",
            "[stage-1 7/7] RUN echo last: env EXTRA: \"x\" is new",
        ],
    },
    Case {
        name: "a user",
        change: |context| edit(context, "RUN echo last", "USER app\nRUN echo last"),
        args: &[],
        says: &["[stage-1 7/7] RUN echo last: user: \"app\" is new"],
    },
    Case {
        name: "a working directory",
        change: |context| edit(context, "WORKDIR /srv", "WORKDIR /opt"),
        args: &[],
        says: &[
            "[stage-1 2/7] WORKDIR /opt: directory: \"/srv\" became \"/opt\"",
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: working directory: \"/srv\" became \"/opt\"",
            "[stage-1 7/7] RUN echo last: working directory: \"/srv\" became \"/opt\"",
        ],
    },
    Case {
        name: "a shell",
        change: |context| edit(context, "RUN echo last", "SHELL [\"/bin/ash\", \"-ec\"]\nRUN echo last"),
        args: &[],
        says: &[
            "[stage-1 7/7] RUN echo last: command: \"/bin/sh -c echo last\" became \"/bin/ash -ec echo last\"",
        ],
    },
    Case {
        name: "a command",
        change: |context| edit(context, "echo last", "echo end"),
        args: &[],
        says: &[
            "[stage-1 7/7] RUN echo end: command: \"/bin/sh -c echo last\" became \"/bin/sh -c echo end\"",
        ],
    },
    Case {
        name: "a mount's target",
        change: |context| edit(context, "target=/c ", "target=/k "),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/k --mount=type=tmpfs,target=/t echo 1",
            "    mount /c: \"cache\" is gone",
            "    mount /k: \"cache\" is new",
        ],
    },
    Case {
        name: "a mount made writable",
        change: |context| edit(context, "target=/bound ", "target=/bound,rw "),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound,rw --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo…: mount /bound readonly: \"true\" became \"false\"",
        ],
    },
    Case {
        name: "a cache mount's sharing",
        change: |context| edit(context, "type=cache,target=/c ", "type=cache,target=/c,sharing=locked "),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c,sharing=locked --mount=type=tmpfs,ta…: mount /c sharing: \"shared\" became \"locked\"",
        ],
    },
    Case {
        name: "a tmpfs's size",
        change: |context| edit(context, "type=tmpfs,target=/t ", "type=tmpfs,target=/t,size=1048576 "),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t,size=10…: mount /t size: \"0\" became \"1048576\"",
        ],
    },
    Case {
        name: "another sort of mount",
        change: |context| edit(context, "type=tmpfs,target=/t ", "type=cache,target=/t "),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=cache,target=/t echo 1",
            "    mount /t type: \"tmpfs\" became \"cache\"",
            "    mount /t size: \"0\" is gone",
            "    mount /t id: \"//t\" is new",
            "    mount /t sharing: \"shared\" is new",
        ],
    },
    Case {
        name: "a network mode",
        change: |context| edit(context, "RUN echo last", "RUN --network=none echo last"),
        args: &[],
        says: &["[stage-1 7/7] RUN --network=none echo last: network: \"default\" became \"none\""],
    },
    Case {
        name: "a platform",
        change: |context| edit(context, "FROM busybox\n", "FROM --platform=linux/arm64 busybox\n"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: platform: \"linux/amd64\" became \"linux/arm64\"",
            "[stage-1 7/7] RUN echo last: platform: \"linux/amd64\" became \"linux/arm64\"",
        ],
    },
    Case {
        name: "an owner of a copy",
        change: |context| edit(context, "COPY dir /d/", "COPY --chown=1000:50 dir /d/"),
        args: &[],
        says: &["[stage-1 3/7] COPY --chown=1000:50 dir /d/: owner: \"1000:50\" is new"],
    },
    Case {
        name: "a mode of a copy",
        change: |context| edit(context, "COPY dir /d/", "COPY --chmod=0700 dir /d/"),
        args: &[],
        says: &["[stage-1 3/7] COPY --chmod=0700 dir /d/: mode: \"as it is\" became \"0700\""],
    },
    Case {
        name: "a linked copy",
        change: |context| edit(context, "COPY dir /d/", "COPY --link dir /d/"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY --link dir /d/: independent of what is below: \"false\" became \"true\"",
            "[stage-1 3/7] LINK COPY --link dir /d/: never built before",
        ],
    },
    Case {
        name: "a destination",
        change: |context| edit(context, "COPY dir /d/", "COPY dir /e/"),
        args: &[],
        says: &["[stage-1 3/7] COPY dir /e/: destination: \"/d/\" became \"/e/\""],
    },
    Case {
        name: "a list of sources",
        change: |context| edit(context, "COPY one two", "COPY one two elsewhere"),
        args: &[],
        says: &["[stage-1 4/7] COPY one two elsewhere /files/: source: \"/elsewhere\" is new"],
    },
    Case {
        name: "another source of the same name",
        change: |context| edit(context, "COPY one two", "COPY elsewhere/one two"),
        args: &[],
        says: &["[stage-1 4/7] COPY elsewhere/one two /files/: source: \"/one\" became \"/elsewhere/one\""],
    },
    Case {
        name: "an exclude pattern",
        change: |context| edit(context, "COPY dir", "COPY --exclude=b dir"),
        args: &[],
        says: &[
            "[stage-1 3/7] COPY --exclude=b dir /d/",
            "    exclude pattern: \"b\" is new",
            "    1 file of [internal] load build context changed:",
            "        dir/b: removed",
        ],
    },
    Case {
        name: "ADD for COPY",
        change: |context| edit(context, "COPY one", "ADD one"),
        args: &[],
        says: &["[stage-1 4/7] ADD one two /files/: unpacks archives: \"false\" became \"true\""],
    },
    Case {
        name: "another stage's files",
        change: |context| edit(context, "echo same", "echo other"),
        args: &[],
        says: &[
            "[tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo other > /out/other: command: \"/bin/sh -c mkdir -p /out && echo $TOOL > /out/tool && echo same > /out/other\" became \"/bin/sh -c mkdir -p /out && echo $TOOL > /out/tool && echo other > /out/other\"",
            "[stage-1 6/7] COPY --from=tools /out /out",
            "    1 file of [tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo other > /out/other changed:",
            "        out/other: content changed",
        ],
    },
    Case {
        name: "another stage to copy from",
        change: |context| edit(context, "COPY --from=tools /out", "COPY --from=busybox /etc"),
        args: &[],
        says: &[
            "[stage-1 6/7] COPY --from=busybox /etc /out",
            "    source: \"/out\" became \"/etc\"",
            "    reads [stage-1 1/7] FROM docker.io/library/busybox:latest instead of [tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo same > /out/other",
        ],
    },
    Case {
        name: "the order of instructions",
        change: |context| {
            edit(context, "COPY dir /d/\nCOPY one two /files/\n", "COPY one two /files/\nCOPY dir /d/\n")
        },
        args: &[],
        says: &[
            "[stage-1 3/7] COPY one two /files/: stands on [stage-1 2/7] WORKDIR /srv instead of [stage-1 3/7] COPY dir /d/",
        ],
    },
    Case {
        name: "the order of variables",
        change: |context| edit(context, "ARG VERSION=1\nENV MODE=a", "ENV MODE=a\nARG VERSION=1"),
        args: &[],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: order: \"env VERSION, env MODE\" became \"env MODE, env VERSION\"",
            "[stage-1 7/7] RUN echo last: order: \"env VERSION, env MODE\" became \"env MODE, env VERSION\"",
        ],
    },
    Case {
        name: "a new instruction",
        change: |context| edit(context, "COPY dir", "RUN echo new\nCOPY dir"),
        args: &[],
        says: &["[stage-1 3/8] RUN echo new: never built before"],
    },
    Case {
        name: "a removed instruction",
        change: |context| edit(context, "COPY dir /d/\n", ""),
        args: &[],
        says: &[
            "[stage-1 4/6] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: [stage-1 3/6] COPY one two /files/ stands on [stage-1 2/6] WORKDIR /srv instead of [stage-1 3/7] COPY dir /d/",
        ],
    },
    Case {
        name: "an ulimit",
        change: unchanged,
        args: &["--ulimit", "nofile=512:1024"],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: ulimit nofile: \"512:1024\" is new",
            "[tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo same > /out/other: ulimit nofile: \"512:1024\" is new",
            "[stage-1 7/7] RUN echo last: ulimit nofile: \"512:1024\" is new",
        ],
    },
    Case {
        name: "a host",
        change: unchanged,
        args: &["--add-host", "db:10.0.0.1"],
        says: &[
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: extra host: \"db\" is new",
            "[tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo same > /out/other: extra host: \"db\" is new",
            "[stage-1 7/7] RUN echo last: extra host: \"db\" is new",
        ],
    },
    Case {
        name: "no cache",
        change: unchanged,
        args: &["--no-cache"],
        says: &[
            "[stage-1 3/7] COPY dir /d/: the build asked for a new run",
            "[stage-1 4/7] COPY one two /files/: the build asked for a new run",
            "[stage-1 5/7] RUN --mount=type=bind,source=bound,target=/bound --mount=type=cache,target=/c --mount=type=tmpfs,target=/t echo 1: the build asked for a new run",
            "[tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo same > /out/other: the build asked for a new run",
            "[stage-1 6/7] COPY --from=tools /out /out: the build asked for a new run",
            "[stage-1 7/7] RUN echo last: the build asked for a new run",
        ],
    },
    Case {
        name: "no cache for a stage",
        change: unchanged,
        args: &["--no-cache-filter", "tools"],
        says: &[
            "[tools 2/2] RUN mkdir -p /out && echo 1 > /out/tool && echo same > /out/other: the build asked for a new run",
        ],
    },
];

/// What is said, without the first line, digests of images, and steps that only follow others.
fn said(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = text.lines().skip(1).map(without_digest).collect();
    let blamed: Vec<String> = lines.clone();
    lines.retain(|line| match line.split_once(": because of ") {
        None => true,
        Some((_, cause)) => {
            assert!(
                blamed.iter().any(|line| line.starts_with(cause) && !line.contains(": because of ")),
                "{cause} is a cause without a reason:\n{text}"
            );
            false
        }
    });
    lines
}

/// Without the digest behind an image's name.
fn without_digest(line: &str) -> String {
    let mut parts = line.split("@sha256:");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |line, rest| line + rest.trim_start_matches(|c: char| c.is_ascii_hexdigit()))
}

/// What the build that ended last is said to have built anew.
fn explained(kiln: &Kiln) -> Vec<String> {
    said(&kiln.run(&["history", "explain"]).ok().stdout)
}

#[test]
fn each_single_change_is_named_and_nothing_else() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let base = context();
    // The same directory each time: what changes is all that changes.
    let reset = || {
        run(Command::new("find").arg(base.path()).args(["-mindepth", "1", "-delete"]));
        fill(&base);
    };
    kiln.build(base.path(), &[]).ok();
    let mut wrong = String::new();
    for case in CASES {
        reset();
        let again = kiln.build(base.path(), &["--explain"]).ok();
        assert!(again.stderr.contains("steps were cached\n"), "before {}: {}", case.name, again.stderr);
        (case.change)(&base);
        kiln.build(base.path(), case.args).ok();
        let found = explained(&kiln);
        if found != case.says {
            wrong.push_str(&format!("{}: {found:#?}\n", case.name));
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(CASES.len() > 30);
}

#[test]
fn a_base_image_is_told_by_its_digest_or_name() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let image = format!("{}/library/base:latest", registry.address);
    let push = |text: &str| {
        let context = Context::new(&format!("FROM busybox\nRUN echo {text} > /version\n"));
        kiln.build(context.path(), &["-t", &image, "--push"]).ok();
        tools::digest(&image)
    };
    let context = Context::new("FROM base\nRUN echo on it\n");
    let first = push("1");
    kiln.build(context.path(), &["--pull"]).ok();
    let second = push("2");
    kiln.build(context.path(), &["--pull"]).ok();
    assert_eq!(
        explained(&kiln),
        [format!(
            "[1/2] FROM docker.io/library/base:latest: base image digest: \"{first}\" became \"{second}\""
        )]
    );

    edit(&context, "FROM base", "FROM busybox");
    kiln.build(context.path(), &["--pull"]).ok();
    let said = explained(&kiln).join("\n");
    assert!(
        said.contains("docker.io/library/base:latest\" became \"docker.io/library/busybox:latest"),
        "{said}"
    );
}

#[test]
fn what_was_removed_is_told_with_its_rule() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nCOPY f /f\nRUN echo x > /x\n");
    context.file("f", "f");
    kiln.build(context.path(), &[]).ok();
    kiln.run(&["prune", "--filter", "type==regular"]).ok();
    kiln.build(context.path(), &[]).ok();
    let found = explained(&kiln);
    assert_eq!(found.len(), 3, "{found:#?}");
    for line in found {
        assert!(line.contains(": its result was removed at 20"), "{line}");
        assert!(line.ends_with(" by kiln prune --filter type==regular"), "{line}");
    }

    kiln.stop();
    let config = kiln.root().with_file_name("kilnd.toml");
    let text = fs::read_to_string(&config).expect("configuration");
    let policies =
        "[[worker.oci.gcpolicy]]\n  filters = [\"type==frontend\"]\n[[worker.oci.gcpolicy]]\n  all = true\n";
    fs::write(&config, text + policies).expect("configuration");
    kiln.start();
    wait_until("garbage to be collected", Duration::from_secs(20), || {
        kiln.usage().iter().all(|record| record["recordType"] == "kiln.store")
    });
    kiln.build(context.path(), &[]).ok();
    let found = explained(&kiln);
    assert!(found.len() >= 2, "{found:#?}");
    for line in found {
        assert!(line.contains(": its result was removed at ") && line.ends_with(" by GC policy 1"), "{line}");
    }
}

#[test]
fn explanations_outlive_the_daemon_and_come_as_json() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nCOPY f /f\nRUN exit 3\n");
    context.file("f", "1");
    let first = kiln.build(context.path(), &["--explain"]).fails(&["exit code: 3"]);
    assert!(
        first.stderr.contains("steps were not cached; there is no earlier build like it"),
        "{}",
        first.stderr
    );
    let second = kiln.build(context.path(), &["--explain", "--format", "json"]).fails(&["exit code: 3"]);
    let json: Value = serde_json::from_str(&second.stdout).expect("JSON");
    assert_eq!(json["steps"][0]["name"], "[3/3] RUN exit 3");
    assert_eq!(json["steps"][0]["reasons"][0]["kind"], "unfinished");
    let reference = json["ref"].as_str().expect("ref").to_owned();
    assert!(first.stderr.contains(json["comparedWith"].as_str().expect("ref")), "{json}");

    kiln.stop();
    kiln.start();
    let later = kiln.run(&["history", "explain", &reference, "--format", "json"]).ok();
    assert_eq!(serde_json::from_str::<Value>(&later.stdout).expect("JSON"), json);
    context.file("f", "2");
    edit(&context, "exit 3", "true");
    kiln.build(context.path(), &[]).ok();
    let found = explained(&kiln);
    assert_eq!(
        found,
        [
            "[2/3] COPY f /f",
            "    1 file of [internal] load build context changed:",
            "        f: content changed",
            "[3/3] RUN true: command: \"/bin/sh -c exit 3\" became \"/bin/sh -c true\"",
        ]
    );
    kiln.run(&["history", "explain", "nosuchbuild"]).fails(&["no explanation of build nosuchbuild"]);
}

#[test]
fn secrets_and_proxies_are_no_reasons() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(concat!(
        "FROM busybox\n",
        "RUN --mount=type=secret,id=token --mount=type=secret,id=token,env=TOKEN echo one\n"
    ));
    let secret = tempfile::TempDir::new().expect("temporary directory");
    let file = secret.path().join("token");
    let argument = format!("id=token,src={}", file.display());
    let mut all = String::new();
    for (value, command) in [("can4ry-one", "one"), ("can4ry-two", "two")] {
        fs::write(&file, value).expect("write");
        edit(&context, "echo one", &format!("echo {command}"));
        let proxy = format!("HTTP_PROXY=http://{value}@proxy.invalid");
        let args = ["--secret", &argument, "--build-arg", &proxy, "--explain", "--format", "json"];
        let Built { stdout, .. } = kiln.build(context.path(), &args).ok();
        all.push_str(&stdout);
    }
    assert!(all.contains("/bin/sh -c echo two"), "{all}");
    assert!(!all.contains("can4ry"), "{all}");
    assert_eq!(all.matches("\"kind\": \"part\"").count(), 1, "{all}");
}

#[test]
fn a_step_that_was_stopped_because_another_failed_has_not_failed() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new(concat!(
        "FROM busybox AS slow\nRUN sleep 600\nRUN echo after\n",
        "FROM busybox AS bad\nRUN sleep 2 && exit 3\n",
        "FROM busybox\nCOPY --from=slow /etc /a\nCOPY --from=bad /etc /b\n",
    ));
    kiln.build(context.path(), &[]).fails(&["exit code: 3"]);
    let json = kiln.run(&["history", "explain", "--format", "json"]).ok().stdout;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let names: Vec<_> = json["steps"].as_array().expect("steps").iter().map(|step| &step["name"]).collect();
    assert!(names.iter().any(|name| **name == "[bad 2/2] RUN sleep 2 && exit 3"), "{json:#}");
    let unbegun = |name: &&&Value| {
        name.as_str().is_some_and(|name| name.contains("[slow 3/3]") || name.contains("COPY"))
    };
    assert_eq!(names.iter().find(unbegun), None, "{json:#}");
    kiln.build(context.path(), &[]).fails(&["exit code: 3"]);
    let json = kiln.run(&["history", "explain", "--format", "json"]).ok().stdout;
    assert!(json.contains("RUN sleep 600"), "it was begun and was not cached: {json}");
}

/// Starts a build; gives it once its progress has a line with that end, and the lines that follow.
fn begin(kiln: &Kiln, path: &str, end: &str) -> (Child, Lines<BufReader<ChildStderr>>) {
    let mut build = kiln.command(&["build", "--progress", "plain", "--explain", path]);
    let mut build = build.stderr(Stdio::piped()).spawn().expect("run kiln");
    let mut lines = BufReader::new(build.stderr.take().expect("its progress")).lines();
    let found = lines.any(|line| line.is_ok_and(|line| line.starts_with('#') && line.ends_with(end)));
    assert!(found, "the step never began");
    (build, lines)
}

#[test]
fn reasons_that_need_no_earlier_build_are_told_without_one() {
    let registry = Registry::with_busybox();
    let kiln = Kiln::new(&registry);
    let context = Context::new("FROM busybox\nRUN echo one\nRUN echo two\n");
    let first = kiln.build(context.path(), &["--explain"]).ok().stderr;
    assert!(first.ends_with("3 of 3 steps were not cached; there is no earlier build like it\n"), "{first}");
    kiln.run(&["history", "rm", "--all"]).ok();
    let anew = kiln.build(context.path(), &["--no-cache", "--explain"]).ok().stderr;
    let said = "there is no earlier build like it\n\
                [2/3] RUN echo one: the build asked for a new run\n\
                [3/3] RUN echo two: the build asked for a new run\n";
    assert!(anew.ends_with(said), "{anew}");
}

#[test]
fn who_wants_an_explanation_starts_no_daemon() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN echo begun; sleep 600\n");
    let (mut build, lines) = begin(&kiln, context.path().to_str().expect("a path in UTF-8"), " begun");
    kiln.kill();
    lines.for_each(drop);
    assert!(!build.wait().expect("wait for the client").success());
    assert_eq!(kiln.daemons(), Vec::<u32>::new());
}

#[test]
fn a_build_that_is_stopped_is_explained() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let context = Context::new("FROM busybox\nRUN true\nRUN echo one\nRUN echo last\n");
    let path = context.path().to_str().expect("a path in UTF-8").to_owned();
    kiln.build(context.path(), &[]).ok();
    let mut before = "echo one".to_owned();
    for signal in [Signal::INT, Signal::KILL] {
        let now = format!("echo {} && sleep 600", signal.as_raw());
        edit(&context, &before, &now);
        let (mut build, mut lines) = begin(&kiln, &path, &format!(" {}", signal.as_raw()));
        kill_process(Pid::from_child(&build), signal).expect("stop the client");
        let told = lines.any(|line| line.is_ok_and(|line| line.contains("kiln history explain ")));
        assert_eq!(told, signal == Signal::INT, "where to ask");
        build.wait().expect("wait for the client");
        wait_until("the build to end", Duration::from_secs(20), || {
            !kiln.run(&["history", "ls"]).ok().stdout.contains("Running")
        });
        let said = explained(&kiln);
        let changed = format!("\"/bin/sh -c {before}\" became \"/bin/sh -c {now}\"");
        assert_eq!(said, [format!("[3/4] RUN {now}: command: {changed}")]);
        before = now;
    }
}
