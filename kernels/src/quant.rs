//! The number formats of weights, and how each becomes f32.
//!
//! One file a quantized format. Invariant: [`dequantize`] gives exactly the numbers of the GGUF definition (each one rounded
//! to f32 once a multiplication or addition), so two readers of one file agree. Nothing is quantized here.

mod float;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
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
    Q5_0,
    Q5_1,
    Q4K,
    Q5K,
    Q6K,
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
        Dtype::Q5_0 => q5_0::dequantize(data, out),
        Dtype::Q5_1 => q5_1::dequantize(data, out),
        Dtype::Q4K => q4_k::dequantize(data, out),
        Dtype::Q5K => q5_k::dequantize(data, out),
        Dtype::Q6K => q6_k::dequantize(data, out),
    }
}

impl Dtype {
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    pub fn from_ggml(id: u32) -> Result<Self, UnknownDtype> {
        match id {
            0 => Ok(Self::F32),
            1 => Ok(Self::F16),
            2 => Ok(Self::Q4_0),
            3 => Ok(Self::Q4_1),
            6 => Ok(Self::Q5_0),
            7 => Ok(Self::Q5_1),
            8 => Ok(Self::Q8_0),
            12 => Ok(Self::Q4K),
            13 => Ok(Self::Q5K),
            14 => Ok(Self::Q6K),
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
            Self::Q5_0 => q5_0::BLOCK_LEN,
            Self::Q5_1 => q5_1::BLOCK_LEN,
            Self::Q4K => q4_k::BLOCK_LEN,
            Self::Q5K => q5_k::BLOCK_LEN,
            Self::Q6K => q6_k::BLOCK_LEN,
        }
    }

    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => q8_0::BLOCK_BYTES,
            Self::Q4_0 => q4_0::BLOCK_BYTES,
            Self::Q4_1 => q4_1::BLOCK_BYTES,
            Self::Q5_0 => q5_0::BLOCK_BYTES,
            Self::Q5_1 => q5_1::BLOCK_BYTES,
            Self::Q4K => q4_k::BLOCK_BYTES,
            Self::Q5K => q5_k::BLOCK_BYTES,
            Self::Q6K => q6_k::BLOCK_BYTES,
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
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

impl fmt::Display for UnknownDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.0 {
            9 => "Q8_1",
            10 => "Q2_K",
            11 => "Q3_K",
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

/// The fifth bit of each of 32 numbers of five bits, in its place; the bits of all lie together at `at`.
fn fifth_bits(block: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    move |i| ((bits >> i & 1) << 4) as u8
}
