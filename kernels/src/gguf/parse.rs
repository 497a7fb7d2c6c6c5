//! The bytes of a GGUF header, read front to back with every claim checked.
//!
//! Invariant: an allocation is never larger than what the bytes that are left could fill.

use std::collections::BTreeMap;

use super::{MetadataArray, MetadataValue, TensorInfo};
use crate::quant::Dtype;

/// Nested arrays are legal but not used by any model; the bound keeps the stack small.
const MAX_ARRAY_DEPTH: usize = 3;
const MAX_DIMS: usize = 4;
const MAX_NAME_BYTES: usize = 1024;
const MAX_ALIGNMENT: usize = 1 << 20;
const DEFAULT_ALIGNMENT: usize = 32;

/// Length of an empty string: its length field.
const MIN_STRING_BYTES: usize = 8;
/// An empty array: element type and count.
const MIN_ARRAY_BYTES: usize = 12;
/// A metadata pair with an empty key and a value of one byte.
const MIN_PAIR_BYTES: usize = MIN_STRING_BYTES + 4 + 1;
/// Name, number of dimensions, type and offset of a tensor without dimensions.
const MIN_TENSOR_BYTES: usize = MIN_STRING_BYTES + 4 + 4 + 8;

pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, MetadataValue>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Debug)]
pub(super) struct ParseError {
    pub(super) what: String,
    pub(super) offset: usize,
}

type Result<T> = std::result::Result<T, ParseError>;

pub(super) fn parse(bytes: &[u8]) -> Result<Header> {
    let mut reader = Reader { bytes, position: 0 };
    if reader.take(4, "the magic number")? != b"GGUF" {
        return Err(ParseError { what: "the magic number is missing".to_owned(), offset: 0 });
    }
    let version = reader.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(reader.error(format!("version {version} is not supported (2 and 3 are)")));
    }
    let num_tensors = reader.count("tensors", MIN_TENSOR_BYTES)?;
    let num_pairs = reader.count("metadata pairs", MIN_PAIR_BYTES)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..num_pairs {
        let key = reader.name("a metadata key")?;
        let kind = reader.u32("a metadata type")?;
        let value = reader.value(kind)?;
        if metadata.contains_key(&key) {
            return Err(reader.error(format!("metadata key {key:?} appears twice")));
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&reader, &metadata)?;
    let tensors = tensors(&mut reader, num_tensors, alignment)?;
    Ok(Header { version, metadata, tensors })
}

fn alignment(reader: &Reader<'_>, metadata: &BTreeMap<String, MetadataValue>) -> Result<usize> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64().and_then(|v| usize::try_from(v).ok()) {
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => Ok(alignment),
        _ => Err(reader.error(format!("alignment {} is not a small power of two", value.describe()))),
    }
}

/// Reads the tensor list, then turns the offsets, which count from the end of the header, into ranges of the file.
fn tensors(
    reader: &mut Reader<'_>,
    num_tensors: usize,
    alignment: usize,
) -> Result<BTreeMap<String, TensorInfo>> {
    let mut found = Vec::with_capacity(num_tensors);
    for _ in 0..num_tensors {
        found.push(tensor(reader, alignment)?);
    }
    let data_start = reader.position.next_multiple_of(alignment);
    let mut tensors = BTreeMap::new();
    for (name, mut info) in found {
        let start = data_start.checked_add(info.range.start);
        let end = data_start.checked_add(info.range.end);
        match (start, end) {
            (Some(start), Some(end)) if end <= reader.bytes.len() => info.range = start..end,
            _ => {
                let what = format!(
                    "tensor {name:?} needs {} bytes from {data_start} + {} on, the file has {}",
                    info.range.len(),
                    info.range.start,
                    reader.bytes.len()
                );
                return Err(reader.error(what));
            }
        }
        if tensors.contains_key(&name) {
            return Err(reader.error(format!("tensor {name:?} appears twice")));
        }
        tensors.insert(name, info);
    }
    Ok(tensors)
}

/// One entry of the tensor list; its range still counts from the start of the tensor data.
fn tensor(reader: &mut Reader<'_>, alignment: usize) -> Result<(String, TensorInfo)> {
    let name = reader.name("a tensor name")?;
    let num_dims = reader.u32("a number of dimensions")? as usize;
    if !(1..=MAX_DIMS).contains(&num_dims) {
        return Err(reader.error(format!("tensor {name:?} has {num_dims} dimensions")));
    }
    let mut shape = Vec::with_capacity(num_dims);
    let mut num_elements = 1usize;
    for _ in 0..num_dims {
        let dim = reader.size("a dimension")?;
        let product = num_elements.checked_mul(dim).filter(|_| dim > 0);
        let Some(product) = product else {
            return Err(reader.error(format!("tensor {name:?} has a dimension of {dim}")));
        };
        num_elements = product;
        shape.push(dim);
    }
    let dtype_id = reader.u32("a tensor type")?;
    let dtype = Dtype::from_ggml(dtype_id)
        .map_err(|unknown| reader.error(format!("tensor {name:?} has the unsupported type {unknown}")))?;
    let size_bytes = dtype.size_bytes(&shape);
    let Some(size_bytes) = size_bytes else {
        return Err(reader.error(format!("tensor {name:?} of type {dtype} cannot have the shape {shape:?}")));
    };
    // The first dimension of the file varies fastest; ours is the outermost.
    shape.reverse();
    let start = reader.size("a tensor offset")?;
    if !start.is_multiple_of(alignment) {
        return Err(reader.error(format!("tensor {name:?} is not aligned to {alignment} bytes")));
    }
    let Some(end) = start.checked_add(size_bytes) else {
        return Err(reader.error(format!("tensor {name:?} has the offset {start}")));
    };
    Ok((name, TensorInfo { dtype, shape, range: start..end }))
}

struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, what: String) -> ParseError {
        ParseError { what, offset: self.position }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        if len > self.left() {
            return Err(
                self.error(format!("the file ends within {what} ({len} bytes, {} left)", self.left()))
            );
        }
        let taken = &self.bytes[self.position..self.position + len];
        self.position += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let taken = self.take(N, what)?;
        Ok(taken.try_into().expect("`take` returns the length asked for"))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn size(&mut self, what: &str) -> Result<usize> {
        let value = u64::from_le_bytes(self.array(what)?);
        usize::try_from(value).map_err(|_| self.error(format!("{what} is {value}")))
    }

    /// A number of things of at least `min_bytes` each, which must still fit into the file.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize> {
        let count = self.size(what)?;
        // The second count of the header is read after the first: leaving it out of the bound is harmless.
        if count > self.left() / min_bytes {
            return Err(self.error(format!("{count} {what} do not fit into the {} bytes left", self.left())));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let len = self.size(what)?;
        let start = self.position;
        let taken = self.take(len, what)?;
        match std::str::from_utf8(taken) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(ParseError { what: format!("{what} is not UTF-8"), offset: start }),
        }
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let name = self.string(what)?;
        if name.len() > MAX_NAME_BYTES {
            return Err(self.error(format!("{what} has {} bytes (at most {MAX_NAME_BYTES})", name.len())));
        }
        Ok(name)
    }

    fn bool(&mut self) -> Result<bool> {
        match self.array::<1>("a bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.error(format!("a bool is {other}"))),
        }
    }

    fn value(&mut self, kind: u32) -> Result<MetadataValue> {
        const WHAT: &str = "a metadata value";
        Ok(match kind {
            0 => MetadataValue::U8(u8::from_le_bytes(self.array(WHAT)?)),
            1 => MetadataValue::I8(i8::from_le_bytes(self.array(WHAT)?)),
            2 => MetadataValue::U16(u16::from_le_bytes(self.array(WHAT)?)),
            3 => MetadataValue::I16(i16::from_le_bytes(self.array(WHAT)?)),
            4 => MetadataValue::U32(u32::from_le_bytes(self.array(WHAT)?)),
            5 => MetadataValue::I32(i32::from_le_bytes(self.array(WHAT)?)),
            6 => MetadataValue::F32(f32::from_le_bytes(self.array(WHAT)?)),
            7 => MetadataValue::Bool(self.bool()?),
            8 => MetadataValue::Str(self.string(WHAT)?),
            9 => MetadataValue::Array(self.metadata_array(0)?),
            10 => MetadataValue::U64(u64::from_le_bytes(self.array(WHAT)?)),
            11 => MetadataValue::I64(i64::from_le_bytes(self.array(WHAT)?)),
            12 => MetadataValue::F64(f64::from_le_bytes(self.array(WHAT)?)),
            other => return Err(self.error(format!("metadata type {other} is unknown"))),
        })
    }

    fn metadata_array(&mut self, depth: usize) -> Result<MetadataArray> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(self.error(format!("arrays are nested more than {MAX_ARRAY_DEPTH} deep")));
        }
        let kind = self.u32("an array type")?;
        Ok(match kind {
            0 => MetadataArray::U8(self.numbers(u8::from_le_bytes)?),
            1 => MetadataArray::I8(self.numbers(i8::from_le_bytes)?),
            2 => MetadataArray::U16(self.numbers(u16::from_le_bytes)?),
            3 => MetadataArray::I16(self.numbers(i16::from_le_bytes)?),
            4 => MetadataArray::U32(self.numbers(u32::from_le_bytes)?),
            5 => MetadataArray::I32(self.numbers(i32::from_le_bytes)?),
            6 => MetadataArray::F32(self.numbers(f32::from_le_bytes)?),
            7 => MetadataArray::Bool(self.elements(1, Self::bool)?),
            8 => MetadataArray::Str(
                self.elements(MIN_STRING_BYTES, |reader| reader.string("a string of an array"))?,
            ),
            9 => MetadataArray::Array(
                self.elements(MIN_ARRAY_BYTES, |reader| reader.metadata_array(depth + 1))?,
            ),
            10 => MetadataArray::U64(self.numbers(u64::from_le_bytes)?),
            11 => MetadataArray::I64(self.numbers(i64::from_le_bytes)?),
            12 => MetadataArray::F64(self.numbers(f64::from_le_bytes)?),
            other => return Err(self.error(format!("array type {other} is unknown"))),
        })
    }

    fn numbers<T, const N: usize>(&mut self, convert: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.elements(N, |reader| Ok(convert(reader.array("an array element")?)))
    }

    fn elements<T>(&mut self, min_bytes: usize, read: impl Fn(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let count = self.count("array elements", min_bytes)?;
        let mut values = Vec::with_capacity(count);
        for _ in 0..count {
            values.push(read(self)?);
        }
        Ok(values)
    }
}
