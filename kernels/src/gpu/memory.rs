//! Arrays in the memory of a device, and pinned ones of the host.
//!
//! Invariant: an array frees its memory when it is dropped, after all queued work. Reading it waits for what was queued.

use std::marker::PhantomData;
use std::sync::Arc;

use super::device::{Address, Device, DeviceError};

/// Plain numbers: any bytes are a value, and there is no padding.
///
/// # Safety
/// Both must hold for the type.
pub(crate) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: integers and floats of fixed width are plain.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// An array on a device.
#[derive(Debug)]
pub(crate) struct DeviceVec<T: Plain> {
    device: Arc<dyn Device>,
    address: Address,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Plain> DeviceVec<T> {
    /// With unknown contents.
    pub(crate) fn new(device: &Arc<dyn Device>, len: usize) -> Result<Self, DeviceError> {
        let address = device.alloc((len * size_of::<T>()).max(1))?;
        Ok(Self { device: Arc::clone(device), address, len, element: PhantomData })
    }

    pub(crate) fn from_slice(device: &Arc<dyn Device>, values: &[T]) -> Result<Self, DeviceError> {
        let mut array = Self::new(device, values.len())?;
        array.write(0, values)?;
        Ok(array)
    }

    pub(crate) fn address(&self) -> Address {
        self.address
    }

    /// Where element `index` lies.
    pub(crate) fn at(&self, index: usize) -> Address {
        assert!(index <= self.len, "element {index} of {}", self.len);
        Address(self.address.0 + (index * size_of::<T>()) as u64)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Writes to the array from `first` on and waits until it is done.
    pub(crate) fn write(&mut self, first: usize, values: &[T]) -> Result<(), DeviceError> {
        assert!(values.len() <= self.len - first, "{} values for {}", values.len(), self.len - first);
        // SAFETY: the range was checked, the values live until the wait below.
        unsafe { self.device.upload(self.at(first), values.as_ptr().cast(), size_of_val(values))? };
        self.device.wait(self.device.record()?)
    }

    /// Waits for what is queued and reads the whole array.
    pub(crate) fn read(&self) -> Result<Vec<T>, DeviceError> {
        let mut values: Vec<T> = Vec::with_capacity(self.len);
        let num_bytes = self.len * size_of::<T>();
        // SAFETY: the capacity is that of the array, and the values live until the wait.
        unsafe { self.device.download(values.as_mut_ptr().cast(), self.address, num_bytes)? };
        self.device.wait(self.device.record()?)?;
        // SAFETY: all were written, and any bytes are a value.
        unsafe { values.set_len(self.len) };
        Ok(values)
    }
}

impl<T: Plain> Drop for DeviceVec<T> {
    fn drop(&mut self) {
        // A device that fails here has failed the step too, where it is reported.
        let _ = self.device.record().and_then(|event| self.device.wait(event));
        // SAFETY: the memory came from this device with this size, and what was queued is done.
        unsafe { self.device.free(self.address, (self.len * size_of::<T>()).max(1)) };
    }
}

/// A part of an array: of the inputs of a step, which are copied as one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceSlice<'a, T: Plain> {
    address: Address,
    len: usize,
    array: PhantomData<&'a T>,
}

impl<'a, T: Plain> DeviceSlice<'a, T> {
    /// `len` elements of `array` from byte `first` on.
    pub(crate) fn of_bytes(array: &'a DeviceVec<u8>, first: usize, len: usize) -> Self {
        assert!(first.is_multiple_of(align_of::<T>()) && first + len * size_of::<T>() <= array.len());
        Self { address: array.at(first), len, array: PhantomData }
    }

    /// Where element `index` lies.
    pub(crate) fn at(&self, index: usize) -> Address {
        self.part(index, 0).address
    }

    /// `len` elements from `first` on.
    pub(crate) fn part(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "{len} elements from {first} on, of {}", self.len);
        Self { address: Address(self.address.0 + (first * size_of::<T>()) as u64), len, array: PhantomData }
    }

    pub(crate) fn address(&self) -> Address {
        self.address
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl<'a, T: Plain> From<&'a DeviceVec<T>> for DeviceSlice<'a, T> {
    fn from(array: &'a DeviceVec<T>) -> Self {
        Self { address: array.address, len: array.len, array: PhantomData }
    }
}

/// An array of the host that copies to and from a device read and write while the host goes on.
#[derive(Debug)]
pub(crate) struct PinnedVec<T: Plain> {
    device: Arc<dyn Device>,
    pointer: *mut T,
    len: usize,
}

// SAFETY: the array is owned, and plain numbers may go from thread to thread.
unsafe impl<T: Plain> Send for PinnedVec<T> {}
// SAFETY: as above; shared references only read.
unsafe impl<T: Plain> Sync for PinnedVec<T> {}

impl<T: Plain> PinnedVec<T> {
    /// Zeros.
    pub(crate) fn new(device: &Arc<dyn Device>, len: usize) -> Result<Self, DeviceError> {
        let pointer = device.alloc_pinned((len * size_of::<T>()).max(1))?.cast();
        Ok(Self { device: Arc::clone(device), pointer, len })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Of element `first`, from which on there are `len`: for copies, whose order is that of the queue.
    pub(crate) fn pointer(&self, first: usize, len: usize) -> *mut T {
        assert!(first + len <= self.len, "{len} elements from {first} on, of {}", self.len);
        // SAFETY: the range was checked.
        unsafe { self.pointer.add(first) }
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: the pointer is to `len` plain values that live as long as this.
        unsafe { std::slice::from_raw_parts(self.pointer, self.len) }
    }

    /// The caller has waited for the copies that use it.
    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and this is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T: Plain> Drop for PinnedVec<T> {
    fn drop(&mut self) {
        let _ = self.device.record().and_then(|event| self.device.wait(event));
        // SAFETY: the memory came from this device with this size, and what was queued is done.
        unsafe { self.device.free_pinned(self.pointer.cast(), (self.len * size_of::<T>()).max(1)) };
    }
}
