//! A feed-forward part made of experts on the device: routing, grouped products and their mixture, without a look at
//! which expert was chosen. The host's form of it is `models/experts.rs`.

use super::Runner;
use crate::gpu::device::DeviceError;
use crate::gpu::ops::{
    Combine, GroupedLinear, LinearOut, Route, Rows, SortRoutes, combine, grouped_linear, route, sort_routes,
};
use crate::gpu::weights::GpuExperts;

impl Runner {
    /// `part = sum over chosen experts of weight * expert(normed)`
    pub(super) fn mix_experts(&self, experts: &GpuExperts, num_rows: usize) -> Result<(), DeviceError> {
        let Self { device, weights, buffers, .. } = self;
        let device = &**device;
        let routing = buffers.experts.as_ref().expect("a model with experts has buffers for them");
        let Rows::Half(normed) = buffers.normed.rows() else { panic!("experts are computed in 16 bits") };
        let Rows::Half(gated) = buffers.gated.rows() else { panic!("experts are computed in 16 bits") };
        let (hidden, intermediate) =
            (weights.config.hidden_size as usize, weights.config.intermediate_size as usize);
        let num_experts = experts.config.num_experts as usize;
        let num_chosen = experts.config.num_experts_per_token as usize;
        let num_routes = num_rows * num_chosen;
        self.linear(num_rows, Rows::Half(normed), &experts.router, LinearOut::F32(&routing.scores))?;
        let args = Route {
            num_tokens: num_rows,
            num_experts,
            num_chosen,
            renormalize: experts.config.renormalize,
            scores: &routing.scores,
            experts: &routing.experts,
            weights: &routing.weights,
        };
        route(device, &args)?;
        let args = SortRoutes {
            num_tokens: num_rows,
            num_experts,
            num_chosen,
            experts: &routing.experts,
            indptr: &routing.indptr,
            rows: &routing.rows,
            routes_of: &routing.routes_of,
        };
        sort_routes(device, &args)?;
        let args = GroupedLinear {
            num_routes,
            num_experts,
            n: 2 * intermediate,
            k: hidden,
            x: normed,
            weight: &experts.gate_up,
            indptr: &routing.indptr,
            rows_of: Some(&routing.rows),
            out: &buffers.gate_up,
        };
        grouped_linear(device, &args)?;
        self.gate(num_routes)?;
        let args = GroupedLinear {
            n: hidden,
            k: intermediate,
            x: gated,
            weight: &experts.down,
            rows_of: None,
            out: &routing.answers,
            ..args
        };
        grouped_linear(device, &args)?;
        let args = Combine {
            num_tokens: num_rows,
            num_chosen,
            size: hidden,
            answers: &routing.answers,
            weights: &routing.weights,
            routes_of: &routing.routes_of,
            out: &buffers.part,
        };
        combine(device, &args)
    }
}
