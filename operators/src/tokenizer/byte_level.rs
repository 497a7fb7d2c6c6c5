//! Byte-pair encoding over bytes, from GPT-2 on: text is cut by a pattern, then bytes are merged within the pieces.
//!
//! Absent: learning. Patterns and switches are those that Hugging Face publishes with the models.

use std::collections::BTreeMap;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::{AddedToken, Parts, Tokenizer, TokenizerError, failed};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Composing (NFC) makes text at most three times shorter in UTF-8: U+1F82 is three bytes for eight.
pub(super) const MAX_COMPOSED: usize = 3;

/// How text is cut before byte-pair encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    /// Digits one by one, then GPT-2's pattern: SmolLM and StarCoder.
    DigitsThenGpt2,
    /// GPT-2's pattern.
    Gpt2,
    /// Digits by threes. A piece that is a token is not cut further, whatever the merges say.
    Llama3,
    /// Digits one by one; characters are composed first (NFC). Qwen2 to Qwen3.
    Qwen2,
}

/// The tables of a byte-level BPE.
pub(super) struct ByteLevel {
    pub(super) pre_tokenizer: PreTokenizer,
    /// By id, in the byte alphabet of GPT-2.
    pub(super) tokens: Vec<String>,
    /// Pairs separated by one space, strongest first.
    pub(super) merges: Vec<String>,
    pub(super) added: Vec<AddedToken>,
    pub(super) bos: Option<u32>,
}

impl ByteLevel {
    pub(super) fn build(self) -> Result<Tokenizer, TokenizerError> {
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in self.merges.iter().enumerate() {
            let pair =
                merge.split_once(' ').ok_or_else(|| TokenizerError(format!("merge {rank} is not a pair")))?;
            merges.push((pair.0.to_owned(), pair.1.to_owned()));
        }
        let composes = if self.pre_tokenizer == PreTokenizer::Qwen2 { MAX_COMPOSED } else { 1 };
        // Each character of the alphabet is one byte.
        let longest = self.tokens.iter().map(|token| token.chars().count()).max().unwrap_or(1);
        let num_ids = self.tokens.len() as u32;
        let cuts_all = merges.is_empty() && self.pre_tokenizer != PreTokenizer::Llama3 && composes == 1;
        let bytes = if cuts_all { byte_tokens(&self.tokens) } else { None };
        let model = BPE::builder()
            .vocab_and_merges(self.tokens.into_iter().zip(0..).collect::<ahash::AHashMap<_, _>>(), merges)
            .ignore_merges(self.pre_tokenizer == PreTokenizer::Llama3)
            .build()
            .map_err(failed)?;
        let mut core = tokenizers::Tokenizer::new(model);
        if core.get_vocab_size(false) != num_ids as usize {
            return Err(TokenizerError("a token appears twice".to_owned()));
        }
        if self.pre_tokenizer == PreTokenizer::Qwen2 {
            core.with_normalizer(Some(NFC));
        }
        core.with_pre_tokenizer(Some(Sequence::new(stages(self.pre_tokenizer)?)));
        core.with_decoder(Some(byte_level::ByteLevel::new(false, false, true)));
        let max_token_bytes = longest.max(1) * composes;
        Tokenizer::new(Parts {
            core,
            first: None,
            num_ids,
            added: self.added,
            bos: self.bos,
            max_token_bytes,
            bytes,
        })
    }
}

/// The token of each byte, if all have one: without merges, that is all there is to encoding.
fn byte_tokens(tokens: &[String]) -> Option<Box<[u32; 256]>> {
    let ids: BTreeMap<&str, u32> = tokens.iter().map(String::as_str).zip(0..).collect();
    let mut bytes = Box::new([0; 256]);
    let mut num_moved = 0;
    for byte in 0..=u8::MAX {
        // GPT-2 writes what does not print as the characters from U+0100 on.
        let symbol = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                num_moved += 1;
                char::from_u32(0xFF + num_moved)?
            }
        };
        bytes[usize::from(byte)] = *ids.get(symbol.to_string().as_str())?;
    }
    Some(bytes)
}

fn stages(pre_tokenizer: PreTokenizer) -> Result<Vec<PreTokenizerWrapper>, TokenizerError> {
    let gpt2 = byte_level::ByteLevel::new(false, false, true);
    let split = |pattern: &str| {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(failed)?;
        Ok(vec![split.into(), byte_level::ByteLevel::new(false, false, false).into()])
    };
    match pre_tokenizer {
        PreTokenizer::DigitsThenGpt2 => Ok(vec![Digits::new(true).into(), gpt2.into()]),
        PreTokenizer::Gpt2 => Ok(vec![gpt2.into()]),
        PreTokenizer::Llama3 => split(LLAMA3),
        PreTokenizer::Qwen2 => split(QWEN2),
    }
}
