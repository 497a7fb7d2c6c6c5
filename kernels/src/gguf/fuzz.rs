//! Bytes flipped, overwritten, cut and moved in a valid file: never a panic, and what opens can be read.

use super::build::{Builder, array_head, open};

const NUM_FILES: u64 = 20_000;

#[test]
fn broken_files_never_panic() {
    let valid = valid();
    let mut num_open = 0;
    for seed in 0..NUM_FILES {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes = damage(valid.clone(), &mut random);
        let checked = std::panic::catch_unwind(|| read_all(bytes));
        num_open += u64::from(checked.unwrap_or_else(|_| panic!("seed {seed} panics")));
    }
    // Both outcomes are exercised.
    assert!(num_open > NUM_FILES / 50, "only {num_open} files open");
    assert!(num_open < NUM_FILES, "all files open");
}

/// Whether the file opens; then everything in it must be readable.
fn read_all(bytes: Vec<u8>) -> bool {
    let len = bytes.len();
    let Ok(gguf) = open(bytes) else { return false };
    for value in gguf.metadata.values() {
        assert!(!value.describe().is_empty());
    }
    for name in gguf.tensor_names() {
        let tensor = gguf.tensor(name).unwrap();
        assert!(tensor.data.len() <= len);
        let mut values = vec![0.0; tensor.num_elements()];
        crate::quant::dequantize(tensor.dtype, tensor.data, &mut values);
    }
    true
}

fn valid() -> Vec<u8> {
    Builder::new()
        .str("general.architecture", "llama")
        .u32("general.alignment", 32)
        .str_array("tokens", &["one", "two", "three"])
        .i32_array("types", &[1, 2, 3])
        .pair("nested", 9, &[array_head(9, 1), array_head(0, 2), vec![1, 2]].concat())
        .pair("flag", 7, &[1])
        .tensor("a", &[4, 8], &[0.5; 32])
        .tensor("b", &[64], &[1.5; 64])
        .bytes()
}

fn damage(mut bytes: Vec<u8>, random: &mut u64) -> Vec<u8> {
    for _ in 0..=next(random) % 3 {
        let at = next(random) as usize % bytes.len();
        match next(random) % 5 {
            0 => bytes[at] ^= 1 << (next(random) % 8),
            1 => bytes[at] = next(random) as u8,
            2 => bytes[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff),
            3 => bytes.truncate(at.max(1)),
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
