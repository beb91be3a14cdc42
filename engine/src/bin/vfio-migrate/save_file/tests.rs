//! What a file's digest stands for, in this process: of simulated devices, which show what was done to them.

use std::path::PathBuf;

use vfio_migration::{
    Device, DeviceState, ErrorKind, LoadSession, Report, SaveSession, Settings, Spill,
    migration::vm,
    sim::{SimConfig, SimDevice, SimHandle},
};

use super::*;
use crate::state_files::{Target, publish};

/// A directory of the test's own, which goes with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("vfio-migrate-save-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn id(name: &str) -> DeviceId {
    DeviceId::new(name, 0).expect("a name")
}

fn device(name: &str, seed: u64) -> (Device, SimHandle) {
    let device = SimDevice::new(SimConfig {
        seed,
        len: 300_000,
        ..SimConfig::default()
    });
    let device = device.expect("a device");
    let handle = device.handle();
    let device = Device::new(id(name), Box::new(device)).expect("it can migrate");
    (device, handle)
}

/// Saves two devices. Their digests.
fn save(path: &Path) -> [u64; 2] {
    let (a, b) = (device("a", 1), device("b", 2));
    let digests = [a.1.digest(), b.1.digest()];
    let target = Target::new(path).expect("a target");
    let file = target.create().expect("a file");
    let (channel, sum) = channel(&file).expect("a channel");
    let session = SaveSession::builder()
        .devices([a.0, b.0])
        .channel(channel)
        .start()
        .expect("a session");
    session.join().result.expect("saved");
    seal(&file, &sum).expect("sealed");
    publish(vec![(&target, file)]).expect("published");
    digests
}

fn load(file: &SaveFile, devices: [Device; 2]) -> Report {
    let settings = Settings::default().spill(Spill::Off).stop_after_load(false);
    let session = LoadSession::builder()
        .settings(settings)
        .devices(devices)
        .channel(file.channel().expect("a channel"))
        .start()
        .expect("a session");
    session.no_more_channels();
    session.switchover_start();
    session.join()
}

#[test]
fn what_was_saved_is_loaded_and_stays_in_resuming() {
    let place = Place::new("same");
    let path = place.0.join("file");
    let digests = save(&path);
    let file = SaveFile::open(&path).expect("a file of save");
    let contents = file.check(&[&id("b"), &id("a")]).expect("its devices");
    assert_eq!(contents.max_packet, DEFAULT_MAX_PACKET);
    assert!(contents.lens.iter().all(|len| *len > 300_000));
    let (a, b) = (device("a", 3), device("b", 4));
    let report = load(&file, [a.0, b.0]);
    report.result.expect("loaded");
    let devices = report.devices.into_iter();
    let mut devices: Vec<_> = devices.map(|it| it.device.expect("it is back")).collect();
    for device in &devices {
        assert_eq!(device.state(), DeviceState::Resuming);
    }
    vm::start(&mut devices).expect("the states are right");
    assert_eq!([a.1.digest(), b.1.digest()], digests);
}

/// Whatever byte it is, and also where the devices have all of theirs: no device leaves RESUMING but by a
/// reset.
#[test]
fn a_file_that_changes_under_the_load_loads_no_device() {
    let place = Place::new("changed");
    let path = place.0.join("file");
    save(&path);
    let len = fs::metadata(&path).expect("it is there").len();
    let last = len - DIGEST_LEN as u64 - 1;
    for (at, why) in [(70_000, None), (last - 20, None), (last, Some(len - 1))] {
        let bytes = fs::read(&path).expect("readable");
        let file = SaveFile::open(&path).expect("a file of save");
        let writer = fs::File::options().write(true).open(&path).expect("a file");
        match why {
            None => {
                let changed = [bytes[usize::try_from(at).expect("small")] ^ 1];
                writer.write_all_at(&changed, at).expect("written");
            }
            Some(_) => writer.set_len(at).expect("cut"),
        }
        let (a, b) = (device("a", 3), device("b", 4));
        let report = load(&file, [a.0, b.0]);
        let error = report.result.expect_err("it has changed");
        // Where the packets' own framing has not found it before.
        assert_eq!(*error.kind(), ErrorKind::Channel, "{error}");
        let said = anyhow::anyhow!(error);
        assert!(
            format!("{said:#}").contains("has changed since"),
            "{said:#}"
        );
        for device in &report.devices {
            let device = device.device.as_ref().expect("it is back");
            assert_eq!(
                (device.state(), device.was_reset()),
                (DeviceState::Running, true)
            );
        }
        fs::write(&path, bytes).expect("written back");
    }
}

#[test]
fn the_digests_packet_is_found_at_its_place_alone() {
    let sha256 = [0xa5; 32];
    let packet = encode(&sha256);
    assert_eq!(packet.len(), DIGEST_LEN);
    assert_eq!(digest_at(&packet), Some(sha256));
    assert_eq!(digest_at(&packet[1..]), None);
    assert_eq!(digest_at(&vec![0; DIGEST_LEN]), None);
    let mut other = packet.clone();
    other[64] = b'V';
    assert_eq!(digest_at(&other), None);
    let mut pages = packet;
    pages[35] = 1;
    assert_eq!(digest_at(&pages), None);
}
