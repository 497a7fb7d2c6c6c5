//! Scales each row to a mean square of one, then by the weights.

/// `x`, `out`: `[num_tokens, weight.len()]`
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let mean_square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
        let scale = 1.0 / (mean_square + epsilon).sqrt();
        for ((x, weight), out) in x.iter().zip(weight).zip(out) {
            *out = x * scale * weight;
        }
    }
}
