//! The threads of a model: a fork and a join for each op, in about a microsecond.
//!
//! A step is some hundred short ops one after the other. Between two of them the members of a team wait in a loop and
//! only sleep after a while without work: waking a sleeper takes longer than most ops. Tasks are handed out by
//! a counter, so a member that is late does less, and one that is asleep is not waited for. Nesting is not supported:
//! a task that forks runs its tasks itself.
//!
//! Invariant: `for_each` returns after every task has run and every member has left the job, so tasks may borrow.

use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crate::shared::SharedMut;

/// Looks at the next job before a member sleeps: some ten microseconds.
const MAX_SPINS: u32 = 1 << 11;

/// Set while the job takes members; the rest of the state counts those that are in, by twos.
const OPEN: usize = 1;
const MEMBER: usize = 2;

type Job<'a> = dyn Fn(usize) + Sync + 'a;

thread_local! {
    /// The team whose member this thread is at the moment, and as which one.
    static CURRENT: Cell<Option<(*const Shared, usize)>> = const { Cell::new(None) };
    static IS_WORKING: Cell<bool> = const { Cell::new(false) };
}

/// Some threads, of which the one that calls [`install`](Self::install) is the first.
pub(crate) struct Team {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    num_threads: usize,
    /// Written by the caller while `state` is 0.
    job: UnsafeCell<Option<(*const Job<'static>, usize)>>,
    state: AtomicUsize,
    next_task: AtomicUsize,
    /// Raised with every job.
    generation: AtomicUsize,
    num_asleep: AtomicUsize,
    has_panicked: AtomicBool,
    is_over: AtomicBool,
}

// SAFETY: the job is written by the one caller while nobody is in it, and read by members that are.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is used only while the caller keeps what it points to alive.
unsafe impl Send for Shared {}

impl Team {
    /// Starts `num_threads - 1` threads; they inherit the cores of the caller.
    pub(crate) fn new(num_threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            num_threads: num_threads.max(1),
            job: UnsafeCell::new(None),
            state: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            num_asleep: AtomicUsize::new(0),
            has_panicked: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let mut team = Self { shared, threads: Vec::new() };
        for index in 1..num_threads {
            let shared = Arc::clone(&team.shared);
            let builder = std::thread::Builder::new().name(format!("kernels-{index}"));
            team.threads.push(builder.spawn(move || work(&shared, index))?);
        }
        Ok(team)
    }

    /// Runs `f` as the first member; `&mut`, as a team does one job at a time.
    pub(crate) fn install<R>(&mut self, f: impl FnOnce() -> R) -> R {
        let before = CURRENT.replace(Some((Arc::as_ptr(&self.shared), 0)));
        let _restore = Restore(before);
        TEAM_THREADS.with_borrow_mut(|threads| {
            threads.clear();
            threads.extend(self.threads.iter().map(|thread| thread.thread().clone()));
        });
        f()
    }
}

thread_local! {
    /// Whom the first member wakes.
    static TEAM_THREADS: std::cell::RefCell<Vec<std::thread::Thread>> = const { std::cell::RefCell::new(Vec::new()) };
}

struct Restore(Option<(*const Shared, usize)>);

impl Drop for Restore {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A panic of a task was handed to the caller already.
            let _ = thread.join();
        }
    }
}

/// Threads of the team this one belongs to; 1 without a team.
pub(crate) fn num_threads() -> usize {
    // SAFETY: a team outlives the time it is current for.
    CURRENT.get().map_or(1, |(shared, _)| unsafe { (*shared).num_threads })
}

/// Which member of its team this thread is, from 0 on.
pub(crate) fn thread_index() -> usize {
    CURRENT.get().map_or(0, |(_, index)| index)
}

/// Calls `task` with every number below `num_tasks`, on all threads of the team.
pub(crate) fn for_each(num_tasks: usize, task: impl Fn(usize) + Sync) {
    let shared = match CURRENT.get() {
        // SAFETY: a team outlives the time it is current for.
        Some((shared, 0)) if num_tasks > 1 && !IS_WORKING.get() => unsafe { &*shared },
        _ => return (0..num_tasks).for_each(task),
    };
    if shared.num_threads == 1 {
        return (0..num_tasks).for_each(task);
    }
    let job: &Job<'_> = &task;
    // SAFETY: only the lifetime changes; `Close` makes sure that no member is in the job when it ends.
    let job: *const Job<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(job)) };
    // SAFETY: `state` is 0, so nobody reads.
    unsafe { *shared.job.get() = Some((job, num_tasks)) };
    shared.next_task.store(0, Ordering::Relaxed);
    shared.has_panicked.store(false, Ordering::Relaxed);
    let close = Close { shared };
    shared.state.store(OPEN, Ordering::Release);
    shared.generation.fetch_add(1, Ordering::SeqCst);
    if shared.num_asleep.load(Ordering::SeqCst) > 0 {
        TEAM_THREADS.with_borrow(|threads| threads.iter().for_each(std::thread::Thread::unpark));
    }
    run_tasks(shared, &task, num_tasks);
    drop(close);
    assert!(!shared.has_panicked.load(Ordering::Relaxed), "a task of a kernel panicked");
}

