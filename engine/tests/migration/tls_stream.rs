//! A TLS stream as a socket is: what ends its waits, how it ends, and what it does with a connection that somebody
//! on the way cuts or changes.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use vfio_migration::{
    ChannelStream, Device, DeviceId, ErrorKind, LoadSession, SaveSession, TlsStream,
    sim::{SimConfig, SimDevice},
};

use crate::{
    tls::{configs, name},
    watchdog::Watchdog,
};

const LONG: Duration = Duration::from_secs(30);

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (near, listener.accept().unwrap().0)
}

/// Two ends that have shaken hands, over these sockets.
fn over(near: TcpStream, far: TcpStream) -> (TlsStream, TlsStream) {
    let (client, server) = configs();
    let mut near = TlsStream::client(near, client, name()).unwrap();
    let mut far = TlsStream::server(far, server).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| far.handshake(LONG).unwrap());
        near.handshake(LONG).unwrap();
    });
    (near, far)
}

fn pair() -> (TlsStream, TlsStream) {
    let (near, far) = tcp();
    over(near, far)
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    let next = |n: usize| n.wrapping_mul(2_654_435_761).to_le_bytes()[2] ^ seed;
    (0..len).map(next).collect()
}

/// Passes bytes from one socket to the other, and does something to each lot. Where that says so, a byte at a
/// time.
fn pass(mut from: TcpStream, mut to: TcpStream, mut lot: impl FnMut(&mut [u8]) -> bool) {
    let mut bytes = vec![0; 4096];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        let slowly = lot(&mut bytes[..count]);
        for piece in bytes[..count].chunks(if slowly { 1 } else { count }) {
            if to.write_all(piece).is_err() {
                return;
            }
            if slowly {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
    let _gone = to.shutdown(Shutdown::Write);
}

/// A connection with somebody in its middle, who does something to each lot of the client's bytes.
fn with_somebody_between(
    lot: impl FnMut(&mut [u8]) -> bool + Send + 'static,
) -> (TcpStream, TcpStream) {
    let (near, here) = tcp();
    let (there, far) = tcp();
    let back = (there.try_clone().unwrap(), here.try_clone().unwrap());
    thread::spawn(move || pass(here, there, lot));
    thread::spawn(move || pass(back.0, back.1, |_| false));
    (near, far)
}

#[test]
fn two_threads_use_one_connection_each_way() {
    let _watchdog = Watchdog::new();
    let (near, far) = pair();
    let len = 3 << 20;
    thread::scope(|scope| {
        for (seed, end, other) in [(1, &near, &far), (2, &far, &near)] {
            let (mut end, mut other) = (end.try_clone(), other.try_clone());
            scope.spawn(move || {
                for piece in pattern(seed, len).chunks(300_001) {
                    end.write_all(piece).unwrap();
                }
                end.finish().unwrap();
            });
            scope.spawn(move || {
                let mut bytes = Vec::new();
                other.read_to_end(&mut bytes).unwrap();
                assert!(bytes == pattern(seed, len), "as they were sent");
            });
        }
    });
}

#[test]
fn a_side_that_has_finished_still_reads() {
    let _watchdog = Watchdog::new();
    let (mut near, mut far) = pair();
    near.write_all(b"all of it").unwrap();
    near.finish().unwrap();
    near.finish().unwrap();
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"all of it");
    assert_eq!(far.read(&mut [0; 9]).unwrap(), 0, "and again");
    far.write_all(b"the verdict").unwrap();
    far.finish().unwrap();
    bytes.clear();
    near.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"the verdict");
}

