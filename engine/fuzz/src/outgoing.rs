//! A relay's destination, as a target has it: what it takes on each channel, when, and what it must
//! never see.
//!
//! Looked at when a packet's first byte is offered, before anybody else has a turn:
//!
//! * a device's packets leave in the order of their idx, each once, and none behind its config;
//! * device state leaves on no channel that is ahead of another in its SYNCs;
//! * nothing leaves on a channel that was ended.
//!
//! And whatever has been taken is well-formed.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice, Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vfio_migration::{
    Channel,
    wire::{DEVICE_PACKET_LEN, DeviceKey, Frame, Framer, Kind, PREFIX_LEN, PageSize, Step},
};

use crate::steps;

/// A name as it can be sorted.
pub type Name = [u8; DeviceKey::LEN];

/// One channel's end.
#[derive(Debug)]
pub struct Line {
    /// All that was taken.
    pub bytes: Vec<u8>,
    framer: Framer,
    /// Where the packet that is under way begins, and where it ends once its header is there.
    begin: usize,
    end: Option<usize>,
    /// Whether what comes next was looked at.
    offered: bool,
    /// How many SYNCs have been taken.
    pub syncs: u32,
    /// How many bytes it will take before it waits for more credit.
    pub credit: usize,
    /// How many it takes with one write, or a 64th of what it is offered.
    pub most: usize,
    /// What the next write is told, once.
    pub fails: Option<io::ErrorKind>,
    /// Whether the relay has said that nothing more will come.
    pub finished: bool,
    /// Whether the relay has hung up.
    pub hung_up: bool,
}

impl Line {
    /// Whether no packet is half taken.
    #[must_use]
    pub fn is_at_rest(&self) -> bool {
        self.begin == self.bytes.len()
    }

    /// How much of it are whole packets.
    #[must_use]
    pub const fn whole(&self) -> usize {
        self.begin
    }

    /// Takes some, and looks what has become whole.
    fn take(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        // Ends: each round is a packet, or the last.
        loop {
            let end = match self.end {
                Some(end) => end,
                None => {
                    let step = self.framer.decode(&self.bytes[self.begin..]);
                    match step.expect("what leaves is well-formed") {
                        Step::More(_) => return,
                        Step::Frame {
                            frame,
                            header_len,
                            payload_len,
                        } => {
                            self.syncs += u32::from(matches!(frame, Frame::Sync { .. }));
                            self.begin + header_len + payload_len as usize
                        }
                    }
                }
            };
            self.end = Some(end);
            if self.bytes.len() < end {
                return;
            }
            self.begin = end;
            self.end = None;
            self.offered = false;
        }
    }
}

/// All channels' ends.
#[derive(Debug, Default)]
pub struct Board {
    /// By number.
    pub lines: Vec<Line>,
    /// Each device's next idx, and whether its config has left.
    pub next: BTreeMap<Name, (u32, bool)>,
    /// Whether a channel stands still at a SYNC until all have come to theirs.
    pub barriers: bool,
    /// Whether ends are told that the connection is gone, which is no failure.
    pub gone_at_end: bool,
}

impl Board {
    /// The least SYNCs that a channel has taken.
    #[must_use]
    pub fn least(&self) -> u32 {
        self.lines.iter().map(|line| line.syncs).min().unwrap_or(0)
    }

