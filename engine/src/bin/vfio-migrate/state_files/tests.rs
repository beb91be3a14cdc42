//! The files in a directory of the test's own, in this process.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use super::*;

/// A directory of the test's own, which goes with it.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let name = format!("vfio-migrate-files-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    fn target(&self, name: &str) -> Target {
        Target::new(&self.0.join(name)).expect("a target")
    }

    fn names(&self) -> Vec<String> {
        let names = fs::read_dir(&self.0).expect("the directory").map(|entry| {
            let name = entry.expect("an entry").file_name();
            name.into_string().expect("a name")
        });
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).expect("a file")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

fn written(file: io::Result<StateFile>, text: &str) -> StateFile {
    let file = file.expect("a file");
    let mut writer = file.file();
    writer.write_all(text.as_bytes()).expect("written");
    file
}

/// Of files with and without a name of their own, and by all means that a file system may offer.
#[test]
fn all_files_appear_or_none() {
    for (named, means) in [
        (false, Means::Exchange),
        (true, Means::Exchange),
        (true, Means::Link),
        (true, Means::Rename),
    ] {
        let place = Place::new(&format!("all-{named}-{means:?}"));
        fs::write(place.0.join("b"), "old").expect("written");
        let (a, b, c) = (place.target("a"), place.target("b"), place.target("c"));
        let make = |target: &Target| match named {
            true => StateFile::named(&target.directory),
            false => target.create(),
        };
        let files = |text| [&a, &b, &c].map(|target| (target, written(make(target), text)));
        let first = files("first");
        // Somebody makes the last one meanwhile.
        fs::write(place.0.join("c"), "theirs").expect("written");
        let error = publish_by(first.into(), means).expect_err("it was changed");
        assert!(
            format!("{error:#}").contains("/c: another process"),
            "{error:#}"
        );
        assert_eq!(place.names(), ["b", "c"]);
        assert_eq!(
            (place.read("b"), place.read("c")),
            ("old".into(), "theirs".into())
        );

        fs::remove_file(place.0.join("c")).expect("removed");
        let b = place.target("b");
        let files = [&a, &b, &c].map(|target| (target, written(make(target), "second")));
        publish_by(files.into(), means).expect("nobody is in the way");
        assert_eq!(place.names(), ["a", "b", "c"]);
        for name in place.names() {
            assert_eq!(place.read(&name), "second");
        }
    }
}

#[test]
fn what_somebody_else_has_put_there_since_is_not_taken_back() {
    for old in [false, true] {
        let place = Place::new(&format!("theirs-{old}"));
        if old {
            fs::write(place.0.join("a"), "old").expect("written");
        }
        let target = place.target("a");
        let mut file = written(target.create(), "ours");
        file.put(&target, Means::Exchange).expect("put");
        fs::write(place.0.join("b"), "theirs").expect("written");
        fs::rename(place.0.join("b"), place.0.join("a")).expect("renamed");
        file.take_back(&target);
        drop(file);
        assert_eq!(place.read("a"), "theirs");
    }
}

#[test]
fn a_directorys_files_share_its_fd() {
    let place = Place::new("fds");
    let fds = || {
        fs::read_dir("/proc/self/fd").expect("fds").filter(|fd| {
            let link = fd.as_ref().expect("an entry").path().read_link();
            link.is_ok_and(|link| link == place.0)
        })
    };
    let directory = Directory::open(&place.0).expect("a directory");
    let target = |name: u32| Target::within(directory.clone(), &place.0.join(name.to_string()));
    let targets: Vec<_> = (0..10)
        .map(|name| target(name).expect("a target"))
        .collect();
    let files: Vec<_> = targets
        .iter()
        .map(|target| target.create().expect("a file"))
        .collect();
    assert_eq!(fds().count(), 1);
    drop(files);
}

#[test]
fn a_file_that_is_dropped_leaves_nothing() {
    let place = Place::new("dropped");
    let target = place.target("a");
    drop(written(target.create(), "state"));
    drop(written(StateFile::named(&target.directory), "state"));
    assert!(place.names().is_empty());
}

#[test]
fn two_spellings_are_one_file() {
    let place = Place::new("spellings");
    fs::create_dir(place.0.join("d")).expect("a directory");
    std::os::unix::fs::symlink(place.0.join("d"), place.0.join("link")).expect("a link");
    fs::write(place.0.join("old"), "state").expect("written");
    fs::hard_link(place.0.join("old"), place.0.join("same")).expect("a link");
    for (one, other, equal) in [
        ("a", "d/../a", true),
        ("d/a", "link/a", true),
        ("old", "same", true),
        ("a", "b", false),
        ("a", "d/a", false),
    ] {
        let (a, b) = (place.target(one), place.target(other));
        assert_eq!(check_distinct(&[&a, &b]).is_err(), equal, "{one}, {other}");
    }
}
