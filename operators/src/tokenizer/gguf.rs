//! The text side of a GGUF file: tokenizer tables, chat template, special tokens.

use tidemill_kernels::gguf::Gguf;

use super::byte_level::{ByteLevel, PreTokenizer};
use super::sentence_piece::SentencePiece;
use super::{AddedKind, AddedToken, TextModelError, Tokenizer};
use crate::chat::ChatTemplate;

/// GGUF's token types that are control tokens or were added as whole tokens.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Rebuilds tokenizer and chat template from a model file's metadata.
pub fn text_of(gguf: &Gguf) -> Result<(Tokenizer, ChatTemplate), TextModelError> {
    let kind = gguf.str("tokenizer.ggml.model")?;
    let tokens = gguf.str_array("tokenizer.ggml.tokens")?;
    let special = |key: &str| -> Result<Option<u32>, TextModelError> {
        if !gguf.has(key) {
            return Ok(None);
        }
        let id = gguf.u32(key)?;
        if id as usize >= tokens.len() {
            return Err(TextModelError::SpecialToken { id });
        }
        Ok(Some(id))
    };
    let bos = special("tokenizer.ggml.bos_token_id")?;
    let eos = special("tokenizer.ggml.eos_token_id")?;
    let tokenizer = match kind {
        "gpt2" => byte_level(gguf, tokens, bos)?,
        "llama" => sentence_piece(gguf, tokens, bos)?,
        _ => return Err(TextModelError::UnknownTokenizer(kind.to_owned())),
    };
    let text = |id: Option<u32>| id.map(|id| tokens[id as usize].clone()).unwrap_or_default();
    let chat = match gguf.has("tokenizer.chat_template") {
        true => ChatTemplate::new(gguf.str("tokenizer.chat_template")?.to_owned(), text(bos), text(eos))
            .map_err(TextModelError::ChatTemplate)?,
        false => ChatTemplate::plain(),
    };
    Ok((tokenizer, chat))
}

fn byte_level(gguf: &Gguf, tokens: &[String], bos: Option<u32>) -> Result<Tokenizer, TextModelError> {
    let pre_tokenizer = pre_tokenizer(gguf)?;
    let tables = ByteLevel {
        pre_tokenizer,
        tokens: tokens.to_vec(),
        merges: gguf.str_array("tokenizer.ggml.merges")?.to_vec(),
        added: added(gguf, tokens, AddedKind::Markup)?,
        bos: if adds_bos(gguf, pre_tokenizer == PreTokenizer::Llama3)? { bos } else { None },
    };
    Ok(tables.build()?)
}

fn sentence_piece(gguf: &Gguf, tokens: &[String], bos: Option<u32>) -> Result<Tokenizer, TextModelError> {
    const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
    let mut pieces = tokens.to_vec();
    let mut scores = gguf.f32_array("tokenizer.ggml.scores")?.to_vec();
    let mut added = added(gguf, tokens, AddedKind::Text)?;
    for token in added.iter_mut().filter(|token| token.kind == AddedKind::Text) {
        // Runs of spaces are merged like other pieces, before them; files write them with plain spaces.
        token.text = token.text.replace(' ', "▁");
        let id = token.id as usize;
        pieces[id].clone_from(&token.text);
        if let Some(score) = scores.get_mut(id) {
            *score = f32::INFINITY;
        }
    }
    let tables = SentencePiece {
        pieces,
        scores,
        added,
        bos: if adds_bos(gguf, true)? { bos } else { None },
        add_space_prefix: !gguf.has(ADD_SPACE_PREFIX) || gguf.bool(ADD_SPACE_PREFIX)?,
    };
    Ok(tables.build()?)
}

/// Control tokens, and user-defined ones as `kind`.
fn added(gguf: &Gguf, tokens: &[String], kind: AddedKind) -> Result<Vec<AddedToken>, TextModelError> {
    let types = gguf.i32_array("tokenizer.ggml.token_type")?;
    let added = (0..).zip(tokens).zip(types).filter_map(|((id, text), token_type)| {
        let kind = match *token_type {
            CONTROL => AddedKind::Control,
            USER_DEFINED => kind,
            _ => return None,
        };
        Some(AddedToken { id, text: text.clone(), kind })
    });
    Ok(added.collect())
}

fn adds_bos(gguf: &Gguf, default: bool) -> Result<bool, TextModelError> {
    const KEY: &str = "tokenizer.ggml.add_bos_token";
    Ok(if gguf.has(KEY) { gguf.bool(KEY)? } else { default })
}

fn pre_tokenizer(gguf: &Gguf) -> Result<PreTokenizer, TextModelError> {
    let name = if gguf.has("tokenizer.ggml.pre") { gguf.str("tokenizer.ggml.pre")? } else { "default" };
    match name {
        "smollm" | "starcoder" => Ok(PreTokenizer::DigitsThenGpt2),
        "default" | "gpt-2" => Ok(PreTokenizer::Gpt2),
        "llama-bpe" | "llama3" | "llama-v3" => Ok(PreTokenizer::Llama3),
        "qwen2" | "deepseek-r1-qwen" => Ok(PreTokenizer::Qwen2),
        _ => Err(TextModelError::UnknownPreTokenizer(name.to_owned())),
    }
}
