//! What comes out the same leaves what follows cached.

use std::collections::BTreeSet;

use kiln_integration::{Built, Context, Kiln, Registry, tools};

const DOCKERFILE: &str = r#"FROM tcc AS base
RUN mkdir /obj

FROM base AS headers
COPY version.h /usr/include/

FROM headers AS library
COPY sum.c /src/
RUN cc -c /src/sum.c -o /obj/sum.o

FROM headers AS compile
RUN --mount=type=bind,source=main.c,target=/main.c cc -c /main.c -o /obj/main.o
RUN sha256sum /obj/main.o > /obj/main.sum

FROM base AS archive
COPY --from=library /obj/sum.o /obj/
RUN cd /obj && cc -ar rcs libsum.a sum.o

FROM base AS link
COPY --from=compile /obj/main.o /obj/
COPY --from=archive /obj/libsum.a /obj/
RUN cc -o /app /obj/main.o /obj/libsum.a

FROM base AS test
COPY --from=link /app /app
RUN test "$(/app 1 2)" = "1 + 2 = 3" && touch /passed

FROM base AS docs
COPY --from=link /app /app
RUN /app > /usage.txt; test -s /usage.txt

FROM base AS bundle
COPY --from=link /app /out/bin/app
COPY --from=docs /usage.txt /out/share/
COPY --from=test /passed /out/share/
COPY --from=compile /obj/main.sum /out/share/
RUN tar -C /out -cf /bundle.tar .

FROM scratch
COPY --from=bundle /out/ /
"#;

const MAIN: &str = r#"#include <stdio.h>
#include <stdlib.h>
#include <version.h>

int sum(int a, int b);

int main(int argc, char **argv) {
    if (argc != 3) {
        printf("usage: app A B (version %s)\n", VERSION);
        return 1;
    }
    int a = atoi(argv[1]), b = atoi(argv[2]);
    printf("%d + %d = %d\n", a, b, sum(a, b));
    return 0;
}
"#;

/// Names of the steps, other than sources, that were not cached.
fn ran(built: &Built) -> BTreeSet<&str> {
    let lines: Vec<(&str, &str)> = built.stderr.lines().filter_map(|line| line.split_once(' ')).collect();
    let done = |number: &str| lines.iter().any(|(n, rest)| *n == number && rest.starts_with("DONE "));
    lines
        .iter()
        .filter(|(number, rest)| rest.starts_with('[') && !rest.starts_with("[internal]") && done(number))
        .filter_map(|(_, rest)| Some(rest.split_once("] ")?.1))
        .filter(|name| !name.starts_with("FROM "))
        .collect()
}

#[test]
fn a_comment_in_a_c_program_compiles_it_anew_and_nothing_else() {
    let registry = Registry::with("tcc");
    let kiln = Kiln::new(&registry);
    let context = Context::new(DOCKERFILE);
    context
        .file("version.h", "#define VERSION \"1\"\n")
        .file("sum.c", "int sum(int a, int b) { return a + b; }\n")
        .file("main.c", MAIN);
    let image = format!("{}/test/app:latest", registry.address);
    let build = || kiln.build(context.path(), &["-t", &image, "--push"]).ok();
    let first = build();
    let digest = tools::digest(&image);
    let compile = "RUN --mount=type=bind,source=main.c,target=/main.c cc -c /main.c -o /obj/main.o";
    assert!(ran(&first).len() > 15 && ran(&first).contains(compile), "{}", first.stderr);

    context.file("main.c", format!("/* What this program is about. */\n{MAIN}"));
    let commented = build();
    assert_eq!(ran(&commented), BTreeSet::from([compile]), "{}", commented.stderr);
    assert_eq!(tools::digest(&image), digest);
    // And the same again is answered at once.
    assert_eq!(ran(&build()), BTreeSet::new());

    context.file("main.c", MAIN.replace("usage:", "Usage:"));
    let changed = build();
    let names = ran(&changed);
    assert!(names.contains("RUN cc -o /app /obj/main.o /obj/libsum.a"), "{}", changed.stderr);
    assert!(!names.iter().any(|name| name.contains("sum.c") || name.contains("-ar")), "{}", changed.stderr);
    assert_ne!(tools::digest(&image), digest);
}
