//! The one place that reads the clock; everything else is given a [`Clock`].

use std::time::Duration;
use std::time::{Instant, SystemTime};

/// Time since the run began.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
    wall_start: SystemTime,
}

impl Clock {
    /// Starts at zero, now.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn start() -> Self {
        Self { start: Instant::now(), wall_start: SystemTime::now() }
    }

    /// The time of day at the start, which only what leaves the process needs.
    pub fn wall_start(&self) -> SystemTime {
        self.wall_start
    }

    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }
}
