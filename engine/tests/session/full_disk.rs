//! A data fd that is a regular file: its position counts, a write that is cut short goes on where it stood,
//! and a file that is full fails the load by device and idx, with an exact prefix of the state in it.
//!
//! A limit is the process's, and a file system is mounted: so these cases are processes of their own.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::net::UnixStream,
    path::Path,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use crate::no_room::{PAGE, cuts, has_tmpfs, in_a_process, limit, resize, state};
use vfio_migration::{
    Backend, Error, ErrorKind, LoadSession, SaveSession, Settings, wire::wrap_config,
};
use vfio_migration_uring::sim::{Fault, FaultPlan, SimConfig as RingConfig};

use crate::{mock::Mock, names::id, payload::payload, pipes::collect, watchdog::Watchdog};

/// Gathered into one write; each a write of its own, in chains; and both.
const STATES: [&[usize]; 3] = [
    &[700; 9],
    &[80_000; 9],
    &[200_000, 100, 5000, 70_000, 1, 66_000, 66_000, 66_000],
];

/// Where the bytes go.
#[derive(Clone, Copy, Debug)]
enum Ring {
    Of(Backend),
    Simulated,
}

const RINGS: [Ring; 3] = [
    Ring::Of(Backend::Auto),
    Ring::Of(Backend::Blocking),
    Ring::Simulated,
];

/// Loads packets of these lengths into a file, all of which are there before the I/O thread may write. `before`
/// comes over the main channel.
fn load(
    file: &File,
    lens: &[usize],
    ring: Ring,
    plan: FaultPlan,
    before: &[u8],
) -> Result<(), Error> {
    let mut settings = Settings::default();
    settings.budget = Some(4 << 20);
    let mut builder = LoadSession::builder();
    match ring {
        Ring::Of(backend) => settings.backend = backend,
        Ring::Simulated => {
            builder = builder.simulated_ring(RingConfig {
                plan,
                ..RingConfig::default()
            });
        }
    }
    let load = builder
        .settings(settings)
        .device(Mock::new(file.try_clone().unwrap()).device(1))
        .start()
        .unwrap();
    let mut publisher = load.publisher();
    let count = u32::try_from(lens.len()).unwrap();
    let state = state(lens);
    let mut rest = &state[..];
    for (index, len) in (0..count).zip(lens) {
        let (data, behind) = rest.split_at(*len);
        publisher
            .push(&id(1), &payload(index, false, data))
            .unwrap();
        rest = behind;
    }
    let config = payload(count, true, &wrap_config(b"c"));
    publisher.push(&id(1), &config).unwrap();
    drop(publisher);
    load.no_more_channels();
    load.write_iterable(&id(1), before).unwrap();
    load.switchover_start();
    load.join().result
}

/// Which packet a byte is of.
fn packet(lens: &[usize], at: usize) -> u32 {
    let mut end = 0;
    let before = lens.iter().take_while(|len| {
        end += *len;
        end <= at
    });
    u32::try_from(before.count()).unwrap()
}

/// A load into a file in which `fits` bytes fit.
fn cut(path: &Path, lens: &[usize], fits: usize, ring: Ring, errno: i32) {
    let case = format!("{ring:?}, {lens:?}, {fits}");
    let mut file = File::create(path).unwrap();
    let error = load(&file, lens, ring, FaultPlan::new(), b"").expect_err(&case);
    assert_eq!(*error.kind(), ErrorKind::Device, "{case}: {error}");
    assert_eq!(error.raw_os_error(), Some(errno), "{case}: {error}");
    assert_eq!(error.device(), Some(&id(1)), "{case}");
    assert_eq!(error.index(), Some(packet(lens, fits)), "{case}");
    let written = fs::read(path).unwrap();
    assert!(written == state(lens)[..fits], "{case}: {}", written.len());
    assert_eq!(file.stream_position().unwrap(), fits as u64, "{case}");
}

fn limited(directory: &Path) {
    let path = directory.join("state");
    for ring in RINGS {
        for lens in STATES {
            for fits in cuts(lens) {
                limit(fits as u64);
                cut(&path, lens, fits, ring, libc::EFBIG);
            }
        }
    }
}

