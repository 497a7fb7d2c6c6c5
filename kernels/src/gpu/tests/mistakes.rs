//! Mistakes are planted in the kernels, one at a time, and tests must find each: every barrier is left out, and every
//! `PLANTED(name)` in a source is made.
//!
//! A mistake may end the process (threads that wait for ever, memory that is not the kernel's), so each is tried in a
//! child: this program again, with the mistake in its environment and the test that should find it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::gpu::device::Device;
use crate::gpu::emulated::EmulatedDevice;

/// Says `order mistake` to a child.
const MISTAKE: &str = "TIDEMILL_PLANTED_MISTAKE";

/// Sources, and the tests (by how their names begin) of which one must fail when there is a mistake in them.
const FOUND_BY: [(&[&str], &[&str]); 5] = [
    (&["rows.cuh"], &["rms_norm::", "rows::"]),
    (
        &["row_search.cuh"],
        &["sample::draws_what_the_cpu_draws", "sample::ties_go_by_id", "log_probs::are_those_of_a_softmax"],
    ),
    (&["route.cu", "grouped_linear.cu"], &["experts::"]),
    (&["attention.cu", "attention.cuh", "attention_merge.cu"], &["attention::a_few_rows"]),
    (&["attention_hopper.cu", "attention.cuh"], &["attention::a_few_rows_on_hopper"]),
];

/// The device that a child is to test, with its mistake.
pub(super) fn planted() -> Option<Arc<dyn Device>> {
    let planted = std::env::var(MISTAKE).ok()?;
    let (order, mistake) = planted.split_once(' ').expect("an order and a mistake");
    Some(EmulatedDevice::with_mistake(order.parse().expect("an order"), mistake).shared())
}

#[test]
fn every_planted_mistake_is_found() {
    let mut missed = Vec::new();
    for (sources, tests) in FOUND_BY {
        // A barrier that is left out shows first where one warp goes as far as it can.
        let found = |mistake: &str| {
            tidemill_cuda_emulation::ORDERS.iter().rev().any(|&order| !passes(tests, order, mistake))
        };
        assert!(!found("none"), "one of {tests:?} fails without a mistake, or there is none");
        let mistakes = sources.iter().flat_map(|source| mistakes(source));
        missed.extend(
            mistakes.filter(|mistake| !found(mistake)).map(|mistake| format!("{mistake} by {tests:?}")),
        );
    }
    assert!(missed.is_empty(), "not found: {missed:#?}");
}

#[test]
fn no_source_is_left_out() {
    let sources =
        std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    for source in sources.filter(|source| !mistakes(source).is_empty()) {
        let is_tested = FOUND_BY.iter().any(|(sources, _)| sources.contains(&&*source));
        assert!(
            is_tested || source == "types.cuh",
            "{source} has barriers, say which test finds that one is missing"
        );
    }
}

/// Whether there are such tests and all pass.
fn passes(tests: &[&str], order: i32, mistake: &str) -> bool {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(tests.iter().map(|test| format!("gpu::tests::{test}")))
        .args(if tests[0].ends_with("::") { None } else { Some("--exact") })
        .env(MISTAKE, format!("{order} {mistake}"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    child.status.success() && !String::from_utf8_lossy(&child.stdout).contains("running 0 tests")
}

/// Of a source: barriers by their place, others by their name.
fn mistakes(source: &str) -> Vec<String> {
    let text = std::fs::read_to_string(folder().join(source)).unwrap();
    let mut all = Vec::new();
    for (line, code) in (1..).zip(text.lines()) {
        let code = code.split("//").next().unwrap_or_default();
        let is_declared = code.contains("named_barrier(int");
        if code.contains("__syncthreads()") || (code.contains("named_barrier(") && !is_declared) {
            all.push(format!("{source}:{line}"));
        }
        let names = code.split("PLANTED(").skip(1).filter_map(|rest| rest.split(')').next());
        all.extend(names.map(str::to_owned));
    }
    all
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}
