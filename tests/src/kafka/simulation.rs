//! The commit protocol against a broker in memory: seeded, with a clock that is only a number.
//!
//! The world is one broker with a consumer group, transactions with timeouts and fencing, and members that run the
//! same [`Assignment`] and [`Committer`] as the real thing. Requests and answers get lost, members crash between any
//! two calls, stop for longer than their session, come back as zombies. While one member waits inside a commit, others
//! go on. What is left out: how librdkafka behaves inside, which the tests against the real broker are for.

mod broker;
mod consumer;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemill_connectors::kafka::commit::{Committer, StagedEpoch};
use tidemill_connectors::kafka::record::{OutRecord, Target};
use tidemill_connectors::kafka::stats::KafkaStats;
use tidemill_connectors::source::InputNames;

use broker::{Client, State};
use consumer::Consumer;

const SESSION_MS: u64 = 300;
const NUM_SLOTS: usize = 3;
const NUM_STEPS: usize = 600;
const MAX_EPOCHS: usize = 6;

/// A small generator, the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn one_in(&mut self, bound: u64) -> bool {
        self.below(bound) == 0
    }
}

/// A mistake that is built in on purpose: the checker must find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Records are committed first and offsets in a transaction of their own.
    OffsetsAfterwards,
    /// Offsets are committed first and records in a transaction of their own.
    OffsetsBefore,
    /// Leases are not looked at, and the group's generation is not passed on.
    NoLeases,
    /// A new producer does not end what the old one left open.
    NoFencing,
}

/// One history.
#[derive(Clone)]
pub struct World {
    state: Arc<Mutex<State>>,
    members: Arc<Mutex<Vec<Option<Member>>>>,
    depth: usize,
}

/// What a history has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub records: u64,
    pub crashes: u64,
    pub rebalances: u64,
    pub aborted: u64,
    pub fenced: u64,
    pub canceled: u64,
}

impl World {
    fn new(seed: u64, fault: Fault) -> Self {
        let mut random = Random::new(seed);
        let num_partitions = 1 + random.below(3) as usize;
        let inputs = (0..num_partitions).map(|_| 20 + random.below(40)).collect();
        let state = State {
            now: 0,
            random,
            fault,
            calm: false,
            inputs,
            outputs: vec![Vec::new(); num_partitions],
            outcomes: BTreeMap::new(),
            committed: BTreeMap::new(),
            transactions: BTreeMap::new(),
            num_transactions: 0,
            members: BTreeMap::new(),
            num_members: 0,
            generation: 0,
            owners: BTreeMap::new(),
        };
        let members = (0..NUM_SLOTS).map(|_| None).collect();
        Self { state: Arc::new(Mutex::new(state)), members: Arc::new(Mutex::new(members)), depth: 0 }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> MutexGuard<'_, Vec<Option<Member>>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn below(&self, bound: u64) -> u64 {
        self.state().random.below(bound)
    }

    /// Lets one member do something; those that are inside a call are not there.
    fn step(&self) {
        let slot = self.below(NUM_SLOTS as u64) as usize;
        let Some(mut member) = self.members()[slot].take() else { return };
        member.depth = self.depth;
        let goes_on = member.step();
        let mut members = self.members();
        // Another may have been started in its place.
        if goes_on && members[slot].is_none() {
            members[slot] = Some(member);
        }
    }

    fn start(&self, slot: usize, totals: &KafkaStats) {
        // The same name as the one before it, as a process that comes back to its folder has.
        if let Some(member) = Member::start(self.clone(), slot, totals.clone()) {
            self.members()[slot] = Some(member);
        }
    }

    /// What went wrong, if anything did: the rows of a partition must come once each, in order.
    fn check(&self) -> Result<(), String> {
        let state = self.state();
        for (partition, entries) in state.outputs.iter().enumerate() {
            let rows: Vec<u64> = entries
                .iter()
                .filter(|(_, transaction)| state.outcomes.get(transaction) == Some(&true))
                .map(|(row, _)| *row)
                .collect();
            let expected: Vec<u64> = (0..state.inputs[partition]).collect();
            if rows != expected {
                return Err(format!("partition {partition} has rows {rows:?}"));
            }
        }
        Ok(())
    }
}

/// Runs the history of a seed and checks it.
pub fn run(seed: u64, fault: Fault) -> Result<Seen, String> {
    let world = World::new(seed, fault);
    let totals = KafkaStats::default();
    let mut num_crashes = 0;
    world.start(0, &totals);
    for _ in 0..NUM_STEPS {
        let slot = world.below(NUM_SLOTS as u64) as usize;
        match world.below(100) {
            0..=2 => {
                // Whatever it held is gone, open transactions stay open.
                num_crashes += u64::from(world.members()[slot].take().is_some());
            }
            3..=6 if world.members()[slot].is_none() => world.start(slot, &totals),
            7 => {
                let ms = 50 + world.below(600);
                let until = world.state().now + ms;
                if let Some(member) = &mut world.members()[slot] {
                    member.consumer.cut_until.store(until);
                }
            }
            8 => {
                let ms = 50 + world.below(900);
                let until = world.state().now + ms;
                if let Some(member) = &mut world.members()[slot] {
                    member.stopped_until = until;
                }
            }
            9 => {
                let num_calls = world.below(12);
                if let Some(member) = &mut world.members()[slot] {
                    member.crash_after.store(num_calls + 1);
                }
            }
            _ => world.step(),
        }
        let ms = world.below(12);
        world.state().advance(ms);
    }
    finish(&world, &totals);
    world.check().map_err(|error| format!("seed {seed}: {error}"))?;
    let stats = totals.snapshot();
    let state = world.state();
    Ok(Seen {
        records: state.inputs.iter().sum(),
        crashes: num_crashes,
        rebalances: state.generation,
        aborted: stats.transactions_aborted,
        fenced: stats.producers_fenced,
        canceled: stats.epochs_canceled,
    })
}

