//! Golden pipelines: every folder of `pipelines/` is run and its output compared, and every example is checked.
//!
//! A new case is a new folder. `UPDATE_EXPECT=1` writes the expected files. Whatever the number of workers,
//! the output must be the same.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, binary, read_parts, workspace};

const OUTPUTS: [&str; 2] = ["result.jsonl", "errors.jsonl"];

fn folders(of: &str) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        fs::read_dir(workspace().join(of)).unwrap().map(|folder| folder.unwrap().path()).collect();
    folders.retain(|folder| folder.join("pipeline.yaml").is_file());
    folders.sort();
    assert!(!folders.is_empty(), "no pipelines in {of}");
    folders
}

/// Copies the inputs of a case into a folder of its own.
fn copy(case: &Path) -> Pipeline {
    let pipeline = Pipeline::new(&fs::read_to_string(case.join("pipeline.yaml")).unwrap());
    for file in fs::read_dir(case).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            fs::copy(&file, pipeline.path(file.file_name().unwrap().to_str().unwrap())).unwrap();
        }
    }
    pipeline
}

fn output(pipeline: &Pipeline, name: &str) -> String {
    let text = fs::read_to_string(pipeline.path(&format!("out/{name}"))).unwrap_or_default();
    text.replace(pipeline.folder.path().to_str().unwrap(), "FOLDER")
}

fn first_difference(lines: Option<(&str, &str)>) -> String {
    let cut = |line: &str| line.chars().take(300).collect::<String>();
    lines.map_or(String::new(), |(got, want)| format!("\n got {}\nwant {}", cut(got), cut(want)))
}

#[test]
fn golden_pipelines_give_what_they_gave() {
    for case in folders("tests/pipelines") {
        for workers in ["1", "2", "3"] {
            let pipeline = copy(&case);
            pipeline.run(&["run", "--workers", workers]).expect_code(0);
            for name in OUTPUTS {
                let expected = case.join(format!("expected-{name}"));
                let got = output(&pipeline, name);
                if std::env::var_os("UPDATE_EXPECT").is_some() {
                    fs::write(&expected, &got).unwrap();
                }
                let want = fs::read_to_string(&expected).unwrap();
                let differs = got.lines().zip(want.lines()).find(|(got, want)| got != want);
                let place = format!("{} with {workers} workers: {name}", case.display());
                assert!(differs.is_none(), "{place}: {}", first_difference(differs));
                assert_eq!(got.lines().count(), want.lines().count(), "{place}: rows");
            }
        }
    }
}

/// Without a model to load, so that what is said is the same on every machine.
#[test]
fn golden_pipelines_are_explained() {
    for case in folders("tests/pipelines") {
        let pipeline = copy(&case);
        let ran = pipeline.run(&["explain"]).expect_code(0);
        let got = ran.stdout().replace(pipeline.folder.path().to_str().unwrap(), "FOLDER");
        let expected = case.join("expected-explain.txt");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            fs::write(&expected, &got).unwrap();
        }
        assert_eq!(got, fs::read_to_string(&expected).unwrap(), "{}", case.display());
    }
}

#[test]
fn every_example_checks_and_runs() {
    for case in folders("examples") {
        let mut pipeline = copy(&case);
        if case.ends_with("kafka-summaries") {
            pipeline.env.push(("KAFKA_BROKERS", broker_with_articles().address().to_owned()));
        }
        let data = case.join("data");
        if data.is_dir() {
            let link = pipeline.path("data");
            std::os::unix::fs::symlink(&data, &link).unwrap();
        }
        pipeline.run(&["check"]).expect_code(0);
        // The example with the fake model: the real one has tests of its own, and here the definition counts.
        let definition = fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap();
        fs::write(pipeline.path("pipeline.yaml"), definition.replace("smollm2-135m-instruct", "fake"))
            .unwrap();
        pipeline.env.push(("TIDEMILL_LOG", "info".to_owned()));
        if case.ends_with("kafka-summaries") {
            pipeline.run(&["run", "--until-end"]).expect_code(0);
            let keys: Vec<_> =
                Broker::shared().read("summaries").into_iter().map(|record| record.key.unwrap()).collect();
            assert_eq!(keys, [b"0", b"1", b"2"]);
            continue;
        }
        pipeline.run(&["run"]).expect_code(0);
        let again = pipeline.run(&["run"]).expect_code(0);
        assert!(again.stderr().contains("nothing to do"), "{}", again.stderr());
    }
}

fn broker_with_articles() -> &'static Broker {
    let broker = Broker::shared();
    for topic in ["articles", "summaries", "summaries-errors"] {
        broker.create_topic(topic, 1);
    }
    let article = |id| {
        Record::new("key", format!("{{\"id\": {id}, \"title\": \"News\", \"body\": \"Much of {id}.\"}}"))
    };
    broker.produce("articles", (0..3).map(article));
    broker
}

#[test]
fn a_run_answers_every_row_of_the_news_example_with_the_real_model() {
    tidemill_tests::default_model();
    let pipeline = copy(&workspace().join("examples/news-summaries"));
    std::os::unix::fs::symlink(workspace().join("examples/news-summaries/data"), pipeline.path("data"))
        .unwrap();
    let ran =
        pipeline.run(&["run", "--summary", pipeline.path("summary.json").to_str().unwrap()]).expect_code(0);
    let rows = read_parts(&pipeline.path("out/summaries")).unwrap();
    let num_rows: usize = rows.iter().map(|batch| batch.num_rows()).sum();
    assert_eq!(num_rows, 42, "{}", ran.stderr());
    let summary: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(pipeline.path("summary.json")).unwrap()).unwrap();
    assert_eq!(summary["documents"], 42);
    assert!(summary["reused_tokens"].as_u64().unwrap() > 0, "the system prompt is shared: {summary}");
    for batch in rows {
        let text = batch.column_by_name("summary").unwrap();
        let text = text.as_any().downcast_ref::<arrow::array::StringArray>().unwrap();
        assert!(text.iter().all(|text| text.is_some_and(|text| text.trim().len() > 10)), "an empty summary");
    }
}

#[test]
fn standard_streams_can_be_source_and_sink() {
    let pipeline = Pipeline::new(
        "name: streams\nmodel: { name: fake }\nsource: { jsonl: { path: '-' } }\n\
         steps:\n  - generate: { name: answer, prompt: 'Say {{ text }}', max_tokens: 4 }\n\
         sink: { jsonl: { path: '-' } }\n",
    );
    let input = pipeline.path("input");
    fs::write(&input, "{\"text\": \"one\"}\nnot json\n{\"text\": \"two\"}\n").unwrap();
    let output = Command::new(binary())
        .args(["run", "--quiet"])
        .arg(pipeline.path("pipeline.yaml"))
        .stdin(fs::File::open(&input).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<serde_json::Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.iter().map(|row| row["text"].as_str().unwrap()).collect::<Vec<_>>(), ["one", "two"]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("malformed") && errors.contains("not json"), "{errors}");
}
