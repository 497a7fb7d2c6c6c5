//! Bytes flipped, overwritten, cut and moved in a valid file: never a panic, and what opens can be read.

use super::parse::parse;
use super::tests::file;

const NUM_FILES: u64 = 20_000;

#[test]
fn broken_files_never_panic() {
    let valid = valid();
    let mut num_open = 0;
    for seed in 0..NUM_FILES {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes = damage(valid.clone(), &mut random);
        let checked = std::panic::catch_unwind(|| read_all(&bytes));
        num_open += u64::from(checked.unwrap_or_else(|_| panic!("seed {seed} panics")));
    }
    // Both outcomes are exercised.
    assert!(num_open > NUM_FILES / 50, "only {num_open} files open");
    assert!(num_open < NUM_FILES, "all files open");
}

/// Whether the file opens; then its tensors must be all of the data, each as large as it says.
fn read_all(bytes: &[u8]) -> bool {
    let Ok(tensors) = parse(bytes) else { return false };
    let mut num_bytes = 0;
    for info in tensors.values() {
        let data = &bytes[info.range.clone()];
        num_bytes += data.len();
        if let Ok(dtype) = info.dtype {
            let mut values = vec![0.0; info.shape.iter().product()];
            crate::quant::dequantize(dtype, data, &mut values);
        }
    }
    let header_len = u64::from_le_bytes(*bytes.first_chunk().expect("it opened")) as usize;
    assert_eq!(num_bytes + header_len + 8, bytes.len());
    true
}

fn valid() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]},"b":{"dtype":"F16","shape":[64],"data_offsets":[128,256]},"c":{"dtype":"U8","shape":[2,1],"data_offsets":[256,258]}}   "#;
    file(header, &[0x3c; 258])
}

fn damage(mut bytes: Vec<u8>, random: &mut u64) -> Vec<u8> {
    for _ in 0..=next(random) % 3 {
        let at = next(random) as usize % bytes.len();
        match next(random) % 6 {
            0 => bytes[at] ^= 1 << (next(random) % 8),
            1 => bytes[at] = next(random) as u8,
            2 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
            3 => bytes.truncate(at.max(1)),
            // A digit for a digit keeps the JSON valid, so that its claims are tested.
            4 => {
                if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b'0' + (next(random) % 10) as u8;
                }
            }
            _ => {
                let from = next(random) as usize % bytes.len();
                let moved: Vec<u8> = bytes[from..].iter().take(16).copied().collect();
                bytes[at..].iter_mut().zip(moved).for_each(|(to, from)| *to = from);
            }
        }
    }
    bytes
}

/// Xorshift.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}
