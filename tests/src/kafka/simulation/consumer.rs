//! A member's consumer: its place in the group, and what it is assigned. It polls also while a commit waits.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemill_connectors::kafka::assignment::{Assignment, Partition};
use tidemill_connectors::source::InputNames;

use super::Shared;
use super::broker::State;

#[derive(Clone)]
pub(super) struct Consumer {
    state: Arc<Mutex<State>>,
    pub(super) assignment: Arc<Mutex<Assignment>>,
    /// Its id and generation in the group; 0 when it is in none.
    pub(super) id: Shared,
    pub(super) generation: Shared,
    pub(super) cut_until: Shared,
    positions: Arc<Mutex<BTreeMap<i32, u64>>>,
}

impl Consumer {
    pub(super) fn new(state: Arc<Mutex<State>>, names: InputNames) -> Self {
        let assignment = Arc::new(Mutex::new(Assignment::new(names)));
        let (id, generation, cut_until) = <(Shared, Shared, Shared)>::default();
        Self { state, assignment, id, generation, cut_until, positions: Arc::default() }
    }

    pub(super) fn positions(&self) -> MutexGuard<'_, BTreeMap<i32, u64>> {
        self.positions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the client's poll does: heartbeats, and rebalances.
    pub(super) fn poll(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.now < self.cut_until.load() {
            return;
        }
        let mut assignment = self.assignment.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.members.contains_key(&self.id.load()) {
            let lost: Vec<Partition> =
                assignment.partitions().map(|(partition, _)| partition.clone()).collect();
            assignment.revoke(&lost);
            state.num_members += 1;
            state.generation += 1;
            self.id.store(state.num_members);
            self.generation.store(0);
        }
        let (id, now) = (self.id.load(), state.now);
        state.members.insert(id, now);
        if self.generation.load() == state.generation {
            return;
        }
        let ids: Vec<u64> = state.members.keys().copied().collect();
        let is_ours = |partition: i32| ids[partition as usize % ids.len()] == id;
        let owned: Vec<Partition> = assignment.partitions().map(|(partition, _)| partition.clone()).collect();
        let given: Vec<Partition> =
            owned.into_iter().filter(|partition| !is_ours(partition.number)).collect();
        if !given.is_empty() {
            assignment.revoke(&given);
            state.owners.retain(|number, _| !given.iter().any(|partition| partition.number == *number));
            // The others learn that these are free now.
            state.generation += 1;
        }
        let mut is_complete = true;
        for number in 0..state.inputs.len() as i32 {
            if !is_ours(number) || state.owners.get(&number) == Some(&id) {
                continue;
            }
            // Owned by somebody who has not heard yet, or its offset may still change.
            if state.owners.contains_key(&number) || state.is_unstable(number) {
                is_complete = false;
                continue;
            }
            state.owners.insert(number, id);
            assignment.assign([Partition::new("in", number)]);
            self.positions().insert(number, state.committed.get(&number).copied().unwrap_or(0));
        }
        if is_complete {
            self.generation.store(state.generation);
        }
    }
}
