//! Parquet files to a topic and a topic to Parquet files, against the real broker.

use std::sync::Arc;

use arrow::array::{AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::Int64Type;
use serde_json::Value;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, read_parts, write_parquet};

#[test]
fn parquet_to_a_topic_and_a_topic_to_parquet() {
    let broker = Broker::shared();
    for topic in ["parquet-rows", "parquet-rows-errors"] {
        broker.create_topic(topic, 3);
    }
    let brokers = broker.address();
    let there = Pipeline::new(&format!(
        "name: there\nmodel: {{ name: fake }}\nsource: {{ parquet: {{ path: in.parquet }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ kafka: {{ brokers: '{brokers}', topic: parquet-rows, key: '{{{{ id }}}}' }} }}\n"
    ));
    let rows = RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(0..500)) as _),
        ("text", Arc::new(StringArray::from_iter_values((0..500).map(|id| format!("row {id}")))) as _),
    ]);
    write_parquet(&there.path("in.parquet"), &rows.unwrap(), 100).unwrap();
    for _ in 0..2 {
        // The second time there is nothing to do.
        there.run(&["run", "--quiet"]).expect_code(0);
        assert_eq!(broker.read("parquet-rows").len(), 500);
    }
    for record in broker.read("parquet-rows") {
        let value: Value = serde_json::from_slice(&record.value.unwrap()).unwrap();
        assert_eq!(record.key.unwrap(), value["id"].to_string().into_bytes());
        assert!(value["answer"].is_string() && value["text"].is_string());
    }

    let back = Pipeline::new(&format!(
        "name: back\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{brokers}', topics: [parquet-rows] }} }}\n\
         steps:\n  - generate: {{ name: again, prompt: '{{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ parquet: {{ path: out }} }}\nerrors: {{ parquet: {{ path: errors }} }}\n"
    ));
    for _ in 0..2 {
        back.run(&["run", "--quiet", "--until-end"]).expect_code(0);
        let parts = read_parts(&back.path("out")).unwrap();
        let mut ids: Vec<i64> = Vec::new();
        for part in &parts {
            let values = part.column_by_name("value").unwrap().as_string::<i32>();
            let kafka = part.column_by_name("kafka").unwrap().as_struct();
            let offsets = kafka.column_by_name("offset").unwrap().as_primitive::<Int64Type>();
            assert_eq!(offsets.len(), part.num_rows());
            ids.extend(
                values.iter().map(|value| {
                    serde_json::from_str::<Value>(value.unwrap()).unwrap()["id"].as_i64().unwrap()
                }),
            );
        }
        ids.sort_unstable();
        assert_eq!(ids, (0..500).collect::<Vec<_>>());
    }
}
