//! The number formats of weights, and how each becomes f32.
//!
//! One file a quantized format. Invariant: [`dequantize`] gives exactly the numbers of the GGUF definition (each one rounded
//! to f32 once a multiplication or addition), so two readers of one file agree. Nothing is quantized here.

mod float;
mod q4_0;
mod q4_1;
mod q8_0;

#[cfg(test)]
mod tests;

use std::fmt;

/// Number format of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
}

/// A GGUF type that is not read (yet); displayed with its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDtype(pub u32);

/// Turns whole blocks into numbers.
///
/// # Panics
/// When `data` is not exactly the blocks for `out`; [`Dtype::size_bytes`] tells the size.
pub fn dequantize(dtype: Dtype, data: &[u8], out: &mut [f32]) {
    assert_eq!(out.len() % dtype.block_len(), 0, "not whole blocks");
    assert_eq!(
        data.len(),
        out.len() / dtype.block_len() * dtype.block_bytes(),
        "data and output differ in length"
    );
    match dtype {
        Dtype::F32 => float::dequantize_f32(data, out),
        Dtype::F16 => float::dequantize_f16(data, out),
        Dtype::Bf16 => float::dequantize_bf16(data, out),
        Dtype::Q8_0 => q8_0::dequantize(data, out),
        Dtype::Q4_0 => q4_0::dequantize(data, out),
        Dtype::Q4_1 => q4_1::dequantize(data, out),
    }
}

impl Dtype {
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0, Self::Q4_1];

    pub fn from_ggml(id: u32) -> Result<Self, UnknownDtype> {
        match id {
            0 => Ok(Self::F32),
            1 => Ok(Self::F16),
            2 => Ok(Self::Q4_0),
            3 => Ok(Self::Q4_1),
            8 => Ok(Self::Q8_0),
            30 => Ok(Self::Bf16),
            _ => Err(UnknownDtype(id)),
        }
    }

    /// Numbers in one block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 => q8_0::BLOCK_LEN,
            Self::Q4_0 => q4_0::BLOCK_LEN,
            Self::Q4_1 => q4_1::BLOCK_LEN,
        }
    }

    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => q8_0::BLOCK_BYTES,
            Self::Q4_0 => q4_0::BLOCK_BYTES,
            Self::Q4_1 => q4_1::BLOCK_BYTES,
        }
    }

    /// Size of a tensor whose first dimension varies fastest; none if that dimension does not consist of whole
    /// blocks, or if there is no such size.
    pub fn size_bytes(self, shape: &[usize]) -> Option<usize> {
        let (&row_len, rest) = shape.split_first()?;
        if row_len % self.block_len() != 0 {
            return None;
        }
        let row_bytes = (row_len / self.block_len()).checked_mul(self.block_bytes())?;
        rest.iter().try_fold(row_bytes, |bytes, &dim| bytes.checked_mul(dim))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
        })
    }
}

impl fmt::Display for UnknownDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            6 => "Q5_0",
            7 => "Q5_1",
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
            12 => "Q4_K",
            13 => "Q5_K",
            14 => "Q6_K",
            15 => "Q8_K",
            16..=23 | 29 => "IQ",
            24..=28 => "integer or F64",
            34 | 35 => "TQ",
            39 => "MXFP4",
            _ => "unknown",
        };
        write!(f, "{name} (GGUF type {})", self.0)
    }
}

/// Reads the f16 at the start of a block.
fn f16_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
