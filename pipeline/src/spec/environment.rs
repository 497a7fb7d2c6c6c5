//! Fills `${NAME}` and `${NAME:default}` of a definition from the environment, before it is parsed.
//!
//! Lines stay lines, so places in errors stay right: a value with a line break is refused.

/// The text with everything filled in, or the 1-based line at fault and what is wrong with it.
pub(super) fn expand(text: &str, get: impl Fn(&str) -> Option<String>) -> Result<String, (usize, String)> {
    let mut out = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate() {
        expand_line(line, &get, &mut out).map_err(|message| (index + 1, message))?;
    }
    Ok(out)
}

fn expand_line(line: &str, get: &impl Fn(&str) -> Option<String>, out: &mut String) -> Result<(), String> {
    // What stands in a comment is not used.
    if line.trim_start().starts_with('#') {
        out.push_str(line);
        return Ok(());
    }
    let mut rest = line;
    while let Some(start) = rest.find("${") {
        if let Some(before) = rest[..start].strip_suffix('$') {
            out.push_str(before);
            out.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        out.push_str(&rest[..start]);
        let Some(len) = rest[start..].find('}') else { return Err("`${` without a `}`".to_owned()) };
        let inside = &rest[start + 2..start + len];
        let (name, default) = match inside.split_once(':') {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name {
            return Err(format!("{name:?} is no name of an environment variable"));
        }
        let value = get(name).filter(|value| !value.is_empty()).or_else(|| default.map(str::to_owned));
        let value = value.ok_or_else(|| format!("the environment variable {name} is not set"))?;
        if value.contains(['\n', '\r']) {
            return Err(format!("the environment variable {name} has a line break in it"));
        }
        out.push_str(&value);
        rest = &rest[start + len + 1..];
    }
    out.push_str(rest);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Result<&str, (usize, &str)>) {
        let get = |name: &str| match name {
            "BROKERS" => Some("kafka:9092".to_owned()),
            "EMPTY" => Some(String::new()),
            "LINES" => Some("a\nb".to_owned()),
            _ => None,
        };
        let got = expand(text, get);
        let got = got.as_deref().map_err(|(line, message)| (*line, message.as_str()));
        assert_eq!(got, expected, "{text}");
    }

    #[test]
    fn variables_are_filled_in() {
        check("a: ${BROKERS}, b\n", Ok("a: kafka:9092, b\n"));
        check("a: ${OTHER:127.0.0.1:9092}\nb: ${EMPTY:x}", Ok("a: 127.0.0.1:9092\nb: x"));
        check("a: $${BROKERS} $5 {{ x }}", Ok("a: ${BROKERS} $5 {{ x }}"));
        check("# ${OTHER}\n", Ok("# ${OTHER}\n"));
        check("x\na: ${OTHER}", Err((2, "the environment variable OTHER is not set")));
        check("a: ${LINES}", Err((1, "the environment variable LINES has a line break in it")));
        check("a: ${BROKERS", Err((1, "`${` without a `}`")));
        check("a: ${A B}", Err((1, "\"A B\" is no name of an environment variable")));
    }
}
