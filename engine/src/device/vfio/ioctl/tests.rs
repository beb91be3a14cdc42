//! Numbers and layouts against the crate's bindings, the numbers that are known, and the system's
//! own header; and what files that are no VFIO devices say.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    mem::{offset_of, size_of},
    os::fd::AsFd,
    process::Command,
};

use super::*;

/// What both sides must agree on: the C expression, and our value.
fn expected() -> Vec<(&'static str, u64)> {
    macro_rules! sizes {
        ($($name:ident { $($field:ident),* })*) => {
            vec![$(
                (concat!("sizeof(struct ", stringify!($name), ")"), size_of::<uapi::$name>() as u64),
                $((
                    concat!("offsetof(struct ", stringify!($name), ", ", stringify!($field), ")"),
                    offset_of!(uapi::$name, $field) as u64,
                ),)*
            )*]
        };
    }
    let mut all = sizes! {
        vfio_device_feature { argsz, flags, data }
        vfio_device_feature_migration { flags }
        vfio_device_feature_mig_state { device_state, data_fd }
        vfio_device_feature_mig_data_size { stop_copy_length }
        vfio_device_bind_iommufd { argsz, flags, iommufd, out_devid }
        vfio_precopy_info { argsz, flags, initial_bytes, dirty_bytes }
        vfio_device_feature_dma_logging_control { page_size, num_ranges, __reserved, ranges }
        vfio_device_feature_dma_logging_range { iova, length }
        vfio_device_feature_dma_logging_report { iova, length, page_size, bitmap }
    };
    all.extend([
        ("VFIO_DEVICE_FEATURE", VFIO_DEVICE_FEATURE.into()),
        ("VFIO_DEVICE_RESET", VFIO_DEVICE_RESET.into()),
        ("VFIO_DEVICE_BIND_IOMMUFD", VFIO_DEVICE_BIND_IOMMUFD.into()),
        (
            "VFIO_MIG_GET_PRECOPY_INFO",
            VFIO_MIG_GET_PRECOPY_INFO.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_GET",
            uapi::VFIO_DEVICE_FEATURE_GET.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_SET",
            uapi::VFIO_DEVICE_FEATURE_SET.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_PROBE",
            uapi::VFIO_DEVICE_FEATURE_PROBE.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_MIGRATION",
            uapi::VFIO_DEVICE_FEATURE_MIGRATION.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE",
            uapi::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_DMA_LOGGING_START",
            uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP",
            uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT",
            uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT.into(),
        ),
        (
            "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE",
            uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE.into(),
        ),
        ("VFIO_MIGRATION_STOP_COPY", MigrationFlags::STOP_COPY.bits()),
        ("VFIO_MIGRATION_P2P", MigrationFlags::P2P.bits()),
        ("VFIO_MIGRATION_PRE_COPY", MigrationFlags::PRE_COPY.bits()),
    ]);
    for (state, name) in DeviceState::ALL.into_iter().zip([
        "VFIO_DEVICE_STATE_ERROR",
        "VFIO_DEVICE_STATE_STOP",
        "VFIO_DEVICE_STATE_RUNNING",
        "VFIO_DEVICE_STATE_STOP_COPY",
        "VFIO_DEVICE_STATE_RESUMING",
        "VFIO_DEVICE_STATE_RUNNING_P2P",
        "VFIO_DEVICE_STATE_PRE_COPY",
        "VFIO_DEVICE_STATE_PRE_COPY_P2P",
    ]) {
        all.push((name, u32::from(state).into()));
    }
    all
}

#[test]
fn requests_and_features_have_the_kernels_numbers() {
    assert_eq!(VFIO_DEVICE_FEATURE, 0x3b75);
    assert_eq!(VFIO_DEVICE_RESET, 0x3b6f);
    assert_eq!(VFIO_MIG_GET_PRECOPY_INFO, 0x3b79);
    assert_eq!(Feature::MIGRATION.0, 1 | 1 << 16);
    assert_eq!(Feature::MIG_DEVICE_STATE.0, 2 | 1 << 17);
    assert_eq!(Feature::STATE.0, 2 | 1 << 16);
    assert_eq!(Feature::DMA_LOGGING_START.0, 6 | 1 << 17);
    assert_eq!(Feature::DMA_LOGGING_STOP.0, 7 | 1 << 17);
    assert_eq!(Feature::DMA_LOGGING_REPORT.0, 8 | 1 << 16);
    assert_eq!(Feature::MIG_DATA_SIZE.0, 9 | 1 << 16);
    assert_eq!(Feature::MIG_PRECOPY_INFO_V2.0, 12 | 1 << 17);
    assert_eq!(uapi::VFIO_DEVICE_FEATURE_PROBE, 1 << 18);
    assert_eq!(uapi::VFIO_PRECOPY_INFO_REINIT, 1);
}

#[test]
fn what_follows_the_header_begins_behind_it() {
    assert_eq!(size_of::<Call<()>>(), 8);
    assert_eq!(size_of::<Call<uapi::vfio_device_feature_mig_state>>(), 16);
    assert_eq!(
        offset_of!(Call<uapi::vfio_device_feature_mig_state>, data),
        8
    );
    assert_eq!(
        offset_of!(Call<uapi::vfio_device_feature_migration>, data),
        8
    );
    assert_eq!(
        size_of::<Call<uapi::vfio_device_feature_dma_logging_control>>(),
        32
    );
    assert_eq!(
        size_of::<Call<uapi::vfio_device_feature_dma_logging_report>>(),
        40
    );
}

