//! Checks where spans of answers are sent.

use super::Result;
use crate::spec::Definition;

/// The URL of a collector, if the definition names one.
pub(super) fn traces(definition: &Definition) -> Result<Option<String>> {
    let Some(spec) = &definition.spec.traces else { return Ok(None) };
    let endpoint = &spec.endpoint;
    let host = ["http://", "https://"].iter().find_map(|scheme| endpoint.value.strip_prefix(scheme));
    if host.is_none_or(|host| host.is_empty() || host.starts_with('/')) {
        let message = format!("{:?} is no URL of a collector", endpoint.value);
        let help = Some("write one such as http://127.0.0.1:4318; /v1/traces is added".to_owned());
        return Err(definition.error(endpoint, "traces.endpoint", message, help));
    }
    Ok(Some(endpoint.value.clone()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn check(more: &str) -> Result<Option<String>> {
        let text = format!(
            "name: p\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: in.jsonl }} }}\n\
             steps: []\nsink: {{ jsonl: {{ path: out.jsonl }} }}\n{more}\n"
        );
        traces(&Definition::parse(Path::new("p.yaml"), text)?)
    }

    #[test]
    fn a_collector_is_a_url() {
        assert_eq!(check("").unwrap(), None);
        assert_eq!(check("traces: { endpoint: 'http://c:4318' }").unwrap().as_deref(), Some("http://c:4318"));
        for endpoint in ["c:4318", "http://", "http:///v1/traces"] {
            let error = check(&format!("traces: {{ endpoint: '{endpoint}' }}")).unwrap_err();
            assert_eq!(error.key, "traces.endpoint");
        }
    }
}
