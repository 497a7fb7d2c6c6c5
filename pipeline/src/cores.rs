//! The cores this process may use, cut into shares that engines are pinned to.
//!
//! A thread inherits the cores of the thread that starts it, so an engine made and started under
//! [`Cores::pinned`] keeps all its threads on its share. Where the system has no such call nothing is pinned.

use std::thread;

/// Some cores, by the system's numbers; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cores(Vec<usize>);

impl Cores {
    /// As many as this process may keep busy.
    pub fn available() -> Self {
        let num_cores = thread::available_parallelism().map_or(1, usize::from);
        let mut cores = allowed();
        cores.truncate(num_cores);
        Self(if cores.is_empty() { (0..num_cores).collect() } else { cores })
    }

    /// Shares of equal size; with more shares than cores some have the same core.
    pub fn shares(&self, num_shares: usize) -> Vec<Self> {
        let num_cores = self.0.len();
        let bound = |share: usize| share * num_cores / num_shares;
        let share = |index: usize| match &self.0[bound(index)..bound(index + 1)] {
            [] => vec![self.0[index % num_cores]],
            cores => cores.to_vec(),
        };
        (0..num_shares).map(|index| Self(share(index))).collect()
    }

    pub fn num_cores(&self) -> usize {
        self.0.len()
    }

    /// Does some work on these cores; the threads that it starts stay there.
    pub fn pinned<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let pinned = || {
            pin(&self.0);
            work()
        };
        match thread::scope(|scope| scope.spawn(pinned).join()) {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

#[cfg(target_os = "linux")]
fn allowed() -> Vec<usize> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    sched_getaffinity(None)
        .map_or_else(|_| Vec::new(), |set| (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect())
}

#[cfg(target_os = "linux")]
fn pin(cores: &[usize]) {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core);
    }
    if let Err(error) = sched_setaffinity(None, &set) {
        tracing::warn!(?cores, %error, "cannot pin a thread");
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn pin(_cores: &[usize]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_and_never_empty() {
        let cores = Cores(vec![2, 3, 5, 7]);
        assert_eq!(cores.shares(2), [Cores(vec![2, 3]), Cores(vec![5, 7])]);
        assert_eq!(cores.shares(3), [Cores(vec![2]), Cores(vec![3]), Cores(vec![5, 7])]);
        let many = cores.shares(9);
        assert!(many.iter().all(|share| share.num_cores() == 1), "{many:?}");
    }

    #[test]
    fn threads_stay_on_the_cores_of_the_one_that_starts_them() {
        let shares = Cores::available().shares(2);
        for share in shares {
            let seen = share.pinned(|| thread::spawn(allowed).join());
            let seen = seen.expect("the thread looks at its cores");
            assert!(seen == share.0 || cfg!(not(target_os = "linux")), "{seen:?} is not {share:?}");
        }
    }
}
