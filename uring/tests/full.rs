//! A regular file that takes a part of what it is given: a limit on its size, and a full file system.
//!
//! What has been written is what the completions say, byte for byte, wherever in a chain the cut is; and
//! who goes on behind that has the whole, once there is room.
//!
//! A limit is the process's, and a file system is mounted: so each case is a process of its own.
#![cfg(feature = "sim")]

mod no_room;

use std::{
    fs,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::Duration,
};

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{Whence, lseek},
};
use no_room::{PAGE, cuts, has_tmpfs, in_a_process, limit, not_tested, resize, state};
use vfio_migration_uring::{
    BlockingRing, Fd, KernelRing, Link, Op, Ring, Token, Waker,
    sim::{SimConfig, SimRing},
};

const LONG: Duration = Duration::from_secs(60);

/// Where the chain begins in the file.
const START: usize = 77;

/// What is written: a chain of these lengths. A border of a page lies on one of theirs, too.
const LENS: [usize; 4] = [3000, PAGE - START + 7000 - 3000, PAGE * 2, 1];

type Named = (&'static str, Box<dyn Ring<Vec<u8>>>);

fn rings() -> Vec<Named> {
    let waker = || Waker::new().unwrap();
    let mut rings: Vec<Named> = Vec::new();
    match KernelRing::new(8, waker(), LONG) {
        Ok(ring) => rings.push(("uring", Box::new(ring))),
        Err(error) => not_tested(&format!("no io_uring here: {error}")),
    }
    let blocking = BlockingRing::new(8, waker(), LONG).unwrap();
    rings.push(("blocking", Box::new(blocking)));
    let sim = SimRing::new(SimConfig::default(), waker()).unwrap();
    rings.push(("sim", Box::new(sim)));
    rings
}

/// Writes what is left of the state from `from` on, as one chain. Returns how far it is then, and the
/// errno of the operation at which it was cut, if that moved nothing.
fn go_on(ring: &mut dyn Ring<Vec<u8>>, fd: &Fd, from: usize) -> (usize, Option<i32>) {
    let state = state(&LENS);
    let mut begin = 0;
    let mut pieces = Vec::new();
    for len in LENS {
        let end = begin + len;
        if end > from {
            pieces.push(begin.max(from)..end);
        }
        begin = end;
    }
    let count = pieces.len();
    for ((at, piece), token) in (1..).zip(pieces).zip(0..) {
        let op = Op::WriteAt {
            fd: fd.clone(),
            offset: (START + piece.start) as u64,
            buffer: state[piece].to_vec(),
        };
        let link = if at < count { Link::Next } else { Link::End };
        ring.push(Token(token), op, link).unwrap();
    }
    let mut results = vec![None; count];
    while ring.in_flight() > 0 {
        ring.wait(None).unwrap();
        while let Some(completion) = ring.reap() {
            let wanted = completion.op.requested();
            let result = completion.result.map_err(|error| error.raw_os_error());
            results[completion.token.0 as usize] = Some((wanted, result));
        }
    }
    let mut at = from;
    let mut results = results.into_iter().map(Option::unwrap);
    let cut = results.find_map(|(wanted, result)| {
        at += result.unwrap_or(0);
        (result != Ok(wanted)).then_some(result)
    });
    for (_, behind) in results {
        assert_eq!(behind, Err(Some(libc::ECANCELED)), "what is behind a cut");
    }
    (at, cut.and_then(|result| result.err().flatten()))
}

/// Writes until the file takes no more, and then, with room, the rest. `fits` bytes fit at first.
fn case(ring: &mut dyn Ring<Vec<u8>>, path: &Path, fits: usize, errno: i32, room: &dyn Fn()) {
    let file = open(path);
    let fd: Fd = Arc::new(file.try_clone().unwrap().into());
    let state = state(&LENS);
    let mut at = 0;
    // Ends: each round moves a byte, or has an errno.
    loop {
        let (next, cut) = go_on(ring, &fd, at);
        let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
        let mut bytes = vec![0; len.saturating_sub(START)];
        file.read_exact_at(&mut bytes, START as u64).unwrap();
        assert!(bytes == state[..next], "{next} bytes are said to be there");
        at = next;
        if let Some(cut) = cut {
            assert_eq!((at, cut), (fits, errno));
            break;
        }
    }
    room();
    assert_eq!(go_on(ring, &fd, at), (state.len(), None));
    let mut bytes = vec![0; state.len()];
    file.read_exact_at(&mut bytes, START as u64).unwrap();
    assert!(bytes == state);
    // Nobody has moved it.
    assert_eq!(lseek(&file, 0, Whence::SeekCur), Ok(0));
}

/// A file with `START` bytes in it.
fn open(path: &Path) -> File {
    let mut options = OpenOptions::new();
    let options = options.create(true).truncate(true).read(true).write(true);
    let file = options.open(path).unwrap();
    file.write_all_at(&[0; START], 0).unwrap();
    file
}

fn limited(directory: &Path) {
    let (unlimited, _) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    let path = directory.join("state");
    for (name, mut ring) in rings() {
        for fits in cuts(&LENS) {
            println!("{name}: a limit behind {fits} bytes");
            limit((START + fits) as u64);
            let room = || limit(unlimited);
            case(&mut *ring, &path, fits, libc::EFBIG, &room);
        }
    }
}

fn full(directory: &Path) {
    if !has_tmpfs(directory) {
        return;
    }
    let path = directory.join("state");
    let pages = (START + state(&LENS).len()).div_ceil(PAGE);
    for (name, mut ring) in rings() {
        for fits in 1..pages {
            println!("{name}: a tmpfs of {fits} pages");
            resize(directory, fits);
            let room = || resize(directory, pages);
            case(&mut *ring, &path, fits * PAGE - START, libc::ENOSPC, &room);
            fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn a_limit_on_a_files_size_cuts_a_chain_where_the_completions_say() {
    in_a_process(
        "a_limit_on_a_files_size_cuts_a_chain_where_the_completions_say",
        limited,
    );
}

#[test]
fn a_full_file_system_cuts_a_chain_where_the_completions_say() {
    in_a_process(
        "a_full_file_system_cuts_a_chain_where_the_completions_say",
        full,
    );
}
