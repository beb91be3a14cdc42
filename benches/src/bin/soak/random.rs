//! The numbers that all plans are made of: the same for the same seed.

/// SplitMix64.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub fn size(&mut self, end: u64) -> usize {
        usize::try_from(self.below(end)).expect("small")
    }

    pub fn percent(&mut self, chances: u64) -> bool {
        self.below(100) < chances
    }

    pub fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.size(choices.len() as u64)].clone()
    }
}
