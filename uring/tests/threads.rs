//! A thread for which there is no room is an error, and never the end of the process, however little is
//! missing. One test, for it limits its process.
#![allow(missing_docs, reason = "a test")]

use std::fs;

use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use vfio_migration_uring::thread::spawn;

const PAGE: u64 = 4096;

/// The addresses that the process has mapped, in bytes.
fn mapped() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = text.split(' ').next().unwrap().parse().unwrap();
    pages * PAGE
}

#[test]
fn a_thread_for_which_there_is_no_room_is_an_error() {
    // The heap has what the test needs itself.
    drop(vec![0_u8; 64 << 10]);
    let mut refused = 0;
    for more in 0..1024 {
        let limit = mapped() + more * PAGE;
        setrlimit(Resource::RLIMIT_AS, limit, RLIM_INFINITY).unwrap();
        let spawned = spawn("a thread", || ());
        setrlimit(Resource::RLIMIT_AS, RLIM_INFINITY, RLIM_INFINITY).unwrap();
        match spawned {
            Ok(thread) => {
                thread.join().unwrap();
                break;
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOMEM), "{error}");
                refused += 1;
            }
        }
    }
    // Its stack alone is more than this.
    assert!((128..1000).contains(&refused), "{refused}");
}
