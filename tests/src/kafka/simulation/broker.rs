//! The broker in memory, and a client of it whose calls get lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tidemill_connectors::kafka::assignment::Partition;
use tidemill_connectors::kafka::commit::{Broker, BrokerError};
use tidemill_connectors::kafka::record::OutRecord;
use tidemill_connectors::source::InputNames;

use super::consumer::Consumer;
use super::{Fault, Random, SESSION_MS, Shared, World};

const TRANSACTION_MS: u64 = 400;

#[derive(Debug, Default)]
pub(super) struct Transaction {
    epoch: u32,
    open: Option<Open>,
    last_committed: Option<u64>,
}

#[derive(Debug)]
struct Open {
    number: u64,
    since: u64,
    offsets: BTreeMap<i32, u64>,
}

/// The broker.
#[derive(Debug)]
pub(super) struct State {
    pub(super) now: u64,
    pub(super) random: Random,
    pub(super) fault: Fault,
    pub(super) calm: bool,
    pub(super) inputs: Vec<u64>,
    /// By partition: the row that each entry stands for, and its transaction.
    pub(super) outputs: Vec<Vec<(u64, u64)>>,
    /// By transaction: whether it was committed; open ones are missing.
    pub(super) outcomes: BTreeMap<u64, bool>,
    pub(super) committed: BTreeMap<i32, u64>,
    pub(super) transactions: BTreeMap<String, Transaction>,
    pub(super) num_transactions: u64,
    /// By member: when it was last heard.
    pub(super) members: BTreeMap<u64, u64>,
    pub(super) num_members: u64,
    pub(super) generation: u64,
    pub(super) owners: BTreeMap<i32, u64>,
}

impl State {
    pub(super) fn advance(&mut self, ms: u64) {
        self.now += ms;
        let dead: Vec<u64> = self
            .members
            .iter()
            .filter(|(_, seen)| self.now - **seen > SESSION_MS)
            .map(|(id, _)| *id)
            .collect();
        for member in dead {
            self.members.remove(&member);
            self.owners.retain(|_, owner| *owner != member);
            self.generation += 1;
        }
        for transaction in self.transactions.values_mut() {
            if transaction.open.as_ref().is_some_and(|open| self.now - open.since > TRANSACTION_MS) {
                let open = transaction.open.take().expect("it was just looked at");
                self.outcomes.insert(open.number, false);
                transaction.epoch += 1;
            }
        }
    }

    pub(super) fn is_unstable(&self, partition: i32) -> bool {
        let mut open = self.transactions.values().filter_map(|transaction| transaction.open.as_ref());
        open.any(|open| open.offsets.contains_key(&partition))
    }
}

/// A member's client: every call may get lost on either way.
pub(super) struct Client {
    pub(super) world: World,
    pub(super) name: String,
    pub(super) epoch: u32,
    pub(super) number: Option<u64>,
    pub(super) names: InputNames,
    pub(super) consumer: Consumer,
    pub(super) pinned: (u64, u64),
    /// For [`Fault::OffsetsBefore`]: kept until the offsets are committed.
    pub(super) early: Option<Vec<OutRecord>>,
    pub(super) crash_after: Shared,
}

impl Client {
    pub(super) fn new(
        world: World,
        name: String,
        names: InputNames,
        consumer: Consumer,
        crash_after: Shared,
    ) -> Self {
        Self {
            world,
            name,
            epoch: 0,
            number: None,
            names,
            consumer,
            pinned: (0, 0),
            early: None,
            crash_after,
        }
    }

    fn has_crashed(&self) -> bool {
        self.crash_after.load() == u64::MAX
    }

    /// Makes a call that may be lost before or after it has done its work.
    fn call<T>(
        &mut self,
        work: impl FnOnce(&mut Self, &mut State) -> Result<T, BrokerError>,
    ) -> Result<T, BrokerError> {
        let lost = || BrokerError::Retry("lost".to_owned());
        let left = self.crash_after.load();
        if left == 1 {
            self.crash_after.store(u64::MAX);
        } else if left > 1 && left != u64::MAX {
            self.crash_after.store(left - 1);
        }
        if self.has_crashed() {
            return Err(lost());
        }
        let state = Arc::clone(&self.world.state);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let ms = state.random.below(6);
        state.advance(ms);
        let fails = !state.calm;
        if state.now < self.consumer.cut_until.load() || (fails && state.random.one_in(20)) {
            return Err(lost());
        }
        let result = work(self, &mut state)?;
        if fails && state.random.one_in(20) { Err(lost()) } else { Ok(result) }
    }

    fn check_epoch(&self, state: &State) -> Result<(), BrokerError> {
        let current = state.transactions.get(&self.name).map_or(0, |transaction| transaction.epoch);
        if current == self.epoch { Ok(()) } else { Err(BrokerError::Fatal("fenced".to_owned())) }
    }

