//! Whole migrations: what one device was, the other is afterwards.

use std::{io::Read, os::unix::net::UnixStream, sync::Arc};

use vfio_migration::{
    Backend, Device, DeviceId, DeviceState, LoadSession, MigrationFlags, Recover, Report,
    SaveSession, vfio,
};

use crate::{
    Test,
    device::{Small, Subject, file, pair, settings},
    kernel::{self, HEADER, IMAGE},
};

pub const TESTS: &[Test] = &[
    ("what the device can do", abilities),
    ("a whole migration", whole),
    ("every device is its own", crosswise),
    ("packets of 1 to 16 bytes", small_packets),
    ("PRE_COPY, then STOP_COPY on the same data fd", precopy),
    ("PRE_COPY given up", precopy_given_up),
    ("two devices through a P2P barrier", barrier),
];

fn abilities(_backend: Backend) {
    let all = MigrationFlags::STOP_COPY | MigrationFlags::P2P | MigrationFlags::PRE_COPY;
    // Opened by its path, through vfio-ioctls.
    let path = kernel::renew(1);
    let opened = vfio::open(&path).unwrap();
    let ability = opened.probe().unwrap();
    assert_eq!(ability.flags, all);
    assert_eq!(ability.state, DeviceState::Running);
    assert_eq!(ability.data_size, Some(IMAGE as u64));
    // Its group is taken now, and that is said by name.
    let error = vfio::open(&path).unwrap_err().to_string();
    assert!(error.contains(path.to_str().unwrap()), "{error}");
    let mut device = Device::new(DeviceId::new("path", 0).unwrap(), Box::new(opened)).unwrap();
    device
        .set_state(DeviceState::StopCopy, DeviceState::Stop)
        .unwrap();
    let mut image = Vec::new();
    let mut fd = file(&*device.lend().unwrap());
    fd.read_to_end(&mut image).unwrap();
    assert_eq!(image.len(), IMAGE);
    drop(device);

    // Opened by somebody else.
    let subject = Subject::open(1, 1, 1);
    let mut device = subject.device();
    assert_eq!(device.flags(), all);
    assert_eq!(device.data_size().unwrap(), IMAGE as u64);
    // Newer kernels may have it.
    let _v2 = device.enable_precopy_info_v2().unwrap();
    subject.assert_in(&device, DeviceState::Running);
}

/// Moves these devices over this many channels. Their reports must be good.
fn migrate(
    backend: Backend,
    small: Small,
    data_len: usize,
    channels: u32,
    sources: Vec<Device>,
    destinations: Vec<Device>,
    iterable: &[&[u8]],
) -> (Report, Report) {
    let settings = settings(backend, small, data_len);
    let mut load = LoadSession::builder().settings(settings.clone());
    let mut save = SaveSession::builder().settings(settings);
    let ids: Vec<_> = destinations.iter().map(|d| d.id().clone()).collect();
    for device in destinations {
        load = load.device(device);
    }
    for device in sources {
        save = save.device(device);
    }
    for _ in 0..channels {
        let (near, far) = UnixStream::pair().unwrap();
        save = save.channel(near);
        load = load.channel(far);
    }
    let load = load.start().unwrap();
    for (id, bytes) in ids.iter().zip(iterable) {
        load.write_iterable(id, bytes).unwrap();
    }
    let save = save.start().unwrap();
    load.switchover_start();
    let saved = save.join();
    let loaded = load.join();
    saved.result.as_ref().unwrap();
    loaded.result.as_ref().unwrap();
    assert_eq!(saved.stats.backend, backend.to_string());
    assert_eq!(loaded.stats.backend, backend.to_string());
    assert_eq!(saved.stats.late_wakeups + loaded.stats.late_wakeups, 0);
    (saved, loaded)
}

/// The devices of a report, each of which must be in `state` and be given back.
fn devices(report: Report, subjects: &[&Subject], state: DeviceState) -> Vec<Device> {
    let devices = report.devices.into_iter().zip(subjects);
    devices
        .map(|(report, subject)| {
            let device = report.device.unwrap();
            subject.assert_in(&device, state);
            device
        })
        .collect()
}

