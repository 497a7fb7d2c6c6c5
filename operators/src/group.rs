//! `group`: prompts leave in an order that reuses prefixes, at the rate the engines ask for them.
//!
//! One worker sees the whole window, so equal prefixes meet wherever they were tokenized, and it routes each to
//! one of the engines, however many workers there are. Nothing waits for the window to fill: prompts leave while an
//! engine has room ([`Demand`]), and those that arrive meanwhile take their place in the order at once. Each prompt
//! tells its engine how many later ones share its prefixes, so that the engine keeps what is still needed. A document
//! whose lease is revoked is dropped where it would leave. Tenants take turns ([`fair`]). The order within a tenant is in [`window`] and [`tree`]; pages and cached prefixes are the engine's business.

pub mod distinct;
pub mod fair;
pub mod tree;
pub mod window;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};
use timely::scheduling::SyncActivator;

use crate::Epoch;
use crate::counters::Counters;
use crate::infer::runner::WorkContext;
use crate::tokenize::Prompt;
use distinct::DistinctTokens;
use fair::FairWindow;
use window::WindowLimits;

/// How many prompts each engine has, and how many it wants.
///
/// `group` is the only one to raise a count, the engine's thread the only one to lower it. An engine is handed many
/// prompts at a time: it asks when it has become short of them, and is then filled up.
#[derive(Debug)]
pub struct Demand {
    /// `[num_engines]`
    outstanding: Vec<AtomicUsize>,
    target: usize,
    /// An engine with no more prompts than this asks for others.
    short: usize,
    group: OnceLock<SyncActivator>,
}

impl Demand {
    /// Each engine is handed prompts until it has `target` of them, whenever it has no more than `short`.
    pub fn new(num_engines: usize, target: usize, short: usize) -> Self {
        assert!(short < target);
        let outstanding = (0..num_engines).map(|_| AtomicUsize::new(0)).collect();
        Self { outstanding, target, short, group: OnceLock::new() }
    }

    fn is_short(&self, engine: usize) -> bool {
        self.outstanding[engine].load(Ordering::Acquire) <= self.short
    }

    pub(crate) fn take(&self, engine: usize) -> bool {
        if self.outstanding[engine].load(Ordering::Acquire) >= self.target {
            return false;
        }
        self.outstanding[engine].fetch_add(1, Ordering::AcqRel);
        true
    }

    /// A prompt of this engine is finished. Whether it is short of them now, which [`wake`](Self::wake) tells.
    pub fn finished(&self, engine: usize) -> bool {
        let before = self.outstanding[engine].fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "more prompts finished than were handed out");
        before - 1 <= self.short
    }

    /// Tells whoever hands out prompts that there is room.
    pub fn wake(&self) {
        if let Some(group) = self.group.get() {
            // Fails only when the worker is gone, and then nobody needs waking.
            let _ = group.activate();
        }
    }
}

/// Extension trait of prompt streams.
pub trait Group<'scope> {
    /// Orders prompts by tenant, shared prefix and size and hands each to an engine.
    fn group(
        self,
        demand: Arc<Demand>,
        limits: WindowLimits,
        context: Arc<WorkContext>,
    ) -> StreamVec<'scope, Epoch, Prompt>;
}

impl<'scope> Group<'scope> for StreamVec<'scope, Epoch, Prompt> {
    fn group(
        self,
        demand: Arc<Demand>,
        limits: WindowLimits,
        context: Arc<WorkContext>,
    ) -> StreamVec<'scope, Epoch, Prompt> {
        let (counters, tenants) = (Arc::clone(&context.counters), Arc::clone(&context.tenants));
        let wake = self.scope().worker();
        let worker_index = wake.index();
        let to_first = Exchange::new(|_: &Prompt| 0);
        self.unary::<CapacityContainerBuilder<Vec<Prompt>>, _, _, _>(to_first, "Group", move |_, info| {
            let num_engines = demand.outstanding.len();
            if worker_index == 0 {
                // Set once: a second dataflow over the same demand would be a bug of the renderer.
                demand.group.set(wake.sync_activator_for(info.address.to_vec())).expect("one group a demand");
                tenants.wake_on_finished(wake.sync_activator_for(info.address.to_vec()));
            }
            let mut window: FairWindow<(Epoch, Duration, Prompt)> =
                FairWindow::new(num_engines, limits, tenants.policy().clone());
            // Only the first worker has prompts to count.
            let mut distinct: Option<DistinctTokens> = None;
            let mut held: BTreeMap<Epoch, (Capability<Epoch>, usize)> = BTreeMap::new();
            let mut num_handed_out = 0;
            move |input, output| {
                input.for_each(|capability, prompts| {
                    let Some(capability) = capability.retain_least(0) else { return };
                    let epoch = *capability.time();
                    held.entry(epoch).or_insert((capability, 0)).1 += prompts.len();
                    let distinct = distinct.get_or_insert_default();
                    let before = distinct.estimate();
                    for prompt in prompts.drain(..) {
                        distinct.insert(&prompt.token_ids);
                        let (tenant, token_ids) = (Arc::clone(&prompt.tenant), Arc::clone(&prompt.token_ids));
                        let arrived = tenants.arrived(&tenant);
                        window.insert(&tenant, prompt.cost(), token_ids, (epoch, arrived, prompt));
                    }
                    Counters::add(&counters.distinct_tokens, distinct.estimate().saturating_sub(before));
                });
                let mut leaving: BTreeMap<Epoch, Vec<Prompt>> = BTreeMap::new();
                for engine in (0..num_engines).filter(|&engine| demand.is_short(engine)) {
                    while !window.is_empty() && demand.take(engine) {
                        let next = window.next_for(engine, |tenant| tenants.may_run(tenant));
                        let Some(((epoch, arrived, mut prompt), shared)) = next else {
                            demand.finished(engine);
                            break;
                        };
                        // An entry without prompts is one whose documents were dropped.
                        let leaving = leaving.entry(epoch).or_default();
                        if prompt.document.lease().is_revoked() {
                            demand.finished(engine);
                            tenants.dropped(&prompt.tenant);
                        } else {
                            tenants.handed_out(&prompt.tenant, prompt.cost(), arrived);
                            prompt.engine = engine as u32;
                            prompt.shared = shared.into();
                            prompt.place = num_handed_out;
                            num_handed_out += 1;
                            leaving.push(prompt);
                        }
                        let (_, count) = held.get_mut(&epoch).expect("held with its first prompt");
                        *count -= 1;
                    }
                }
                // A message for each epoch; `infer` brings the prompts back into their order.
                for (epoch, mut prompts) in leaving {
                    let (capability, count) = held.get(&epoch).expect("held with its first prompt");
                    if !prompts.is_empty() {
                        output.session(capability).give_container(&mut prompts);
                    }
                    if *count == 0 {
                        held.remove(&epoch);
                    }
                }
            }
        })
    }
}