    fn open<'a>(&mut self, state: &'a mut State) -> Result<&'a mut Open, BrokerError> {
        self.check_epoch(state)?;
        let now = state.now;
        let transaction = state.transactions.entry(self.name.clone()).or_default();
        if transaction.open.is_none() {
            state.num_transactions += 1;
            self.number = Some(state.num_transactions);
            transaction.open =
                Some(Open { number: state.num_transactions, since: now, offsets: BTreeMap::new() });
        }
        Ok(transaction.open.as_mut().expect("it was just opened"))
    }

    fn append(&mut self, state: &mut State, record: &OutRecord) -> Result<(), BrokerError> {
        let number = self.open(state)?.number;
        let partition = record.partition.expect("set by the member");
        state.outputs[partition as usize].push((record.row, number));
        Ok(())
    }

    fn add_offsets(&mut self, state: &mut State, offsets: &BTreeMap<u32, u64>) -> Result<(), BrokerError> {
        self.check_epoch(state)?;
        let (id, generation) = self.pinned;
        let is_member = state.members.contains_key(&id) && state.generation == generation;
        if !is_member && state.fault != Fault::NoLeases {
            return Err(BrokerError::Abort("illegal generation".to_owned()));
        }
        let names = self.names.clone();
        let open = self.open(state)?;
        for (&input, &offset) in offsets {
            let partition = Partition::parse(&names.get(input)).expect("inputs are partitions");
            open.offsets.insert(partition.number, offset);
        }
        Ok(())
    }

    fn end(&mut self, state: &mut State, commit: bool) -> Result<(), BrokerError> {
        self.check_epoch(state)?;
        let transaction = state.transactions.entry(self.name.clone()).or_default();
        let Some(open) = transaction.open.take() else {
            // The answer was lost, not the request.
            let is_known = !commit || self.number.is_none() || transaction.last_committed == self.number;
            return if is_known { Ok(()) } else { Err(BrokerError::Fatal("no such transaction".to_owned())) };
        };
        if commit {
            transaction.last_committed = Some(open.number);
            state.committed.extend(open.offsets);
        }
        state.outcomes.insert(open.number, commit);
        Ok(())
    }
}

impl Broker for Client {
    fn init(&mut self) -> Result<(), BrokerError> {
        self.number = None;
        self.call(|client, state| {
            let fault = state.fault;
            let transaction = state.transactions.entry(client.name.clone()).or_default();
            if fault != Fault::NoFencing {
                transaction.epoch += 1;
                if let Some(open) = transaction.open.take() {
                    state.outcomes.insert(open.number, false);
                }
            }
            client.epoch = state.transactions[&client.name].epoch;
            Ok(())
        })
    }

    fn pin_group(&mut self, check: &mut dyn FnMut()) -> bool {
        let _no_rebalance = self.consumer.assignment.lock().unwrap_or_else(PoisonError::into_inner);
        check();
        self.pinned = (self.consumer.id.load(), self.consumer.generation.load());
        true
    }

    fn begin(&mut self) -> Result<(), BrokerError> {
        self.number = None;
        self.early = None;
        Ok(())
    }

    fn send(&mut self, record: &OutRecord) -> Result<(), BrokerError> {
        if self.world.state().fault == Fault::OffsetsBefore {
            self.early.get_or_insert_default().push(record.clone());
            return Ok(());
        }
        // The client's own queue: nothing of it is lost as long as the client lives.
        if self.has_crashed() {
            return Err(BrokerError::Retry("lost".to_owned()));
        }
        let state = Arc::clone(&self.world.state);
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        self.append(&mut state, record)
    }

    fn send_offsets(&mut self, offsets: &BTreeMap<u32, u64>) -> Result<(), BrokerError> {
        let fault = self.world.state().fault;
        match fault {
            Fault::OffsetsAfterwards => {
                loop {
                    match self.call(|client, state| client.end(state, true)) {
                        Err(BrokerError::Retry(_)) if self.pause(Duration::from_millis(5), "lost") => {}
                        result => break result?,
                    }
                }
                self.number = None;
                self.call(|client, state| client.add_offsets(state, offsets))
            }
            Fault::OffsetsBefore => {
                self.call(|client, state| {
                    client.add_offsets(state, offsets)?;
                    client.end(state, true)
                })?;
                self.number = None;
                for record in self.early.take().unwrap_or_default() {
                    let state = Arc::clone(&self.world.state);
                    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                    self.append(&mut state, &record)?;
                }
                Ok(())
            }
            _ => self.call(|client, state| client.add_offsets(state, offsets)),
        }
    }

    fn commit(&mut self) -> Result<(), BrokerError> {
        self.call(|client, state| client.end(state, true))
    }

    fn abort(&mut self) -> Result<(), BrokerError> {
        self.call(|client, state| client.end(state, false))
    }

    fn committed(&mut self, inputs: &BTreeSet<u32>) -> Result<BTreeMap<u32, u64>, BrokerError> {
        self.call(|client, state| {
            let mut found = BTreeMap::new();
            for &input in inputs {
                let partition = Partition::parse(&client.names.get(input)).expect("inputs are partitions");
                if state.is_unstable(partition.number) {
                    return Err(BrokerError::Retry("unstable".to_owned()));
                }
                if let Some(&offset) = state.committed.get(&partition.number) {
                    found.insert(input, offset);
                }
            }
            Ok(found)
        })
    }

    fn errors_limit(&self) -> usize {
        usize::MAX
    }

    fn pause(&mut self, time: Duration, _reason: &str) -> bool {
        if self.has_crashed() {
            return false;
        }
        self.world.state().advance((time.as_millis() as u64).min(100));
        // Neither our own consumer nor the others wait.
        self.consumer.poll();
        if self.world.depth < 4 {
            for _ in 0..3 {
                World { depth: self.world.depth + 1, ..self.world.clone() }.step();
            }
        }
        true
    }
}
