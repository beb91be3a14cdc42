//! The state of a simulated device: any number of bytes, from a seed.
//!
//! ```text
//!    0          8          16         24                                  len
//!   ┌──────────┬──────────┬──────────┬────────── … ───────────────────────┐
//!   │ vfio-sim │ len be64 │ seed be64│ word 3, word 4, …  (little-endian)  │
//!   └──────────┴──────────┴──────────┴────────── … ───────────────────────┘
//!                                       word i = splitmix64(seed, i)
//! ```
//!
//! Every word depends only on the seed and its position. So any thread can generate any part, without the
//! parts before it and without memory for them. From the header a destination knows when the state is
//! complete, and can save it again later. Pure functions: no system calls, no waits.

use std::cmp;

use xxhash_rust::xxh3::Xxh3Default;

const MAGIC: [u8; 8] = *b"vfio-sim";
const WORD: u64 = 8;

/// The bytes of a simulated device's state. They are made on the fly and never held.
///
/// ```
/// use vfio_migration::sim::Image;
///
/// let image = Image::new(7, 1000);
/// let mut whole = vec![0; 1000];
/// image.fill(0, &mut whole);
/// let mut part = [0; 100];
/// image.fill(123, &mut part);
/// assert_eq!(part, whole[123..223]);
/// assert_eq!(image.digest(), Image::digest_of(&whole));
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Image {
    seed: u64,
    len: u64,
}

impl Image {
    /// The length of the header that every state begins with, in bytes.
    pub const HEADER_LEN: u64 = 24;

    /// The state of `len` bytes, header included, that `seed` stands for. At least
    /// [`Image::HEADER_LEN`] bytes.
    #[must_use]
    pub const fn new(seed: u64, len: u64) -> Self {
        let len = if len < Self::HEADER_LEN {
            Self::HEADER_LEN
        } else {
            len
        };
        Self { seed, len }
    }

    /// What the header says, if it is one.
    #[must_use]
    pub fn from_header(header: &[u8; 24]) -> Option<Self> {
        let (words, _) = header.as_chunks::<8>();
        let [magic, len, seed] = words else {
            unreachable!("24 bytes are three words");
        };
        let len = u64::from_be_bytes(*len);
        (*magic == MAGIC && len >= Self::HEADER_LEN).then(|| Self {
            seed: u64::from_be_bytes(*seed),
            len,
        })
    }

    /// The seed.
    #[must_use]
    pub const fn seed(&self) -> u64 {
        self.seed
    }

    /// The length in bytes, header included.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an image is never empty")]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Makes the bytes from `offset` on.
    ///
    /// # Panics
    ///
    /// Where that goes past the end.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let end = offset.checked_add(buffer.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "past the image's end"
        );
        let mut index = offset / WORD;
        let mut rest = buffer;
        let skip = part(offset % WORD);
        if skip != 0 {
            let word = self.word(index);
            let here = cmp::min(word.len() - skip, rest.len());
            let (head, tail) = rest.split_at_mut(here);
            head.copy_from_slice(&word[skip..skip + here]);
            rest = tail;
            index += 1;
        }
        while index < 3 && !rest.is_empty() {
            let here = cmp::min(part(WORD), rest.len());
            let (head, tail) = rest.split_at_mut(here);
            head.copy_from_slice(&self.word(index)[..here]);
            rest = tail;
            index += 1;
        }
        let (words, tail) = rest.as_chunks_mut::<8>();
        for word in words {
            *word = mix(self.seed, index).to_le_bytes();
            index += 1;
        }
        if !tail.is_empty() {
            let here = tail.len();
            tail.copy_from_slice(&self.word(index)[..here]);
        }
    }

    /// The digest of all its bytes. Takes as long as making them: a second for some gigabytes.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut digest = Xxh3Default::new();
        let mut buffer = vec![0; 1 << 16];
        let mut at = 0;
        while at < self.len {
            let here = cmp::min(self.len - at, buffer.len() as u64);
            let bytes = &mut buffer[..part(here)];
            self.fill(at, bytes);
            digest.update(bytes);
            at += here;
        }
        digest.digest()
    }

    /// The digest (XXH3, 64 bits) that [`Image::digest`] would give for these bytes.
    #[must_use]
    pub fn digest_of(bytes: &[u8]) -> u64 {
        xxhash_rust::xxh3::xxh3_64(bytes)
    }

    fn word(&self, index: u64) -> [u8; 8] {
        match index {
            0 => MAGIC,
            1 => self.len.to_be_bytes(),
            2 => self.seed.to_be_bytes(),
            _ => mix(self.seed, index).to_le_bytes(),
        }
    }
}

/// A length that is known to be below that of some slice.
pub(super) fn part(len: u64) -> usize {
    usize::try_from(len).expect("bounded by a slice's length")
}

/// The `index`th word of the splitmix64 sequence that starts at `seed`.
pub(super) const fn mix(seed: u64, index: u64) -> u64 {
    let mut word = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_part_is_what_it_is_in_the_whole() {
        for len in [24, 25, 31, 32, 33, 200] {
            let image = Image::new(42, len);
            let mut whole = vec![0; part(len)];
            image.fill(0, &mut whole);
            for start in 0..whole.len() {
                for end in start..=whole.len() {
                    let mut bytes = vec![0; end - start];
                    image.fill(start as u64, &mut bytes);
                    assert_eq!(bytes, whole[start..end], "{start}..{end} of {len}");
                }
            }
        }
    }

    #[test]
    fn the_header_says_it_all() {
        let image = Image::new(u64::MAX, 1 << 40);
        let mut header = [0; 24];
        image.fill(0, &mut header);
        assert_eq!(Image::from_header(&header), Some(image));
        header[0] ^= 1;
        assert_eq!(Image::from_header(&header), None);
    }

    #[test]
    fn one_seed_is_not_another() {
        assert_ne!(Image::new(1, 100).digest(), Image::new(2, 100).digest());
        assert_ne!(Image::new(1, 100).digest(), Image::new(1, 101).digest());
    }
}
