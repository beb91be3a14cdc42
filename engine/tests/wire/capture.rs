//! Migrations recorded between two QEMUs: every byte of both directions, in `data/`,
//! and two that were cut, in `cut/`.
//!
//! One folder for each: 22 is of QEMU 11.1.3, the others of 10.0.2. There, `NN-c2s.bin` is a
//! connection from source to destination, 00 the main channel; `-s2c` is the other way;
//! `expected.json` says what was sent, as seen at both ends; `src.trace` and `dst.trace` are what the
//! two QEMUs' own trace of their VFIO migration code said meanwhile.
//!
//! The devices of 06 and 09 had 2.5 MB of pseudo-random bytes, which are cut from the files and
//! made again here; `cut` in `expected.json` says where from, and the sha256 of the whole. From 06
//! the RAM packets are left out too, from 09 the multifd channels, which had nothing else.

use std::{fs, path::PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use vfio_migration::{DeviceId, stream::SectionKind};

pub struct Capture {
    folder: PathBuf,
    pub expected: Value,
}

impl Capture {
    pub fn open(name: &str) -> Self {
        let tests: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests"].iter().collect();
        let mut places = ["data", "cut"]
            .map(|place| tests.join(place).join(name))
            .into_iter();
        let folder = places.find(|folder| folder.exists()).expect("a capture");
        let expected = fs::read(folder.join("expected.json")).expect("a capture's file");
        let expected = serde_json::from_slice(&expected).expect("JSON");
        Self { folder, expected }
    }

    /// A connection's bytes, whole again where they were cut.
    pub fn file(&self, name: &str) -> Vec<u8> {
        let bytes = fs::read(self.folder.join(name)).expect("a capture's file");
        let cut = &self.expected["cut"];
        if cut["of"][name].is_null() {
            return bytes;
        }
        let (mut pad, mut rest, mut whole) = (Pad::new(cut), &bytes[..], Vec::new());
        for piece in list(&cut["pieces"]) {
            let (of, at, len) = (text(&piece[0]), number(&piece[1]), number(&piece[2]));
            let missing = pad.take(len);
            if of == name {
                let (before, after) = rest.split_at(at - whole.len());
                whole.extend(before);
                whole.extend(missing);
                rest = after;
            }
        }
        whole.extend(rest);
        assert_eq!(sha256(&whole), text(&cut["of"][name]), "as it was recorded");
        whole
    }

    pub fn channels(&self) -> Vec<Vec<u8>> {
        list(&self.expected["channels"])
            .iter()
            .map(|name| self.file(text(name)))
            .collect()
    }

    /// Every VFIO section of the main channel: its bytes, and what is known about it.
    pub fn sections<'a>(&'a self, main: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Value)> {
        list(&self.expected["sections"]).iter().map(|section| {
            (
                &main[number(&section["offset"])..number(&section["end"])],
                section,
            )
        })
    }
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

pub fn text(value: &Value) -> &str {
    value.as_str().expect("text")
}

pub fn number(value: &Value) -> usize {
    value
        .as_u64()
        .and_then(|number| number.try_into().ok())
        .expect("a number")
}

pub fn id(value: &Value) -> DeviceId {
    let instance = u32::try_from(number(&value["instance"])).expect("an instance id");
    DeviceId::new(text(&value["idstr"]), instance).expect("a device's name")
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The main channel without what only a VMM can walk: the other devices' sections.
pub fn vfio_only(capture: &Capture, main: &[u8]) -> Vec<u8> {
    // Header, configuration, two commands; then the first section, which is RAM's.
    let front = 8 + (5 + 11) + 5 + 9;
    assert_eq!(main[front], SectionKind::Start as u8);
    let mut bytes = main[..front].to_vec();
    let command = number(&capture.expected["switchover_start_offset"]);
    let mut sections: Vec<_> = capture
        .sections(main)
        .map(|(bytes, section)| (number(&section["offset"]), bytes))
        .collect();
    sections.push((command, &main[command..command + 5]));
    sections.sort_unstable_by_key(|(offset, _)| *offset);
    for (_, section) in sections {
        bytes.extend(section);
    }
    // The description goes to the very end, and so its length finds its beginning.
    let tail = (0..main.len() - 6)
        .rev()
        .find(|&at| {
            let left = u32::try_from(main.len() - at - 6).expect("small");
            main[at..at + 2] == [0, 6] && main[at + 2..at + 6] == left.to_be_bytes()
        })
        .expect("a description");
    bytes.extend(&main[tail..]);
    bytes
}

/// The devices' pseudo-random bytes: L'Ecuyer's combined Tausworthe generator of 1999, with four
/// components of 113 bits in all.
struct Pad([u32; 4]);

impl Pad {
    fn new(cut: &Value) -> Self {
        let seed = u32::try_from(number(&cut["seed"])).expect("a small number");
        let seed = (seed << 10) ^ seed;
        let least = |least: u32| if seed < least { seed + least } else { seed };
        Self([2, 8, 16, 128].map(least))
    }

    fn next(&mut self) -> u32 {
        let steps = [
            (6, 13, 0xffff_fffe_u32, 18),
            (2, 27, 0xffff_fff8, 2),
            (13, 21, 0xffff_fff0, 7),
            (3, 12, 0xffff_ff80, 13),
        ];
        for (word, (a, b, mask, d)) in self.0.iter_mut().zip(steps) {
            *word = ((*word & mask) << d) ^ (((*word << a) ^ *word) >> b);
        }
        self.0.iter().fold(0, |all, word| all ^ word)
    }

    /// The next bytes; `len` is a multiple of 4.
    fn take(&mut self, len: usize) -> Vec<u8> {
        assert_eq!(len % 4, 0);
        (0..len / 4)
            .flat_map(|_| self.next().to_le_bytes())
            .collect()
    }
}
