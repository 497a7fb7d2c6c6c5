//! SentencePiece's byte-pair encoding: spaces are written `▁`, whole lines are merged by the scores of the pieces, and
//! what no piece covers is spelled in bytes.
//!
//! The merges are rebuilt from the scores as Hugging Face does: every way to cut a piece in two pieces is a merge, ranked
//! by the score of the whole. Absent: the unigram model, whose scores mean something else, and its normalization.

use ahash::AHashMap;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace};

use super::{AddedToken, Parts, Tokenizer, TokenizerError, failed};

const SPACE: &str = "▁";
/// A piece of `n` characters has `n - 1` merges.
const MAX_PIECE_CHARS: usize = 1024;

/// The tables of a SentencePiece BPE.
pub(super) struct SentencePiece {
    /// By id, with `▁` for a space.
    pub(super) pieces: Vec<String>,
    /// By id; the larger, the earlier a piece is made.
    pub(super) scores: Vec<f32>,
    pub(super) added: Vec<AddedToken>,
    pub(super) bos: Option<u32>,
    /// Whether text begins with a space that is not written.
    pub(super) add_space_prefix: bool,
}

impl SentencePiece {
    pub(super) fn build(self) -> Result<Tokenizer, TokenizerError> {
        if self.scores.len() != self.pieces.len() {
            return Err(TokenizerError(format!(
                "{} scores of {} pieces",
                self.scores.len(),
                self.pieces.len()
            )));
        }
        if let Some(piece) = self.pieces.iter().find(|piece| piece.chars().count() > MAX_PIECE_CHARS) {
            return Err(TokenizerError(format!("a piece has {} bytes", piece.len())));
        }
        let vocabulary: AHashMap<&str, u32> = self.pieces.iter().map(String::as_str).zip(0..).collect();
        if vocabulary.len() != self.pieces.len() {
            return Err(TokenizerError("a token appears twice".to_owned()));
        }
        if let Some(byte) = (0..=u8::MAX).find(|byte| !vocabulary.contains_key(byte_piece(*byte).as_str())) {
            return Err(TokenizerError(format!("no token stands for the byte {byte:#04X}")));
        }
        let merges = merges(&vocabulary, &self.pieces, &self.scores);
        let plain_len = |piece: &String| piece.replace(SPACE, " ").len();
        let max_token_bytes = self.pieces.iter().map(plain_len).max().unwrap_or(1);
        let num_ids = self.pieces.len() as u32;
        let model = BPE::builder()
            .vocab_and_merges(self.pieces.into_iter().zip(0..).collect::<AHashMap<_, _>>(), merges)
            .byte_fallback(true)
            .build()
            .map_err(failed)?;
        let mut core = tokenizers::Tokenizer::new(model);
        let spaces: NormalizerWrapper = Replace::new(" ", SPACE).map_err(failed)?.into();
        let mut decoders: Vec<DecoderWrapper> = vec![
            Replace::new(SPACE, " ").map_err(failed)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
        ];
        if self.add_space_prefix {
            let prefix = Prepend::new(SPACE.to_owned()).into();
            core.with_normalizer(Some(Normalizers::new(vec![prefix, spaces])));
            decoders.push(Strip::new(' ', 1, 0).into());
        } else {
            core.with_normalizer(Some(spaces));
        }
        core.with_decoder(Some(Sequence::new(decoders)));
        Tokenizer::new(Parts {
            core,
            first: None,
            num_ids,
            added: self.added,
            bos: self.bos,
            max_token_bytes,
            bytes: None,
        })
    }
}

fn byte_piece(byte: u8) -> String {
    format!("<{byte:#04X}>")
}

/// Pairs of pieces that make a piece, best first: by the score of the whole, then long left parts before short ones.
fn merges(vocabulary: &AHashMap<&str, u32>, pieces: &[String], scores: &[f32]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (piece, &score) in pieces.iter().zip(scores) {
        let cuts = piece.char_indices().skip(1).map(|(at, _)| piece.split_at(at));
        let start = found.len();
        for (left, right) in cuts {
            if let (Some(left_id), Some(right_id)) = (vocabulary.get(left), vocabulary.get(right)) {
                found.push((score, left, right, (left_id, right_id)));
            }
        }
        found[start..].sort_by_key(|&(.., ids)| ids);
    }
    let num_chars =
        |(_, left, right, _): &(f32, &str, &str, _)| (left.chars().count(), right.chars().count());
    found.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| num_chars(b).cmp(&num_chars(a))));
    found.into_iter().map(|(_, left, right, _)| (left.to_owned(), right.to_owned())).collect()
}