/// Calls `task` with the index and the numbers of every chunk of `values`, the last of which may be shorter.
pub(crate) fn for_each_chunk<T: Send>(
    values: &mut [T],
    chunk_len: usize,
    task: impl Fn(usize, &mut [T]) + Sync,
) {
    let len = values.len();
    let values = SharedMut::new(values);
    for_each(len.div_ceil(chunk_len), |index| {
        let start = index * chunk_len;
        let chunk_len = chunk_len.min(len - start);
        // SAFETY: chunks do not overlap, and each is used by one task.
        task(index, unsafe { values.part(start, chunk_len) });
    });
}

/// Ends a job: takes no more members, and waits for those that are in.
struct Close<'a> {
    shared: &'a Shared,
}

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.shared.state.load(Ordering::Acquire) != 0 {
            wait(&mut spins);
        }
    }
}

/// One more look: busy at first, then leaving the core to others.
fn wait(spins: &mut u32) {
    *spins += 1;
    match *spins < MAX_SPINS {
        true => std::hint::spin_loop(),
        false => std::thread::yield_now(),
    }
}

fn run_tasks(shared: &Shared, task: &Job<'_>, num_tasks: usize) {
    IS_WORKING.set(true);
    loop {
        let index = shared.next_task.fetch_add(1, Ordering::Relaxed);
        if index >= num_tasks {
            break;
        }
        // A panic is passed on by the caller, when nobody uses what the tasks borrow.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(index))) {
            shared.has_panicked.store(true, Ordering::Relaxed);
            if CURRENT.get().is_some_and(|(_, index)| index == 0) {
                IS_WORKING.set(false);
                resume_unwind(panic);
            }
        }
    }
    IS_WORKING.set(false);
}

/// A member's life: wait for a job, join it, leave it.
fn work(shared: &Shared, index: usize) {
    CURRENT.set(Some((shared, index)));
    let mut seen = 0;
    let mut spins = 0;
    while !shared.is_over.load(Ordering::Relaxed) {
        let generation = shared.generation.load(Ordering::Acquire);
        if generation == seen {
            spins += 1;
            if spins < MAX_SPINS {
                std::hint::spin_loop();
                continue;
            }
            shared.num_asleep.fetch_add(1, Ordering::SeqCst);
            // A job that came before the count was raised is seen here, and one that comes later wakes this thread.
            if shared.generation.load(Ordering::SeqCst) == seen {
                std::thread::park();
            }
            shared.num_asleep.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        (seen, spins) = (generation, 0);
        let join = |state: usize| (state & OPEN != 0).then_some(state + MEMBER);
        if shared.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, join).is_err() {
            continue;
        }
        // SAFETY: the job was written before it was opened, and stays until its members have left.
        if let Some((job, num_tasks)) = unsafe { *shared.job.get() } {
            // SAFETY: as above.
            run_tasks(shared, unsafe { &*job }, num_tasks);
        }
        shared.state.fetch_sub(MEMBER, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for num_threads in 1..5 {
            let mut team = Team::new(num_threads).unwrap();
            for num_tasks in [0, 1, 2, 7, 100].into_iter().cycle().take(500) {
                let counts: Vec<AtomicUsize> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
                team.install(|| {
                    assert_eq!(super::num_threads(), num_threads);
                    for_each(num_tasks, |task| {
                        assert!(thread_index() < num_threads);
                        counts[task].fetch_add(1, Ordering::Relaxed);
                        // Nested, so on this thread.
                        for_each(2, |_| assert!(IS_WORKING.get() || num_tasks < 2 || num_threads == 1));
                    });
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn members_wake_from_sleep_and_chunks_are_whole() {
        let mut team = Team::new(3).unwrap();
        let mut values = vec![0; 1000];
        for round in 1..4 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            team.install(|| {
                for_each_chunk(&mut values, 7, |_, chunk| chunk.iter_mut().for_each(|v| *v += 1))
            });
            assert!(values.iter().all(|&value| value == round));
        }
    }

    #[test]
    fn a_panic_of_a_task_reaches_the_caller_and_the_team_goes_on() {
        let mut team = Team::new(3).unwrap();
        for bad in [0, 50, 99] {
            let run = |team: &mut Team| team.install(|| for_each(100, |task| assert_ne!(task, bad)));
            assert!(catch_unwind(AssertUnwindSafe(|| run(&mut team))).is_err());
            let sum = AtomicUsize::new(0);
            team.install(|| {
                for_each(10, |task| {
                    sum.fetch_add(task, Ordering::Relaxed);
                });
            });
            assert_eq!(sum.load(Ordering::Relaxed), 45);
        }
    }
}
