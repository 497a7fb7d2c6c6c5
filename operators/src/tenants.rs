//! On whose behalf documents are processed: weights, limits, and what was done for each.
//!
//! A [`Tenants`] belongs to one pipeline and is shared by its operators; metrics read it from another thread. Tokens in
//! flight are known exactly for every tenant. Counts are kept for the first [`MAX_COUNTED`] tenants and for all others
//! together, so names that come from data cannot use up memory. The order in which tenants are served is in
//! [`group::fair`](crate::group::fair).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use timely::scheduling::SyncActivator;

use crate::infer::figures::Histogram;

/// Tenants that are counted by name.
pub const MAX_COUNTED: usize = 64;
/// The name under which all others are counted.
pub const OTHER: &str = "other";
/// A name is cut here.
pub const MAX_NAME_BYTES: usize = 256;
const WAIT_SECONDS: [f64; 14] =
    [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];

/// What the definition says of tenants; by default there is one, and no limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantPolicy {
    /// Of a tenant named here its weight, at least 1.
    pub weights: BTreeMap<String, u32>,
    pub default_weight: u32,
    /// A tenant is handed no further prompt while it has so many tokens in engines; of those named here their own limit.
    pub limits: BTreeMap<String, u64>,
    pub max_tokens_in_flight: Option<u64>,
}

impl Default for TenantPolicy {
    fn default() -> Self {
        Self {
            weights: BTreeMap::new(),
            default_weight: 1,
            limits: BTreeMap::new(),
            max_tokens_in_flight: None,
        }
    }
}

impl TenantPolicy {
    pub fn weight(&self, tenant: &str) -> u32 {
        self.weights.get(tenant).copied().unwrap_or(self.default_weight)
    }

    pub fn limit(&self, tenant: &str) -> Option<u64> {
        self.limits.get(tenant).copied().or(self.max_tokens_in_flight)
    }

    fn has_limits(&self) -> bool {
        self.max_tokens_in_flight.is_some() || !self.limits.is_empty()
    }
}

/// Totals of one tenant, over all steps; answers from the journal are not among them.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantCounts {
    /// Documents answered.
    pub documents: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    /// Prompts that wait for an engine, now.
    pub waiting: u64,
    /// Tokens in engines, now.
    pub tokens_in_flight: u64,
    /// How many seconds prompts had waited when they were handed to an engine.
    pub wait: Histogram,
}

impl Default for TenantCounts {
    fn default() -> Self {
        Self {
            documents: 0,
            prompt_tokens: 0,
            output_tokens: 0,
            waiting: 0,
            tokens_in_flight: 0,
            wait: Histogram::new(&WAIT_SECONDS),
        }
    }
}

/// See the module.
pub struct Tenants {
    policy: TenantPolicy,
    now: Box<dyn Fn() -> Duration + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    counts: BTreeMap<Arc<str>, TenantCounts>,
    /// Tokens in engines, of those who have any.
    in_flight: BTreeMap<Arc<str>, u64>,
    /// Who hands out prompts, one for each step.
    groups: Vec<SyncActivator>,
}

impl Tenants {
    /// `now` is the time since any fixed moment.
    pub fn new(policy: TenantPolicy, now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { policy, now: Box::new(now), state: Mutex::default() }
    }

    pub fn policy(&self) -> &TenantPolicy {
        &self.policy
    }

    /// What was done for each, by name.
    pub fn counts(&self) -> BTreeMap<Arc<str>, TenantCounts> {
        self.lock().counts.clone()
    }

    /// Wakes this operator when a tenant may have come below its limit.
    pub(crate) fn wake_on_finished(&self, group: SyncActivator) {
        self.lock().groups.push(group);
    }

    /// A prompt of the tenant waits from now on; returns when that was.
    pub(crate) fn arrived(&self, tenant: &Arc<str>) -> Duration {
        self.lock().count(tenant).waiting += 1;
        (self.now)()
    }

    /// A prompt that had waited was dropped.
    pub(crate) fn dropped(&self, tenant: &Arc<str>) {
        self.lock().count(tenant).waiting -= 1;
    }

    /// Whether the tenant is below its limit.
    pub(crate) fn may_run(&self, tenant: &str) -> bool {
        let in_flight = || self.lock().in_flight.get(tenant).copied().unwrap_or(0);
        self.policy.limit(tenant).is_none_or(|most| in_flight() < most)
    }

