//! The first errno of a device's driver is final, and names device and idx: also where the driver
//! would take the same bytes the second time. Short and interrupted transfers go on where they stood.

use std::io;

use vfio_migration::{Error, ErrorKind, LoadSession, Settings, wire::wrap_config};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig as RingConfig};

use crate::{mock::Mock, names::id, payload::payload, pipes::collect, watchdog::Watchdog};

/// Loads 10 packets of `len` bytes over a ring with this plan.
fn load(len: usize, plan: FaultPlan) -> (Vec<u8>, Option<Error>) {
    load_mixed(&[len; 10], plan)
}

/// Loads packets of these lengths over a ring with this plan. All are there before the switchover
/// starts, so that what can be chained or gathered is. Returns what the device got, and the error.
fn load_mixed(lens: &[usize], plan: FaultPlan) -> (Vec<u8>, Option<Error>) {
    let _watchdog = Watchdog::new();
    let (reader, writer) = io::pipe().unwrap();
    let got = collect(reader);
    let mut settings = Settings::default();
    settings.budget = Some(8 << 20);
    let ring = RingConfig {
        plan,
        ..RingConfig::default()
    };
    let load = LoadSession::builder()
        .settings(settings)
        .device(Mock::new(writer).device(1))
        .simulated_ring(ring)
        .start()
        .unwrap();
    let mut publisher = load.publisher();
    let count = u32::try_from(lens.len()).unwrap();
    for (index, len) in (0..count).zip(lens) {
        let data = vec![u8::try_from(index).unwrap(); *len];
        publisher
            .push(&id(1), &payload(index, false, &data))
            .unwrap();
    }
    let config = payload(count, true, &wrap_config(b"c"));
    publisher.push(&id(1), &config).unwrap();
    drop(publisher);
    load.no_more_channels();
    load.switchover_start();
    let mut report = load.join();
    report.devices.clear();
    (got.join().unwrap(), report.result.err())
}

fn whole(len: usize) -> Vec<u8> {
    (0..10).flat_map(|index| vec![index; len]).collect()
}

#[test]
fn a_driver_that_refuses_once_is_not_asked_again() {
    // Large packets are written one by one, in chains: the k-th operation is the k-th packet.
    for refused in [0, 3, 7, 9] {
        let plan = FaultPlan::new().with(refused, Fault::Errno(libc::EIO));
        let (got, error) = load(80_000, plan.clone());
        let error = error.expect("the driver refused");
        assert_eq!(*error.kind(), ErrorKind::Device);
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert_eq!(error.device(), Some(&id(1)));
        assert_eq!(error.index(), u32::try_from(refused).ok());
        let before = usize::try_from(refused).unwrap() * 80_000;
        assert_eq!(got, whole(80_000)[..before], "nothing after the refusal");
    }
}

#[test]
fn within_a_gathered_write_the_packet_is_found_by_the_bytes() {
    // Small packets are gathered: the first operation takes some bytes, its rest is refused.
    for (taken, index) in [(1, 0), (99, 0), (100, 1), (101, 1), (555, 5), (999, 9)] {
        let plan = FaultPlan::new()
            .with(0, Fault::Short(taken))
            .with(1, Fault::Errno(libc::ENOMEM));
        let (got, error) = load(100, plan);
        let error = error.expect("the driver refused");
        assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        assert_eq!(error.index(), Some(index), "{taken} bytes were taken");
        assert_eq!(got, whole(100)[..taken]);
    }
}

#[test]
fn short_and_interrupted_writes_go_on_where_they_stood() {
    for len in [100, 80_000] {
        for fault in [
            Fault::Short(1),
            Fault::Short(len - 1),
            Fault::Errno(libc::EINTR),
            Fault::Errno(libc::EAGAIN),
        ] {
            for at in 0..3 {
                let plan = FaultPlan::new().with(at, fault).with(at + 1, fault);
                let (got, error) = load(len, plan);
                assert!(error.is_none(), "{fault:?} at {at}: {error:?}");
                assert_eq!(got, whole(len), "{fault:?} at {at}");
            }
        }
    }
}

#[test]
fn an_interruption_without_end_is_an_error() {
    let plan = FaultPlan::new();
    for number in 0..5000 {
        plan.set(number, Fault::Errno(libc::EAGAIN));
    }
    let (got, error) = load(80_000, plan);
    assert_eq!(error.unwrap().raw_os_error(), Some(libc::EAGAIN));
    assert_eq!(got, b"");
}

/// A small packet's staging buffer is an operation of the chain, too, wherever it stands in it.
#[test]
fn a_chain_is_no_longer_than_its_lane_has_places() {
    for large_before in 0..10 {
        for small in 1..4 {
            let mut lens = vec![200_000; large_before];
            lens.extend(vec![100; small]);
            lens.extend([200_000; 3]);
            let (got, error) = load_mixed(&lens, FaultPlan::new());
            assert!(error.is_none(), "{large_before}, {small}: {error:?}");
            let whole: Vec<u8> = (0..)
                .zip(&lens)
                .flat_map(|(index, len)| vec![index; *len])
                .collect();
            assert!(got == whole, "{large_before}, {small}");
        }
    }
}
