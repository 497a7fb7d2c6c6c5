//! What differs between two definitions, told by key path.

use serde_json::Value;

/// Changes of a definition that an error lists.
const MAX_CHANGES: usize = 3;
/// The most of a value that such a change shows.
const MAX_VALUE_CHARS: usize = 60;

/// The first differences of two definitions, as `steps[0].generate.max_tokens was 8 and is 9`.
pub(super) fn changes(before: &Value, now: &Value) -> String {
    let mut found = Vec::new();
    compare("", before, now, &mut found);
    let more = found.len().saturating_sub(MAX_CHANGES);
    found.truncate(MAX_CHANGES);
    let more = if more > 0 { format!(" and {more} more changes") } else { String::new() };
    if found.is_empty() { String::new() } else { found.join(", ") + &more }
}

fn compare(path: &str, before: &Value, now: &Value, found: &mut Vec<String>) {
    let at = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (before, now) {
        (Value::Object(before), Value::Object(now)) => {
            let keys = before.keys().chain(now.keys().filter(|key| !before.contains_key(*key)));
            for key in keys {
                let side =
                    |object: &serde_json::Map<String, Value>| object.get(key).cloned().unwrap_or_default();
                compare(&at(key), &side(before), &side(now), found);
            }
        }
        (Value::Array(before), Value::Array(now)) => {
            for index in 0..before.len().max(now.len()) {
                let side = |array: &[Value]| array.get(index).cloned().unwrap_or_default();
                compare(&format!("{path}[{index}]"), &side(before), &side(now), found);
            }
        }
        _ if before != now => found.push(format!("{path} was {} and is {}", brief(before), brief(now))),
        _ => {}
    }
}

/// A value as text, cut to [`MAX_VALUE_CHARS`].
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_VALUE_CHARS) {
        Some((end, _)) => format!("{} …", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_change_of_a_long_text_is_told_in_brief() {
        let told = changes(&json!({ "prompt": "é".repeat(5000) }), &json!({ "prompt": "x".repeat(5000) }));
        assert!(told.starts_with("prompt was ") && told.chars().count() < 200, "{told}");
    }
}