#[test]
fn a_look_leaves_the_data_there() {
    let _watchdog = Watchdog::new();
    let (mut near, mut far) = pair();
    let kind = far.peek(&mut [0; 4]).unwrap_err().kind();
    assert_eq!(kind, io::ErrorKind::WouldBlock);
    assert!(!far.wait_readable(Duration::from_millis(10)).unwrap());
    // The server's session tickets are nothing to read.
    assert!(!near.wait_readable(Duration::from_millis(10)).unwrap());
    near.write_all(b"QEVM and more").unwrap();
    let mut first = [0; 4];
    assert!(far.wait_readable(LONG).unwrap());
    assert_eq!(far.peek(&mut first).unwrap(), 4);
    assert_eq!(&first, b"QEVM");
    let mut all = [0; 13];
    far.read_exact(&mut all).unwrap();
    assert_eq!(&all, b"QEVM and more");
    near.finish().unwrap();
    assert!(far.wait_readable(LONG).unwrap(), "the end");
    assert_eq!(far.peek(&mut first).unwrap(), 0);
}

#[test]
fn a_hang_up_ends_every_wait_of_another_thread() {
    let _watchdog = Watchdog::new();
    let (client, _) = configs();
    type Wait = fn(&mut TlsStream) -> io::Result<()>;
    let read: Wait = |stream| stream.read_exact(&mut [0; 1]);
    // Nobody reads: it waits for room.
    let write: Wait = |stream| loop {
        stream.write_all(&[7; 1 << 20])?;
    };
    let handshake: Wait = |stream| stream.handshake(LONG);
    for (established, wait) in [
        (true, read),
        (true, write),
        (false, handshake),
        (false, read),
    ] {
        let (near, far) = tcp();
        let (mut near, _far) = if established {
            let (near, far) = over(near, far);
            (near, Some(far))
        } else {
            let near = TlsStream::client(near, client.clone(), name()).unwrap();
            // Open, and silent.
            std::mem::forget(far);
            (near, None)
        };
        ChannelStream::set_timeout(&near, LONG).unwrap();
        let hang_up = near.hangup().unwrap();
        let waits = thread::spawn(move || wait(&mut near));
        thread::sleep(Duration::from_millis(50));
        assert!(!waits.is_finished());
        hang_up();
        hang_up();
        let error = waits.join().unwrap().unwrap_err();
        assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        assert_ne!(error.kind(), io::ErrorKind::TimedOut, "{error}");
    }
}