    /// A prompt goes to an engine, with so many tokens as it and its answer may have.
    pub(crate) fn handed_out(&self, tenant: &Arc<str>, tokens: u64, arrived: Duration) {
        let now = (self.now)();
        let mut state = self.lock();
        *state.in_flight.entry(Arc::clone(tenant)).or_insert(0) += tokens;
        let counts = state.count(tenant);
        counts.waiting -= 1;
        counts.tokens_in_flight += tokens;
        counts.wait.observe(now.saturating_sub(arrived).as_secs_f64());
    }

    /// A prompt that was handed out with `tokens` is done; `answer` has the tokens of prompt and answer, if there is one.
    pub(crate) fn finished(&self, tenant: &Arc<str>, tokens: u64, answer: Option<(u32, u32)>) {
        let mut state = self.lock();
        let in_flight = state.in_flight.get_mut(tenant).expect("it was handed out");
        *in_flight -= tokens;
        if *in_flight == 0 {
            state.in_flight.remove(tenant);
        }
        let counts = state.count(tenant);
        counts.tokens_in_flight -= tokens;
        if let Some((prompt_len, output_len)) = answer {
            counts.documents += 1;
            counts.prompt_tokens += u64::from(prompt_len);
            counts.output_tokens += u64::from(output_len);
        }
        if self.policy.has_limits() {
            for group in &state.groups {
                // Fails only when a worker is gone, and then nobody needs waking.
                let _ = group.activate();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Who is not among the first is counted under [`OTHER`], always.
    fn count(&mut self, tenant: &Arc<str>) -> &mut TenantCounts {
        let is_counted = self.counts.contains_key(tenant) || self.counts.len() < MAX_COUNTED;
        let name = if is_counted { Arc::clone(tenant) } else { OTHER.into() };
        self.counts.entry(name).or_default()
    }
}

impl fmt::Debug for Tenants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenants").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// The name as it is kept.
pub fn name(text: &str) -> Arc<str> {
    let text = text.trim();
    text[..text.floor_char_boundary(MAX_NAME_BYTES)].into()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn tokens_in_flight_are_limited_for_each_tenant() {
        let limits = BTreeMap::from([("large".to_owned(), 100), ("none".to_owned(), 0)]);
        let policy = TenantPolicy { limits, ..TenantPolicy::default() };
        assert_eq!((policy.limit("large"), policy.limit("free")), (Some(100), None));
        let clock = Arc::new(AtomicU64::new(5));
        let now = Arc::clone(&clock);
        let tenants = Tenants::new(policy, move || Duration::from_millis(now.load(Ordering::Relaxed)));
        let (small, large): (Arc<str>, Arc<str>) = ("small".into(), "large".into());
        for _ in 0..2 {
            let arrived = tenants.arrived(&large);
            clock.fetch_add(10, Ordering::Relaxed);
            tenants.handed_out(&large, 60, arrived);
        }
        assert!(!tenants.may_run("large") && tenants.may_run(&small) && tenants.may_run("free"));
        assert_eq!(tenants.counts()["large"].tokens_in_flight, 120);
        tenants.finished(&large, 60, Some((40, 7)));
        assert!(tenants.may_run("large"));
        tenants.finished(&large, 60, None);
        let mut expected =
            TenantCounts { documents: 1, prompt_tokens: 40, output_tokens: 7, ..TenantCounts::default() };
        (0..2).for_each(|_| expected.wait.observe(0.01));
        assert_eq!(tenants.counts(), BTreeMap::from([(large, expected)]));
        assert!(tenants.lock().in_flight.is_empty());
    }

    #[test]
    fn names_from_data_do_not_use_up_memory() {
        let tenants = Tenants::new(TenantPolicy::default(), || Duration::ZERO);
        for id in 0..1000 {
            tenants.arrived(&name(&format!("tenant {id}")));
        }
        let counts = tenants.counts();
        assert_eq!(counts.len(), MAX_COUNTED + 1);
        assert_eq!(counts[OTHER].waiting, 1000 - MAX_COUNTED as u64);
        assert_eq!(name(&"é".repeat(1000)).len(), MAX_NAME_BYTES);
    }
}
