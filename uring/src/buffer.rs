//! Memory that an operation may use for as long as it is in flight.
#![expect(
    unsafe_code,
    reason = "the trait's promise is what the kernel's accesses rest on"
)]

/// Memory that an operation may use for as long as it is in flight.
///
/// # Safety
///
/// [`Buffer::as_mut_ptr`] stays valid for reads and writes of [`Buffer::len`] bytes, and both stay
/// the same, until the value is dropped or changed through `&mut`, wherever the value moves, from
/// whichever thread; and nobody else touches those bytes meanwhile.
pub unsafe trait Buffer: Send + 'static {
    /// Where the bytes start.
    fn as_mut_ptr(&mut self) -> *mut u8;

    /// How many bytes the operation should move.
    fn len(&self) -> usize;

    /// Whether there is nothing to move.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: a vector's heap block does not move with the vector, and the vector is its only owner.
unsafe impl Buffer for Vec<u8> {
    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.as_mut_slice().as_mut_ptr()
    }

    fn len(&self) -> usize {
        self.as_slice().len()
    }
}
