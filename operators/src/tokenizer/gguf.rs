//! The text side of a GGUF file: tokenizer tables, chat template, special tokens.

use tidemill_kernels::gguf::{Gguf, GgufError};

use super::{PreTokenizer, Tokenizer, TokenizerError, TokenizerTables};
use crate::chat::ChatTemplate;

/// GGUF's token types that are control tokens or were added as whole tokens.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

#[derive(Debug, thiserror::Error)]
pub enum TextModelError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error("model file has a tokenizer of kind {0:?}, known is \"gpt2\"")]
    UnknownTokenizer(String),
    #[error(
        "model file has the pre-tokenizer {0:?}, known are \"smollm\", \"default\", \"gpt-2\" and \"starcoder\""
    )]
    UnknownPreTokenizer(String),
    #[error(transparent)]
    Tables(#[from] TokenizerError),
    #[error("model file has special token {id} beyond its vocabulary")]
    SpecialToken { id: u32 },
    #[error("model file has no chat template")]
    NoChatTemplate,
    #[error("the model's chat template is not valid Jinja: {0}")]
    ChatTemplate(minijinja::Error),
}

/// Rebuilds tokenizer and chat template from a model file's metadata.
pub fn text_of(gguf: &Gguf) -> Result<(Tokenizer, ChatTemplate), TextModelError> {
    let kind = gguf.str("tokenizer.ggml.model")?;
    if kind != "gpt2" {
        return Err(TextModelError::UnknownTokenizer(kind.to_owned()));
    }
    let tokens = gguf.str_array("tokenizer.ggml.tokens")?.to_vec();
    let types = gguf.i32_array("tokenizer.ggml.token_type")?;
    let control_ids = (0..)
        .zip(types)
        .filter(|&(_, kind)| matches!(*kind, CONTROL | USER_DEFINED))
        .map(|(id, _)| id)
        .collect();
    let special = |key: &str| -> Result<String, TextModelError> {
        if !gguf.has(key) {
            return Ok(String::new());
        }
        let id = gguf.u32(key)?;
        tokens.get(id as usize).cloned().ok_or(TextModelError::SpecialToken { id })
    };
    let (bos, eos) = (special("tokenizer.ggml.bos_token_id")?, special("tokenizer.ggml.eos_token_id")?);
    if !gguf.has("tokenizer.chat_template") {
        return Err(TextModelError::NoChatTemplate);
    }
    let chat = ChatTemplate::new(gguf.str("tokenizer.chat_template")?.to_owned(), bos, eos)
        .map_err(TextModelError::ChatTemplate)?;
    let tables = TokenizerTables {
        pre_tokenizer: pre_tokenizer(gguf)?,
        tokens,
        merges: gguf.str_array("tokenizer.ggml.merges")?.to_vec(),
        control_ids,
    };
    Ok((Tokenizer::new(tables)?, chat))
}

fn pre_tokenizer(gguf: &Gguf) -> Result<PreTokenizer, TextModelError> {
    let name = if gguf.has("tokenizer.ggml.pre") { gguf.str("tokenizer.ggml.pre")? } else { "default" };
    match name {
        "smollm" | "starcoder" => Ok(PreTokenizer::DigitsThenGpt2),
        "default" | "gpt-2" => Ok(PreTokenizer::Gpt2),
        _ => Err(TextModelError::UnknownPreTokenizer(name.to_owned())),
    }
}
