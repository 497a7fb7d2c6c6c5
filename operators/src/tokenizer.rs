//! Text to token ids and back, with the tables a model file or a Hugging Face folder carries.
//!
//! Control tokens come from the chat template only. A document that contains the text of one (`<|im_end|>`)
//! gets its plain pieces instead: [`Tokenizer::shield`] marks such text before the template is rendered, and
//! [`Tokenizer::encode`] takes the mark away again. Everything else gives the ids of Hugging Face's
//! tokenizers, which does the byte-pair encoding here.
//!
//! Added tokens are found here and not by that library, which would find them in documents too. A byte symbol that
//! the vocabulary lacks is dropped, as Hugging Face does where no unknown token is set.

mod byte_level;
#[cfg(test)]
mod fuzz;
pub mod gguf;
pub mod hugging_face;
mod sentence_piece;
mod shield;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use aho_corasick::{AhoCorasick, BuildError, MatchKind};
use tidemill_kernels::gguf::GgufError;
use tokenizers::Decoder;

use self::byte_level::{ByteLevel, PreTokenizer};
use self::shield::{MAX_TOKENS, Shield};

/// A token that stands for its text wherever that is written, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
struct AddedToken {
    id: u32,
    text: String,
    kind: AddedKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AddedKind {
    /// Structure of a conversation: prints nothing, documents cannot write it.
    Control,
    /// Structure of an answer (`<think>`): prints, but documents cannot write it.
    Markup,
    /// Text like any other, such as a run of line breaks.
    Text,
}

/// What the sources of tokenizers come down to.
struct Parts {
    /// Without added tokens.
    core: tokenizers::Tokenizer,
    added: Vec<AddedToken>,
    /// For text that begins a prompt, where that is encoded in another way.
    first: Option<tokenizers::Tokenizer>,
    /// One more than the largest id of `core`.
    num_ids: u32,
    /// The token every prompt begins with, if there is one.
    bos: Option<u32>,
    /// No token stands for more bytes of text.
    max_token_bytes: usize,
    /// By byte, where every byte is a token and nothing is merged.
    bytes: Option<Box<[u32; 256]>>,
}

#[derive(Debug, thiserror::Error)]
#[error("tokenizer tables are not usable: {0}")]
pub struct TokenizerError(String);

/// Why a model has no usable text side.
#[derive(Debug, thiserror::Error)]
pub enum TextModelError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("cannot read tokenizer file {path:?}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("tokenizer file {path:?} is not readable: {what}")]
    Invalid { path: PathBuf, what: String },
    #[error("model file has a tokenizer of kind {0:?}, known are \"gpt2\" and \"llama\"")]
    UnknownTokenizer(String),
    #[error(
        "model file has the pre-tokenizer {0:?}, known are \"smollm\", \"default\", \"gpt-2\", \"starcoder\", \
        \"llama-bpe\" and \"qwen2\""
    )]
    UnknownPreTokenizer(String),
    #[error(transparent)]
    Tables(#[from] TokenizerError),
    #[error("model file has special token {id} beyond its vocabulary")]
    SpecialToken { id: u32 },
    #[error("the model's chat template is not valid Jinja: {0}")]
    ChatTemplate(minijinja::Error),
}

/// A loaded tokenizer; cheap to share, safe to use from many threads.
pub struct Tokenizer {
    parts: Parts,
    /// Finds the added tokens, the longest first; pattern numbers are those of `parts.added`.
    matcher: AhoCorasick,
    shield: Shield,
    /// By id, what added tokens print.
    printed: BTreeMap<u32, String>,
}

impl Tokenizer {
    fn new(mut parts: Parts) -> Result<Self, TokenizerError> {
        parts.added.retain(|token| !token.text.is_empty());
        let shielded = parts.added.iter().filter(|token| token.kind != AddedKind::Text);
        let shielded: Vec<String> = shielded.map(|token| token.text.clone()).collect();
        if shielded.len() > MAX_TOKENS {
            return Err(TokenizerError(format!("more than {MAX_TOKENS} control tokens")));
        }
        let failed = |error: BuildError| TokenizerError(error.to_string());
        let texts: Vec<String> = parts.added.iter().map(|token| token.text.clone()).collect();
        let printed = |token: &AddedToken| match token.kind {
            AddedKind::Control => (token.id, String::new()),
            AddedKind::Markup | AddedKind::Text => (token.id, token.text.clone()),
        };
        Ok(Self {
            matcher: matcher(&texts).map_err(failed)?,
            shield: Shield::new(shielded).map_err(failed)?,
            printed: parts.added.iter().map(printed).collect(),
            parts,
        })
    }

