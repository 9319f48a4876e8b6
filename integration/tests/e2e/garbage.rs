//! What is kept when room runs out, and what people see of it.

use std::time::Duration;

use kiln_integration::{Context, Kiln, Registry, tools, wait_until};
use serde_json::Value;

fn size(records: &[Value]) -> i64 {
    records.iter().map(|record| record["size"].as_i64().expect("size")).sum()
}

fn of_type<'a>(records: &'a [Value], kind: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["recordType"] == kind).collect()
}

fn assert_total_is_the_disks(kiln: &Kiln) {
    let total = size(&kiln.usage());
    let disk = tools::disk_usage(kiln.root());
    assert!((total - disk).abs() * 50 <= disk, "kiln du: {total}, du: {disk}");
}

/// Two layers of 8 MB, one on the other, and a cache mount and a context of 8 MB each.
fn fill(kiln: &Kiln) {
    let context = Context::new(
        "FROM busybox\n\
         RUN head -c 8000000 /dev/urandom > /one\n\
         RUN head -c 8000000 /dev/urandom > /two\n\
         RUN --mount=type=cache,target=/c head -c 8000000 /dev/urandom > /c/mount\n\
         RUN --mount=type=bind,target=/ctx test -s /ctx/file\n",
    );
    context.file("file", vec![1; 8_000_000]);
    kiln.build(context.path(), &[]).ok();
}

#[test]
fn a_limit_is_kept_by_what_was_used_last_and_nothing_goes_below_it() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    fill(&kiln);
    assert!(size(&kiln.usage()) > 32_000_000, "{:#?}", kiln.usage());
    assert_total_is_the_disks(&kiln);
    kiln.stop();

    // Soon after the start it is all looked at, and below the limit all of it stays.
    kiln.configure(
        "[worker.oci]\n  maxUsedSpace = \"100MB\"\n  [[worker.oci.gcpolicy]]\n    maxUsedSpace = 20000000\n",
    );
    kiln.start();
    wait_until("the collection", Duration::from_secs(30), || size(&kiln.usage()) <= 20_000_000);
    let after = kiln.usage();
    assert!(size(&after) > 4_000_000, "no more than needed: {after:#?}");
    kiln.stop();
}

#[test]
fn du_and_prune_take_the_flags_of_buildctl() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    fill(&kiln);
    let records = kiln.usage();
    for kind in ["regular", "kiln.store", "exec.cachemount", "source.local"] {
        assert!(!of_type(&records, kind).is_empty(), "{kind}: {records:#?}");
    }
    let listed = kiln
        .run(&["du", "-f", "type==exec.cachemount", "-f", "type==source.local,mutable", "--verbose"])
        .ok();
    let types: Vec<&str> =
        listed.stdout.lines().filter_map(|line| line.strip_prefix("Type:")).map(str::trim).collect();
    assert_eq!(types.iter().filter(|kind| **kind == "exec.cachemount").count(), 1, "{}", listed.stdout);
    assert!(types.len() > 1 && !types.contains(&"regular"), "{}", listed.stdout);
    let columns = kiln.run(&["du"]).ok().stdout;
    assert!(columns.starts_with("ID ") && columns.contains("RECLAIMABLE"), "{columns}");

    let prune = |args: &[&str]| -> Vec<Value> {
        let mut all = vec!["prune", "--format", "{{json .}}"];
        all.extend_from_slice(args);
        let out = kiln.run(&all).ok().stdout;
        out.lines().map(|line| serde_json::from_str(line).expect("a record")).collect()
    };
    // Nothing was used so long ago, and there is room.
    for args in [
        &["--keep-duration", "1h"][..],
        &["--keep-storage", "1000"],
        &["--free-storage", "0.001"],
        &["--reserved-space", "1gb"],
    ] {
        assert_eq!(prune(args), [] as [Value; 0], "{args:?}");
    }
    let gone = prune(&["--filter", "type==exec.cachemount", "--filter", "type==source.local"]);
    assert_eq!(of_type(&gone, "exec.cachemount").len(), 1, "{gone:#?}");
    assert_eq!(of_type(&gone, "source.local").len() + 1, gone.len(), "{gone:#?}");
    assert!(size(&gone) > 16_000_000);

    let total = size(&kiln.usage());
    let gone = prune(&["--keep-storage", &format!("{}", (total - 4_000_000) / 1_000_000)]);
    assert!((4_000_000..12_000_000).contains(&size(&gone)), "{gone:#?}");
    prune(&["--all"]);
    let left = kiln.usage();
    assert_eq!(of_type(&left, "kiln.store").len(), left.len(), "only the store's own is left: {left:#?}");
    let others = kiln.run(&["du", "--format", "json", "--filter", "type!=regular"]).ok();
    assert_eq!(others.stdout.trim(), "[]", "who doesn't ask for them is not shown what can't go");
    assert_eq!(kiln.build(Context::new("FROM busybox\nRUN echo again\n").path(), &[]).ok().cached(), 0);
    kiln.stop();
}

#[test]
fn layers_that_are_gathered_for_a_long_chain_count_once() {
    let registry = Registry::with_busybox();
    let mut kiln = Kiln::new(&registry);
    kiln.start();
    let chain = |steps: usize| {
        let runs = (0..steps).map(|step| format!("RUN head -c 200000 /dev/urandom > /{step}\n"));
        Context::new(&format!("FROM busybox\n{}", runs.collect::<String>()))
    };
    kiln.build(chain(120).path(), &[]).ok();
    // All sizes are known when the lower layers get more names.
    assert_total_is_the_disks(&kiln);
    kiln.build(chain(140).path(), &[]).ok();
    assert!(
        kiln.usage()
            .iter()
            .any(|record| record["description"].as_str().is_some_and(|text| text.contains("flattened"))),
        "the chain is long enough for that"
    );
    assert_total_is_the_disks(&kiln);
    kiln.stop();
}
