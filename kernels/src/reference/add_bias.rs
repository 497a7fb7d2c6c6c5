//! Adds a bias to each row.

/// `x`: `[num_tokens, bias.len()]`
pub(super) fn add_bias(bias: &[f32], x: &mut [f32]) {
    for row in x.chunks_exact_mut(bias.len()) {
        for (x, bias) in row.iter_mut().zip(bias) {
            *x += bias;
        }
    }
}
