//! Points in the stream that can be waited for, made of a few events of the driver that are used again.
//!
//! An event is a number; the stream is done in order, so when one is reached all before it are. Invariant: those of the
//! driver's events that are queued are in the order of their numbers. When there are many, those that were reached are
//! taken back even if nobody waits for them.

use std::collections::VecDeque;
use std::ptr::null_mut;

use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};

use super::driver::check;
use crate::gpu::device::{DeviceError, Event};

/// From here on, those that were reached are looked for before a new one is made.
const MAX_QUEUED: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Events {
    num_recorded: u64,
    queued: VecDeque<(u64, CUevent)>,
    free: Vec<CUevent>,
}

impl Events {
    pub(super) fn record(&mut self, stream: CUstream) -> Result<Event, DeviceError> {
        if self.queued.len() >= MAX_QUEUED {
            self.retire_reached()?;
        }
        let event = match self.free.pop() {
            Some(event) => event,
            None => create()?,
        };
        // SAFETY: both live as long as the device.
        if let Err(error) = check("record an event", unsafe { sys::cuEventRecord(event, stream) }) {
            self.free.push(event);
            return Err(error);
        }
        self.num_recorded += 1;
        self.queued.push_back((self.num_recorded, event));
        Ok(Event(self.num_recorded))
    }

    /// What to wait for; nothing if it was reached.
    pub(super) fn of(&self, event: Event) -> Option<CUevent> {
        self.queued.iter().find(|queued| queued.0 == event.0).map(|queued| queued.1)
    }

    /// This one was reached.
    pub(super) fn retire(&mut self, event: Event) {
        while let Some(&(_, handle)) = self.queued.front().filter(|queued| queued.0 <= event.0) {
            self.queued.pop_front();
            self.free.push(handle);
        }
    }

    fn retire_reached(&mut self) -> Result<(), DeviceError> {
        while let Some(&(number, handle)) = self.queued.front() {
            // SAFETY: the event lives as long as the device.
            match unsafe { sys::cuEventQuery(handle) } {
                CUresult::CUDA_ERROR_NOT_READY => break,
                result => check("look at an event", result)?,
            }
            self.retire(Event(number));
        }
        Ok(())
    }

    /// # Safety
    /// The context is the thread's, and nobody waits.
    pub(super) unsafe fn destroy(&mut self) {
        let queued = self.queued.drain(..).map(|queued| queued.1);
        for event in queued.chain(self.free.drain(..)) {
            // SAFETY: each was created, and is in one of the two lists.
            unsafe { sys::cuEventDestroy_v2(event) };
        }
    }
}

fn create() -> Result<CUevent, DeviceError> {
    let mut event = null_mut();
    let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
    // SAFETY: the pointer is to a handle.
    check("make an event", unsafe { sys::cuEventCreate(&mut event, flags) })?;
    Ok(event)
}
