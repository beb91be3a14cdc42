//! A simulated device leaves nothing behind: no thread, no file. One test alone in its process, for
//! it counts the process's.
#![cfg(feature = "sim")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    thread,
    time::Duration,
};

use vfio_migration::{
    Device, DeviceId,
    DeviceState::{PreCopy, Resuming, Running, Stop, StopCopy},
    Recover,
    sim::{Image, SimConfig, SimDevice, Stall, Stream},
};

fn count(what: &str) -> usize {
    fs::read_dir(format!("/proc/self/{what}")).unwrap().count()
}

/// Sessions that end in every way that there is: read or written to the end, abandoned, reset,
/// dropped with the device, the fd closed before or after.
fn sessions(stream: Stream, stall: Option<Stall>) {
    let mut config = SimConfig {
        stream,
        len: 100_000,
        precopy_initial: 10_000,
        ..SimConfig::default()
    };
    config.faults.stall = stall;
    let device = || {
        let sim = SimDevice::new(config.clone()).unwrap();
        let handle = sim.handle();
        let id = DeviceId::new("sim", 0).unwrap();
        (Device::new(id, Box::new(sim)).unwrap(), handle)
    };
    let fd = |device: &Device| File::from(device.lend().unwrap().try_clone().unwrap());

    let (mut dev, handle) = device();
    dev.set_state(PreCopy, Running).unwrap();
    dev.read_precopy(&mut [0; 100]).unwrap();
    dev.set_state(StopCopy, Stop).unwrap();
    handle.release();
    fd(&dev).read_to_end(&mut Vec::new()).unwrap();
    dev.set_state(Stop, Recover::Reset).unwrap();
    dev.set_state(Resuming, Recover::Reset).unwrap();
    let mut state = vec![0; 70_000];
    Image::new(1, 70_000).fill(0, &mut state);
    handle.release();
    fd(&dev).write_all(&state).unwrap();
    dev.set_state(Stop, Recover::Reset).unwrap();
    // The file goes with the device, whoever still looks at it.
    dev.set_state(StopCopy, Recover::Reset).unwrap();
    drop(dev);
    assert!(handle.has_loaded());

    for state in [PreCopy, StopCopy, Resuming] {
        let (mut dev, _) = device();
        dev.set_state(state, Recover::Reset).unwrap();
        dev.reset().unwrap();
        dev.set_state(state, Recover::Reset).unwrap();
        let late = fd(&dev);
        drop(dev);
        drop(late);
    }
}

#[test]
fn nothing_is_left_behind() {
    let before = (count("task"), count("fd"));
    for _ in 0..20 {
        for stream in [
            Stream::Pipe,
            Stream::Socket,
            Stream::PlainWrite,
            Stream::Memfd,
        ] {
            sessions(stream, None);
            let stall = Stall {
                at: 500,
                time: None,
            };
            sessions(stream, Some(stall));
            // A thread that has been joined is in the list until the kernel has buried it.
            let mut tries = 0;
            while (count("task"), count("fd")) != before {
                tries += 1;
                assert!(tries < 1000, "{stream:?} leaves something behind");
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}
