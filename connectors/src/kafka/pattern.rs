//! Patterns of topics: what both the client of a group and we understand in the same way.

/// Whether a pattern of topics can be used. A member of a group matches by POSIX extended regular expressions, where
/// what they lack would silently match nothing.
pub fn check(pattern: &str) -> Result<(), String> {
    regex::Regex::new(pattern).map_err(|error| error.to_string())?;
    let mut rest = pattern;
    while let Some((_, escaped)) = rest.split_once('\\') {
        if escaped.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(
                "Kafka's patterns have no classes such as \\d or \\w: write [0-9] or [a-z]".to_owned()
            );
        }
        rest = escaped.get(1..).unwrap_or_default();
    }
    match ["(?", "*?", "+?", "??", "}?"].into_iter().find(|part| pattern.contains(part)) {
        Some(part) => Err(format!("Kafka's patterns do not know {part:?}")),
        None => Ok(()),
    }
}

/// Whether a pattern takes in a topic of this name.
pub fn matches(pattern: &str, topic: &str) -> bool {
    regex::Regex::new(pattern).is_ok_and(|pattern| pattern.is_match(topic))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_posix_lacks_is_refused() {
        for pattern in ["^news-", "^(a|b)\\.[0-9]+$", "^x{2,3}\\-"] {
            assert_eq!(check(pattern), Ok(()), "{pattern}");
        }
        for pattern in ["^news-\\d+", "^\\w", "^(?i)news", "^a.*?b", "^(", "^a\\\\\\d"] {
            assert!(check(pattern).is_err(), "{pattern}");
        }
        assert!(matches("^news", "news-summaries") && !matches("^news-in", "news-summaries"));
    }
}
