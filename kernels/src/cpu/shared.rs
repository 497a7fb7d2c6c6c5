//! A slice that several threads write to, each its own part.

use std::marker::PhantomData;

/// Writers must keep to parts that do not overlap.
#[derive(Clone, Copy)]
pub(super) struct SharedMut<'a> {
    start: *mut f32,
    len: usize,
    slice: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only used through `at`, whose callers promise disjoint parts.
unsafe impl Send for SharedMut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedMut<'_> {}

impl<'a> SharedMut<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A pointer to `offset`, where at least `len` numbers follow. Writing through it needs a promise that no
    /// other thread uses the same numbers.
    pub(super) fn at(self, offset: usize, len: usize) -> *mut f32 {
        assert!(len <= self.len && offset <= self.len - len, "a part outside of the slice");
        // SAFETY: just compared with the length.
        unsafe { self.start.add(offset) }
    }
}
