//! The engine on a GPU, each figure beside the most that this GPU can do, measured in the same run.
//!
//! Weights are those of a model, or random ones of a known shape, so that nothing needs to be fetched. One engine does
//! all workloads, as it would in a run. What a workload must do at least is counted step by step
//! ([`cost`]); the peaks are those of a large product of matrices and of a copy.

mod attention;
mod cost;
mod shapes;
#[cfg(test)]
mod tests;
mod timed;
mod workloads;

use serde::Serialize;
use tidemill_kernels::gpu::peak::{LoadingRates, copy_gb_per_second, gemm_tflops, loading_rates};
use tidemill_kernels::gpu::{GpuError, GpuOptions, WeightDtype};
use tidemill_kernels::models::{ModelConfig, ModelError};
use tidemill_kernels::step::Model;
use tidemill_operators::infer::engine::{Engine, EngineConfig};

use self::attention::AttentionRow;
use self::cost::{Ceilings, Counter};
pub(super) use self::shapes::Shape;
use self::timed::Timed;
use self::workloads::{Bench, Row, Workload, standard};
use super::{BenchError, EngineArgs, model, table};
use crate::clock::Clock;
use crate::models::gpu::Gpus;
use crate::models::load::{Compute, LoadError, LoadedModel, load};
use crate::plan::engine::EnginePlan;
use crate::spec::{self, KvCacheDtype, Quantization};

/// So many bytes are copied for the peak, times the elements of a matrix; a gigabyte, which no cache holds.
const COPY_FACTOR: usize = 16;

/// How fast weights reach the device.
#[derive(Clone, Copy, Debug, Serialize)]
struct Loading {
    bus_gb_per_second: f64,
    weights_gb_per_second: f64,
}

#[derive(Debug, Serialize)]
pub(super) struct GpuReport {
    model: String,
    has_random_weights: bool,
    device: String,
    weights: &'static str,
    kv_cache: &'static str,
    deterministic: bool,
    ceilings: Ceilings,
    loading: Loading,
    kv_tokens: u64,
    rows: Vec<Row>,
    /// Of one layer, alone.
    attention: Vec<AttentionRow>,
}

pub(super) fn measure(args: &EngineArgs, ordinal: usize) -> Result<GpuReport, BenchError> {
    let clock = Clock::start();
    let plan = EnginePlan {
        dtype: match args.dtype {
            Dtype::F16 => spec::Dtype::Float16,
            Dtype::Bf16 | Dtype::Fp8 => spec::Dtype::Bfloat16,
        },
        quantization: (args.dtype == Dtype::Fp8).then_some(Quantization::Fp8),
        kv_cache_dtype: match args.kv_cache_dtype {
            KvDtype::Auto => KvCacheDtype::Auto,
            KvDtype::Fp8 => KvCacheDtype::Fp8,
        },
        deterministic: args.deterministic,
        ..EnginePlan::default()
    };
    let gpus = Gpus::open(&[ordinal], &plan)?;
    let device = gpus.to_string();
    let on_device = |source| LoadError::Gpu { name: format!("cuda:{ordinal}"), source: Box::new(source) };
    eprintln!("peaks of {device} …");
    // Before anything else has taken memory.
    let ceilings = ceilings(&gpus, args.peak_size, clock).map_err(on_device)?;
    let loading = loading(&gpus, args.peak_size, clock)
        .map_err(|source| LoadError::Model { name: "of the peaks".to_owned(), source: Box::new(source) })?;
    let name = args.shape.map_or_else(|| args.model.clone(), |shape| shape.name().to_owned());
    let loaded = match args.shape {
        Some(shape) => LoadedModel::random(&gpus, &name, shape.config())?,
        None => load(&model(&args.model)?, &args.model, Compute::Gpus(&gpus), &|what| eprintln!("{what} …"))?,
    };
    let Some(config) = loaded.config() else { return Err(BenchError::NoWeights { name }) };
    let is_wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| name.contains(&**only));
    let attention = match is_wanted("attention") {
        true => attention::measure(&gpus, config, &ceilings, clock).map_err(on_device)?,
        false => Vec::new(),
    };
    let weight_size = if args.dtype == Dtype::Fp8 { 1 } else { 2 };
    let subject = Subject {
        config,
        weight_size,
        kv_bytes_per_token: loaded.kv_bytes_per_token(),
        engine: loaded.engine_config(&plan),
    };
    let (mut bench, kv_tokens) = subject.bench(loaded.model(&plan, 0, 1, 1)?, clock);
    let workloads = standard(args.requests.into()).into_iter().filter(|workload| is_wanted(&workload.name));
    let rows = run_all(&mut bench, workloads, &ceilings, args.common.repeat.into())?;
    Ok(GpuReport {
        model: name,
        has_random_weights: args.shape.is_some(),
        device,
        weights: args.dtype.name(),
        kv_cache: match (args.kv_cache_dtype, args.dtype) {
            (KvDtype::Fp8, _) => "fp8",
            (KvDtype::Auto, Dtype::F16) => "f16",
            (KvDtype::Auto, Dtype::Bf16 | Dtype::Fp8) => "bf16",
        },
        deterministic: args.deterministic,
        ceilings,
        loading,
        kv_tokens,
        rows,
        attention,
    })
}

/// Numbers of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Dtype {
    Bf16,
    F16,
    Fp8,
}

/// Numbers of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum KvDtype {
    Auto,
    Fp8,
}

