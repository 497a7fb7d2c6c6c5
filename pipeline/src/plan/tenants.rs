//! Checks what a definition says of tenants.

use arrow::datatypes::Schema;
use tidemill_operators::tenants::TenantPolicy;

use super::steps::template;
use super::{Result, at_least};
use crate::spec::{Definition, Spanned};

/// A tenant with more would starve the others.
const MAX_WEIGHT: u32 = 1000;

/// `by` may use the columns of the input, not the results of steps: a document has one tenant.
pub(super) fn tenants(definition: &Definition, schema: &Schema) -> Result<Option<TenantPolicy>> {
    let Some(spec) = &definition.spec.tenants else { return Ok(None) };
    template(definition, &spec.by, "tenants.by", schema, &[])?;
    let weight = |value: Option<&Spanned<u32>>, key: &str| -> Result<Option<u32>> {
        let weight = at_least(definition, value, 1, key, |weight| u64::from(*weight))?;
        match value {
            Some(value) if value.value > MAX_WEIGHT => {
                let message = format!("{key} is {}, it must be at most {MAX_WEIGHT}", value.value);
                Err(definition.error(value, key, message, None))
            }
            _ => Ok(weight.map(|weight| weight as u32)),
        }
    };
    let mut policy = TenantPolicy::default();
    for (name, value) in &spec.weights {
        let weight = weight(Some(value), &format!("tenants.weights.{name}"))?;
        policy.weights.extend(weight.map(|weight| (name.clone(), weight)));
    }
    let default_weight = weight(spec.default_weight.as_ref(), "tenants.default_weight")?;
    policy.default_weight = default_weight.unwrap_or(policy.default_weight);
    let (limit, key) = (spec.max_tokens_in_flight.as_ref(), "tenants.max_tokens_in_flight");
    policy.max_tokens_in_flight = at_least(definition, limit, 1, key, |tokens| *tokens)?;
    for (name, value) in &spec.limits {
        let limit =
            at_least(definition, Some(value), 1, &format!("tenants.limits.{name}"), |tokens| *tokens)?;
        policy.limits.extend(limit.map(|limit| (name.clone(), limit)));
    }
    Ok(Some(policy))
}
