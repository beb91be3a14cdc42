//! What a VMM on vfio-ioctls does today: a device's state is read to its end into one `Vec`, sent,
//! received into one `Vec`, and written with `write_all`. One connection.
//!
//! ```text
//!   Whole      source: read all devices ─▶ send all │ destination: receive all ─▶ write all
//!   ByDevice   the same, device by device
//! ```
//!
//! The state of a VM is one message for these VMMs, that of its devices inside it: [`Shape::Whole`]
//! is what they do. [`Shape::ByDevice`] is the kinder shape, with one device's state in memory at a
//! time. Made as fast as that allows: each `Vec` has its whole capacity from the start.

use std::{
    fs::File,
    io::{self, Read, Write},
};

use crate::sink::Sink;

/// How much is one message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shape {
    /// All devices.
    Whole,
    /// Each device.
    ByDevice,
}

fn read(sink: &Sink, len: usize) -> io::Result<Vec<u8>> {
    sink.rewind()?;
    let mut state = Vec::with_capacity(len + 1);
    sink.file()?.read_to_end(&mut state)?;
    Ok(state)
}

fn send(stream: &mut impl Write, state: &[u8]) -> io::Result<()> {
    stream.write_all(&state.len().to_be_bytes())?;
    stream.write_all(state)
}

fn receive(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut len = [0; size_of::<usize>()];
    stream.read_exact(&mut len)?;
    let len = usize::from_be_bytes(len);
    let mut state = Vec::with_capacity(len + 1);
    stream.take(len as u64).read_to_end(&mut state)?;
    Ok(state)
}

fn write(sink: &Sink, state: &[u8]) -> io::Result<()> {
    sink.rewind()?;
    let mut file: File = sink.file()?;
    file.write_all(state)
}

/// The source.
///
/// # Errors
///
/// The kernel's.
pub fn save(shape: Shape, sinks: &[Sink], len: usize, stream: &mut impl Write) -> io::Result<()> {
    match shape {
        Shape::Whole => {
            let states: io::Result<Vec<_>> = sinks.iter().map(|sink| read(sink, len)).collect();
            states?.iter().try_for_each(|state| send(stream, state))
        }
        Shape::ByDevice => sinks
            .iter()
            .try_for_each(|sink| send(stream, &read(sink, len)?)),
    }
}

/// The destination.
///
/// # Errors
///
/// The kernel's.
pub fn load(shape: Shape, sinks: &[Sink], stream: &mut impl Read) -> io::Result<()> {
    match shape {
        Shape::Whole => {
            let states: io::Result<Vec<_>> = sinks.iter().map(|_| receive(stream)).collect();
            sinks
                .iter()
                .zip(states?)
                .try_for_each(|(sink, state)| write(sink, &state))
        }
        Shape::ByDevice => sinks
            .iter()
            .try_for_each(|sink| write(sink, &receive(stream)?)),
    }
}