/// The system's header as the system's compiler reads it. What an older header does not have yet is
/// left out, and named; the least is what every header has had since migration came to it.
#[test]
fn the_systems_header_says_the_same() {
    let dir = std::env::temp_dir().join(format!("vfio-header-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let header = Command::new("cc")
        .args([
            "-E",
            "-dM",
            "-include",
            "linux/vfio.h",
            "-x",
            "c",
            "/dev/null",
        ])
        .output()
        .expect("a C compiler");
    assert!(header.status.success(), "linux/vfio.h: {header:?}");
    let whole = Command::new("cc")
        .args(["-E", "-include", "linux/vfio.h", "-x", "c", "/dev/null"])
        .output()
        .expect("a C compiler");
    let text = [header.stdout, whole.stdout].concat();
    let text = String::from_utf8_lossy(&text);
    let words: std::collections::BTreeSet<&str> = text
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .collect();
    let known = |expression: &str| {
        let names = expression.split(|c: char| !c.is_alphanumeric() && c != '_');
        let mut names = names
            .filter(|name| !name.is_empty() && !["struct", "sizeof", "offsetof"].contains(name));
        names.all(|name| words.contains(name))
    };
    let (there, missing): (Vec<_>, Vec<_>) = expected()
        .into_iter()
        .partition(|(expression, _)| known(expression));
    for least in [
        "VFIO_DEVICE_FEATURE",
        "VFIO_DEVICE_STATE_STOP_COPY",
        "sizeof(struct vfio_device_feature_mig_state)",
    ] {
        assert!(
            there.iter().any(|(expression, _)| *expression == least),
            "{least}"
        );
    }
    if !missing.is_empty() {
        let names: Vec<_> = missing.iter().map(|(expression, _)| *expression).collect();
        println!("not in this header: {names:?}");
    }
    let mut program = String::from(
        "#include <linux/vfio.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    for (expression, _) in &there {
        program += &format!(
            "printf(\"%s|%llu\\n\", \"{expression}\", (unsigned long long)({expression}));\n"
        );
    }
    program += "return 0; }\n";
    fs::write(dir.join("layout.c"), program).unwrap();
    let built = Command::new("cc")
        .args(["-o", "layout", "layout.c"])
        .current_dir(&dir)
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let output = Command::new(dir.join("layout")).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    let found: BTreeMap<&str, u64> = output
        .lines()
        .map(|line| {
            let (name, value) = line.rsplit_once('|').unwrap();
            (name, value.parse().unwrap())
        })
        .collect();
    for (expression, ours) in there {
        assert_eq!(found[expression], ours, "{expression}");
    }
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_file_that_is_no_device_has_no_migration() {
    let file = File::open("/dev/null").unwrap();
    let fd = file.as_fd();
    for what in [
        Feature::MIGRATION,
        Feature::DMA_LOGGING_START,
        Feature::MIG_PRECOPY_INFO_V2,
    ] {
        assert_eq!(probe(fd, what).unwrap(), Support::NotThisKernel);
    }
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    let enotty = Some(libc::ENOTTY);
    assert_eq!(errno(flags(fd).map(drop)), enotty);
    assert_eq!(errno(state(fd).map(drop)), enotty);
    assert_eq!(errno(set_state(fd, DeviceState::Stop).map(drop)), enotty);
    assert_eq!(errno(data_size(fd).map(drop)), enotty);
    assert_eq!(errno(precopy_info(fd).map(drop)), enotty);
    assert_eq!(errno(enable_precopy_info_v2(fd)), enotty);
    assert_eq!(errno(reset(fd)), enotty);
    let range = DmaRange {
        iova: 0,
        length: 1 << 20,
    };
    assert_eq!(
        errno(start_dma_logging(fd, 4096, &[range]).map(drop)),
        enotty
    );
    assert_eq!(errno(stop_dma_logging(fd)), enotty);
    assert_eq!(
        errno(report_dma_logging(fd, range, 4096, &mut [0; 4])),
        enotty
    );
}

#[test]
fn a_report_that_does_not_fit_is_not_asked_for() {
    let file = File::open("/dev/null").unwrap();
    let range = DmaRange {
        iova: 0,
        length: 257 * 4096,
    };
    for (page_size, words) in [(4096, 4), (0, 4), (1, 4)] {
        let refused = report_dma_logging(file.as_fd(), range, page_size, &mut vec![0; words]);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
    // The kernel would take 64 pages and a byte for 65.
    for (iova, length) in [(0, 64 * 4096 + 1), (1, 64 * 4096)] {
        let refused =
            report_dma_logging(file.as_fd(), DmaRange { iova, length }, 4096, &mut [0; 1]);
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}

#[test]
fn an_errno_tells_the_kernel_from_the_device() {
    let says = |errno: Errno| Support::from_refusal(&errno.into());
    assert_eq!(says(Errno::ENOTTY), Some(Support::NotThisKernel));
    assert_eq!(says(Errno::EINVAL), Some(Support::NotThisDevice));
    assert_eq!(says(Errno::EOPNOTSUPP), Some(Support::NotThisDevice));
    assert_eq!(says(Errno::EIO), None);
}
