//! A whole load: see `vfio_migration_fuzz::session`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration_fuzz::session;

fuzz_target!(|input: &[u8]| session::run(input));