fn full(directory: &Path) {
    if !has_tmpfs(directory) {
        return;
    }
    // Packets of pages: the cut is at, before and behind each packet's border.
    let by_pages: [&[usize]; 3] = [
        &[PAGE; 6],
        &[20 * PAGE, PAGE, 18 * PAGE, 3 * PAGE, 17 * PAGE],
        &[700; 30],
    ];
    let path = directory.join("state");
    for ring in RINGS {
        for lens in by_pages {
            for pages in 1..lens.iter().sum::<usize>().div_ceil(PAGE) {
                resize(directory, pages);
                cut(&path, lens, pages * PAGE, ring, libc::ENOSPC);
                fs::remove_file(&path).unwrap();
            }
        }
    }
}

#[test]
fn a_limit_on_a_files_size_fails_the_load_and_leaves_an_exact_prefix() {
    in_a_process(
        "full_disk::a_limit_on_a_files_size_fails_the_load_and_leaves_an_exact_prefix",
        limited,
    );
}

#[test]
fn a_full_file_system_fails_the_load_and_leaves_an_exact_prefix() {
    in_a_process(
        "full_disk::a_full_file_system_fails_the_load_and_leaves_an_exact_prefix",
        full,
    );
}

/// A file without a name.
fn unnamed(append: bool) -> File {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = env::temp_dir().join(format!("full-disk-{}-{number}", process::id()));
    let mut options = OpenOptions::new();
    let options = options.create_new(true).read(true).append(append);
    let file = options.write(true).open(&path).unwrap();
    fs::remove_file(path).unwrap();
    file
}

fn contents(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn where_room_comes_back_a_short_write_goes_on_where_it_stood() {
    let _watchdog = Watchdog::new();
    for lens in STATES {
        for at in 0..4 {
            for bytes in [1, 699, 4096, 79_999] {
                let plan = FaultPlan::new().with(at, Fault::Short(bytes));
                let mut file = unnamed(false);
                load(&file, lens, Ring::Simulated, plan, b"").unwrap();
                let written = contents(&mut file);
                assert!(written == state(lens), "{lens:?}, {at}, {bytes}");
            }
        }
    }
}

#[test]
fn a_file_is_written_from_its_position_on_and_stands_behind_the_state_then() {
    let _watchdog = Watchdog::new();
    for ring in RINGS {
        for lens in STATES {
            for append in [false, true] {
                let mut file = unnamed(append);
                file.write_all(b"0123456789").unwrap();
                file.seek(SeekFrom::Start(4)).unwrap();
                load(&file, lens, ring, FaultPlan::new(), b"PRE").unwrap();
                let before: &[u8] = if append { b"0123456789PRE" } else { b"0123PRE" };
                let expected = [before, &state(lens)].concat();
                let case = format!("{ring:?}, {lens:?}, {append}");
                let position = file.stream_position().unwrap();
                assert_eq!(position, expected.len() as u64, "{case}");
                assert!(contents(&mut file) == expected, "{case}");
            }
        }
    }
}

#[test]
fn a_file_is_read_from_its_position_on() {
    let _watchdog = Watchdog::new();
    for backend in [Backend::Auto, Backend::Blocking] {
        // The last read of a chain is short.
        let lens = [300_000, 77];
        let mut file = unnamed(false);
        file.write_all(b"0123").unwrap();
        file.write_all(&state(&lens)).unwrap();
        file.seek(SeekFrom::Start(4)).unwrap();
        let mut settings = Settings::default();
        settings.backend = backend;
        settings.data_len = Some(10_000);
        let (reader, writer) = io::pipe().unwrap();
        let got = collect(reader);
        let (near, far) = UnixStream::pair().unwrap();
        let load = LoadSession::builder()
            .settings(settings.clone())
            .device(Mock::new(writer).device(1))
            .channel(far)
            .start()
            .unwrap();
        let save = SaveSession::builder()
            .settings(settings)
            .device(Mock::new(file.try_clone().unwrap()).device(1))
            .channel(near)
            .start()
            .unwrap();
        load.switchover_start();
        save.join().result.unwrap();
        load.join().result.unwrap();
        assert!(got.join().unwrap() == state(&lens), "{backend:?}");
        let len = file.metadata().unwrap().len();
        assert_eq!(file.stream_position().unwrap(), len, "{backend:?}");
    }
}
