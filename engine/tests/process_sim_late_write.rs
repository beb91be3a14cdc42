//! A write to a simulated device whose session is over. One test alone in its process: the memory of an
//! ended session is the next one's, whosever that is.
#![cfg(feature = "sim")]
#![allow(missing_docs, reason = "a test")]

use std::{fs::File, io::Write};

use nix::errno::Errno;
use vfio_migration::{
    Device, DeviceId,
    DeviceState::{Resuming, Running, Stop},
    Recover,
    sim::{Image, SimConfig, SimDevice, Stream},
};

#[test]
fn a_late_write_never_reaches_the_next_session() {
    let config = SimConfig {
        seed: 5,
        len: 300_001,
        stream: Stream::PlainWrite,
        ..SimConfig::default()
    };
    let sim = SimDevice::new(config).unwrap();
    let handle = sim.handle();
    let id = DeviceId::new("sim", 0).unwrap();
    let mut device = Device::new(id, Box::new(sim)).unwrap();
    let data = |device: &Device| File::from(device.lend().unwrap().try_clone().unwrap());

    device.set_state(Resuming, Running).unwrap();
    let mut late = data(&device);
    late.write_all(&[0; 10]).unwrap();
    device.reset().unwrap();
    let error = late.write(&[0xff; 100]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EIO as i32));

    let image = Image::new(9, 300_001);
    let mut bytes = vec![0; 300_001];
    image.fill(0, &mut bytes);
    device.set_state(Resuming, Running).unwrap();
    data(&device).write_all(&bytes).unwrap();
    device.set_state(Stop, Recover::Reset).unwrap();
    assert_eq!(handle.digest(), image.digest());
}
