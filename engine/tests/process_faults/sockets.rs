//! The k-th read or write of a channel.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    time::Duration,
};

use vfio_migration::Channel;

use crate::{
    kth::Kth,
    run::{ERRNOS, Expect, Scene, judged, name},
    tally::{Sweep, numbers},
};

/// How a read or a write goes wrong.
#[derive(Clone, Copy, Debug)]
pub enum SocketFault {
    Errno(i32),
    /// It moves one byte.
    Short,
    /// It moves nothing, as at the end.
    End,
}

/// A socket whose calls are counted.
pub struct Faulty {
    stream: UnixStream,
    kth: Kth<SocketFault>,
}

impl Faulty {
    pub fn channel(stream: UnixStream, kth: Kth<SocketFault>, patience: Duration) -> Channel {
        let patience = Some(patience);
        stream.set_read_timeout(patience).unwrap();
        stream.set_write_timeout(patience).unwrap();
        let other = stream.try_clone().unwrap();
        Channel::from_stream(Self { stream, kth }, move || {
            let _closed = other.shutdown(Shutdown::Both);
        })
    }

    /// What to do instead, if so; else whether to move one byte at most.
    fn fault(&self) -> Result<bool, io::Result<usize>> {
        match self.kth.next() {
            None => Ok(false),
            Some(SocketFault::Short) => Ok(true),
            Some(SocketFault::End) => Err(Ok(0)),
            Some(SocketFault::Errno(errno)) => Err(Err(io::Error::from_raw_os_error(errno))),
        }
    }
}

impl Read for Faulty {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(bytes)])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self.fault() {
            Ok(false) => self.stream.read_vectored(buffers),
            Ok(true) => self.stream.read(&mut buffers[0][..1]),
            Err(instead) => instead,
        }
    }
}

impl Write for Faulty {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.fault() {
            Ok(false) => self.stream.write_vectored(buffers),
            Ok(true) => self.stream.write(&buffers[0][..1]),
            Err(instead) => instead,
        }
    }

    /// Nothing more will be sent.
    fn flush(&mut self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Write)
    }
}

fn scene(kth: &Kth<SocketFault>) -> Scene {
    Scene {
        sockets: Some(kth.clone()),
        ..Scene::new()
    }
}

#[test]
fn every_socket_call_fails() {
    let mut sweep = Sweep::new("socket calls × errnos, short, end");
    let none = Kth::none();
    judged(
        &mut sweep,
        &"sockets: no fault",
        &scene(&none),
        Expect::Success,
        || false,
    );
    let count = none.count();
    sweep.counted(count);
    let faults = ERRNOS.map(SocketFault::Errno).into_iter();
    for (salt, fault) in (0..).zip(faults.chain([SocketFault::Short, SocketFault::End])) {
        let (expect, what) = match fault {
            SocketFault::Short => (Expect::Success, "one byte".into()),
            SocketFault::Errno(libc::EINTR) => (Expect::Success, name(libc::EINTR)),
            // The stream's own time-out: between two packets it is none of the channel's business.
            SocketFault::Errno(errno @ (libc::EAGAIN | libc::ETIMEDOUT)) => {
                (Expect::Any, name(errno))
            }
            SocketFault::Errno(errno) => (Expect::Cause(errno), name(errno)),
            SocketFault::End => (Expect::Any, "the end".into()),
        };
        for k in numbers(count, 2, salt) {
            let kth = Kth::new(k, fault);
            let case = format!("sockets: {what} in call {k}");
            let mut scene = scene(&kth);
            if matches!(fault, SocketFault::End) {
                // An end that was none leaves a sender to whom nobody listens.
                scene.no_progress = Duration::from_millis(300);
            }
            judged(&mut sweep, &case, &scene, expect, || kth.met());
        }
    }
}
