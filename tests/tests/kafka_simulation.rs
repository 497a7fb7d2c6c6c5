//! Hundreds of histories of the commit protocol in seconds, and the proof that the checker would see a mistake.

use tidemill_tests::kafka::simulation::{Fault, Seen, run};

const NUM_SEEDS: u64 = 1000;

#[test]
fn every_row_comes_once_and_in_order() {
    let mut total = Seen::default();
    for seed in 0..NUM_SEEDS {
        let seen = run(seed, Fault::None).unwrap_or_else(|error| panic!("{error}"));
        total.records += seen.records;
        total.crashes += seen.crashes;
        total.rebalances += seen.rebalances;
        total.aborted += seen.aborted;
        total.fenced += seen.fenced;
        total.canceled += seen.canceled;
    }
    println!("{NUM_SEEDS} histories: {total:?}");
    // Histories in which nothing goes wrong show nothing.
    for count in [total.crashes, total.rebalances, total.aborted, total.fenced, total.canceled] {
        assert!(count > NUM_SEEDS / 20, "{total:?}");
    }
}

#[test]
fn a_mistake_in_the_protocol_is_seen() {
    for fault in [Fault::OffsetsAfterwards, Fault::OffsetsBefore, Fault::NoLeases, Fault::NoFencing] {
        let seen = (0..NUM_SEEDS).find_map(|seed| run(seed, fault).err());
        println!("{fault:?}: {seen:?}");
        assert!(seen.is_some(), "{fault:?} goes unseen");
    }
}
