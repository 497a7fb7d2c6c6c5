//! Which engines a definition asks for: one on a GPU or on all cores, or one for each name of a list.
//!
//! The k-th name of a list of cores is `cpu:k`, the k-th of as many equal shares as the list has names; GPUs are named by
//! the driver's numbers. What the shares of this machine are, and whether a GPU is there, is found out when the
//! engines are made.

use serde::Serialize;

use super::Result;
use crate::spec::Definition;

/// More engines than this are a mistake in the definition.
const MAX_ENGINES: usize = 256;
const KNOWN: &str =
    "known are: auto, cuda, cpu, reference, and lists such as [cuda:0, cuda:1] or [cpu:0, cpu:1]";

/// Where the model runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Devices {
    /// One engine on the first GPU if it can be used, else on all cores.
    Auto,
    /// One engine, the fastest there is, on all cores.
    Cpu,
    /// So many engines, each pinned to its share of the cores.
    CpuShares(usize),
    /// An engine for each of these GPUs, which are demanded.
    Cuda(Vec<usize>),
    /// One engine of plain f32 loops: slow, the measure of all other paths.
    Reference,
}

impl Devices {
    pub fn num_engines(&self) -> usize {
        match self {
            Self::Auto | Self::Cpu | Self::Reference => 1,
            Self::CpuShares(num_engines) => *num_engines,
            Self::Cuda(ordinals) => ordinals.len(),
        }
    }

    /// Names what answers depend on: not the number of engines, nor which device is found here.
    pub(super) fn path(&self) -> &'static str {
        match self {
            Self::Auto | Self::Cpu | Self::CpuShares(_) => "auto",
            Self::Cuda(_) => "cuda",
            Self::Reference => "reference",
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
        (None, None) => return Ok(Devices::Auto),
    };
    let names: Vec<&str> = device.value.0.iter().map(String::as_str).collect();
    parse(&names, key).map_err(|message| definition.error(device, key, message, Some(KNOWN.to_owned())))
}

fn parse(names: &[&str], key: &str) -> std::result::Result<Devices, String> {
    match names {
        [] => Err(format!("{key} names no device")),
        ["auto"] => Ok(Devices::Auto),
        ["cpu"] => Ok(Devices::Cpu),
        ["reference"] => Ok(Devices::Reference),
        ["cuda"] => Ok(Devices::Cuda(vec![0])),
        _ if names.len() > MAX_ENGINES => {
            Err(format!("{key} has {} devices, the limit is {MAX_ENGINES}", names.len()))
        }
        [first, ..] if first.starts_with("cuda") => gpus(names),
        _ => cpu_shares(names),
    }
}

fn gpus(names: &[&str]) -> std::result::Result<Devices, String> {
    let mut ordinals = Vec::new();
    for name in names {
        let Some(ordinal) = name.strip_prefix("cuda:").and_then(|number| number.parse().ok()) else {
            return Err(unexpected(name, "a GPU such as cuda:0"));
        };
        if ordinals.contains(&ordinal) {
            return Err(format!("device {name:?} is named twice"));
        }
        ordinals.push(ordinal);
    }
    Ok(Devices::Cuda(ordinals))
}

fn cpu_shares(names: &[&str]) -> std::result::Result<Devices, String> {
    for (index, name) in names.iter().enumerate() {
        let expected = format!("cpu:{index}");
        if *name != expected {
            return Err(unexpected(name, &expected));
        }
    }
    Ok(Devices::CpuShares(names.len()))
}

fn unexpected(name: &str, expected: &str) -> String {
    let is_numbered =
        |kind| name.strip_prefix(kind).is_some_and(|number: &str| number.parse::<u32>().is_ok());
    match name {
        "auto" | "cuda" | "cpu" | "reference" => {}
        _ if is_numbered("cpu:") || is_numbered("cuda:") => {}
        _ => return format!("no device {name:?}"),
    }
    format!("device {name:?} stands where {expected} is expected")
}
