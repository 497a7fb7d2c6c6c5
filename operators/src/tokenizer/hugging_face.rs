//! The text side of a Hugging Face folder: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
//!
//! The tokenizers library reads its own format; only the added tokens and the token that every prompt begins with are
//! taken over from it. Absent: folders with `tokenizer.model` only, and models other than byte-pair encoding.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::models::ModelWrapper;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::byte_level::MAX_COMPOSED;
use super::{AddedKind, AddedToken, Parts, TextModelError, Tokenizer};
use crate::chat::ChatTemplate;

/// Gemma's tables, the largest around, have 33 megabytes.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// `tokenizer.json`; the parts are read by the tokenizers library, which wants them to be well-formed.
#[derive(Deserialize)]
struct TokenizerFile<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

/// The switches of a BPE model.
#[derive(Deserialize)]
struct Model {
    dropout: Option<f32>,
    #[serde(default)]
    byte_fallback: bool,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
struct AddedEntry {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

/// `tokenizer_config.json`, as far as it is needed.
#[derive(Default, Deserialize)]
struct Config {
    add_bos_token: Option<bool>,
    bos_token: Option<Special>,
    eos_token: Option<Special>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Special {
    Text(String),
    Token { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// Reads tokenizer and chat template of a folder.
pub fn text_of_folder(folder: &Path) -> Result<(Tokenizer, ChatTemplate), TextModelError> {
    let path = folder.join("tokenizer_config.json");
    let config: Config = match read(&path)? {
        Some(text) => serde_json::from_str(&text).map_err(|error| invalid(&path, &error))?,
        None => Config::default(),
    };
    let text_of = |token: &Option<Special>| match token {
        Some(Special::Text(text) | Special::Token { content: text }) => text.clone(),
        None => String::new(),
    };
    let (bos, eos) = (text_of(&config.bos_token), text_of(&config.eos_token));
    let template = match read(&folder.join("chat_template.jinja"))? {
        Some(template) => Some(template),
        None => config.chat_template.and_then(Templates::default_one),
    };
    let chat = match template {
        Some(template) => {
            ChatTemplate::new(template, bos.clone(), eos).map_err(TextModelError::ChatTemplate)?
        }
        None => ChatTemplate::plain(),
    };
    let tokenizer = tokenizer(&folder.join("tokenizer.json"), &bos, config.add_bos_token)?;
    Ok((tokenizer, chat))
}

impl Templates {
    fn default_one(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(templates) => {
                templates.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        }
    }
}

fn tokenizer(path: &Path, bos: &str, add_bos: Option<bool>) -> Result<Tokenizer, TextModelError> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let text = read(path)?.ok_or_else(|| TextModelError::Io { path: path.to_owned(), source: missing() })?;
    parse(path, &text, bos, add_bos)
}

pub(super) fn parse(
    path: &Path,
    text: &str,
    bos: &str,
    add_bos: Option<bool>,
) -> Result<Tokenizer, TextModelError> {
    let mut file: TokenizerFile = serde_json::from_str(text).map_err(|error| invalid(path, &error))?;
    let parsed = serde_json::from_str(file.model.get());
    let Model { dropout, byte_fallback, continuing_subword_prefix, end_of_word_suffix } =
        parsed.map_err(|error| invalid(path, &error))?;
    let is_set = |affix: Option<String>| affix.is_some_and(|affix| !affix.is_empty());
    if is_set(continuing_subword_prefix)
        || is_set(end_of_word_suffix)
        || dropout.is_some_and(|share| share > 0.0)
    {
        return Err(invalid(path, &"its model uses affixes or dropout, which are not supported"));
    }
    let ModelWrapper::BPE(model) =
        serde_json::from_str(file.model.get()).map_err(|error| invalid(path, &error))?
    else {
        return Err(invalid(path, &"its model is not BPE"));
    };
    let vocabulary = model.get_vocab();
    let num_ids = vocabulary.values().max().map_or(0, |id| id.saturating_add(1));
    let num_bytes = |token: &String| if byte_fallback { token.len() } else { token.chars().count() };
    let longest = vocabulary.keys().map(num_bytes).max().unwrap_or(1).max(1);
    let mut core = tokenizers::Tokenizer::new(model);
    let max_token_bytes = longest * MAX_COMPOSED;
    core.with_normalizer(part::<NormalizerWrapper>(path, "normalizers", file.normalizer, &|part, kind| {
        matches!(kind, "NFC" | "Prepend") || kind == "Replace" && part["pattern"]["String"] == " "
    })?);
    core.with_decoder(part::<DecoderWrapper>(path, "decoders", file.decoder, &|part, kind| {
        matches!(kind, "ByteLevel" | "Replace" | "ByteFallback" | "Fuse")
            || kind == "Strip" && part["stop"] == 0
    })?);
    let is_single = file.pre_tokenizer["type"] == "Metaspace";
    let pre_tokenizer = |value| {
        part::<PreTokenizerWrapper>(path, "pretokenizers", value, &|part, kind| {
            matches!(kind, "ByteLevel" | "Split" | "Digits")
                || kind == "Metaspace" && (is_single || part["prepend_scheme"] != "first")
        })
    };
    // Text that begins a prompt may get a space that text after an added token does not get.
    let first = match file.pre_tokenizer["prepend_scheme"] == "first" {
        true => {
            let mut first = core.clone();
            first.with_pre_tokenizer(pre_tokenizer(file.pre_tokenizer.clone())?);
            file.pre_tokenizer["prepend_scheme"] = "never".into();
            Some(first)
        }
        false => None,
    };
    core.with_pre_tokenizer(pre_tokenizer(file.pre_tokenizer)?);
    let added = added(path, file.added_tokens, byte_fallback)?;
    let ids: BTreeMap<&str, u32> = added.iter().map(|token| (token.text.as_str(), token.id)).collect();
    let bos_id = ids.get(bos).copied().or_else(|| core.token_to_id(bos));
    let bos = bos_id.filter(|_| add_bos.unwrap_or_else(|| begins_with(&file.post_processor, bos)));
    Ok(Tokenizer::new(Parts { core, first, num_ids, added, bos, max_token_bytes, bytes: None })?)
}

/// Reads a part, or a list of parts under `list`, of the kinds that are known to give no surprise: normalizers that
/// change the length of a text by little, decoders that do not panic.
fn part<T: DeserializeOwned>(
    path: &Path,
    list: &str,
    value: Value,
    is_known: &dyn Fn(&Value, &str) -> bool,
) -> Result<Option<T>, TextModelError> {
    let kind = |part: &Value| part["type"].as_str().unwrap_or_default().to_owned();
    let parts = match kind(&value) == "Sequence" {
        true => value[list].as_array().cloned().unwrap_or_default(),
        false => Vec::from_iter((!value.is_null()).then(|| value.clone())),
    };
    if let Some(unknown) = parts.iter().find(|part| !is_known(part, &kind(part))) {
        return Err(invalid(path, &format!("it has {unknown} among its {list}, which is not supported")));
    }
    serde_json::from_value(value).map_err(|error| invalid(path, &error))
}

/// Whether a post-processor puts the token before a text.
fn begins_with(processor: &Value, bos: &str) -> bool {
    match processor["type"].as_str() {
        Some("TemplateProcessing") => processor["single"][0]["SpecialToken"]["id"] == bos,
        Some("Sequence") => {
            let processors = processor["processors"].as_array();
            processors.is_some_and(|all| all.iter().any(|processor| begins_with(processor, bos)))
        }
        _ => false,
    }
}

fn added(
    path: &Path,
    entries: Vec<AddedEntry>,
    byte_fallback: bool,
) -> Result<Vec<AddedToken>, TextModelError> {
    let mut added = Vec::with_capacity(entries.len());
    for entry in entries {
        if entry.single_word || entry.lstrip || entry.rstrip {
            let what =
                format!("the token {:?} takes its neighbors with it, which is not supported", entry.content);
            return Err(invalid(path, &what));
        }
        // As in GGUF: what SentencePiece was given as whole pieces is text, what others were given is markup.
        let kind = match (entry.special, byte_fallback) {
            (true, _) => AddedKind::Control,
            (false, true) => AddedKind::Text,
            (false, false) => AddedKind::Markup,
        };
        added.push(AddedToken { id: entry.id, text: entry.content, kind });
    }
    Ok(added)
}

/// Text of a file, none if there is no such file.
fn read(path: &Path) -> Result<Option<String>, TextModelError> {
    let io_error = |source| TextModelError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io_error)?,
    };
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(io_error)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(invalid(path, &format!("it has more than {MAX_FILE_BYTES} bytes")));
    }
    Ok(Some(text))
}

fn invalid(path: &Path, what: &dyn std::fmt::Display) -> TextModelError {
    TextModelError::Invalid { path: path.to_owned(), what: what.to_string() }
}
