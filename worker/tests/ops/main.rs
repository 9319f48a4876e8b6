//! Operations on a real store and in real sandboxes, as a daemon runs them.
//!
//! Has its own `main`, because the executor starts this binary again as its helper. Needs root and `busybox`.

#[path = "../../../session/tests/common/mod.rs"]
mod common;
mod exec;
mod files;
mod sources;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use kiln_worker::sandbox::zygote;

use crate::exec::{
    a_dropped_step_leaves_nothing, a_failing_step_tells_its_exit_code,
    a_step_writes_a_layer_and_reports_its_output, cache_mounts_persist_and_locked_ones_wait,
    forbidden_things_are_refused, keys_leave_out_what_does_not_matter, mounts_show_inputs_and_scratch_space,
    nothing_but_the_change_is_in_the_layer, secrets_come_from_the_client,
    several_outputs_are_numbered_by_mount, user_files_that_are_no_files_are_left_alone,
    users_environment_and_hosts,
};
use crate::files::{
    a_chain_too_deep_for_one_mount_is_still_one_tree, a_failing_action_is_named, device_nodes_are_not_opened,
    file_actions_make_layers, merge_and_diff, removed_files_are_whiteouts,
    users_are_looked_up_in_their_input,
};
use crate::sources::{
    a_broken_transfer_is_not_taken_for_the_present_state, a_clients_directory_is_transferred_once,
    an_unchanged_file_keeps_the_steps_that_read_it, unknown_sources_are_refused_by_name,
};
use crate::world::World;

const PATIENCE: Duration = Duration::from_secs(60);

type Test = for<'a> fn(&'a World) -> LocalBoxFuture<'a, ()>;

macro_rules! tests {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), |world| $name(world).boxed_local())),*] };
}

const TESTS: &[(&str, Test)] = tests![
    file_actions_make_layers,
    removed_files_are_whiteouts,
    users_are_looked_up_in_their_input,
    a_failing_action_is_named,
    device_nodes_are_not_opened,
    a_chain_too_deep_for_one_mount_is_still_one_tree,
    merge_and_diff,
    a_step_writes_a_layer_and_reports_its_output,
    nothing_but_the_change_is_in_the_layer,
    a_failing_step_tells_its_exit_code,
    users_environment_and_hosts,
    user_files_that_are_no_files_are_left_alone,
    mounts_show_inputs_and_scratch_space,
    several_outputs_are_numbered_by_mount,
    cache_mounts_persist_and_locked_ones_wait,
    secrets_come_from_the_client,
    a_dropped_step_leaves_nothing,
    forbidden_things_are_refused,
    keys_leave_out_what_does_not_matter,
    a_clients_directory_is_transferred_once,
    a_broken_transfer_is_not_taken_for_the_present_state,
    unknown_sources_are_refused_by_name,
    an_unchanged_file_keeps_the_steps_that_read_it,
];

fn main() -> ExitCode {
    zygote::run_if_requested();
    if !rustix::process::geteuid().is_root() {
        println!("skipped: operations need root");
        return ExitCode::SUCCESS;
    }
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mounts = mount_points();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut failed = Vec::new();
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
        let started = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(|| {
            runtime.block_on(async {
                let world = World::new();
                tokio::time::timeout(PATIENCE, test(&world)).await.expect("the test takes too long");
                world.worker.idle().await;
            });
        }));
        let word = if passed.is_ok() { "ok" } else { "FAILED" };
        println!("test {name} ... {word} ({} ms)", started.elapsed().as_millis());
        if passed.is_err() {
            failed.push(*name);
        }
    }
    if mount_points() != mounts {
        println!("mounts were left behind");
        failed.push("mounts");
    }
    println!("{} failed {failed:?}", failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn mount_points() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect()
}
