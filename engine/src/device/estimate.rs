//! A driver's estimate of its state's size, made safe to use. Pure functions, any thread.

/// What [`Device::data_size`](super::Device::data_size) is believed at most, in bytes: 1 PiB.
/// Drivers have been seen to estimate near 2^64; below this, the estimates of thousands of devices
/// add up without overflow.
pub const MAX_DATA_SIZE: u64 = 1 << 50;

/// The length of a buffer for this device's data, in bytes: the size of the state as
/// [`Device::data_size`](super::Device::data_size) has it, between 64 KiB (a buffer of 0 would make
/// every read look like the end) and 1 MiB; 1 MiB where the device could not tell.
///
/// ```
/// assert_eq!(vfio_migration::estimate::buffer_len(Some(0)), 64 << 10);
/// assert_eq!(vfio_migration::estimate::buffer_len(Some(100_000)), 100_000);
/// assert_eq!(vfio_migration::estimate::buffer_len(Some(u64::MAX - 7)), 1 << 20);
/// assert_eq!(vfio_migration::estimate::buffer_len(None), 1 << 20);
/// ```
#[must_use]
pub fn buffer_len(data_size: Option<u64>) -> usize {
    const MIN: usize = 64 << 10;
    const MAX: usize = 1 << 20;
    data_size
        .and_then(|size| usize::try_from(size).ok())
        .unwrap_or(MAX)
        .clamp(MIN, MAX)
}

/// What STOP_COPY is thought to stream, in bytes: the size of the state as
/// [`Device::data_size`](super::Device::data_size) has it, believed up to [`MAX_DATA_SIZE`]; 100
/// GiB where the device could not tell, so that no limit on downtime is broken by accident.
///
/// ```
/// use vfio_migration::estimate::{MAX_DATA_SIZE, stop_copy_estimate};
///
/// assert_eq!(stop_copy_estimate(Some(96)), 96);
/// assert_eq!(stop_copy_estimate(Some(u64::MAX)), MAX_DATA_SIZE);
/// assert_eq!(stop_copy_estimate(None), 100 << 30);
/// ```
#[must_use]
pub fn stop_copy_estimate(data_size: Option<u64>) -> u64 {
    data_size.unwrap_or(100 << 30).min(MAX_DATA_SIZE)
}
