//! The command's probe, and devices of the kernel's in send and receive, where there are none: what
//! is refused, and how that is said.

use crate::{
    command::{Directory, words},
    start::run,
};

#[test]
fn a_path_that_is_no_device_is_refused_by_name() {
    let directory = Directory::new();
    let path = directory.file("no-device");
    for path in [&path, "/dev/null", "/sys"] {
        for arguments in [
            format!("probe {path}"),
            format!("probe --json {path}"),
            format!("send --to 127.0.0.1:1 --device vfio:{path},id=x"),
            format!("receive --listen 127.0.0.1:0 --device vfio:{path},id=x"),
        ] {
            let ended = run(words(&arguments));
            let why = ended.why();
            assert!(why.contains("cannot open the device: "), "{why}");
            assert!(why.contains(path), "{why}");
            // In JSON, what is said on stderr stands there too.
            assert_eq!(ended.stdout.is_empty(), !arguments.contains("--json"));
        }
    }
}

#[test]
fn a_device_that_is_named_twice_is_wrong_use() {
    let twice = "vfio:/sys/none,id=a --device vfio:/sys/none,id=b";
    let ended = run(words(&format!("send --to 127.0.0.1:1 --device {twice}")));
    assert_eq!(ended.status, Some(2), "{ended:?}");
    let ended = run(words("probe"));
    assert_eq!(ended.status, Some(2), "{ended:?}");
}
