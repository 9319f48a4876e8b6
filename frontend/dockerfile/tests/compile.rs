//! The compiler from outside: files in, LLB and image configurations out.

mod common;

use std::collections::BTreeMap;

use common::{
    Images, base, compile, compile_with_ignore, config, error, history, loaded, names, render, try_compile,
};
use kiln_dockerfile::OutlineNeed;
use kiln_proto::pb;
use serde_json::json;

#[test]
fn the_usual_file() {
    let file = "FROM alpine\nRUN apk add --update redis\nRUN apk add --update gcc\nCMD [\"redis-server\"]\n";
    let c = compile(file, &[]);
    insta::assert_json_snapshot!(render(&c.targets[0]));
    insta::assert_json_snapshot!(config(&c));
    assert_eq!(c.warnings, []);
}

#[test]
fn copies() {
    let file = r#"
FROM alpine AS base
WORKDIR /app
FROM base AS build
COPY . .
FROM base
COPY --from=build --chown=app:10 /app/out/* /usr/bin/
COPY --chmod=0755 a b/ c/
ADD --chmod=u+x x.tar /
COPY --parents --exclude=*.md src/./lib/*.rs docs/a.txt /p/
COPY --link cfg /etc/cfg
COPY <<one <<"two" /inline/
hello $PATH
one
hello $PATH
two
"#;
    insta::assert_json_snapshot!(render(&compile(file, &[]).targets[0]));
}

#[test]
fn runs() {
    let file = r#"
FROM alpine
ARG TOKEN=x
ENV DIR=cache
USER app
WORKDIR /w
RUN --mount=type=cache,target=/root/.cache,sharing=locked \
    --mount=type=cache,target=$DIR,uid=10,mode=0700 \
    --mount=type=bind,source=src,target=src \
    --mount=from=alpine,target=/alpine,rw \
    --mount=type=tmpfs,target=/tmp,size=1m \
    --mount=type=secret,id=a/pw,required=true \
    --mount=type=secret,id=key,env=KEY \
    --mount=type=ssh \
    --network=none --security=insecure echo $TOKEN $KEY
RUN <<EOF
set -e
echo two
EOF
RUN <<-'EOF'
	#!/usr/bin/env python3
	print("x")
EOF
RUN cat <<A - <<B
a
A
b
B
RUN ["/bin/true", "$DIR"]
"#;
    let attrs = [
        ("build-arg:HTTP_PROXY", "http://p"),
        ("add-hosts", "h=1.2.3.4"),
        ("hostname", "hh"),
        ("shm-size", "1024"),
        ("build-arg:BUILDKIT_CACHE_MOUNT_NS", "ns"),
    ];
    let c = compile(file, &attrs);
    insta::assert_json_snapshot!(render(&c.targets[0]));
    insta::assert_json_snapshot!(history(&c));
}

#[test]
fn remote_sources() {
    let file = "FROM scratch\nADD https://example.com/a/b.tgz?x=1 /d/\nADD --checksum=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 http://example.com/ /e\nADD --keep-git-dir https://github.com/a/b.git#v1:sub /g\n";
    insta::assert_json_snapshot!(render(&compile(file, &[]).targets[0]));
}

#[test]
fn the_whole_configuration() {
    let file = r#"
FROM alpine
LABEL a=1 "b c"="d \"e\"" f=$PATH
ENV X=1 Y="a b" PATH=/x:$PATH
ENV Z $X two
EXPOSE 80 53/udp 8000-8001
VOLUME /data ["/more"]
VOLUME ["/v 1"]
USER app:grp
STOPSIGNAL SIGTERM
SHELL ["/bin/bash", "-c"]
HEALTHCHECK --interval=1m30s --retries=3 CMD curl -f http://x || exit 1
ENTRYPOINT exec top
CMD echo "hi"
ONBUILD COPY . /x
MAINTAINER me
WORKDIR sub
"#;
    let c = compile(file, &[("label:f", "over"), ("label:g", "h")]);
    insta::assert_json_snapshot!(config(&c));
    let rules: Vec<&str> = c.warnings.iter().map(|w| w.rule).collect();
    assert_eq!(rules, ["MaintainerDeprecated", "LegacyKeyValueFormat", "WorkdirRelativePath"]);
    assert_eq!(
        c.warnings[1].short(),
        "LegacyKeyValueFormat: \"ENV key=value\" should be used instead of legacy \"ENV key value\" format (line 5)"
    );
}

#[test]
fn entrypoint_resets_the_base_images_cmd_only() {
    assert!(config(&compile("FROM alpine\nENTRYPOINT [\"x\"]", &[]))["config"]["Cmd"].is_null());
    let c = compile("FROM alpine\nCMD [\"y\"]\nENTRYPOINT [\"x\"]", &[]);
    assert_eq!(config(&c)["config"]["Cmd"], json!(["y"]));
}

#[test]
fn scratch_results() {
    let c = compile("FROM scratch\nENV A=b\n", &[]);
    assert!(c.targets[0].definition.is_none());
    let config = config(&c);
    assert_eq!(config["config"]["WorkingDir"], "/");
    assert_eq!(
        config["config"]["Env"],
        json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "A=b"])
    );
    assert_eq!((&config["os"], &config["architecture"]), (&json!("linux"), &json!("amd64")));
    let c = compile("FROM scratch\nCOPY a /\n", &[]);
    assert_eq!(names(&c), ["[internal] load build context", "[1/1] COPY a /"]);
}

#[test]
fn only_what_the_target_needs_is_resolved() {
    let file = "FROM nosuch AS a\nRUN x\nFROM alpine AS b\nRUN y\nFROM a AS c\n";
    let images = Images::new();
    let c = try_compile(&images, file, &[("target", "B")]).expect("compiles");
    assert_eq!(
        names(&c),
        [
            format!("[b 1/2] FROM docker.io/library/alpine:latest@{}", common::DIGEST),
            "[b 2/2] RUN y".to_string()
        ]
    );
    let asked = images.asked.into_inner().expect("no panic");
    assert_eq!(asked, ["linux/amd64 default [internal] load metadata for docker.io/library/alpine:latest"]);
    assert_eq!(
        names(&compile("FROM alpine\nRUN x\nFROM alpine\nRUN y", &[("target", "0")]))[1],
        "[stage-0 2/2] RUN x"
    );
}

#[test]
fn stages_share_what_is_equal() {
    let c = compile(
        "FROM alpine AS a\nRUN x\nFROM alpine\nRUN x\nCOPY --from=a /f /f\nCOPY --from=0 /g /g\n",
        &[],
    );
    assert_eq!(loaded(&c.targets[0]).vertices.len(), 4);
}

#[test]
fn arguments() {
    let file = "ARG IMG=nosuch\nARG V=${IMG}-x\nFROM $IMG\nARG V\nARG D=\"d $V\"\nARG HTTP_PROXY\nRUN echo $D $IMG\n";
    let c = compile(file, &[("build-arg:IMG", "alpine"), ("build-arg:HTTP_PROXY", "p")]);
    let run = &loaded(&c.targets[0]).vertices[1];
    let Some(kiln_proto::pb::op::Op::Exec(exec)) = &run.op.op else { panic!("exec") };
    let meta = exec.meta.clone().expect("meta");
    assert_eq!(meta.env, ["PATH=/usr/bin:/bin", "V=alpine-x", "D=d alpine-x", "HTTP_PROXY=p"]);
    // What is not declared in the stage is not seen, and stays as it is written.
    assert_eq!(&*run.name, "[2/2] RUN echo d alpine-x $IMG");
    assert_eq!(
        history(&c)[1..],
        [
            "ARG V=alpine-x",
            "ARG D=d alpine-x",
            "ARG HTTP_PROXY=p",
            "* RUN |3 V=alpine-x D=d alpine-x HTTP_PROXY=p /bin/sh -c echo $D $IMG # buildkit"
        ]
    );
    let rules: Vec<&str> = c.warnings.iter().map(|w| w.rule).collect();
    assert_eq!(rules, Vec::<&str>::new());
}

#[test]
fn platforms() {
    let arm = {
        let mut config = base(json!({}));
        config["architecture"] = json!("arm64");
        config
    };
    let images = Images::new().with("docker.io/library/arm:latest", arm);
    let file = "FROM --platform=$BUILDPLATFORM alpine AS b\nARG TARGETARCH\nRUN make $TARGETARCH\nFROM arm\nCOPY --from=b /x /x\n";
    let c = try_compile(&images, file, &[("platform", "linux/arm64,linux/amd64")]).expect("compiles");
    assert_eq!(c.targets.len(), 2);
    let vertices = loaded(&c.targets[0]).vertices;
    let mut names: Vec<&str> =
        vertices.iter().map(|v| v.name.split(" FROM").next().unwrap_or_default()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "[linux/amd64 b 1/2]",
            "[linux/amd64->arm64 b 2/2] RUN make arm64",
            "[linux/arm64 stage-1 1/2]",
            "[linux/arm64 stage-1 2/2] COPY --from=b /x /x",
        ]
    );
    let config: serde_json::Value = serde_json::from_slice(&c.targets[1].image_config).expect("json");
    assert_eq!(config["architecture"], "amd64");
    assert_eq!(kiln_proto::platform::format(&c.targets[0].platform), "linux/arm64");
}

#[test]
fn onbuild_triggers_run_in_the_next_stage() {
    let images = Images::new().with(
        "docker.io/library/trigger:latest",
        base(json!({"OnBuild": ["COPY --from=alpine /a /a", "RUN make"]})),
    );
    let c = try_compile(&images, "FROM trigger\nRUN after\n", &[]).expect("compiles");
    let steps: Vec<String> = names(&c).into_iter().filter(|n| !n.contains("FROM")).collect();
    assert_eq!(
        steps,
        ["[2/4] ONBUILD COPY --from=alpine /a /a", "[3/4] ONBUILD RUN make", "[4/4] RUN after"]
    );
    assert!(config(&c)["config"]["OnBuild"].is_null());
    let c = compile("FROM alpine AS a\nONBUILD RUN t\nFROM a\nRUN x\n", &[]);
    assert_eq!(names(&c)[1..], ["[stage-1 1/2] ONBUILD RUN t", "[stage-1 2/2] RUN x"]);
}

#[test]
fn the_context_transfers_what_is_read() {
    let attrs_of = |file: &str, ignore: Option<&str>| {
        let c = compile_with_ignore(&Images::new(), file, &[], ignore).expect("compiles");
        let vertices = loaded(&c.targets[0]).vertices;
        let found = vertices.iter().find_map(|v| match &v.op.op {
            Some(kiln_proto::pb::op::Op::Source(s)) if s.identifier == "local://context" => {
                Some(s.attrs.clone())
            }
            _ => None,
        });
        (found, c.warnings.iter().map(|w| w.short()).collect::<Vec<_>>())
    };
    let (attrs, warnings) =
        attrs_of("FROM alpine\nCOPY b a/* ./\nADD sub/../c /\n", Some("# x\nnode_modules\n!keep\n"));
    let attrs = attrs.expect("context is used");
    assert_eq!(attrs["local.followpaths"], r#"["a/*","b","c"]"#);
    assert_eq!(attrs["local.excludepatterns"], r#"["node_modules","!keep"]"#);
    assert_eq!((attrs["local.session"].as_str(), attrs["local.sharedkeyhint"].as_str()), ("sess", "context"));
    assert_eq!(warnings, Vec::<String>::new());
    let (attrs, warnings) = attrs_of("FROM alpine\nCOPY . /\nCOPY out/x /\n", Some("out\n"));
    assert!(!attrs.expect("context is used").contains_key("local.followpaths"));
    assert_eq!(
        warnings,
        ["CopyIgnoredFile: Attempting to Copy file \"out/x\" that is excluded by .dockerignore (line 3)"]
    );
    assert_eq!(attrs_of("FROM alpine\nRUN x\n", None).0, None);
}

#[test]
fn no_cache_and_resolve_mode() {
    let file = "FROM alpine AS a\nRUN x\nFROM alpine AS b\nCOPY --from=a /x /x\nRUN y\n";
    let ignoring = |attrs: &[(&str, &str)]| {
        let c = compile(file, attrs);
        loaded(&c.targets[0])
            .vertices
            .into_iter()
            .filter(|v| v.metadata.ignore_cache)
            .map(|v| v.name.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(ignoring(&[("no-cache", "a")]), ["[a 2/2] RUN x"]);
    assert_eq!(ignoring(&[("no-cache", "")]).len(), 3);
    assert!(ignoring(&[]).is_empty());
    let images = Images::new();
    try_compile(&images, file, &[("image-resolve-mode", "pull")]).expect("compiles");
    // One image is asked for once, however often it is used.
    let asked = images.asked.into_inner().expect("no panic");
    assert_eq!(asked, ["linux/amd64 pull [internal] load metadata for docker.io/library/alpine:latest"]);
}

#[test]
fn named_contexts_replace_images() {
    let images = Images::new().with("example.com/other:1", base(json!({"User": "other"})));
    let attrs = [("context:alpine", "docker-image://example.com/other:1")];
    let c = try_compile(&images, "FROM alpine\nRUN x\n", &attrs).expect("compiles");
    assert_eq!(config(&c)["config"]["User"], "other");
    assert_eq!(names(&c)[0], format!("[context alpine] example.com/other:1@{}", common::DIGEST));
    let images = images.with("docker.io/library/alpine:latest", base(json!({})));
    let attrs = [("context:dep", "docker-image://example.com/other:1")];
    let c =
        try_compile(&images, "FROM nosuch AS dep\nRUN never\nFROM alpine\nCOPY --from=dep /a /a\n", &attrs);
    assert!(!names(&c.expect("compiles")).iter().any(|n| n.contains("never")));
    assert_eq!(
        error("FROM alpine\n", &[("context:alpine", "tape:x")]),
        "Dockerfile:1:1: no context alpine=tape:x"
    );
}

/// The attributes of the source that reads a named directory.
fn directory(file: &str, attrs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let compiled = compile(file, attrs);
    let mut sources = loaded(&compiled.targets[0]).vertices.into_iter().filter_map(|v| match &v.op.op {
        Some(pb::op::Op::Source(source)) if source.identifier == "local://x" => {
            assert!(v.name.ends_with("] load from client"), "{}", v.name);
            Some(source.attrs.clone())
        }
        _ => None,
    });
    let attrs = sources.next().expect("the directory");
    assert!(sources.next().is_none(), "it is read once");
    attrs
}

#[test]
fn named_contexts_that_are_directories() {
    let named: &[(&str, &str)] = &[("context:dir", "local:x")];
    let file = "FROM alpine\nCOPY --from=dir /a b/c /\nRUN --mount=from=dir,source=/d,target=/m x\n";
    let attrs = directory(file, named);
    assert_eq!(attrs["local.followpaths"], r#"["a","b/c","d"]"#);
    assert_eq!(attrs["local.excludepatterns"], r#"["junk"]"#);
    assert_eq!(attrs["local.sharedkeyhint"], "context:dir-");
    assert_eq!(attrs["local.session"], "sess");
    // In the place of a stage, of which no instruction is left.
    let file = "FROM nosuch AS dir\nRUN never\nFROM scratch\nCOPY --from=dir /a /\n";
    assert_eq!(directory(file, named)["local.followpaths"], r#"["a"]"#);
    // What starts from it has all of it.
    for file in ["FROM dir\n", "FROM dir\nRUN x\n", "FROM dir AS s\nRUN x\nFROM alpine\nCOPY --from=s /a /\n"]
    {
        assert!(!directory(file, named).contains_key("local.followpaths"), "{file}");
    }
    // For one platform only.
    let named: &[(&str, &str)] = &[("context:dir", "local:y"), ("context:dir::linux/amd64", "local:x")];
    assert_eq!(
        directory("FROM scratch\nCOPY --from=dir /a /\n", named)["local.sharedkeyhint"],
        "context:dir::linux/amd64-"
    );
}

#[test]
fn named_contexts_that_are_results_of_builds() {
    let made = compile("FROM alpine\nRUN made\n", &[]).targets.remove(0).definition.expect("not scratch");
    let named: &[(&str, &str)] = &[("context:base", "input:other")];
    let c = try_compile(&Images::new().with_input(made), "FROM base\nRUN x\n", named).expect("compiles");
    assert_eq!(config(&c)["config"]["User"], "maker");
    let names = names(&c);
    assert!(names.iter().any(|name| name.ends_with("RUN made")), "{names:?}");
    assert!(names.iter().any(|name| name.ends_with("RUN x")), "{names:?}");
}

#[test]
fn a_fixed_epoch() {
    let c = compile("FROM scratch\nWORKDIR /a\n", &[("build-arg:SOURCE_DATE_EPOCH", "1700000000")]);
    assert_eq!(config(&c)["history"][0]["created"], "2023-11-14T22:13:20Z");
    assert_eq!(c.targets[0].epoch, Some(1_700_000_000));
    insta::assert_json_snapshot!(render(&c.targets[0]));
}

#[test]
fn mistakes() {
    for (file, want) in [
        (
            "FROM alpine\nRUNN x",
            "Dockerfile:2:1: dockerfile parse error on line 2: unknown instruction: RUNN (did you mean RUN?)",
        ),
        (
            "FROM alpine\n\n  COPY --form=a \\\n --chmodd=1 b c",
            "Dockerfile:3:8: dockerfile parse error on line 3: unknown flag: --form (did you mean from?)",
        ),
        (
            "FROM alpine\nCOPY --from=a \\\n --chmodd=1 b c",
            "Dockerfile:3:2: dockerfile parse error on line 2: unknown flag: --chmodd (did you mean chmod?)",
        ),
        (
            "FROM alpine\nENV A \"",
            "Dockerfile:2:1: failed to process \"\\\"\": unexpected end of statement while looking for matching double-quote",
        ),
        ("RUN x", "Dockerfile:1:1: no build stage in current context"),
        ("ARG x", "Dockerfile: dockerfile contains no stages to build"),
        ("", "Dockerfile: the Dockerfile cannot be empty"),
        ("FROM alpine\nRUN <<X\n", "Dockerfile:2:1: dockerfile parse error on line 2: unterminated heredoc"),
        (
            "FROM alpin",
            "Dockerfile:1:1: alpin: failed to resolve source metadata for docker.io/library/alpin:latest: docker.io/library/alpin:latest: not found (did you mean alpine?)",
        ),
        ("FROM $X", "Dockerfile:1:1: base name ($X) should not be blank"),
        (
            "FROM Alpine",
            "Dockerfile:1:1: failed to parse stage name \"Alpine\": invalid reference format: repository name (Alpine) must be lowercase",
        ),
        (
            "FROM --platform=linux/nos/x/y alpine",
            "Dockerfile:1:1: failed to parse platform linux/nos/x/y: \"linux/nos/x/y\": cannot parse platform specifier: invalid argument",
        ),
        (
            "FROM --platform=$TARGETPLATFROM alpine",
            "Dockerfile:1:1: empty platform value from expression $TARGETPLATFROM (did you mean TARGETPLATFORM?)",
        ),
        ("FROM alpine\nCOPY --from=5 a b", "Dockerfile:2:1: invalid stage index 5"),
        (
            "FROM alpine\nCOPY --from=$X a b",
            "Dockerfile:2:1: variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround",
        ),
        (
            "FROM alpine AS a\nCOPY --from=b x y\nFROM alpine AS b\nCOPY --from=a x y",
            "Dockerfile:4: circular dependency detected on stage: a",
        ),
        (
            "FROM alpine AS a\nCOPY --from=b x y\nFROM alpine AS b\nFROM a",
            "Dockerfile:2:1: cannot copy from stage \"b\", it needs to be defined before current stage \"a\"",
        ),
        ("FROM alpine\nEXPOSE foo", "Dockerfile:2:1: invalid containerPort: foo"),
        ("FROM alpine\nSTOPSIGNAL SIGFOO", "Dockerfile:2:1: invalid signal: SIGFOO"),
        (
            "FROM alpine\nCOPY --chmod=999 a b",
            "Dockerfile:2:1: invalid chmod parameter: '999'. it should be octal string and between 0 and 07777",
        ),
        ("FROM alpine\nCOPY https://x/y z", "Dockerfile:2:1: source can't be a URL for COPY"),
        (
            "FROM alpine\nRUN --mount=type=cach,target=/x y",
            "Dockerfile:2:1: unsupported mount type \"cach\" (did you mean cache?)",
        ),
        ("FROM alpine\nRUN --mount=target=/ y", "Dockerfile:2:1: invalid mount target \"/\""),
        (
            "FROM alpine\nWORKDIR ${X:?no directory}",
            "Dockerfile:2:1: failed to process \"${X:?no directory}\": X: no directory",
        ),
    ] {
        assert_eq!(error(file, &[]), want);
    }
    assert_eq!(
        error("FROM alpine AS build", &[("target", "biuld")]),
        "Dockerfile: target stage \"biuld\" could not be found (did you mean build?)"
    );
    assert_eq!(
        error("# check=error=true\nFROM alpine\nMAINTAINER x", &[]),
        "Dockerfile: lint violation found for rules: MaintainerDeprecated"
    );
    let e = try_compile(&Images::new(), "# check=error=true\nFROM alpine\nMAINTAINER x", &[]);
    assert_eq!(e.expect_err("a finding").warnings.len(), 1);
    let e = try_compile(&Images::new(), "FROM nosuch\n", &[]).expect_err("no such image");
    assert!(e.cause.is_some());
    assert_eq!(e.ranges.len(), 1);
}

#[test]
fn long_chains_need_no_stack() {
    let mut file = String::from("FROM alpine AS s0\n");
    for n in 1..1000 {
        file.push_str(&format!("FROM s{} AS s{n}\nRUN {n}\n", n - 1));
    }
    let c = compile(&file, &[]);
    assert_eq!(loaded(&c.targets[0]).vertices.len(), 1000);
}

#[test]
fn a_report_of_the_checks() {
    let report = |file: &str, attrs: &[(&str, &str)]| common::lint(file, attrs);
    let found = report("FROM alpine AS Foo\nFROM alpine\nMAINTAINER x", &[]);
    let rules: Vec<&str> = found.warnings.iter().map(|w| w.rule).collect();
    assert_eq!(rules, ["StageNameCasing", "MaintainerDeprecated"]);
    assert!(found.error.is_none());
    // Without a target, stages that nothing needs are checked.
    let file = "FROM alpine AS a\nENV A=$PAHT\nFROM alpine AS b\n";
    assert_eq!(report(file, &[]).warnings.len(), 1);
    assert_eq!(report(file, &[("target", "b")]).warnings.len(), 0);
    let failed = report("FROM alpine\nMAINTAINER x\nEXPOSE foo", &[]);
    assert_eq!(failed.warnings.len(), 1);
    assert_eq!(failed.error.expect("it does not compile").message, "invalid containerPort: foo");
}

#[test]
fn the_stages_of_a_file() {
    let file = "# base has the tools\nFROM --platform=$BUILDPLATFORM golang:$V AS base\nFROM base\n";
    let found = kiln_dockerfile::targets(file.as_bytes(), "Dockerfile").expect("reads");
    assert_eq!(found.len(), 2);
    assert_eq!((found[0].name.as_str(), found[0].description.as_str()), ("base", "has the tools"));
    assert_eq!((found[0].base.as_str(), found[0].platform.as_str()), ("golang:$V", "$BUILDPLATFORM"));
    assert_eq!((found[1].name.as_str(), found[1].base.as_str(), found[1].lines), ("", "base", (3, 3)));
    assert!(kiln_dockerfile::targets(b"FORM x", "Dockerfile").is_err());
}

#[test]
fn what_can_be_given_to_a_target() {
    let file = concat!(
        "# V is the kind\nARG V=debi\nARG NAME=${V}ine\nARG UNUSED\n",
        "FROM $NAME AS base\nRUN --mount=type=secret,target=/s/key --mount=type=ssh x\n",
        "FROM alpine AS other\nARG OTHER\n",
        "# last is what it is about\nFROM base AS last\nARG OWN=a TARGETARCH\n",
        "RUN --mount=type=secret,id=key,required x\n",
    );
    let found = common::outline(file, &[("build-arg:V", "alp")]).expect("compiles");
    assert_eq!((found.name.as_str(), found.description.as_str()), ("last", "is what it is about"));
    let args: Vec<_> =
        found.args.iter().map(|arg| (arg.name.as_str(), arg.value.as_str(), arg.lines.0)).collect();
    assert_eq!(args, [("V", "alp", 2), ("NAME", "alpine", 3), ("OWN", "a", 11)]);
    assert_eq!(found.args[0].description, "is the kind");
    let needs = |needs: &[OutlineNeed]| {
        needs.iter().map(|need| (need.name.clone(), need.required, need.lines.0)).collect::<Vec<_>>()
    };
    assert_eq!(needs(&found.secrets), [("key".to_owned(), true, 12)]);
    assert_eq!(needs(&found.ssh), [("default".to_owned(), false, 6)]);
    let found = common::outline(file, &[("target", "other")]).expect("compiles");
    assert_eq!(found.args.iter().map(|arg| arg.name.as_str()).collect::<Vec<_>>(), ["OTHER"]);
    assert!(common::outline("FROM alpine\nEXPOSE foo", &[]).is_err());
}

#[test]
fn checks() {
    let rules = |file: &str| compile(file, &[]).warnings.into_iter().map(|w| w.rule).collect::<Vec<_>>();
    assert_eq!(rules("FROM alpine AS Foo"), ["StageNameCasing"]);
    assert_eq!(rules("FROM alpine as foo"), ["FromAsCasing"]);
    assert_eq!(rules("FROM alpine AS a\nFROM alpine AS a"), ["DuplicateStageName"]);
    assert_eq!(rules("FROM alpine\nrun x\nRUN y"), ["ConsistentInstructionCasing"]);
    assert_eq!(rules("FROM alpine\nRUN a \\\n\n b"), ["NoEmptyContinuation"]);
    assert_eq!(
        rules("FROM alpine\nCMD a\nCMD b"),
        ["JSONArgsRecommended", "JSONArgsRecommended", "MultipleInstructionsDisallowed"]
    );
    assert_eq!(rules("FROM alpine\nENV A=$PAHT"), ["UndefinedVar"]);
    assert_eq!(rules("FROM alpine\nARG API_TOKEN"), ["SecretsUsedInArgOrEnv"]);
    assert_eq!(rules("FROM alpine\nARG TOKEN_FILE"), Vec::<&str>::new());
    assert_eq!(rules("FROM --platform=linux/amd64 alpine"), ["FromPlatformFlagConstDisallowed"]);
    assert_eq!(rules("FROM --platform=$TARGETPLATFORM alpine"), ["RedundantTargetPlatform"]);
    assert_eq!(rules("# check=skip=all\nFROM alpine\nMAINTAINER x"), Vec::<&str>::new());
    assert_eq!(rules("FROM alpine\nEXPOSE 1:80/TCP"), ["ExposeProtoCasing", "ExposeInvalidFormat"]);
}
