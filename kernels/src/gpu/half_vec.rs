//! Arrays of 16-bit floats on a device, which know of which kind they are.
//!
//! A model computes in one of the two kinds, so each kernel that has such floats is there twice, as `NAME_bf16` and as
//! `NAME_f16`. Invariant: the operands of a call are of one kind; the ops check it.

use std::sync::Arc;

use half::{bf16, f16};

use super::device::{Address, Device, DeviceError, GemmInput, GemmOutput};
use super::memory::{DeviceSlice, DeviceVec};

/// The 16-bit floats that a model computes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HalfDtype {
    /// The range of f32, 8 bits of precision.
    #[default]
    Bf16,
    /// Up to 65504, 11 bits of precision.
    F16,
}

impl HalfDtype {
    /// The nearest, ties to even.
    pub(crate) fn round(self, x: f32) -> u16 {
        match self {
            Self::Bf16 => bf16::from_f32(x).to_bits(),
            Self::F16 => f16::from_f32(x).to_bits(),
        }
    }

    /// Bits of the exponent, all set in infinity and NaN.
    pub(crate) fn exponent(self) -> u16 {
        match self {
            Self::Bf16 => 0x7f80,
            Self::F16 => 0x7c00,
        }
    }

    #[cfg(test)]
    pub(crate) fn to_f32(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => bf16::from_bits(bits).to_f32(),
            Self::F16 => f16::from_bits(bits).to_f32(),
        }
    }

    /// Of two, the one for this kind; see `half_kernels`.
    pub(crate) fn of<T: Copy>(self, [bf16, f16]: [T; 2]) -> T {
        match self {
            Self::Bf16 => bf16,
            Self::F16 => f16,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

impl From<HalfDtype> for GemmInput {
    fn from(dtype: HalfDtype) -> Self {
        match dtype {
            HalfDtype::Bf16 => Self::Bf16,
            HalfDtype::F16 => Self::F16,
        }
    }
}

impl From<HalfDtype> for GemmOutput {
    fn from(dtype: HalfDtype) -> Self {
        match dtype {
            HalfDtype::Bf16 => Self::Bf16,
            HalfDtype::F16 => Self::F16,
        }
    }
}

/// An array on a device.
#[derive(Debug)]
pub(crate) struct HalfVec {
    dtype: HalfDtype,
    bits: DeviceVec<u16>,
}

impl HalfVec {
    /// With unknown contents.
    pub(crate) fn new(device: &Arc<dyn Device>, dtype: HalfDtype, len: usize) -> Result<Self, DeviceError> {
        Ok(Self { dtype, bits: DeviceVec::new(device, len)? })
    }

    #[cfg(test)]
    pub(crate) fn from_slice(
        device: &Arc<dyn Device>,
        dtype: HalfDtype,
        values: &[f32],
    ) -> Result<Self, DeviceError> {
        let bits: Vec<u16> = values.iter().map(|&x| dtype.round(x)).collect();
        Ok(Self { dtype, bits: DeviceVec::from_slice(device, &bits)? })
    }

    /// Waits for what is queued and reads the whole array.
    #[cfg(test)]
    pub(crate) fn read(&self) -> Result<Vec<f32>, DeviceError> {
        Ok(self.bits.read()?.into_iter().map(|bits| self.dtype.to_f32(bits)).collect())
    }

    pub(crate) fn dtype(&self) -> HalfDtype {
        self.dtype
    }

    pub(crate) fn address(&self) -> Address {
        self.bits.address()
    }

    /// Where element `index` lies.
    pub(crate) fn at(&self, index: usize) -> Address {
        self.bits.at(index)
    }

    pub(crate) fn len(&self) -> usize {
        self.bits.len()
    }

    pub(crate) fn bits(&self) -> DeviceSlice<'_, u16> {
        DeviceSlice::from(&self.bits)
    }
}

/// Both forms of a kernel, whose source has its name: `half_kernels!("NAME", block, shared_bytes)`.
macro_rules! half_kernels {
    ($name:literal, $block:expr, $shared_bytes:expr) => {
        [
            $crate::gpu::device::Kernel {
                name: concat!($name, "_bf16"),
                source: $name,
                block: $block,
                shared_bytes: $shared_bytes,
            },
            $crate::gpu::device::Kernel {
                name: concat!($name, "_f16"),
                source: $name,
                block: $block,
                shared_bytes: $shared_bytes,
            },
        ]
    };
}

pub(crate) use half_kernels;
