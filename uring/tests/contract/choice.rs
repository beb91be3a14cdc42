//! Which ring is opened.

use std::io;

use vfio_migration_uring::{Backend, Waker, open};

use crate::LONG;

#[test]
fn a_forced_backend_is_the_one_that_is_opened() {
    let (ring, chosen) =
        open::<Vec<u8>>(Backend::Blocking, 4, Waker::new().unwrap(), LONG).unwrap();
    assert_eq!((ring.capacity(), chosen), (4, Backend::Blocking));
    let (_ring, chosen) = open::<Vec<u8>>(Backend::Auto, 4, Waker::new().unwrap(), LONG).unwrap();
    assert_ne!(chosen, Backend::Auto);
}

#[test]
fn a_capacity_out_of_bounds_is_an_error_for_every_backend() {
    for backend in [Backend::Auto, Backend::Uring, Backend::Blocking] {
        for capacity in [0, vfio_migration_uring::MAX_CAPACITY + 1] {
            let error = open::<Vec<u8>>(backend, capacity, Waker::new().unwrap(), LONG)
                .err()
                .unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