    /// A packet's first bytes are offered.
    fn offered(&mut self, at: usize, first: &[u8]) {
        let line = &mut self.lines[at];
        assert!(!line.finished, "line {at} was ended before");
        // Not again where the write was interrupted.
        if std::mem::replace(&mut line.offered, true) {
            return;
        }
        let line = &self.lines[at];
        let prefix: Option<&[u8; PREFIX_LEN]> = first.first_chunk();
        let greeted = !line.bytes.is_empty();
        if !greeted
            || prefix.is_none_or(|prefix| Kind::decode(prefix).ok() != Some(Kind::DeviceState))
        {
            return;
        }
        assert!(line.syncs > 0, "device state before the first SYNC");
        assert_eq!(line.syncs, self.least(), "line {at} is ahead: {self:?}");
        let step = line.framer.clone().decode(first);
        let Ok(Step::Frame {
            frame: Frame::DeviceState(packet),
            ..
        }) = step
        else {
            panic!("line {at}: {step:?}");
        };
        let name = *packet.header.key().as_bytes();
        let (next, complete) = self.next.entry(name).or_default();
        assert!(!*complete, "line {at}: behind its config: {packet:?}");
        assert_eq!(*next, packet.packet.index, "line {at}: out of order");
        *next += 1;
        *complete = packet.packet.config;
    }

    /// How many bytes of so many a line takes now.
    fn allows(&self, at: usize, total: usize) -> usize {
        let line = &self.lines[at];
        if self.barriers && line.is_at_rest() && line.syncs > self.least() {
            return 0;
        }
        line.credit.min(line.most.max(total / 64)).min(total)
    }
}

/// The target's end of all channels.
#[derive(Clone, Debug, Default)]
pub struct Destination(Arc<Mutex<Board>>);

impl Destination {
    /// What has been taken.
    pub fn board(&self) -> MutexGuard<'_, Board> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more channel, and the relay's end of it.
    pub fn channel(&self, page_size: PageSize, max_packet: u32) -> Channel {
        let mut board = self.board();
        let at = board.lines.len();
        board.lines.push(Line {
            bytes: Vec::new(),
            framer: Framer::new(Some(page_size), max_packet),
            begin: 0,
            end: None,
            offered: false,
            syncs: 0,
            credit: usize::MAX,
            most: usize::MAX,
            fails: None,
            finished: false,
            hung_up: false,
        });
        let (writer, hanging) = (Writer(self.clone(), at), self.clone());
        Channel::from_stream(writer, move || hanging.board().lines[at].hung_up = true)
    }
}

struct Writer(Destination, usize);

impl Read for Writer {
    /// The destination says nothing, and ends its side: asked when all has been sent.
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        let board = self.0.board();
        assert!(
            board.lines[self.1].finished,
            "read before the channel's end"
        );
        Ok(0)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let Self(destination, at) = self;
        let total: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        assert!(total > 0, "a write of nothing");
        {
            let mut board = destination.board();
            if board.lines[*at].is_at_rest() {
                let first = buffers.iter().flat_map(|buffer| buffer.iter().copied());
                let first: Vec<u8> = first.take(DEVICE_PACKET_LEN).collect();
                board.offered(*at, &first);
            }
        }
        // Everybody else may have a turn before each write.
        steps::moved();
        steps::give_way(steps::Place::Outside);
        let count = steps::wait_for(|| -> Option<io::Result<usize>> {
            let mut board = destination.board();
            let allowed = board.allows(*at, total);
            let line = &mut board.lines[*at];
            if line.hung_up {
                return Some(Err(io::ErrorKind::BrokenPipe.into()));
            }
            if let Some(kind) = line.fails.take() {
                return Some(Err(kind.into()));
            }
            (allowed > 0).then_some(Ok(allowed))
        });
        let count = count?;
        let mut board = destination.board();
        let line = &mut board.lines[*at];
        line.credit -= count;
        let mut left = count;
        for buffer in buffers {
            let some = left.min(buffer.len());
            line.take(&buffer[..some]);
            left -= some;
        }
        Ok(count)
    }

    /// What a relay calls at a channel's end, and never else.
    fn flush(&mut self) -> io::Result<()> {
        let mut board = self.0.board();
        let gone = board.gone_at_end;
        let line = &mut board.lines[self.1];
        assert!(line.is_at_rest() || line.hung_up, "an end within a packet");
        line.finished = true;
        if gone {
            return Err(io::Error::from_raw_os_error(
                nix::errno::Errno::ENOTCONN as i32,
            ));
        }
        Ok(())
    }
}
