//! Random chains and cancellations: nothing is lost, and all comes in order.

use std::{
    io::{self, Read, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use vfio_migration_uring::{Completion, Fd, Link, Op, Ring, Token, Waker};

use crate::{
    ops::{Outcome, all, file, next, outcome, pipe, push, read, write},
    rings::Kind,
};

/// A small generator, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 16).unwrap() % end
    }
}

/// The byte at a position of every test stream. Its period is prime, so that a shift shows.
fn pattern(position: usize) -> u8 {
    u8::try_from(position % 251).unwrap()
}

/// A stream into a pipe: one chain in flight, resubmitted from where it broke.
struct Lane {
    writer: Option<Fd>,
    /// Bytes that the pipe has taken.
    position: usize,
    len: usize,
    first_token: u32,
    /// What is in flight, and what came of it so far.
    chain: Vec<Option<Outcome>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Lane {
    const DEPTH: usize = 5;

    fn new(index: u32, len: usize) -> Self {
        let (mut reader, writer) = io::pipe().unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = vec![0; 10_000];
            let mut position = 0;
            loop {
                let count = reader.read(&mut bytes).unwrap();
                if count == 0 {
                    break;
                }
                for byte in &bytes[..count] {
                    assert_eq!(*byte, pattern(position), "at {position}");
                    position += 1;
                }
            }
            assert_eq!(position, len);
        });
        Self {
            writer: Some(Arc::new(writer.into())),
            position: 0,
            len,
            first_token: index * u32::try_from(Self::DEPTH).unwrap(),
            chain: Vec::new(),
            reader: Some(reader),
        }
    }

    fn push(&mut self, ring: &mut dyn Ring<Vec<u8>>, random: &mut Random) {
        let writer = self.writer.as_ref().unwrap();
        let count = 1 + random.below(Self::DEPTH);
        let mut start = self.position;
        for (index, token) in (0..count).zip(self.first_token..) {
            let end = self.len.min(start + 1 + random.below(9000));
            let bytes: Vec<u8> = (start..end).map(pattern).collect();
            let last = index + 1 == count || end == self.len;
            let link = if last { Link::End } else { Link::Next };
            let op = if bytes.len() > 2 && random.below(3) == 0 {
                let (head, tail) = bytes.split_at(random.below(bytes.len()));
                Op::WriteVectored {
                    fd: writer.clone(),
                    buffers: vec![head.to_vec(), tail.to_vec()],
                }
            } else {
                write(writer, &bytes)
            };
            ring.push(Token(token), op, link).unwrap();
            self.chain.push(None);
            start = end;
            if last {
                break;
            }
        }
    }

    fn complete(&mut self, completion: &Completion<Vec<u8>>) {
        let index = usize::try_from(completion.token.0 - self.first_token).unwrap();
        let full = completion.op.requested();
        let end = outcome(completion);
        if let Ok(moved) = end {
            // Nothing moves behind a short one.
            for before in &self.chain[..index] {
                assert!(before.as_ref().unwrap().is_ok());
            }
            self.position += moved;
            assert!(moved > 0 && moved <= full);
        } else {
            let errno = end.unwrap_err();
            assert!([libc::ECANCELED, libc::EINTR, libc::EAGAIN].contains(&errno));
        }
        assert!(self.chain[index].replace(end).is_none());
    }

    /// Starts the next chain when the last one is over. False when the stream is at its end.
    fn go_on(&mut self, ring: &mut dyn Ring<Vec<u8>>, random: &mut Random) -> bool {
        if self.chain.iter().all(Option::is_some) {
            self.chain.clear();
            if self.position < self.len {
                self.push(ring, random);
            } else {
                self.writer = None;
            }
        }
        self.writer.is_some()
    }
}

contract_test!(random_chains_arrive_in_order, {
    for seed in 1..=12 {
        let Some(mut ring) = K::open_rough(seed, &Waker::new().unwrap()) else {
            return;
        };
        let mut random = Random(seed);
        let mut lanes: Vec<Lane> = (0..3)
            .map(|index| Lane::new(index, 200_000 + random.below(50_000)))
            .collect();
        loop {
            let mut open = false;
            for lane in &mut lanes {
                open |= lane.go_on(&mut *ring, &mut random);
            }
            if !open {
                break;
            }
            if random.below(2) == 0 {
                ring.submit().unwrap();
            }
            let completion = next(&mut *ring);
            let lane = usize::try_from(completion.token.0).unwrap() / Lane::DEPTH;
            lanes[lane].complete(&completion);
        }
        for lane in lanes {
            lane.reader.unwrap().join().unwrap();
        }
    }
});

// Operations on pipes of which some never end, cancelled at random: each completes once, and what
// was read is what was written.
contract_test!(random_cancellations_lose_nothing, {
    for seed in 1..=6 {
        let waker = Waker::new().unwrap();
        let Some(mut ring) = K::open_rough(seed, &waker) else {
            return;
        };
        let mut random = Random(seed);
        let (reader, writer) = pipe();
        let (mut sent, mut received) = (0, 0);
        let mut free: Vec<u32> = (0..16).collect();
        for _ in 0..500 {
            if !free.is_empty() && random.below(3) > 0 {
                let token = free.swap_remove(random.below(free.len()));
                // One byte each: no transfer can be short.
                push(&mut *ring, token, read(&reader, 1));
            }
            if random.below(3) == 0 {
                file(&writer).write_all(b"x").unwrap();
                sent += 1;
            }
            if random.below(3) == 0 {
                ring.cancel(Token(u32::try_from(random.below(16)).unwrap()));
            }
            match random.below(4) {
                0 => ring.submit().unwrap(),
                1 => {
                    waker.wake();
                    while !ring.wait(None).unwrap() && ring.in_flight() == 0 {}
                }
                2 => assert!(!ring.wait(Some(Duration::ZERO)).unwrap() || ring.in_flight() < 17),
                _ => {}
            }
            while let Some(completion) = ring.reap() {
                match outcome(&completion) {
                    Ok(moved) => received += moved,
                    Err(errno) => {
                        assert!([libc::ECANCELED, libc::EINTR, libc::EAGAIN].contains(&errno));
                    }
                }
                assert!(!free.contains(&completion.token.0));
                free.push(completion.token.0);
            }
            assert_eq!(ring.in_flight() + free.len(), 16);
        }
        for token in 0..16 {
            ring.cancel(Token(token));
        }
        for completion in all(&mut *ring).values() {
            received += outcome(completion).unwrap_or(0);
        }
        drop((ring, writer));
        let mut rest = Vec::new();
        file(&reader).read_to_end(&mut rest).unwrap();
        assert_eq!(received + rest.len(), sent);
    }
});
