//! Tenants take turns and are limited, and no answer depends on it.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use tidemill_tests::Pipeline;

fn pipeline(tenants: &str) -> Pipeline {
    let pipeline = Pipeline::new(&format!(
        "name: tenants\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: input.jsonl }} }}\n\
         steps:\n  - generate: {{ name: a, prompt: '{{{{ text }}}}', max_tokens: 4 }}\n\
         \x20 - generate: {{ name: b, prompt: 'Again: {{{{ a }}}} {{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ jsonl: {{ path: results.jsonl }} }}\n{tenants}"
    ));
    let lines = (0..300).map(|id| {
        let tenant = ["\"large\"", "\"large\"", "\"small\"", "null"][id % 4];
        format!("{{\"id\": {id}, \"tenant\": {tenant}, \"text\": \"Part {} of {id}\"}}\n", id % 9)
    });
    fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    pipeline
}

#[test]
fn answers_do_not_depend_on_tenants_nor_on_their_limits() {
    let answers = |tenants: &str, workers: &str| {
        let pipeline = pipeline(tenants);
        pipeline.run(&["run", "--quiet", "--workers", workers]).expect_code(0);
        fs::read_to_string(pipeline.path("results.jsonl")).unwrap()
    };
    let expected = answers("", "1");
    assert_eq!(expected.lines().count(), 300);
    // Less than one prompt: they go one by one.
    for (limit, workers) in [
        ("max_tokens_in_flight: 1", "2"),
        ("max_tokens_in_flight: 100", "1"),
        ("max_tokens_in_flight: 1000000", "2"),
        ("limits: { large: 1, small: 200 }", "1"),
    ] {
        let tenants = format!("tenants: {{ by: '{{{{ tenant }}}}', weights: {{ small: 3 }}, {limit} }}\n");
        assert_eq!(answers(&tenants, workers), expected, "{limit}");
    }
}

#[test]
fn what_is_wrong_with_tenants_is_said_at_its_place() {
    for (tenants, words) in [
        ("{ by: '{{ tenent }}' }", ["unknown column \"tenent\"", "did you mean \"tenant\"?"]),
        ("{ by: '{{ a }}' }", ["unknown column \"a\"", "there are"]),
        ("{ by: '{{ tenant }}', weights: { small: 0 } }", ["tenants.weights.small is 0", "at least 1"]),
        ("{ by: '{{ tenant }}', limits: { small: 0 } }", ["tenants.limits.small is 0", "at least 1"]),
        ("{ by: '{{ tenant }}', default_weight: 1001 }", ["tenants.default_weight is 1001", "at most 1000"]),
    ] {
        let pipeline = pipeline(&format!("tenants: {tenants}\n"));
        pipeline.run(&["check"]).expect_code(2).expect_words(&words);
    }
}