/// Takes the devices to RUNNING, and compares what they are with these images and configs.
fn compare(loaded: Report, subjects: &[&Subject], expected: &[(Vec<u8>, u8)]) {
    for mut device in devices(loaded, subjects, DeviceState::Stop) {
        device
            .set_state(DeviceState::Running, Recover::Reset)
            .unwrap();
    }
    for (subject, (image, seed)) in subjects.iter().zip(expected) {
        assert_eq!(subject.kernel.scratch(), [*seed, seed + 1]);
        assert_eq!(&subject.kernel.image(), image);
        assert_eq!(*subject.config.lock().unwrap(), vec![*seed; 100]);
    }
}

fn whole(backend: Backend) {
    let (source, destination) = pair();
    let image = source.kernel.image();
    assert_ne!(image, destination.kernel.image());
    let (mut saved, loaded) = migrate(
        backend,
        Small::Chained,
        64 << 10,
        1,
        vec![source.device()],
        vec![destination.device()],
        &[],
    );
    assert_eq!(saved.stats.devices[0].packets, 2);
    assert_eq!(loaded.stats.devices[0].packets, 2);
    saved.stop_devices();
    let mut source_device = devices(saved, &[&source], DeviceState::Stop);
    compare(loaded, &[&destination], &[(image.clone(), 0xa0)]);

    // The source still has it all, should the destination not start.
    source_device[0]
        .set_state(DeviceState::Running, Recover::Reset)
        .unwrap();
    assert_eq!(source.kernel.image(), image);
}

/// Two devices there, two here, in the other order.
fn crosswise(backend: Backend) {
    let sources = [Subject::open(1, 1, 0x10), Subject::open(2, 2, 0x50)];
    let destinations = [Subject::open(3, 2, 0x90), Subject::open(4, 1, 0xd0)];
    let images = sources.each_ref().map(|source| source.kernel.image());
    let (saved, loaded) = migrate(
        backend,
        Small::Gathered,
        7,
        3,
        sources.iter().map(Subject::device).collect(),
        destinations.iter().map(Subject::device).collect(),
        &[],
    );
    let _sources = devices(saved, &sources.each_ref(), DeviceState::StopCopy);
    let [first, second] = images;
    compare(
        loaded,
        &destinations.each_ref(),
        &[(second, 0x50), (first, 0x10)],
    );
}

fn small_packets(backend: Backend) {
    for small in [Small::Chained, Small::Gathered] {
        for (channels, data_len) in [1, 2, 3].into_iter().cycle().zip(1..=16) {
            let (source, destination) = pair();
            let image = source.kernel.image();
            let (saved, loaded) = migrate(
                backend,
                small,
                data_len,
                channels,
                vec![source.device()],
                vec![destination.device()],
                &[],
            );
            let packets = IMAGE.div_ceil(data_len) as u64 + 1;
            assert_eq!(saved.stats.devices[0].packets, packets);
            assert_eq!(loaded.stats.devices[0].packets, packets);
            compare(loaded, &[&destination], &[(image, 0xa0)]);
        }
    }
}

/// Reads what there is in PRE_COPY, `step` bytes at a time.
fn read_precopy(device: &mut Device, step: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let info = device.precopy_info().unwrap();
        assert_eq!(info.initial_bytes, (HEADER - bytes.len()) as u64);
        assert_eq!((info.dirty_bytes, info.reinit), (0, false));
        let mut buffer = vec![0; step];
        let read = device.read_precopy(&mut buffer).unwrap();
        if read == 0 {
            // And for now it stays so.
            assert_eq!(device.read_precopy(&mut buffer).unwrap(), 0);
            return bytes;
        }
        bytes.extend(&buffer[..read]);
    }
}

