//! The blocking ring's workers on threads of its owner's: they run there, end before the drain does, and one that
//! is refused, dropped or unable is an error that loses no operation.
#![allow(missing_docs, reason = "a test")]

use std::{
    io::{self, Read},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use vfio_migration_uring::{BlockingRing, Link, Op, Ring, Token, Waker, Worker};

const LONG: Duration = Duration::from_secs(60);

type Spawn = dyn Fn(Worker) -> io::Result<Option<thread::JoinHandle<()>>> + Send + Sync;

fn ring(spawn: Arc<Spawn>) -> BlockingRing<Vec<u8>> {
    let ring = BlockingRing::new(4, Waker::new().unwrap(), LONG).unwrap();
    ring.spawn_with(spawn)
}

fn push(ring: &mut BlockingRing<Vec<u8>>) -> io::PipeReader {
    let (reader, writer) = io::pipe().unwrap();
    let op = Op::Write {
        fd: Arc::new(writer.into()),
        buffer: b"x".to_vec(),
    };
    ring.push(Token(0), op, Link::End).unwrap();
    reader
}

/// Waits for the operation. Returns the errors on the way.
fn wait(ring: &mut BlockingRing<Vec<u8>>, mut reader: io::PipeReader) -> Vec<String> {
    let mut errors = Vec::new();
    let done = loop {
        if let Err(error) = ring.wait(None) {
            errors.push(error.to_string());
        }
        if let Some(done) = ring.reap() {
            break done;
        }
    };
    assert_eq!(done.result.unwrap(), 1);
    drop(done.op);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"x");
    errors
}

#[test]
fn workers_run_on_the_given_threads_and_end_before_the_drain_does() {
    let running = Arc::new(AtomicUsize::new(0));
    let counted = running.clone();
    let mut ring = ring(Arc::new(move |worker: Worker| {
        let counted = counted.clone();
        thread::spawn(move || {
            counted.fetch_add(1, SeqCst);
            worker.run();
            counted.fetch_sub(1, SeqCst);
        });
        Ok(None)
    }));
    let reader = push(&mut ring);
    assert!(wait(&mut ring, reader).is_empty());
    assert_eq!(running.load(SeqCst), 1);
    assert_eq!(ring.drain(LONG).leaked, 0);
    // The worker has ended; its thread has a moment more.
    while running.load(SeqCst) > 0 {
        thread::yield_now();
    }
}

#[test]
fn a_worker_that_does_not_come_to_work_is_an_error_and_its_operation_is_not_lost() {
    for way in ["refused", "dropped", "failed", "lost later"] {
        let tries = AtomicUsize::new(0);
        let spawn = move |worker: Worker| {
            if tries.fetch_add(1, SeqCst) > 0 {
                return Ok(Some(thread::spawn(move || worker.run())));
            }
            match way {
                "refused" => Err(io::Error::other("refused")),
                "dropped" => Ok(None),
                "failed" => {
                    worker.fail(io::Error::other("failed"));
                    Ok(None)
                }
                _ => {
                    thread::spawn(move || drop(worker));
                    Ok(None)
                }
            }
        };
        let mut ring = ring(Arc::new(spawn));
        let reader = push(&mut ring);
        let errors = wait(&mut ring, reader);
        assert_eq!(errors.len(), 1, "{way}: {errors:?}");
        let expected = match way {
            "refused" | "failed" => way,
            _ => "a worker of the ring was dropped without being run",
        };
        assert_eq!(errors[0], expected, "{way}");
        assert_eq!(ring.drain(LONG).leaked, 0);
    }
}

#[test]
fn a_worker_that_is_run_after_the_end_finds_nothing_to_do() {
    let kept: Arc<Mutex<Vec<Worker>>> = Arc::default();
    let keeps = kept.clone();
    let mut ring = ring(Arc::new(move |worker| {
        keeps.lock().unwrap().push(worker);
        Ok(None)
    }));
    let _reader = push(&mut ring);
    ring.submit().unwrap();
    assert_eq!(ring.drain(Duration::from_millis(50)).reaped, 1);
    drop(ring);
    let late = kept.lock().unwrap().pop().unwrap();
    late.run();
}
