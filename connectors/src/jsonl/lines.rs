//! Cuts a stream of bytes into lines without ever holding more than one line of bounded length.
//!
//! A line ends at `\n`; an `\r` before it, and a byte order mark at the start of the stream, belong to no line.

use std::io::{self, BufRead, Read};

/// The most bytes of a line; a longer line is skipped and rejected.
pub const MAX_LINE_BYTES: usize = 64 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// One line, without its end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    Blank,
    Text(&'a [u8]),
    /// The start of a line above the limit.
    TooLong(&'a [u8]),
}

/// Reads lines and counts them.
pub(super) struct Lines<R> {
    reader: R,
    max_bytes: usize,
    buffer: Vec<u8>,
    /// The 0-based number of the next line.
    next: u64,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R, max_bytes: usize) -> Self {
        Self { reader, max_bytes, buffer: Vec::new(), next: 0 }
    }

    /// The number of the next line.
    pub(super) fn position(&self) -> u64 {
        self.next
    }

    /// The next line with its number.
    pub(super) fn read(&mut self) -> io::Result<Option<(u64, Line<'_>)>> {
        // One long line must not keep its memory for the rest of the file.
        if self.buffer.capacity() > 1 << 20 {
            self.buffer = Vec::new();
        }
        self.buffer.clear();
        // One byte more than a line may have tells a long line; two more are the line end.
        let limit = self.max_bytes as u64 + 2;
        if Read::by_ref(&mut self.reader).take(limit).read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        let number = self.next;
        self.next += 1;
        let mut line = self.buffer.as_slice();
        let ended = line.last() == Some(&b'\n');
        if ended {
            line = &line[..line.len() - 1];
            line = line.strip_suffix(b"\r").unwrap_or(line);
        }
        if line.len() > self.max_bytes {
            if !ended {
                self.reader.skip_until(b'\n')?;
            }
            return Ok(Some((number, Line::TooLong(&line[..self.max_bytes]))));
        }
        if number == 0 {
            line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line);
        }
        let blank = line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'));
        Ok(Some((number, if blank { Line::Blank } else { Line::Text(line) })))
    }

    /// Skips to line `number`; false if the stream ends before it.
    pub(super) fn skip_to(&mut self, number: u64) -> io::Result<bool> {
        while self.next < number {
            if self.reader.skip_until(b'\n')? == 0 {
                return Ok(false);
            }
            self.next += 1;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(bytes: &[u8], max_bytes: usize) -> Vec<String> {
        let mut lines = Lines::new(io::BufReader::with_capacity(3, bytes), max_bytes);
        let mut all = Vec::new();
        while let Some((number, line)) = lines.read().unwrap() {
            all.push(match line {
                Line::Blank => format!("{number} blank"),
                Line::Text(text) => format!("{number} {}", String::from_utf8_lossy(text)),
                Line::TooLong(start) => format!("{number} long {}", String::from_utf8_lossy(start)),
            });
        }
        all
    }

    #[test]
    fn lines_are_cut_and_counted() {
        assert_eq!(read_all(b"\xef\xbb\xbfa\r\n\n \t\r\nb", 9), ["0 a", "1 blank", "2 blank", "3 b"]);
        assert_eq!(read_all(b"a\n", 9), ["0 a"]);
        assert_eq!(read_all(b"", 9), [""; 0]);
    }

    #[test]
    fn long_lines_are_skipped_without_losing_the_next() {
        let text = b"1234\n12345\n123456\n1234567890123\r\n1234\r\n12345";
        let expected = ["0 1234", "1 long 1234", "2 long 1234", "3 long 1234", "4 1234", "5 long 1234"];
        assert_eq!(read_all(text, 4), expected);
    }

    #[test]
    fn skipping_counts_lines_of_any_length() {
        let mut lines = Lines::new(&b"123456789\n\nc\nd"[..], 4);
        assert!(lines.skip_to(2).unwrap());
        assert_eq!(lines.read().unwrap(), Some((2, Line::Text(b"c"))));
        assert!(lines.skip_to(4).unwrap());
        assert!(!lines.skip_to(5).unwrap());
    }
}