/// Nothing fails any more, and one member does what is left.
fn finish(world: &World, totals: &KafkaStats) {
    for member in world.members().iter_mut() {
        *member = None;
    }
    world.state().calm = true;
    world.state().advance(10 * SESSION_MS);
    world.start(0, totals);
    for _ in 0..20_000 {
        world.step();
        let mut state = world.state();
        state.advance(5);
        let ends = state.inputs.clone();
        if ends.iter().enumerate().all(|(number, end)| state.committed.get(&(number as i32)) == Some(end)) {
            return;
        }
    }
}

/// A number that a member shares with its client.
#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<u64>>);

impl Shared {
    fn load(&self) -> u64 {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn store(&self, value: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

struct Epoch {
    input: u32,
    partition: i32,
    rows: std::ops::Range<u64>,
    revoked: Arc<AtomicBool>,
    done_at: u64,
}

/// A process: a source, work in flight, and the committer.
struct Member {
    world: World,
    committer: Committer<Client>,
    consumer: Consumer,
    crash_after: Shared,
    stopped_until: u64,
    epochs: VecDeque<Epoch>,
    depth: usize,
}

impl Member {
    fn start(world: World, slot: usize, stats: KafkaStats) -> Option<Self> {
        let names = InputNames::default();
        let consumer = Consumer::new(Arc::clone(&world.state), names.clone());
        let crash_after = Shared::default();
        let client = Client::new(
            world.clone(),
            format!("slot-{slot}"),
            names.clone(),
            consumer.clone(),
            crash_after.clone(),
        );
        let committer = Committer::start(client, names, stats).ok()?;
        let epochs = VecDeque::new();
        Some(Self { world, committer, consumer, crash_after, stopped_until: 0, epochs, depth: 0 })
    }

    /// False when it has crashed.
    fn step(&mut self) -> bool {
        let now = self.world.state().now;
        if now < self.stopped_until {
            return true;
        }
        match self.world.below(4) {
            0 => self.consumer.poll(),
            1 | 2 => self.read(),
            _ => return self.write(),
        }
        true
    }

    /// Takes a batch of one partition, if there is room.
    fn read(&mut self) {
        let mut state = self.world.state();
        if self.epochs.len() >= MAX_EPOCHS || state.now < self.consumer.cut_until.load() {
            return;
        }
        let assignment = self.consumer.assignment.lock().unwrap_or_else(PoisonError::into_inner);
        let assigned: Vec<_> =
            assignment.partitions().map(|(one, found)| (one.number, found.clone())).collect();
        if assigned.is_empty() {
            return;
        }
        let (partition, found) = assigned[state.random.below(assigned.len() as u64) as usize].clone();
        let mut positions = self.consumer.positions();
        let first = positions[&partition];
        let end = (first + 1 + state.random.below(5)).min(state.inputs[partition as usize]);
        if first < end {
            let done_at = state.now + state.random.below(80);
            positions.insert(partition, end);
            let epoch =
                Epoch { input: found.input, partition, rows: first..end, revoked: found.revoked, done_at };
            self.epochs.push_back(epoch);
        }
    }

    /// Stages what is done, in order, and commits; false when it has crashed.
    fn write(&mut self) -> bool {
        let (now, fault) = {
            let state = self.world.state();
            (state.now, state.fault)
        };
        while self.epochs.front().is_some_and(|epoch| epoch.done_at <= now) {
            let epoch = self.epochs.pop_front().expect("it was just looked at");
            if epoch.revoked.load(Ordering::Acquire) && fault != Fault::NoLeases {
                continue;
            }
            let records = epoch.rows.clone().map(|row| OutRecord {
                target: Target::Results,
                key: None,
                value: None,
                headers: Vec::new(),
                partition: Some(epoch.partition),
                timestamp: None,
                input: epoch.input,
                row,
                num_refused: 0,
            });
            self.committer.stage(StagedEpoch {
                input: epoch.input,
                end: epoch.rows.end,
                revoked: if fault == Fault::NoLeases { Arc::default() } else { epoch.revoked },
                records: records.collect(),
                num_rows: epoch.rows.end - epoch.rows.start,
                num_errors: 0,
            });
        }
        if self.world.below(3) > 0 {
            return true;
        }
        self.committer.broker().world.depth = self.depth + 1;
        self.committer.commit().is_ok()
    }
}
