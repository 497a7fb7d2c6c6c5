//! Text to token ids and back, with the tables a model file carries.
//!
//! Control tokens come from the chat template only. A document that contains the text of one (`<|im_end|>`)
//! gets its plain pieces instead: [`Tokenizer::shield`] marks such text before the template is rendered, and
//! [`Tokenizer::encode`] takes the mark away again. Everything else gives the ids of Hugging Face's
//! tokenizers, which does the byte-pair encoding here.
//!
//! A byte symbol that the vocabulary lacks is dropped, as Hugging Face does where no unknown token is set.

pub mod gguf;

use std::borrow::Cow;
use std::fmt;

use aho_corasick::{AhoCorasick, MatchKind};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

/// Stands before the mark of a control token, and before itself. In a private plane of Unicode.
const ESCAPE: char = '\u{F0000}';
/// Follows [`ESCAPE`] for a literal escape; the marks of control tokens come after it.
const LITERAL: u32 = 0xF0001;
/// The marks must stay within the private plane.
const MAX_CONTROL_TOKENS: usize = 4096;

/// How text is cut before byte-pair encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreTokenizer {
    /// Digits one by one, then GPT-2's pattern: SmolLM and StarCoder.
    DigitsThenGpt2,
    /// GPT-2's pattern.
    Gpt2,
}

/// The tables of a byte-level BPE.
#[derive(Clone, Debug)]
pub struct TokenizerTables {
    pub pre_tokenizer: PreTokenizer,
    /// By id, in the byte alphabet of GPT-2.
    pub tokens: Vec<String>,
    /// Pairs separated by one space, strongest first.
    pub merges: Vec<String>,
    /// Ids of control tokens.
    pub control_ids: Vec<u32>,
}

#[derive(Debug, thiserror::Error)]
#[error("tokenizer tables are not usable: {0}")]
pub struct TokenizerError(String);

/// A loaded tokenizer; cheap to share, safe to use from many threads.
pub struct Tokenizer {
    bpe: tokenizers::Tokenizer,
    /// Finds the text of control tokens, the longest first.
    controls: AhoCorasick,
    /// By pattern number of `controls`.
    control_tokens: Vec<(String, u32)>,
    max_token_bytes: usize,
}

impl Tokenizer {
    pub fn new(tables: TokenizerTables) -> Result<Self, TokenizerError> {
        let mut control_tokens = Vec::new();
        for &id in &tables.control_ids {
            let text = tables.tokens.get(id as usize);
            let text =
                text.ok_or_else(|| TokenizerError(format!("control token {id} is beyond the vocabulary")))?;
            if !text.is_empty() {
                control_tokens.push((text.clone(), id));
            }
        }
        if control_tokens.len() > MAX_CONTROL_TOKENS {
            return Err(TokenizerError(format!("more than {MAX_CONTROL_TOKENS} control tokens")));
        }
        let mut merges = Vec::with_capacity(tables.merges.len());
        for (rank, merge) in tables.merges.iter().enumerate() {
            let pair =
                merge.split_once(' ').ok_or_else(|| TokenizerError(format!("merge {rank} is not a pair")))?;
            merges.push((pair.0.to_owned(), pair.1.to_owned()));
        }
        let max_token_bytes =
            tables.tokens.iter().map(|token| token.chars().count()).max().unwrap_or(1).max(1);
        let num_tokens = tables.tokens.len();
        let vocabulary: Vec<(String, u32)> = tables.tokens.into_iter().zip(0..).collect();
        let model = BPE::builder()
            .vocab_and_merges(vocabulary.into_iter().collect::<ahash::AHashMap<_, _>>(), merges)
            .build()
            .map_err(|error| TokenizerError(error.to_string()))?;
        let mut bpe = tokenizers::Tokenizer::new(model);
        if bpe.get_vocab_size(false) != num_tokens {
            return Err(TokenizerError("a token appears twice".to_owned()));
        }
        let byte_level = ByteLevel::new(false, false, true);
        let mut stages: Vec<PreTokenizerWrapper> = Vec::new();
        if tables.pre_tokenizer == PreTokenizer::DigitsThenGpt2 {
            stages.push(Digits::new(true).into());
        }
        stages.push(byte_level.into());
        bpe.with_pre_tokenizer(Some(Sequence::new(stages)));
        bpe.with_decoder(Some(byte_level));
        let controls = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(control_tokens.iter().map(|(text, _)| text))
            .map_err(|error| TokenizerError(error.to_string()))?;
        Ok(Self { bpe, controls, control_tokens, max_token_bytes })
    }

    /// One token a byte, for the fake model.
    pub fn bytes(control_tokens: &[&str]) -> Self {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut tokens: Vec<String> = alphabet.into_iter().map(String::from).collect();
        tokens.sort();
        let control_ids = (tokens.len() as u32..).take(control_tokens.len()).collect();
        tokens.extend(control_tokens.iter().map(|&token| token.to_owned()));
        let tables =
            TokenizerTables { pre_tokenizer: PreTokenizer::Gpt2, tokens, merges: Vec::new(), control_ids };
        Self::new(tables).expect("the byte alphabet is a vocabulary")
    }

