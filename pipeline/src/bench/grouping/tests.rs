use super::*;

/// The promise of the documentation; the counts are the same on every machine.
#[test]
fn prefixes_are_computed_once_and_little_is_computed_again() {
    for workload in [workload::template(100), workload::questions(40), workload::three_levels()] {
        let report = compare(&workload).unwrap();
        let [arrival, .., tidemill, two] = report.runs.as_slice() else {
            panic!("{} runs", report.runs.len())
        };
        println!("{}", report.render());
        assert!(tidemill.ratio < 1.02, "{}: {}", report.name, tidemill.ratio);
        assert!(tidemill.recomputed_percent < 2.0, "{}: {}", report.name, tidemill.recomputed_percent);
        assert!(two.ratio < 1.1, "{}: {}", report.name, two.ratio);
        assert!(arrival.ratio >= tidemill.ratio);
    }
}

#[test]
fn the_table_has_every_figure() {
    let workloads = vec![compare(&workload::questions(3)).unwrap()];
    let report = GroupingReport { workloads, planning: plan(50, 1) };
    let text = report.render();
    for word in ["(b) five questions", "arrival order, LRU", "tidemill, two engines", "planning 50 prompts"] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
}
