//! Random runs with crashes, against a list of what was committed.

use std::io::Write;

use serde_json::json;

use super::tests::{at, lines, parts, rows, scratch};
use super::*;
use crate::random::Random;
use crate::source::Position;

const NUM_SEEDS: u64 = 200;
const NUM_RUNS: usize = 10;

/// What a reader must see.
#[derive(Default)]
struct Model {
    position: Option<u64>,
    rows: Vec<i64>,
    errors: Vec<i64>,
}

/// Results, errors and the next row of the input, as staged since the last commit.
#[derive(Default)]
struct Staged {
    rows: Vec<i64>,
    errors: Vec<i64>,
}

fn target(path: PathBuf, is_parquet: bool) -> SinkSpec {
    if is_parquet {
        SinkSpec::Parquet { path }
    } else {
        SinkSpec::Jsonl { path: path.with_extension("jsonl") }
    }
}

fn read(spec: &SinkSpec) -> Vec<i64> {
    match spec {
        SinkSpec::Parquet { path } => parts(path),
        SinkSpec::Jsonl { path } => lines(path),
        SinkSpec::Stderr => unreachable!("not drawn"),
    }
}

/// Stages up to three batches: each row of the input becomes a result or an error, or vanishes.
fn stage(output: &mut Output, random: &mut Random, next: &mut i64) -> Staged {
    let mut staged = Staged::default();
    for _ in 0..random.below(4) {
        let ids = *next..*next + random.below(6) as i64;
        *next = ids.end;
        match random.below(3) {
            0 => {
                output.write_errors(&rows(ids.clone())).unwrap();
                staged.errors.extend(ids);
            }
            1 => {
                output.write(&rows(ids.clone())).unwrap();
                staged.rows.extend(ids);
            }
            _ => {}
        }
    }
    assert_eq!(output.staged_rows(), (staged.rows.len() + staged.errors.len()) as u64);
    staged
}

/// Stops at a random point of a commit; true if that was after the commit point.
fn crash(output: &mut Output, random: &mut Random, position: Position) -> bool {
    let point = random.below(6);
    let mut parts = [None, None];
    for (index, sink) in [&mut output.sink, &mut output.errors].into_iter().enumerate() {
        if point > index as u64 {
            parts[index] = sink.prepare().unwrap();
        }
    }
    if point < 3 {
        return false;
    }
    let manifest = &mut output.state.as_mut().unwrap().manifest;
    manifest
        .commit(Commit { position: position.into(), output: parts[0].clone(), errors: parts[1].clone() })
        .unwrap();
    for (index, sink) in [&mut output.sink, &mut output.errors].into_iter().enumerate() {
        if let Some(part) = &parts[index]
            && point > 3 + index as u64
        {
            sink.publish(part).unwrap();
            sink.publish(part).unwrap();
        }
    }
    true
}

/// Leaves what a crash in the middle of a write leaves.
fn tear(spec: &OutputSpec, folder: &Path, random: &mut Random) {
    let append = |path: &Path, text: &str| {
        fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    };
    if random.below(3) == 0 {
        let line = r#"{"commit":{"position":{"file":0,"row":99},"output":null,"errors":null}}"#;
        append(&folder.join(MANIFEST), &line[..=random.below(line.len() as u64) as usize]);
    }
    for spec in [&spec.sink, &spec.errors] {
        match spec {
            SinkSpec::Parquet { path } if random.below(3) == 0 => {
                append(&path.join(".part-00900.parquet.tmp"), "PAR1 and no more");
            }
            SinkSpec::Jsonl { path } if random.below(3) == 0 => append(path, "{\"id\":12}\n{\"id"),
            _ => {}
        }
    }
}

#[test]
fn crashes_at_any_point_lose_and_repeat_nothing() {
    for seed in 0..NUM_SEEDS {
        let folder = scratch();
        let mut random = Random(seed);
        let schema = rows(0..1).schema();
        let spec = OutputSpec {
            sink: target(folder.path().join("results"), seed % 2 == 0),
            errors: target(folder.path().join("errors"), seed / 2 % 2 == 0),
            output_schema: SchemaRef::clone(&schema),
            errors_schema: schema,
        };
        let state = spec.sink.state_folder().unwrap();
        let mut model = Model::default();
        for _ in 0..NUM_RUNS {
            let (mut output, resume) = Output::open(spec.clone(), &json!({}), &[], false).unwrap();
            let (num_rows, num_errors) = (model.rows.len() as u64, model.errors.len() as u64);
            let expected = match model.position {
                None => Resume::Fresh,
                Some(row) => {
                    Resume::Continue { position: at(row).into(), rows: num_rows, errors: num_errors }
                }
            };
            assert_eq!(resume, expected, "seed {seed}");
            assert_eq!(read(&spec.sink), model.rows, "seed {seed}");
            assert_eq!(read(&spec.errors), model.errors, "seed {seed}");
            let mut next = model.position.unwrap_or(0) as i64;
            let mut keep = |staged: Staged, next: i64| {
                model.position = Some(next as u64);
                model.rows.extend(staged.rows);
                model.errors.extend(staged.errors);
            };
            for _ in 0..random.below(3) {
                let staged = stage(&mut output, &mut random, &mut next);
                output.commit(at(next as u64)).unwrap();
                keep(staged, next);
            }
            let staged = stage(&mut output, &mut random, &mut next);
            if crash(&mut output, &mut random, at(next as u64)) {
                keep(staged, next);
            }
            drop(output);
            tear(&spec, &state, &mut random);
        }
    }
}
