//! What signals do to a ring: nothing. A process of its own, for it changes signal handlers.
#![expect(unsafe_code, reason = "installing a signal handler")]

use std::{
    io::{self, Write},
    os::unix::{net::UnixStream, thread::JoinHandleExt},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use nix::sys::{
    pthread::pthread_kill,
    signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction},
};
use vfio_migration_uring::{Backend, Fd, Link, Op, Ring, Token, Waker, open};

const LONG: Duration = Duration::from_secs(60);

static HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn handle(_signal: libc::c_int) {
    // Relaxed: a counter.
    HANDLED.fetch_add(1, Relaxed);
}

fn rings() -> impl Iterator<Item = (Backend, Waker, Box<dyn Ring<Vec<u8>>>)> {
    [Backend::Uring, Backend::Blocking]
        .into_iter()
        .filter_map(|backend| {
            let waker = Waker::new().unwrap();
            match open(backend, 8, waker.clone(), LONG) {
                Ok((ring, _)) => Some((backend, waker, ring)),
                Err(error) => {
                    eprintln!("skipped: no {backend} ring here: {error}");
                    None
                }
            }
        })
}

#[test]
fn signals_end_no_wait_and_break_no_operation() {
    // Without SA_RESTART: every call that can be interrupted is.
    let action = SigAction::new(
        SigHandler::Handler(handle),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler only adds to an atomic.
    unsafe { sigaction(Signal::SIGUSR1, &action) }.unwrap();

    for (backend, waker, mut ring) in rings() {
        let (one, other) = UnixStream::pair().unwrap();
        let fd: Fd = Arc::new(one.into());
        let before = HANDLED.load(Relaxed);
        let user = thread::spawn(move || {
            for _ in 0..20 {
                let op = Op::Recv {
                    fd: fd.clone(),
                    buffer: vec![0; 4],
                };
                ring.push(Token(0), op, Link::End).unwrap();
                let woken = ring.wait(Some(LONG)).unwrap();
                let mut completion = ring.reap();
                // Both, where they came together; never neither.
                assert!(woken || completion.is_some(), "a signal ended the wait");
                let completion = loop {
                    if let Some(completion) = completion {
                        break completion;
                    }
                    ring.cancel(Token(0));
                    ring.wait(Some(LONG)).unwrap();
                    completion = ring.reap();
                };
                match completion.result {
                    Ok(moved) => assert_eq!(moved, 4),
                    Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ECANCELED)),
                }
            }
        });
        let mut other = other;
        let mut round = 0;
        while !user.is_finished() {
            for _ in 0..10 {
                // The thread has not been joined, so its handle is valid.
                let _exited = pthread_kill(user.as_pthread_t(), Signal::SIGUSR1);
                thread::sleep(Duration::from_micros(200));
            }
            round += 1;
            if round % 3 == 0 {
                waker.wake();
            } else {
                let _closed = other.write_all(b"data");
            }
        }
        user.join().unwrap();
        assert!(HANDLED.load(Relaxed) > before, "{backend}");
    }
}

#[test]
fn a_send_that_nobody_will_receive_kills_nobody() {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: installs no handler.
    unsafe { sigaction(Signal::SIGPIPE, &action) }.unwrap();

    for (backend, _waker, mut ring) in rings() {
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        let op = Op::Send {
            fd: Arc::new(one.into()),
            buffer: vec![0; 4],
        };
        ring.push(Token(0), op, Link::End).unwrap();
        ring.wait(Some(LONG)).unwrap();
        let error = ring.reap().unwrap().result.unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE), "{backend}");
    }
}

#[test]
fn a_write_to_a_pipe_that_nobody_reads_kills_nobody_who_blocks_signals() {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: installs no handler.
    unsafe { sigaction(Signal::SIGPIPE, &action) }.unwrap();

    for (backend, _waker, mut ring) in rings() {
        // As the engine's own threads do. There is no flag for it, as a socket's send has one.
        let user = thread::spawn(move || {
            SigSet::all().thread_block().unwrap();
            let (reader, writer) = io::pipe().unwrap();
            drop(reader);
            let op = Op::Write {
                fd: Arc::new(writer.into()),
                buffer: vec![0; 4],
            };
            ring.push(Token(0), op, Link::End).unwrap();
            ring.wait(Some(LONG)).unwrap();
            ring.reap().unwrap().result.unwrap_err()
        });
        let error = user.join().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE), "{backend}");
    }
}
