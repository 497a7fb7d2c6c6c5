//! Which tenant is served next: deficit round robin over tokens, and the order of a [`Window`] within a tenant.
//!
//! Each tenant has a window of its own, so the burst of one keeps nobody out and nobody's prefixes apart. Tenants with
//! prompts stand in a ring. Who comes to its front is granted a quantum of tokens for each unit of weight and is served
//! until that is used up; what is used beyond it is owed next time. The quantum is the largest prompt and answer so far:
//! then whoever waits is passed over by at most one quantum of each other tenant, and forgetting the debt of one who has
//! nothing left gains it no more than its share. With one tenant the order is that of its window.
//!
//! Fair is what was read: a prompt that the source has not let in yet is not known here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::window::{Window, WindowLimits};
use crate::infer::sequence::SharedPrefix;
use crate::tenants::TenantPolicy;

/// Prompts that wait, by tenant; see the module.
#[derive(Debug)]
pub struct FairWindow<V> {
    num_engines: usize,
    limits: WindowLimits,
    policy: TenantPolicy,
    shares: BTreeMap<Arc<str>, Share<V>>,
    /// Tenants with prompts, each once; the first is served.
    ring: VecDeque<Arc<str>>,
    /// Tokens; the largest cost so far.
    quantum: u64,
    num_prompts: usize,
}

#[derive(Debug)]
struct Share<V> {
    /// With the cost of each.
    window: Window<(u64, V)>,
    /// Tokens that may be served before it is the next one's turn; below 0 it is owed.
    balance: i64,
}

impl<V> FairWindow<V> {
    /// The limits are of each tenant; that of all together is the source's credit.
    pub fn new(num_engines: usize, limits: WindowLimits, policy: TenantPolicy) -> Self {
        let (shares, ring) = (BTreeMap::new(), VecDeque::new());
        Self { num_engines, limits, policy, shares, ring, quantum: 1, num_prompts: 0 }
    }

    pub fn len(&self) -> usize {
        self.num_prompts
    }

    pub fn is_empty(&self) -> bool {
        self.num_prompts == 0
    }

    /// `cost` is what serving it takes, in tokens.
    pub fn insert(&mut self, tenant: &Arc<str>, cost: u64, token_ids: Arc<[u32]>, value: V) {
        self.quantum = self.quantum.max(cost);
        self.num_prompts += 1;
        if !self.shares.contains_key(tenant) {
            let share = Share { window: Window::new(self.num_engines, self.limits), balance: 0 };
            self.shares.insert(Arc::clone(tenant), share);
            self.ring.push_back(Arc::clone(tenant));
        }
        let share = self.shares.get_mut(tenant).expect("it was just made");
        share.window.insert(token_ids, (cost, value));
    }

    /// The next prompt for an engine, of a tenant that `may_run`. `None` if there is none, or if the other engines had
    /// better serve those that wait.
    pub fn next_for(
        &mut self,
        engine: usize,
        may_run: impl Fn(&str) -> bool,
    ) -> Option<(V, Vec<SharedPrefix>)> {
        let mut passed: BTreeSet<Arc<str>> = BTreeSet::new();
        while passed.len() < self.ring.len() {
            let tenant = Arc::clone(self.ring.front().expect("more tenants than were passed"));
            let share = self.shares.get_mut(&tenant).expect("who stands in the ring has a share");
            if passed.contains(&tenant) || !may_run(&tenant) {
                passed.insert(tenant);
                self.ring.rotate_left(1);
                continue;
            }
            if share.balance <= 0 {
                share.balance += (self.quantum * u64::from(self.policy.weight(&tenant))) as i64;
            }
            let found = if share.balance > 0 { share.window.next_for(engine) } else { None };
            let Some(((cost, value), shared)) = found else {
                // With a positive balance the engine is not wanted here.
                if share.balance > 0 {
                    passed.insert(tenant);
                }
                self.ring.rotate_left(1);
                continue;
            };
            share.balance -= cost as i64;
            self.num_prompts -= 1;
            if share.window.is_empty() {
                self.shares.remove(&tenant);
                self.ring.pop_front();
            } else if share.balance <= 0 {
                self.ring.rotate_left(1);
            }
            return Some((value, shared));
        }
        None
    }
}

#[cfg(test)]
mod tests;
