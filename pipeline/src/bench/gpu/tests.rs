use tidemill_kernels::gpu::peak::Heads;
use tidemill_kernels::models::{FakeConfig, FakeModel};

use super::workloads::{Work, ragged_len};
use super::*;

const CEILINGS: Ceilings = Ceilings { half_tflops: 100.0, weight_tflops: 200.0, copy_gb_per_second: 1000.0 };

fn bench(runs_ahead: bool) -> Bench {
    let config = Shape::SmolLm2_135m.config();
    let subject = Subject {
        config: &config,
        weight_size: 1,
        kv_bytes_per_token: 100,
        engine: EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 64, enable_prefix_cache: true },
    };
    let fake = FakeConfig { runs_ahead, max_position: 600, num_pages: 512, ..FakeConfig::default() };
    let (bench, kv_tokens) = subject.bench(Box::new(FakeModel::new(fake)), Clock::start());
    assert_eq!(kv_tokens, 512 * 16);
    bench
}

fn workload(name: &str, work: Work) -> Workload {
    Workload { name: name.to_owned(), work }
}

#[test]
fn every_workload_does_the_work_that_it_counts() {
    let requests = 10;
    let ragged = (0..requests).map(|index| u64::from(ragged_len(40, index, requests))).sum::<u64>();
    let job =
        |is_ragged, shared_len| Work::Job { requests, prompt_len: 40, is_ragged, shared_len, output_len: 5 };
    for runs_ahead in [false, true] {
        let workloads = [
            workload("ragged", job(true, 0)),
            workload("shared", job(false, 16)),
            workload("prefill", Work::Prefill { len: 100 }),
            workload("too long", Work::Prefill { len: 600 }),
            workload("decode", Work::Decode { batch: 4, context_len: 20, steps: 6 }),
        ];
        let rows = run_all(&mut bench(runs_ahead), workloads, &CEILINGS, 2).unwrap();
        let seen: Vec<_> = rows
            .iter()
            .map(|row| (row.name.as_str(), row.prompt_tokens, row.computed_tokens, row.output_tokens))
            .collect();
        let wanted = [
            ("ragged", ragged, ragged, 50),
            ("shared", 400, 400 - 9 * 16, 50),
            ("prefill", 100, 100, 1),
            ("decode", 0, 0, 24),
        ];
        assert_eq!(seen, wanted, "runs ahead: {runs_ahead}");
        for row in &rows {
            assert!(row.seconds > 0.0 && row.predicted_seconds > 0.0 && row.fraction > 0.0, "{row:?}");
            assert!(row.host_us_p50 <= row.host_us_p99 && row.steps > 0, "{row:?}");
        }
        // One byte a weight at a terabyte a second, six times; keys and values are a few bytes beside it.
        let weights = 106_168_320.0 + 2.0 * 28_311_552.0;
        let least = 6.0 * weights / 1e12;
        assert!((rows[3].predicted_seconds / least - 1.0).abs() < 1e-3, "{:?}", rows[3]);
        assert_eq!((rows[3].bound, rows[3].steps, rows[3].samples.len()), ("memory", 6, 2));
    }
}

#[test]
fn lengths_are_spread_around_their_mean() {
    for requests in [1, 2, 256, 1000] {
        let mut lens: Vec<u32> = (0..requests).map(|index| ragged_len(3000, index, requests)).collect();
        lens.sort_unstable();
        assert_eq!(lens[0], 1500);
        assert!(lens.windows(2).all(|pair| pair[0] < pair[1]), "{requests} different lengths");
        assert!(requests == 1 || lens.last() == Some(&4500));
    }
}

#[test]
fn the_standard_workloads_fit_the_models_they_are_for() {
    for shape in [Shape::Qwen3_8b, Shape::Llama31_8b, Shape::SmolLm2_135m] {
        let config = shape.config();
        assert_eq!(config.windows.len(), config.num_layers as usize);
        let fits = |workload: &Workload| workload.work.longest() <= config.max_position;
        let num_fitting = standard(256).iter().filter(|workload| fits(workload)).count();
        // A prompt of 8192 leaves no place for an answer in the smallest.
        assert_eq!(num_fitting, if shape == Shape::SmolLm2_135m { 18 } else { 19 }, "{shape:?}");
    }
}

fn attention(name: &str, shape: [u32; 3]) -> AttentionRow {
    let heads = Heads { num_heads: 8, num_kv_heads: 2, head_dim: 64 };
    AttentionRow::new(name, 1e-6, shape, heads, 2.0, &CEILINGS)
}

#[test]
fn attention_is_counted_as_positions_and_bytes() {
    let prefill = attention("prefill", [1, 0, 1000]);
    // 500.5 positions for each of 1000 rows, products with keys and with values.
    let flops = 500.5 * 1000.0 * 8.0 * 64.0 * 4.0;
    assert!((prefill.predicted_seconds / (flops / 1e14) - 1.0).abs() < 1e-9 && prefill.bound == "compute");
    let decode = attention("decode", [16, 999, 1]);
    let bytes = 16.0 * 1000.0 * 2.0 * 2.0 * 64.0 * 2.0;
    assert!((decode.predicted_seconds / (bytes / 1e12) - 1.0).abs() < 1e-9 && decode.bound == "memory");
    assert!((decode.gb_per_second / (bytes / 1e3) - 1.0).abs() < 1e-9);
}

#[test]
fn the_report_shows_each_row_beside_its_limit() {
    let work = Work::Decode { batch: 2, context_len: 20, steps: 3 };
    let rows = run_all(&mut bench(true), [workload("decode, batch 2", work)], &CEILINGS, 1).unwrap();
    let report = GpuReport {
        model: "smollm2-135m".to_owned(),
        has_random_weights: true,
        device: "cuda:0 (one)".to_owned(),
        weights: "fp8",
        kv_cache: "bf16",
        deterministic: false,
        ceilings: CEILINGS,
        loading: Loading { bus_gb_per_second: 55.0, weights_gb_per_second: 54.25 },
        kv_tokens: 8192,
        rows,
        attention: vec![attention("attention, prefill", [1, 0, 100])],
    };
    let text = report.render();
    for word in [
        "decode, batch 2",
        "memory",
        "GEMM, fp8",
        "200 TFLOP/s",
        "1000 GB/s",
        "54.2 GB/s",
        "attention, prefill",
    ] {
        assert!(text.contains(word), "{word} is missing in\n{text}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["rows"][0]["output_tokens"], 6);
    assert_eq!(json["rows"][0]["work"]["Decode"]["batch"], 2);
}
