//! A slice that several threads write to, each its own part.

use std::marker::PhantomData;

/// Writers must keep to parts that do not overlap.
pub(crate) struct SharedMut<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

impl<T> Clone for SharedMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SharedMut<'_, T> {}

// SAFETY: the pointer is only used through `at`, whose callers promise disjoint parts.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A pointer to `offset`, where at least `len` values follow. Writing through it needs a promise that no
    /// other thread uses the same values.
    pub(crate) fn at(self, offset: usize, len: usize) -> *mut T {
        assert!(len <= self.len && offset <= self.len - len, "a part outside of the slice");
        // SAFETY: just compared with the length.
        unsafe { self.start.add(offset) }
    }

    /// The `len` values from `offset` on.
    ///
    /// # Safety
    /// No other thread may use these values while the result lives.
    pub(crate) unsafe fn part(self, offset: usize, len: usize) -> &'a mut [T] {
        // SAFETY: `at` checks the bounds; that nobody else uses them is promised.
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, len), len) }
    }
}