impl Dtype {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Fp8 => "fp8",
        }
    }
}

/// The model that is measured.
struct Subject<'a> {
    config: &'a ModelConfig,
    weight_size: u64,
    kv_bytes_per_token: u64,
    engine: EngineConfig,
}

impl Subject<'_> {
    /// An engine whose steps are counted and timed, and the tokens that its cache holds.
    fn bench(&self, model: Box<dyn Model>, clock: Clock) -> (Bench, u64) {
        let (page_size, num_pages) = (model.info().page_size, model.info().num_pages);
        let counter =
            Counter::new(self.config, self.weight_size, self.kv_bytes_per_token, (page_size, num_pages));
        let (timed, steps) = Timed::new(model, counter, clock);
        let engine = Engine::new(Box::new(timed), self.engine);
        (Bench::new(engine, steps, clock), u64::from(page_size) * u64::from(num_pages))
    }
}

/// Leaves out what is too long for the model.
fn run_all(
    bench: &mut Bench,
    workloads: impl IntoIterator<Item = Workload>,
    ceilings: &Ceilings,
    repeat: usize,
) -> Result<Vec<Row>, BenchError> {
    let mut rows = Vec::new();
    for workload in workloads {
        if workload.work.longest() > bench.max_seq_len() {
            continue;
        }
        eprintln!("{} …", workload.name);
        rows.push(bench.run(&workload, ceilings, repeat)?);
    }
    Ok(rows)
}

fn ceilings(gpus: &Gpus, size: usize, clock: Clock) -> Result<Ceilings, GpuError> {
    let elapsed = || clock.elapsed();
    let gpu = gpus.first();
    let tflops = |dtype| gemm_tflops(gpu, [size; 3], dtype, &elapsed);
    let GpuOptions { dtype, weight_dtype, .. } = gpus.options();
    let half = dtype.unwrap_or_default();
    let half_tflops = tflops((half, WeightDtype::Half))?;
    let weight_tflops = match weight_dtype {
        WeightDtype::Half => half_tflops,
        WeightDtype::E4m3 => tflops((half, weight_dtype))?,
    };
    let copy_gb_per_second = copy_gb_per_second(gpu, COPY_FACTOR * size * size, &elapsed)?;
    Ok(Ceilings { half_tflops, weight_tflops, copy_gb_per_second })
}

fn loading(gpus: &Gpus, size: usize, clock: Clock) -> Result<Loading, ModelError> {
    let LoadingRates { bus, weights } = loading_rates(gpus.first(), size, &|| clock.elapsed())?;
    Ok(Loading { bus_gb_per_second: bus, weights_gb_per_second: weights })
}

impl GpuReport {
    pub(super) fn render(&self) -> String {
        let weights = if self.has_random_weights { "random weights" } else { "its weights" };
        let title =
            format!("{}, {weights} in {}, keys and values in {}", self.model, self.weights, self.kv_cache);
        let gemm = |name: &str, tflops: f64| (format!("GEMM, {name}"), format!("{tflops:.0} TFLOP/s"));
        let of_weights = gemm(self.weights, self.ceilings.weight_tflops);
        // Weights of 8 bits are multiplied beside a head and attention in 16.
        let half =
            (self.weights == Dtype::Fp8.name()).then(|| gemm(Dtype::Bf16.name(), self.ceilings.half_tflops));
        let others = [
            ("memory copied".to_owned(), format!("{:.0} GB/s", self.ceilings.copy_gb_per_second)),
            ("memory of the host copied".to_owned(), format!("{:.1} GB/s", self.loading.bus_gb_per_second)),
            ("weights loaded".to_owned(), format!("{:.1} GB/s", self.loading.weights_gb_per_second)),
            ("KV cache".to_owned(), format!("{} tokens", self.kv_tokens)),
        ];
        let peaks = half.into_iter().chain([of_weights]).chain(others);
        let rows = self.rows.iter().map(render_row);
        let attention = self.attention.iter().map(render_attention);
        format!(
            "{title}\n\n{}\n\n{}\n\n{}",
            table(
                &[
                    "",
                    "prompt tokens/s",
                    "output tokens/s",
                    "s",
                    "least s",
                    "of it",
                    "bound",
                    "host µs p50",
                    "p99"
                ],
                rows
            ),
            table(&["one layer", "TFLOP/s", "GB/s", "ms", "least ms", "of it", "bound"], attention),
            table(&[&self.device, "peak"], peaks.map(|(name, value)| vec![name, value])),
        )
    }
}

fn render_row(row: &Row) -> Vec<String> {
    vec![
        row.name.clone(),
        format!("{:.0}", row.prompt_tokens_per_second),
        format!("{:.0}", row.output_tokens_per_second),
        format!("{:.3}", row.seconds),
        format!("{:.3}", row.predicted_seconds),
        format!("{:.0} %", 100.0 * row.fraction),
        row.bound.to_owned(),
        format!("{:.0}", row.host_us_p50),
        format!("{:.0}", row.host_us_p99),
    ]
}

fn render_attention(row: &AttentionRow) -> Vec<String> {
    vec![
        row.name.clone(),
        format!("{:.0}", row.tflops),
        format!("{:.0}", row.gb_per_second),
        format!("{:.3}", 1e3 * row.seconds),
        format!("{:.3}", 1e3 * row.predicted_seconds),
        format!("{:.0} %", 100.0 * row.fraction),
        row.bound.to_owned(),
    ]
}
