//! The tracking of what a device writes to memory, as far as the sample driver goes: it writes none.
//!
//! So what is seen here is that the calls say to the kernel what they were told to say: it checks
//! ranges and page sizes itself, before it asks any driver.

use std::os::fd::AsFd;

use nix::errno::Errno;
use vfio_migration::{
    Backend,
    vfio::{
        DmaRange, Feature, Support,
        ioctl::{probe, report_dma_logging, start_dma_logging, stop_dma_logging},
    },
};

use crate::{Test, device::Subject};

pub const TESTS: &[Test] = &[("DMA logging, started, read and stopped", logging)];

const PAGE: u64 = 4096;

const fn range(iova: u64, length: u64) -> DmaRange {
    DmaRange { iova, length }
}

fn logging(_backend: Backend) {
    let subject = Subject::open(1, 1, 5);
    let fd = subject.kernel.fd();
    let fd = fd.as_fd();
    assert_eq!(probe(fd, Feature::DMA_LOGGING_START).unwrap(), Support::Yes);

    let refusals: [(&[DmaRange], Errno); 5] = [
        (&[], Errno::EINVAL),
        (&[range(0, PAGE + 1)], Errno::EINVAL),
        (&[range(0, PAGE), range(PAGE + 1, PAGE)], Errno::EINVAL),
        // The second is within the first: each came with its own address and length.
        (&[range(0, 16 * PAGE), range(8 * PAGE, PAGE)], Errno::EINVAL),
        (&[range(u64::MAX - PAGE + 1, 2 * PAGE)], Errno::EOVERFLOW),
    ];
    for (ranges, errno) in refusals {
        let error = start_dma_logging(fd, PAGE, ranges).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(errno as i32), "{ranges:?}");
    }
    // Side by side; with address and length the other way round they would overlap.
    let ranges = [range(8 * PAGE, 4 * PAGE), range(12 * PAGE, 8 * PAGE)];
    assert_eq!(start_dma_logging(fd, PAGE, &ranges).unwrap(), PAGE);

    let mut bitmap = [0; 1];
    let all = range(0, 24 * PAGE);
    for page_size in [PAGE / 2, 3 * PAGE] {
        let length = 24 * page_size;
        let error = report_dma_logging(fd, range(0, length), page_size, &mut bitmap).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EINVAL as i32));
    }
    let beyond = range(u64::MAX - PAGE + 1, 2 * PAGE);
    let error = report_dma_logging(fd, beyond, PAGE, &mut bitmap).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::EOVERFLOW as i32));
    match report_dma_logging(fd, all, PAGE, &mut bitmap) {
        Ok(()) => assert_eq!(bitmap, [0]),
        // A kernel that was built without what turns reports into bitmaps (IOMMUFD_DRIVER).
        Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::EOPNOTSUPP as i32)),
    }
    stop_dma_logging(fd).unwrap();
}
