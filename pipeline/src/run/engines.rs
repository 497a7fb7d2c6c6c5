//! The engines of a process: pipelines that ask for the same share them, with their weights and KV cache.
//!
//! Same means the same model, devices and bounds. Nothing of a pipeline is kept here; it comes with each work.

use std::collections::BTreeSet;
use std::sync::Arc;

use tidemill_operators::infer::runner::{EngineHandle, Runner};
use tidemill_operators::tokenize::TextModel;

use super::RunError;
use crate::clock::Clock;
use crate::models::load::{Engines, Placement, load_engines};
use crate::plan::Plan;

/// What one pipeline needs of its engines.
#[derive(Clone)]
pub(super) struct Lent {
    pub handles: Vec<EngineHandle>,
    pub text: Arc<TextModel>,
    /// Of each engine.
    pub max_num_seqs: u32,
    pub device: Arc<str>,
}

/// Running engines; they end when what was lent is dropped.
pub(super) struct Running {
    runners: Vec<Runner>,
}

impl Running {
    /// Waits until all answers that were made are journaled.
    pub(super) fn join(self) {
        for runner in self.runners {
            runner.join();
        }
    }
}

/// Starts the engines that the plans ask for; in the order of the plans, what each is lent.
pub(super) fn start(
    plans: &[&Plan],
    tells_device: bool,
    clock: Clock,
) -> Result<(Running, Vec<Lent>), RunError> {
    let mut running = Running { runners: Vec::new() };
    let mut groups: Vec<(&Plan, Lent)> = Vec::new();
    let mut lent = Vec::new();
    let mut told = BTreeSet::new();
    for plan in plans {
        let group = match groups.iter().position(|(other, _)| shares_engines(other, plan)) {
            Some(group) => group,
            None => {
                let say = |what: &str| eprintln!("{what} …");
                let engines = load_engines(&plan.model, &plan.model_name, &plan.devices, &plan.engine, &say)?;
                if tells_device {
                    tell(&engines.placement, &mut told);
                }
                groups.push((plan, start_all(engines, clock, &mut running)?));
                groups.len() - 1
            }
        };
        lent.push(groups[group].1.clone());
    }
    Ok((running, lent))
}

fn shares_engines(one: &Plan, other: &Plan) -> bool {
    (&one.model, &one.devices, one.engine) == (&other.model, &other.devices, other.engine)
}

/// Says where engines run, and each thing once.
fn tell(placement: &Placement, told: &mut BTreeSet<String>) {
    for line in placement.lines() {
        if told.insert(line.clone()) {
            eprintln!("{line}");
        }
    }
}

/// Starts the threads of all engines, each on its cores.
fn start_all(engines: Engines, clock: Clock, running: &mut Running) -> Result<Lent, RunError> {
    let mut handles = Vec::new();
    for (engine, cores) in engines.engines {
        let elapsed = Arc::new(move || clock.elapsed());
        let start = || Runner::start(engine, Arc::clone(&engines.text), elapsed);
        let (runner, handle) = match cores {
            Some(cores) => cores.pinned(start),
            None => start(),
        }?;
        running.runners.push(runner);
        handles.push(handle);
    }
    Ok(Lent {
        handles,
        text: engines.text,
        max_num_seqs: engines.max_num_seqs,
        device: engines.placement.device.into(),
    })
}
