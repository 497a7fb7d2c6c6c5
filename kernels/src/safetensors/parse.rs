//! The header of one safetensors file, with every claim checked.
//!
//! A file is the length of the header (u64, little endian), the header (JSON: name to type, shape and byte range), and
//! the data. Invariant: ranges come out within the file, and together they are all of the data.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::quant::Dtype;

/// As in Hugging Face's own reader.
const MAX_HEADER_BYTES: usize = 100_000_000;
const LEN_BYTES: usize = 8;
const MAX_DIMS: usize = 8;
/// An entry of the header that is not a tensor.
const METADATA: &str = "__metadata__";

/// Where a tensor lies; checked against the file.
#[derive(Clone, Debug)]
pub(super) struct TensorInfo {
    /// The name of the type where it is not read.
    pub(super) dtype: Result<Dtype, String>,
    pub(super) shape: Vec<usize>,
    pub(super) range: Range<usize>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// All tensors of a file's bytes, or what is wrong with it.
pub(super) fn parse(bytes: &[u8]) -> Result<BTreeMap<String, TensorInfo>, String> {
    let (len, rest) = bytes.split_first_chunk::<LEN_BYTES>().ok_or("the file is too short for a header")?;
    let header_len = u64::from_le_bytes(*len);
    let header = usize::try_from(header_len).ok().filter(|&len| len <= MAX_HEADER_BYTES);
    let Some(header) = header.and_then(|len| rest.get(..len)) else {
        return Err(format!("a header of {header_len} bytes does not fit into {} bytes", rest.len()));
    };
    let data_start = LEN_BYTES + header.len();
    let entries: BTreeMap<String, &RawValue> =
        serde_json::from_slice(header).map_err(|error| format!("the header is not readable: {error}"))?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries.into_iter().filter(|(name, _)| name != METADATA) {
        let info =
            tensor(entry, data_start, bytes.len()).map_err(|what| format!("tensor {name:?} {what}"))?;
        tensors.insert(name, info);
    }
    check_ranges(&tensors, data_start..bytes.len())?;
    Ok(tensors)
}

fn tensor(entry: &RawValue, data_start: usize, file_len: usize) -> Result<TensorInfo, String> {
    let entry: Entry =
        serde_json::from_str(entry.get()).map_err(|error| format!("is not readable: {error}"))?;
    let Entry { dtype, shape, data_offsets: [start, end] } = entry;
    let dtype = match dtype.as_str() {
        "F32" => Ok(Dtype::F32),
        "F16" => Ok(Dtype::F16),
        "BF16" => Ok(Dtype::Bf16),
        _ => Err(dtype),
    };
    if shape.len() > MAX_DIMS {
        return Err(format!("has {} dimensions", shape.len()));
    }
    let range = data_start.saturating_add(start)..data_start.saturating_add(end);
    if start > end || range.end > file_len {
        return Err(format!("has the range {start}..{end}, the data has {} bytes", file_len - data_start));
    }
    // What is not read is only known to lie within the file.
    if let Ok(dtype) = dtype {
        let size = shape.iter().try_fold(dtype.block_bytes(), |bytes, &dim| bytes.checked_mul(dim));
        if size != Some(range.len()) {
            return Err(format!("of type {dtype} and shape {shape:?} has {} bytes", range.len()));
        }
    }
    Ok(TensorInfo { dtype, shape, range })
}

fn check_ranges(tensors: &BTreeMap<String, TensorInfo>, data: Range<usize>) -> Result<(), String> {
    let mut ranges: Vec<(&Range<usize>, &str)> =
        tensors.iter().map(|(name, info)| (&info.range, name.as_str())).collect();
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    let mut end = data.start;
    for (range, name) in ranges {
        if range.start != end {
            return Err(format!("tensor {name:?} does not follow the one before it"));
        }
        end = range.end;
    }
    if end != data.end {
        return Err(format!("{} bytes after the last tensor", data.end - end));
    }
    Ok(())
}
