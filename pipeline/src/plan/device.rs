//! Which engines a definition asks for: one on all cores, or several with a share of the cores each.
//!
//! The k-th name of a list is `cpu:k`, the k-th of as many equal shares as the list has names. What the shares of
//! this machine are is found out when the engines are made.

use serde::Serialize;

use super::Result;
use crate::spec::Definition;

/// More engines than this are a mistake in the definition.
const MAX_ENGINES: usize = 256;
const KNOWN: &str = "known are: auto, cpu, reference, and a list such as [cpu:0, cpu:1]";

/// Where the model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Devices {
    /// One engine, the fastest there is, on all cores.
    Cpu,
    /// So many engines, each pinned to its share of the cores.
    CpuShares(usize),
    /// One engine of plain f32 loops: slow, the measure of all other paths.
    Reference,
}

impl Devices {
    pub fn num_engines(self) -> usize {
        match self {
            Self::Cpu | Self::Reference => 1,
            Self::CpuShares(num_engines) => num_engines,
        }
    }
}

/// Checks the devices of a definition, which stand with the engine or with the model.
pub(super) fn devices(definition: &Definition) -> Result<Devices> {
    let spec = &definition.spec;
    let (key, device) = match (&spec.engine.device, &spec.model.device) {
        (Some(_), Some(device)) => {
            let help = Some("keep engine.device".to_owned());
            let message = "the device is given twice, with the model and with the engine";
            return Err(definition.error(device, "model.device", message, help));
        }
        (Some(device), None) => ("engine.device", device),
        (None, Some(device)) => ("model.device", device),
        (None, None) => return Ok(Devices::Cpu),
    };
    let fail = |message: String| Err(definition.error(device, key, message, Some(KNOWN.to_owned())));
    let names: Vec<&str> = device.value.0.iter().map(String::as_str).collect();
    match names[..] {
        [] => return fail(format!("{key} names no device")),
        ["auto" | "cpu"] => return Ok(Devices::Cpu),
        ["reference"] => return Ok(Devices::Reference),
        _ => {}
    }
    if names.len() > MAX_ENGINES {
        return fail(format!("{key} has {} devices, the limit is {MAX_ENGINES}", names.len()));
    }
    for (index, name) in names.iter().enumerate() {
        if *name != format!("cpu:{index}") {
            let known = matches!(*name, "auto" | "cpu" | "reference") || name.strip_prefix("cpu:").is_some();
            return fail(if known {
                format!("device {name:?} stands where cpu:{index} is expected")
            } else {
                format!("no device {name:?}")
            });
        }
    }
    Ok(Devices::CpuShares(names.len()))
}
