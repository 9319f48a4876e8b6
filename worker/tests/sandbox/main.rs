//! Behaviour of sandboxes, the same for every executor.
//!
//! Has its own `main`, because executors start this binary again as their helper. Needs root and
//! `busybox` (static); runs on Kiln's own executor and on each of `runc` and `crun` that is installed, and again on
//! Kiln's own in mount namespaces that show only version 2 cgroups, and none.
mod attended;
mod confinement;
mod ends;
mod roots;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use kiln_worker::sandbox::{ExecutorChoice, open, raise_open_files, zygote};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::attended::{further_processes, signals, terminals};
use crate::confinement::{
    confinement, descriptors_lead_nowhere, devices, exit_status, insecure, memory_limit, no_network,
    open_files, own_namespaces, process, readonly_root, resource_limits, system_calls,
    the_hosts_program_stays_as_it_is, touch_own_program, user_and_directory,
};
use crate::ends::{
    background_processes_end, bad_sources, cancel, daemon, death_of_the_daemon, death_of_the_helper, dropped,
    large_environment, many_at_once, programs_that_do_not_start,
};
use crate::roots::{
    changes_go_to_the_upper_directory, layered_mounts, links_do_not_lead_out, many_layers, memory_files,
    mount_points_are_reported, plain_mounts,
};
use crate::world::{World, cgroups_named, choices, make_root, mount_points};

const FEW_FILES: u64 = 512;
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    zygote::run_if_requested();
    if let Some(mode) = std::env::var_os("KILN_TEST_DAEMON") {
        return match mode.to_str() {
            Some("touch") => touch_own_program(),
            mode => daemon(mode.unwrap_or_default()),
        };
    }
    if !rustix::process::geteuid().is_root() {
        println!("skipped: sandbox tests need root");
        return ExitCode::SUCCESS;
    }
    let groups = std::env::var("KILN_TEST_CGROUPS").unwrap_or_default();
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let base = tempfile::tempdir().unwrap();
    let root = make_root(base.path());
    let mounts_before = mount_points();
    lower_open_files();
    raise_open_files();
    let mut failed = Vec::new();
    let mut ran = 0;
    for choice in if groups.is_empty() { choices() } else { vec![ExecutorChoice::Lean] } {
        let state = base.path().join("state");
        let executor = open(&choice, &state).unwrap();
        let world = World {
            executor,
            root: root.clone(),
            base: base.path().to_owned(),
            choice,
            groups: groups.clone(),
        };
        for (name, test) in TESTS {
            let name = format!("{}::{name}", world.executor.name());
            let name = if groups.is_empty() { name } else { format!("{groups}::{name}") };
            if !name.contains(&filter) {
                continue;
            }
            ran += 1;
            let started = Instant::now();
            let passed = catch_unwind(AssertUnwindSafe(|| test(&world))).is_ok();
            let word = if passed { "ok" } else { "FAILED" };
            println!("test {name} ... {word} ({} ms)", started.elapsed().as_millis());
            if !passed {
                failed.push(name);
            }
        }
        drop(world);
    }
    for kind in if groups.is_empty() { ["cgroup2", "no_cgroups"].as_slice() } else { &[] } {
        if !again_with(kind) {
            failed.push((*kind).to_owned());
        }
    }
    let mine = format!("kiln-{}-", std::process::id());
    let left = cgroups_named(&mine);
    if mount_points() != mounts_before || !left.is_empty() {
        println!("left behind: cgroups {left:?}, mounts {:#?}", mount_points());
        failed.push("nothing is left".into());
    }
    println!("{ran} tests, {} failed", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A soft limit below the hard one, as most systems start a daemon with.
fn lower_open_files() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(FEW_FILES), ..limit }).unwrap();
}

/// Runs the tests of this program where the host seems to have other cgroups.
fn again_with(kind: &str) -> bool {
    let mount = if kind == "cgroup2" { "mount -t cgroup2 none /sys/fs/cgroup" } else { "true" };
    let script = format!("umount -R /sys/fs/cgroup && {mount} && exec \"$0\" \"$@\"");
    let exe = std::env::current_exe().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(exe).args(std::env::args().skip(1));
    command.env("KILN_TEST_CGROUPS", kind).status().unwrap().success()
}

type Test = fn(&World);

const TESTS: &[(&str, Test)] = &[
    ("exit_status", exit_status),
    ("process", process),
    ("own_namespaces", own_namespaces),
    ("confinement", confinement),
    ("system_calls", system_calls),
    ("devices", devices),
    ("descriptors_lead_nowhere", descriptors_lead_nowhere),
    ("the_hosts_program_stays_as_it_is", the_hosts_program_stays_as_it_is),
    ("insecure", insecure),
    ("user_and_directory", user_and_directory),
    ("changes_go_to_the_upper_directory", changes_go_to_the_upper_directory),
    ("mount_points_are_reported", mount_points_are_reported),
    ("layered_mounts", layered_mounts),
    ("plain_mounts", plain_mounts),
    ("memory_files", memory_files),
    ("links_do_not_lead_out", links_do_not_lead_out),
    ("readonly_root", readonly_root),
    ("no_network", no_network),
    ("resource_limits", resource_limits),
    ("open_files", open_files),
    ("memory_limit", memory_limit),
    ("programs_that_do_not_start", programs_that_do_not_start),
    ("bad_sources", bad_sources),
    ("background_processes_end", background_processes_end),
    ("cancel", cancel),
    ("dropped", dropped),
    ("many_at_once", many_at_once),
    ("many_layers", many_layers),
    ("death_of_the_daemon", death_of_the_daemon),
    ("death_of_the_helper", death_of_the_helper),
    ("large_environment", large_environment),
    ("signals", signals),
    ("further_processes", further_processes),
    ("terminals", terminals),
];
