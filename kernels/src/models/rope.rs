//! How fast the positions turn the pairs of a head, with the stretching that lets a model read longer texts.
//!
//! Only frequencies are made here; the op that turns is `rope` of the backend. What a frequency is stretched by
//! follows Llama 3.1 and position interpolation (Chen et al. 2023); YaRN and the others are absent.

use crate::backend::RopeTable;

/// Base and stretching of the frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    pub theta: f32,
    pub scaling: RopeScaling,
}

/// How the frequencies differ from those of the base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    /// All are divided.
    Linear {
        factor: f32,
    },
    /// Slow ones are divided, fast ones are not, those between are blended.
    Llama3 {
        factor: f32,
        low_freq_factor: f32,
        high_freq_factor: f32,
        original_max_position: u32,
    },
}

impl RopeConfig {
    pub(crate) const fn unscaled(theta: f32) -> Self {
        Self { theta, scaling: RopeScaling::None }
    }

    /// Radians per position of every pair, `[head_dim / 2]`.
    pub(crate) fn frequencies(&self, head_dim: usize) -> Vec<f32> {
        let mut frequencies = RopeTable::frequencies(head_dim, self.theta);
        for frequency in &mut frequencies {
            *frequency = self.scaling.apply(*frequency);
        }
        frequencies
    }
}

impl RopeScaling {
    fn apply(self, frequency: f32) -> f32 {
        match self {
            Self::None => frequency,
            Self::Linear { factor } => frequency / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                // Turns that the pair makes over the texts of the first training.
                let turns = original_max_position as f32 * frequency / std::f32::consts::TAU;
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                (1.0 - kept) * (frequency / factor) + kept * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_divides_slow_pairs_only() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let plain = RopeConfig::unscaled(500_000.0).frequencies(128);
        let scaled = RopeConfig { theta: 500_000.0, scaling }.frequencies(128);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        let blended = plain.iter().zip(&scaled).filter(|(p, s)| *s < *p && **s > **p / 8.0).count();
        assert!((1..64).contains(&blended));
        assert!(scaled.is_sorted_by(|a, b| a > b));
    }
}
