//! A whole load: see `vfio_migration_fuzz::relay`.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vfio_migration_fuzz::relay;

fuzz_target!(|input: &[u8]| relay::run(input));
