//! Topics as the output of a run: results and errors, committed together with where their input ends.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::KafkaError;
use super::broker::{KafkaBroker, ProducerSpec, Progress};
use super::commit::{CommitError, Committed, Committer, StagedEpoch};
use super::group::{Group, SharedGroup, Start};
use super::record::Target;
use super::stats::KafkaStats;
use super::topics;
use crate::output::Resume;
use crate::source::{InputNames, Position};

/// What an output is opened with.
#[derive(Clone, Debug)]
pub struct KafkaOutputSpec {
    pub producer: ProducerSpec,
    /// Of inputs that are files: what decides the records, in short.
    pub definition: String,
    /// Begin anew whatever the topic holds.
    pub force: bool,
}

/// An open output.
pub struct KafkaOutput {
    committer: Committer<KafkaBroker>,
    spec: KafkaOutputSpec,
    has_group: bool,
    done: State,
}

/// Where a run over files is, kept with the topic's offset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    definition: String,
    position: Position,
    rows: u64,
    errors: u64,
    finished: bool,
}

impl KafkaOutput {
    /// Finds mistakes in the options; does not connect.
    pub fn check(producer: &ProducerSpec) -> Result<(), KafkaError> {
        // The real name may be known only when it runs.
        let producer = ProducerSpec { transactional_id: "check".to_owned(), ..producer.clone() };
        let home = home(&producer, InputNames::default())?;
        let progress = Progress::Rows { home, state: String::new() };
        KafkaBroker::new(producer, [usize::MAX; 2], progress, Arc::default()).check()
    }

    /// Opens the topics and fences who wrote them by the same name before; only then may the input be read.
    /// `group` is where the offsets of topics that are read belong; without it the input is files.
    pub fn open(
        spec: KafkaOutputSpec,
        group: Option<SharedGroup>,
        names: InputNames,
        stats: KafkaStats,
        stop: Arc<AtomicBool>,
    ) -> Result<(Self, Resume), KafkaError> {
        let producer = &spec.producer;
        let limits = topics::limits(&producer.cluster, [&producer.topic, &producer.errors_topic])?;
        let has_group = group.is_some();
        if let Some(group) = group.as_ref().filter(|_| producer.exactly_once) {
            check_cluster(producer, group)?;
        }
        let progress = match group {
            Some(group) => Progress::Group { group, names: names.clone() },
            None => Progress::Rows { home: home(producer, names.clone())?, state: String::new() },
        };
        let broker = KafkaBroker::new(producer.clone(), limits, progress, stop);
        let mut committer =
            Committer::start(broker, names, stats).map_err(|error| failed(producer, error))?;
        let mut done = State { definition: spec.definition.clone(), ..State::default() };
        let mut resume = Resume::Fresh;
        if !has_group
            && !spec.force
            && let Some(state) = committer.broker().committed_state()?
        {
            let other = || KafkaError::OtherDefinition { topic: producer.topic.clone() };
            let state: State = serde_json::from_str(&state).map_err(|_| other())?;
            if state.definition != spec.definition {
                return Err(other());
            }
            let State { position, rows, errors, finished, .. } = state;
            resume = if finished {
                Resume::Finished { rows, errors }
            } else {
                Resume::Continue { position: position.into(), rows, errors }
            };
            done = state;
        }
        Ok((Self { committer, spec, has_group, done }, resume))
    }

    /// The run is ending: what the broker does not take soon is left for the next one.
    pub fn hurry(&mut self) {
        self.committer.broker().hurry();
    }

    /// The most bytes of a record for a topic.
    pub fn limit(&mut self, target: Target) -> usize {
        self.committer.broker().limit(target)
    }

    pub fn stage(&mut self, epoch: StagedEpoch) {
        self.committer.stage(epoch);
    }

    pub fn staged_rows(&self) -> u64 {
        self.committer.staged_rows()
    }

    pub fn staged_bytes(&self) -> u64 {
        self.committer.staged_bytes()
    }

    /// Commits all that is staged.
    pub fn commit(&mut self) -> Result<Committed, KafkaError> {
        if !self.has_group {
            for epoch in self.committer.staged() {
                self.done.position = Position { file: epoch.input, row: epoch.end };
                self.done.rows += epoch.num_rows;
                self.done.errors += epoch.num_errors;
            }
            self.keep_state();
        }
        self.committer.commit().map_err(|error| failed(&self.spec.producer, error))
    }

    /// Says that files were read to their end. Topics have none.
    pub fn finish(&mut self) -> Result<(), KafkaError> {
        if self.has_group {
            return Ok(());
        }
        self.done.finished = true;
        self.keep_state();
        let Position { file, row } = self.done.position;
        self.committer.stage(StagedEpoch {
            input: file,
            end: row,
            revoked: Arc::default(),
            records: Vec::new(),
            num_rows: 0,
            num_errors: 0,
        });
        self.committer.commit().map_err(|error| failed(&self.spec.producer, error))?;
        Ok(())
    }

    fn keep_state(&mut self) {
        let now = serde_json::to_string(&self.done).expect("plain data");
        if let Progress::Rows { state, .. } = &mut self.committer.broker().progress {
            *state = now;
        }
    }
}

/// A transaction is of one cluster, so the offsets of another one cannot be in it.
fn check_cluster(producer: &ProducerSpec, group: &SharedGroup) -> Result<(), KafkaError> {
    if producer.cluster.brokers == *group.brokers() {
        return Ok(());
    }
    let ours = home(producer, InputNames::default())?.cluster_id();
    if let (Some(source), Some(sink)) = (group.cluster_id(), ours)
        && source != sink
    {
        return Err(KafkaError::OtherCluster { brokers: producer.cluster.brokers.clone() });
    }
    Ok(())
}

/// The group that keeps the position of files; nobody reads with it.
fn home(producer: &ProducerSpec, names: InputNames) -> Result<SharedGroup, KafkaError> {
    let id = &producer.transactional_id;
    let stats = KafkaStats::default();
    Ok(Arc::new(Group::new(&producer.cluster, id, Start::Earliest, names, stats)?))
}

fn failed(producer: &ProducerSpec, error: CommitError) -> KafkaError {
    match error {
        CommitError::Stopped(reason) => KafkaError::Unfinished { reason },
        CommitError::Fenced(reason) => KafkaError::Fenced { id: producer.transactional_id.clone(), reason },
        CommitError::Broken(reason) => KafkaError::Refused {
            topics: format!("{} and {}", producer.topic, producer.errors_topic),
            reason,
        },
    }
}