fn precopy(backend: Backend) {
    for through_p2p in [false, true] {
        let (source, destination) = pair();
        let image = source.kernel.image();
        let mut device = source.device();
        device
            .set_state(DeviceState::PreCopy, DeviceState::Running)
            .unwrap();
        let fd = device.lend().unwrap();
        let early = read_precopy(&mut device, 7);
        assert_eq!(early, image[..HEADER]);
        // The VM runs on, and what it changes now is in what comes later.
        source.kernel.fill(0xc0);
        if through_p2p {
            device
                .set_state(DeviceState::PreCopyP2p, DeviceState::PreCopy)
                .unwrap();
        }
        device
            .set_state(DeviceState::StopCopy, DeviceState::Stop)
            .unwrap();
        source.assert_in(&device, DeviceState::StopCopy);
        assert!(Arc::ptr_eq(&fd, &device.lend().unwrap()));
        assert_eq!(device.precopy_info().unwrap_err().raw_os_error(), Some(22));
        drop(fd);

        let destination_device = destination.device();
        let (saved, loaded) = migrate(
            backend,
            Small::Chained,
            10,
            2,
            vec![device],
            vec![destination_device],
            &[&early],
        );
        let rest = (IMAGE - HEADER).div_ceil(10) as u64 + 1;
        assert_eq!(saved.stats.devices[0].packets, rest);
        let mut device = devices(saved, &[&source], DeviceState::StopCopy).remove(0);
        device
            .set_state(DeviceState::Running, Recover::Reset)
            .unwrap();
        let image = source.kernel.image();
        assert_eq!(source.kernel.scratch(), [0xc0, 0xc1]);
        for mut device in devices(loaded, &[&destination], DeviceState::Stop) {
            device
                .set_state(DeviceState::Running, Recover::Reset)
                .unwrap();
        }
        assert_eq!(destination.kernel.image(), image);
    }
}

/// Back to RUNNING from PRE_COPY, and then all over again: with a new data fd.
fn precopy_given_up(_backend: Backend) {
    let subject = Subject::open(1, 1, 5);
    let image = subject.kernel.image();
    let mut device = subject.device();
    for state in [DeviceState::PreCopy, DeviceState::PreCopyP2p] {
        device.set_state(state, DeviceState::Running).unwrap();
        let mut dead = file(&*device.lend().unwrap());
        let mut buffer = [0; 10];
        assert_eq!(device.read_precopy(&mut buffer).unwrap(), 10);
        device
            .set_state(DeviceState::Running, Recover::Reset)
            .unwrap();
        subject.assert_in(&device, DeviceState::Running);
        assert_eq!(dead.read(&mut buffer).unwrap_err().raw_os_error(), Some(19));
        assert_eq!(device.lend().unwrap_err().raw_os_error(), Some(9));
        device.set_state(state, DeviceState::Running).unwrap();
        assert_eq!(read_precopy(&mut device, 5), image[..HEADER]);
        device
            .set_state(DeviceState::Running, Recover::Reset)
            .unwrap();
    }
    assert_eq!(subject.kernel.image(), image);
}

/// No device stops while another could still write into it; none runs before all have come.
fn barrier(backend: Backend) {
    let sources = [Subject::open(1, 1, 0x10), Subject::open(2, 2, 0x50)];
    let destinations = [Subject::open(3, 1, 0x90), Subject::open(4, 2, 0xd0)];
    let images = sources.each_ref().map(|source| source.kernel.image());
    let mut saving: Vec<_> = sources.iter().map(Subject::device).collect();
    let mut early = Vec::new();
    for device in &mut saving {
        device
            .set_state(DeviceState::PreCopy, DeviceState::Running)
            .unwrap();
        early.push(read_precopy(device, 16));
    }
    for state in [DeviceState::PreCopyP2p, DeviceState::StopCopy] {
        for (device, source) in saving.iter_mut().zip(&sources) {
            device.set_state(state, DeviceState::Stop).unwrap();
            source.assert_in(device, state);
        }
    }
    let early: Vec<&[u8]> = early.iter().map(Vec::as_slice).collect();
    let loading = destinations.iter().map(Subject::device).collect();
    let (saved, loaded) = migrate(backend, Small::Gathered, 16, 2, saving, loading, &early);
    let _sources = devices(saved, &sources.each_ref(), DeviceState::StopCopy);
    let mut loaded = devices(loaded, &destinations.each_ref(), DeviceState::Stop);
    for state in [DeviceState::RunningP2p, DeviceState::Running] {
        for (device, destination) in loaded.iter_mut().zip(&destinations) {
            device.set_state(state, Recover::Reset).unwrap();
            destination.assert_in(device, state);
        }
    }
    for (destination, image) in destinations.iter().zip(images) {
        assert_eq!(destination.kernel.image(), image);
    }
}
