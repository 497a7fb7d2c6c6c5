//! How near the matrix products of a model come to the machine's peak, shape by shape.
//!
//! Each is run alone and again and again, so its weights stay in a cache that holds them: what memory adds in a real
//! step is for the figures of decode to show.

use serde::Serialize;
use tidemill_kernels::peak::Linear;

use super::machine::{Machine, rate};
use super::{BenchError, table};
use crate::clock::Clock;
use crate::models::load::LoadedModel;

/// Rows of the products: tokens of a step.
const NUM_ROWS: [usize; 5] = [1, 8, 32, 128, 512];

/// A matrix and its speed with each number of rows, in billions of operations a second, two a product.
#[derive(Debug, Serialize)]
pub(super) struct LinearFigure {
    name: &'static str,
    num_inputs: usize,
    num_outputs: usize,
    gops: [f64; NUM_ROWS.len()],
}

pub(super) fn measure(
    loaded: &LoadedModel,
    num_threads: usize,
    clock: Clock,
) -> Result<Vec<LinearFigure>, BenchError> {
    let mut figures = Vec::new();
    for (name, num_inputs, num_outputs) in loaded.matrix_shapes() {
        let mut gops = [0.0; NUM_ROWS.len()];
        for (num_rows, gops) in NUM_ROWS.into_iter().zip(&mut gops) {
            let mut linear = Linear::new(num_rows, num_inputs, num_outputs, num_threads)
                .map_err(|source| BenchError::Threads { num_threads, source })?;
            linear.run();
            *gops = rate(clock, &mut || linear.run()) / 1e9;
        }
        figures.push(LinearFigure { name, num_inputs, num_outputs, gops });
    }
    Ok(figures)
}

pub(super) fn render(figures: &[LinearFigure], machine: &Machine) -> String {
    let header: Vec<String> = NUM_ROWS.iter().map(|rows| format!("{rows} rows")).collect();
    let header: Vec<&str> =
        ["int8 GOP/s (of peak)"].into_iter().chain(header.iter().map(String::as_str)).collect();
    table(
        &header,
        figures.iter().map(|figure| {
            let name = format!("{}, {} to {}", figure.name, figure.num_inputs, figure.num_outputs);
            let share = |gops: &f64| format!("{gops:.0} ({:.0} %)", 100.0 * gops / machine.int8_gops);
            std::iter::once(name).chain(figure.gops.iter().map(share)).collect()
        }),
    )
}
