//! Keeps the text of control tokens, where a document has it, apart from the control tokens of the template.
//!
//! Invariant: shielded text contains no control token, and taking the marks away gives the text back, whatever it
//! was. A mark is two characters of a private plane of Unicode; where text has the first of them, it is marked too.

use std::borrow::Cow;

use aho_corasick::{AhoCorasick, BuildError};

use super::matcher;

/// Stands before the mark of a control token, and before itself. In a private plane of Unicode.
const ESCAPE: char = '\u{F0000}';
/// Follows [`ESCAPE`] for a literal escape; the marks of control tokens come after it.
const LITERAL: u32 = 0xF0001;
/// The marks must stay within the private plane, which ends at U+FFFFD.
pub(super) const MAX_TOKENS: usize = 0xF000;

pub(super) struct Shield {
    /// Finds the tokens, the longest first.
    matcher: AhoCorasick,
    /// By pattern number.
    tokens: Vec<String>,
}

impl Shield {
    /// At most [`MAX_TOKENS`] texts of tokens which documents cannot write.
    pub(super) fn new(tokens: Vec<String>) -> Result<Self, BuildError> {
        assert!(tokens.len() <= MAX_TOKENS);
        Ok(Self { matcher: matcher(&tokens)?, tokens })
    }

    /// Marks the tokens in text that comes from outside.
    pub(super) fn shield<'a>(&self, text: &'a str) -> Cow<'a, str> {
        if !text.contains(ESCAPE) && !self.matcher.is_match(text) {
            return Cow::Borrowed(text);
        }
        let text = text.replace(ESCAPE, &format!("{ESCAPE}{}", mark(LITERAL)));
        let mut shielded = String::with_capacity(text.len());
        self.matcher.replace_all_with(&text, &mut shielded, |found, _, out| {
            out.push(ESCAPE);
            out.push(mark(LITERAL + 1 + found.pattern().as_u32()));
            true
        });
        Cow::Owned(shielded)
    }

    /// Text as it was before it was shielded.
    pub(super) fn unshield<'a>(&self, text: &'a str) -> Cow<'a, str> {
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
                Some(code) if (code.wrapping_sub(LITERAL + 1) as usize) < self.tokens.len() => {
                    chars.next();
                    plain.push_str(&self.tokens[(code - LITERAL - 1) as usize]);
                }
                _ => plain.push(c),
            }
        }
        Cow::Owned(plain)
    }
}

fn mark(code: u32) -> char {
    char::from_u32(code).expect("marks stay within a private plane")
}
