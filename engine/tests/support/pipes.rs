//! What comes out of a device's pipe.

use std::{
    io::{PipeReader, Read},
    thread::{self, JoinHandle},
};

/// Reads a pipe to its end, on a thread of its own.
pub fn collect(mut reader: PipeReader) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        bytes
    })
}