    /// One token a byte, for the fake model.
    pub fn bytes(control_tokens: &[&str]) -> Self {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut tokens: Vec<String> = alphabet.into_iter().map(String::from).collect();
        tokens.sort();
        let ids = tokens.len() as u32..;
        let added = ids.zip(control_tokens).map(|(id, &text)| AddedToken {
            id,
            text: text.to_owned(),
            kind: AddedKind::Control,
        });
        let added = added.collect();
        tokens.extend(control_tokens.iter().map(|&token| token.to_owned()));
        let tables =
            ByteLevel { pre_tokenizer: PreTokenizer::Gpt2, tokens, merges: Vec::new(), added, bos: None };
        tables.build().expect("the byte alphabet is a vocabulary")
    }

    /// The token that stands before every prompt, if the model wants one.
    pub fn bos(&self) -> Option<u32> {
        self.parts.bos
    }

    /// For a model of so many token ids: added tokens beyond them become plain text.
    ///
    /// Some folders name tokens that only a larger sibling of their model has.
    pub fn fit(mut self, vocab_size: u32) -> Result<Self, TokenizerError> {
        if self.parts.num_ids > vocab_size {
            let num_ids = self.parts.num_ids;
            let what = format!("they have {num_ids} token ids, but the model knows {vocab_size}");
            return Err(TokenizerError(what));
        }
        if self.parts.added.iter().all(|token| token.id < vocab_size) {
            return Ok(self);
        }
        self.parts.added.retain(|token| token.id < vocab_size);
        self.parts.bos = self.parts.bos.filter(|&bos| bos < vocab_size);
        Self::new(self.parts)
    }

    /// Marks the text of control tokens in text that comes from outside.
    pub fn shield<'a>(&self, text: &'a str) -> Cow<'a, str> {
        self.shield.shield(text)
    }

    /// Token ids of a rendered prompt; text of control tokens becomes their ids unless shielded. The token that the
    /// model wants first stands first, once, whether or not the chat template writes it.
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut start = 0;
        for found in self.matcher.find_iter(prompt) {
            self.encode_plain(prompt, start..found.start(), &mut ids)?;
            ids.push(self.parts.added[found.pattern().as_usize()].id);
            start = found.end();
        }
        self.encode_plain(prompt, start..prompt.len(), &mut ids)?;
        match self.parts.bos {
            Some(bos) if ids.first().is_some_and(|&first| first != bos) => ids.insert(0, bos),
            _ => {}
        }
        Ok(ids)
    }

    /// Encodes a part of the prompt that has no added token.
    fn encode_plain(
        &self,
        prompt: &str,
        part: Range<usize>,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        if !part.is_empty() {
            let first = self.parts.first.as_ref().filter(|_| part.start == 0);
            let text = self.shield.unshield(&prompt[part]);
            if let Some(bytes) = &self.parts.bytes {
                ids.extend(text.bytes().map(|byte| bytes[usize::from(byte)]));
                return Ok(());
            }
            let core = first.unwrap_or(&self.parts.core);
            let encoding = core.encode_fast(text.as_ref(), false).map_err(failed)?;
            ids.extend_from_slice(encoding.get_ids());
        }
        Ok(())
    }

    /// Text of an answer; control tokens print nothing, invalid UTF-8 becomes U+FFFD.
    ///
    /// The answer is decoded as a whole: a character may be spread over several tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let text = |id: &u32| match self.printed.get(id) {
            Some(text) => Some(text.clone()).filter(|text| !text.is_empty()),
            None => self.parts.core.id_to_token(*id),
        };
        let tokens: Vec<String> = ids.iter().filter_map(text).collect();
        match self.parts.core.get_decoder() {
            Some(decoder) => decoder.decode(tokens).map_err(failed),
            None => Ok(tokens.concat()),
        }
    }

    /// No token stands for more bytes than this, so a text of `n` bytes has at least `n / max` tokens.
    pub fn max_token_bytes(&self) -> usize {
        self.parts.max_token_bytes
    }

    /// Number of different tokens.
    pub fn vocab_size(&self) -> usize {
        let core = &self.parts.core;
        let is_new = |token: &&AddedToken| core.id_to_token(token.id).is_none();
        core.get_vocab_size(false) + self.parts.added.iter().filter(is_new).count()
    }
}

/// Finds any of the texts, leftmost first, then longest.
fn matcher(texts: &[String]) -> Result<AhoCorasick, BuildError> {
    AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts)
}

fn failed(error: tokenizers::Error) -> TokenizerError {
    TokenizerError(error.to_string())
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}
