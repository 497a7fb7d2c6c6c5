//! Copies the first slots of pages to other pages; see `copy_kv.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::{DeviceSlice, DeviceVec};

const KERNEL: Kernel = Kernel { name: "copy_kv", source: "copy_kv", block: 128, shared_bytes: 0 };

pub(crate) struct CopyKv<'a> {
    pub(crate) num_copies: usize,
    /// `[num_copies, 3]`: from, to, slots.
    pub(crate) copies: DeviceSlice<'a, u32>,
    /// `[pages, 2, num_kv_heads, page_size, slot]`
    pub(crate) kv: &'a DeviceVec<u8>,
    pub(crate) num_kv_heads: usize,
    pub(crate) page_size: usize,
    /// Of one head.
    pub(crate) slot_bytes: usize,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    kv: Address,
    copies: Address,
    page_size: u32,
    slot_bytes: u32,
}

pub(crate) fn copy_kv(device: &dyn Device, args: &CopyKv<'_>) -> Result<(), DeviceError> {
    assert!(args.slot_bytes.is_multiple_of(16) && args.copies.len() >= 3 * args.num_copies);
    let params = Params {
        kv: args.kv.address(),
        copies: args.copies.address(),
        page_size: args.page_size as u32,
        slot_bytes: args.slot_bytes as u32,
    };
    let grid = [args.num_copies as u32, 2 * args.num_kv_heads as u32, 1];
    // SAFETY: the lengths were checked above; pages are within the cache, as the batch was checked.
    unsafe { launch(device, &KERNEL, grid, &params) }
}
