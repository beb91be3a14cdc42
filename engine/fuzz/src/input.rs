//! An input's bytes as choices. Where they end, every further choice is 0.

/// The rest of an input.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of an input.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    /// Four bytes.
    pub fn word(&mut self) -> u32 {
        u32::from_be_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// The next `len` bytes, which are there.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    /// What has not been used.
    #[must_use]
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// An idx: `next`, one of those around it, or one far away.
    pub fn index(&mut self, next: u32) -> u32 {
        match self.byte() {
            choice @ 0..=199 => next.saturating_add(match choice {
                0..=99 => 0,
                _ => u32::from(choice) % 8,
            }),
            choice @ 200..=239 => next.saturating_sub(u32::from(choice) % 4),
            240..=247 => self.word() % 70_000,
            _ => u32::MAX - 1 - u32::from(self.byte() % 2),
        }
    }
}