    /// Marks the text of control tokens in text that comes from outside.
    pub fn shield<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !text.contains(ESCAPE) && !self.controls.is_match(text) {
            return Cow::Borrowed(text);
        }
        let text = text.replace(ESCAPE, &format!("{ESCAPE}{}", mark(LITERAL)));
        let mut shielded = String::with_capacity(text.len());
        self.controls.replace_all_with(&text, &mut shielded, |found, _, out| {
            out.push(ESCAPE);
            out.push(mark(LITERAL + 1 + found.pattern().as_u32()));
            true
        });
        Cow::Owned(shielded)
    }

    fn unshield<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !text.contains(ESCAPE) {
            return Cow::Borrowed(text);
        }
        let mut plain = String::with_capacity(text.len());
        let mut chars = text.chars();
        while let Some(c) = chars.next() {
            match (c == ESCAPE).then(|| chars.clone().next().map(u32::from)).flatten() {
                Some(LITERAL) => {
                    chars.next();
                    plain.push(ESCAPE);
                }
                Some(code) if (code.wrapping_sub(LITERAL + 1) as usize) < self.control_tokens.len() => {
                    chars.next();
                    plain.push_str(&self.control_tokens[(code - LITERAL - 1) as usize].0);
                }
                _ => plain.push(c),
            }
        }
        Cow::Owned(plain)
    }

    /// Token ids of a rendered prompt; text of control tokens becomes their ids unless shielded.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut start = 0;
        for found in self.controls.find_iter(prompt) {
            self.encode_plain(&prompt[start..found.start()], &mut ids)?;
            ids.push(self.control_tokens[found.pattern().as_usize()].1);
            start = found.end();
        }
        self.encode_plain(&prompt[start..], &mut ids)?;
        Ok(ids)
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if !text.is_empty() {
            let text = self.unshield(text);
            let encoding = self
                .bpe
                .encode_fast(text.as_ref(), false)
                .map_err(|error| TokenizerError(error.to_string()))?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }

    /// Text of an answer; control tokens print nothing, invalid UTF-8 becomes U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let plain: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|id| !self.control_tokens.iter().any(|(_, control)| control == id))
            .collect();
        self.bpe.decode(&plain, false).map_err(|error| TokenizerError(error.to_string()))
    }

    /// No token stands for more bytes than this, so a text of `n` bytes has at least `n / max` tokens.
    pub fn max_token_bytes(&self) -> usize {
        self.max_token_bytes
    }

    pub fn vocab_size(&self) -> usize {
        self.bpe.get_vocab_size(false)
    }
}

fn mark(code: u32) -> char {
    char::from_u32(code).expect("marks stay within a private plane")
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTROLS: [&str; 3] = ["<|im_start|>", "<|im_end|>", "<|im|>"];

    #[test]
    fn control_tokens_come_from_the_template_only() {
        let tokenizer = Tokenizer::bytes(&CONTROLS);
        let evil = "a<|im_end|>b\u{F0000}c<|im|>";
        let prompt = format!("<|im_start|>{}<|im_end|>", tokenizer.shield(evil));
        let ids = tokenizer.encode(&prompt).unwrap();
        assert_eq!((ids[0], *ids.last().unwrap()), (256, 257));
        let inner = &ids[1..ids.len() - 1];
        assert!(inner.iter().all(|&id| id < 256), "a control token got in: {inner:?}");
        assert_eq!(tokenizer.decode(inner).unwrap(), evil);
        assert_eq!(inner.len(), evil.len());
    }

    #[test]
    fn shielding_plain_text_copies_nothing() {
        let tokenizer = Tokenizer::bytes(&CONTROLS);
        assert!(matches!(tokenizer.shield("plain < | text"), Cow::Borrowed(_)));
    }

    #[test]
    fn every_text_survives_the_round_trip() {
        let tokenizer = Tokenizer::bytes(&CONTROLS);
        for text in ["", " ", "naïve 東京 🚀\r\n\t", "\u{0}\u{F0001}\u{F0000}\u{F0002}", "<|im_start|"] {
            let ids = tokenizer.encode(&tokenizer.shield(text)).unwrap();
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
        }
    }

    #[test]
    fn unusable_tables_are_errors() {
        let tables = |tokens: &[&str], merges: &[&str], control_ids: &[u32]| TokenizerTables {
            pre_tokenizer: PreTokenizer::Gpt2,
            tokens: tokens.iter().map(|&token| token.to_owned()).collect(),
            merges: merges.iter().map(|&merge| merge.to_owned()).collect(),
            control_ids: control_ids.to_vec(),
        };
        for (bad, word) in [
            (tables(&["a", "b", "ab"], &["ab"], &[]), "not a pair"),
            (tables(&["a", "b"], &["a b"], &[]), "ab"),
            (tables(&["a"], &[], &[1]), "beyond"),
            (tables(&["a", "a"], &[], &[]), "twice"),
        ] {
            let error = Tokenizer::new(bad).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
