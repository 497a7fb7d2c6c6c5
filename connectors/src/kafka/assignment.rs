//! Which partitions are ours, and the lease on each.
//!
//! Invariant: a partition has at most one lease that is not revoked, and whatever was read under a lease may be
//! committed only while it holds. A partition that goes and comes back gets a new lease: what was read before is
//! read again from the committed offset. A plain struct without a client, shared with the simulation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::source::InputNames;

/// A topic's partition.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Partition {
    pub topic: Arc<str>,
    pub number: i32,
}

impl Partition {
    pub fn new(topic: &str, number: i32) -> Self {
        Self { topic: topic.into(), number }
    }

    /// The partition of which [`Display`](std::fmt::Display) is the name.
    pub fn parse(name: &str) -> Option<Self> {
        let (topic, number) = name.rsplit_once('-')?;
        Some(Self::new(topic, number.parse().ok()?))
    }
}

/// As Kafka itself writes it: `topic-0`.
impl std::fmt::Display for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.topic, self.number)
    }
}

/// What is known of a partition that is ours.
#[derive(Clone, Debug)]
pub struct Assigned {
    /// Its number among the inputs.
    pub input: u32,
    pub revoked: Arc<AtomicBool>,
}

/// The partitions that are ours.
#[derive(Debug)]
pub struct Assignment {
    names: InputNames,
    partitions: BTreeMap<Partition, Assigned>,
    /// Counts every change.
    version: u64,
}

impl Assignment {
    pub fn new(names: InputNames) -> Self {
        Self { names, partitions: BTreeMap::new(), version: 0 }
    }

    pub fn assign(&mut self, partitions: impl IntoIterator<Item = Partition>) {
        self.version += 1;
        for partition in partitions {
            let input = self.names.number(&partition.to_string());
            let new = Assigned { input, revoked: Arc::default() };
            if let Some(old) = self.partitions.insert(partition, new) {
                old.revoked.store(true, Ordering::Release);
            }
        }
    }

    /// Must be called before the group gives the partitions to somebody else.
    pub fn revoke<'a>(&mut self, partitions: impl IntoIterator<Item = &'a Partition>) {
        self.version += 1;
        for partition in partitions {
            if let Some(old) = self.partitions.remove(partition) {
                old.revoked.store(true, Ordering::Release);
            }
        }
    }

    pub fn get(&self, partition: &Partition) -> Option<&Assigned> {
        self.partitions.get(partition)
    }

    pub fn partitions(&self) -> impl Iterator<Item = (&Partition, &Assigned)> {
        self.partitions.iter()
    }

    pub fn version(&self) -> u64 {
        self.version
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_that_comes_back_has_a_new_lease() {
        let names = InputNames::default();
        let mut assignment = Assignment::new(names.clone());
        let (a, b) = (Partition::new("t-1", 0), Partition::new("t-1", 1));
        assignment.assign([a.clone(), b.clone()]);
        let first = assignment.get(&a).unwrap().clone();
        let other = assignment.get(&b).unwrap().clone();
        assignment.revoke([&a]);
        assert!(first.revoked.load(Ordering::Acquire) && !other.revoked.load(Ordering::Acquire));
        assert!(assignment.get(&a).is_none());
        assignment.assign([a.clone()]);
        let second = assignment.get(&a).unwrap();
        assert_eq!(second.input, first.input);
        assert!(!second.revoked.load(Ordering::Acquire) && first.revoked.load(Ordering::Acquire));
        assert_eq!(&*names.get(second.input), "t-1-0");
        assert_eq!(Partition::parse("t-1-0"), Some(a));
    }
}