#[test]
fn a_peer_that_trickles_gets_the_time_of_the_call_and_no_more() {
    let _watchdog = Watchdog::new();
    // From some point on the client's bytes come one at a time.
    static SLOW: AtomicBool = AtomicBool::new(false);
    let (near, far) = with_somebody_between(|_| SLOW.load(Relaxed));
    let (mut near, mut far) = over(near, far);
    SLOW.store(true, Relaxed);
    let trickling = thread::spawn(move || {
        for _ in 0..500 {
            if near.write_all(b"x").is_err() {
                return;
            }
        }
    });
    ChannelStream::set_timeout(&far, Duration::from_millis(300)).unwrap();
    let error = far.read(&mut [0; 100]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    let _gone = far.shutdown(Shutdown::Both);
    drop(far);
    trickling.join().unwrap();

    // So with a handshake: a record's header, and then its body as slowly.
    let (_, server) = configs();
    let (mut near, far) = tcp();
    let mut far = TlsStream::server(far, server).unwrap();
    let trickling = thread::spawn(move || {
        let mut hello = vec![22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
        hello.resize(500, 0);
        for byte in hello {
            if near.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    });
    let error = far.handshake(Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    drop(far);
    trickling.join().unwrap();
}

#[test]
fn what_is_no_handshake_is_refused_at_once() {
    let _watchdog = Watchdog::new();
    let mut long = Vec::new();
    for _ in 0..64 {
        // A piece of a client's hello of 16 MiB less a byte.
        long.extend([22, 3, 1, 64, 0]);
        let piece = long.len();
        long.resize(piece + (16 << 10), 0);
        if piece == 5 {
            long[5..9].copy_from_slice(&[1, 255, 255, 255]);
        }
    }
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"QEVM\0\0\0\x03".to_vec(),
        long,
    ] {
        let (mut near, far) = tcp();
        let writing = thread::spawn(move || {
            let _gone = near.write_all(&bytes);
            near
        });
        let mut far = TlsStream::server(far, configs().1).unwrap();
        let error = far.handshake(LONG).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        drop(far);
        writing.join().unwrap();
    }
}

/// A load and a save with such a channel between them. The load's error.
fn load(
    near: impl Into<vfio_migration::Channel>,
    far: impl Into<vfio_migration::Channel>,
) -> vfio_migration::Error {
    let device = |seed| {
        let config = SimConfig {
            seed,
            len: 4 << 20,
            ..SimConfig::default()
        };
        let id = DeviceId::new("0000:00:03.0/vfio", 0).unwrap();
        Device::new(id, Box::new(SimDevice::new(config).unwrap())).unwrap()
    };
    let load = LoadSession::builder().device(device(2)).channel(far);
    let save = SaveSession::builder().device(device(1)).channel(near);
    let (load, save) = (load.start().unwrap(), save.start().unwrap());
    load.switchover_start();
    let failed = load.join().result.expect_err("it cannot be whole");
    save.cancel();
    let _save = save.join();
    failed
}

#[test]
fn a_byte_that_is_changed_on_the_way_fails_the_load_and_names_the_channel() {
    let _watchdog = Watchdog::new();
    let mut passed = 0;
    let (near, far) = with_somebody_between(move |lot| {
        let before = passed;
        passed += lot.len();
        if before < 1 << 20 && passed >= 1 << 20 {
            lot[0] ^= 1;
        }
        false
    });
    let (near, far) = over(near, far);
    let error = load(near, far);
    assert_eq!(*error.kind(), ErrorKind::Channel);
    assert_eq!(error.channel(), Some(0));
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert!(why.contains("decrypt"), "{why}");
}

#[test]
fn a_connection_that_is_cut_between_two_records_is_no_end() {
    let _watchdog = Watchdog::new();
    let (mut near, mut far) = pair();
    near.write_all(b"whole").unwrap();
    // Not told by this side.
    near.shutdown(Shutdown::Write).unwrap();
    let mut bytes = Vec::new();
    let error = far.read_to_end(&mut bytes).unwrap_err();
    assert_eq!(bytes, b"whole");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn the_kernels_tls_or_the_stream_as_it_was() {
    let _watchdog = Watchdog::new();
    let (near, far) = pair();
    let clone = near.try_clone();
    let near = near.into_kernel().expect_err("there is another handle");
    let near = near.into_stream().unwrap();
    drop(clone);
    // With data on its way that nobody has read.
    let mut near = near;
    near.write_all(b"early").unwrap();
    assert!(far.wait_readable(LONG).unwrap());
    let begun = Instant::now();
    let (mut near, mut far): (Box<dyn ChannelStream>, Box<dyn ChannelStream>) =
        match (near.into_kernel(), far.into_kernel()) {
            (Ok(near), Ok(far)) => (Box::new(near), Box::new(far)),
            (near, far) => {
                let refused = near.expect_err("both or none").into_stream().unwrap();
                let other = far.expect_err("both or none").into_stream().unwrap();
                (Box::new(refused), Box::new(other))
            }
        };
    assert!(begun.elapsed() < LONG);
    let sent = pattern(3, 2 << 20);
    let expected = [b"early".as_slice(), &sent].concat();
    thread::scope(|scope| {
        scope.spawn(|| {
            near.write_all(&sent).unwrap();
            near.finish().unwrap();
        });
        let mut bytes = Vec::new();
        far.read_to_end(&mut bytes).unwrap();
        assert!(bytes == expected, "as they were sent");
    });
    far.write_all(b"back").unwrap();
    far.finish().unwrap();
    let mut bytes = Vec::new();
    near.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"back");
}
