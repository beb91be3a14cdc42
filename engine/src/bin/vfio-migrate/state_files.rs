//! The files that a migration leaves behind: all of them appear together, after the last check, or
//! none does.
//!
//! ```text
//!   Target::new(PATH)   before anything listens: is PATH one that can be written?
//!        │ create()
//!        ▼
//!   StateFile           a file without a name (O_TMPFILE), mode 0600
//!        │
//!        ▼              fsync, the old file's mode ─▶ a name beside PATH ─▶ exchanged with PATH
//!   publish(all) ──────▶ fsync of the directories ─▶ what stood at PATH is removed
//!                        a failure: every exchange is taken back
//! ```
//!
//! | what | rule |
//! |---|---|
//! | PATH | a regular file, or nothing yet; a link, FIFO, socket or device node is refused |
//! | its directory | is there, and can be written to |
//! | two targets | are two files, however they are spelled |
//! | a file system without O_TMPFILE | a name of its own beside PATH, by O_EXCL; removed on drop |
//! | PATH changed under way | refused by [`publish`]: nobody's file is replaced unseen |
//! | the process is killed | PATH is as it was; without O_TMPFILE a `.vfio-migrate-…` stays |
//!
//! A [`StateFile`] belongs to whoever writes it; [`publish`] is called on the command's main thread.
//! Nothing here waits but for the file system.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    hash::{BuildHasher, RandomState},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail, ensure};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2},
    sys::stat::{Mode, SFlag, fstatat},
    unistd::{self, AccessFlags, UnlinkatFlags},
};

/// Opens a regular file for reading. Anything else is refused, and not waited for.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    // A FIFO without a writer would block the open.
    options
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits() | OFlag::O_NOCTTY.bits());
    let file = options.open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

/// What tells one file from another, however it is spelled.
type Inode = (u64, u64);

/// A directory that is held open, so that no rename can put another in its place. All its targets and
/// files share the one fd.
#[derive(Clone, Debug)]
pub(crate) struct Directory(Arc<File>);

impl Directory {
    /// Opens one that can be written to.
    pub(crate) fn open(path: &Path) -> anyhow::Result<Self> {
        let open = || -> io::Result<Self> {
            let mut options = File::options();
            options.read(true).custom_flags(OFlag::O_DIRECTORY.bits());
            let directory = Self(Arc::new(options.open(path)?));
            let access = AccessFlags::W_OK | AccessFlags::X_OK;
            unistd::faccessat(&directory.0, ".", access, AtFlags::AT_EACCESS)?;
            Ok(directory)
        };
        open().with_context(|| format!("cannot write to its directory {}", path.display()))
    }

    fn inode(&self) -> io::Result<Inode> {
        let meta = self.0.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The regular file of that name, if there is one.
    fn look(&self, name: &OsStr) -> io::Result<Option<Old>> {
        let stat = match fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        let what = match kind {
            SFlag::S_IFREG => {
                return Ok(Some(Old {
                    inode: (stat.st_dev, stat.st_ino),
                    mode: stat.st_mode & 0o777,
                    owner: (stat.st_uid, stat.st_gid),
                }));
            }
            SFlag::S_IFDIR => "a directory",
            SFlag::S_IFLNK => "a symbolic link: name the file that it points to",
            SFlag::S_IFIFO => "a FIFO",
            SFlag::S_IFSOCK => "a socket",
            _ => "a device node",
        };
        let text = format!("not a regular file, but {what}");
        Err(io::Error::other(text))
    }

    /// Renames within it.
    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        renameat2(&self.0, from, &self.0, to, flags)
    }

    /// Links within it.
    fn link(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        unistd::linkat(&self.0, from, &self.0, to, AtFlags::empty())
    }

    fn remove(&self, name: &OsStr) {
        // Perhaps it has never been there.
        let _gone = unistd::unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir);
    }
}

/// What stands at a target before.
#[derive(Clone, Copy, Debug)]
struct Old {
    inode: Inode,
    mode: u32,
    owner: (u32, u32),
}

/// Where a file shall be.
#[derive(Debug)]
pub(crate) struct Target {
    path: PathBuf,
    directory: Directory,
    name: OsString,
    old: Option<Old>,
}

impl Target {
    /// Checks a path: whether a file can be put there.
    pub(crate) fn new(path: &Path) -> anyhow::Result<Self> {
        let open = || {
            let parent = path.parent().filter(|parent| *parent != Path::new(""));
            Directory::open(parent.unwrap_or(Path::new(".")))
        };
        let directory = open().with_context(|| path.display().to_string())?;
        Self::within(directory, path)
    }

    /// As [`Target::new`], in the directory of the path, which is open.
    pub(crate) fn within(directory: Directory, path: &Path) -> anyhow::Result<Self> {
        let make = || -> anyhow::Result<Self> {
            let name = path.file_name().context("this path ends in no name")?;
            Ok(Self {
                old: directory.look(name)?,
                path: path.to_owned(),
                name: name.to_owned(),
                directory,
            })
        };
        make().with_context(|| path.display().to_string())
    }

    /// Whether there is a file already.
    pub(crate) const fn exists(&self) -> bool {
        self.old.is_some()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    fn cannot_keep(&self) -> String {
        format!("cannot keep {}", self.path.display())
    }

    /// Whether both are one file.
    fn is(&self, other: &Self) -> io::Result<bool> {
        let same_name =
            self.name == other.name && self.directory.inode()? == other.directory.inode()?;
        let inodes = (
            self.old.map(|old| old.inode),
            other.old.map(|old| old.inode),
        );
        Ok(same_name || matches!(inodes, (Some(a), Some(b)) if a == b))
    }

    /// Makes the file, empty, without its name.
    pub(crate) fn create(&self) -> io::Result<StateFile> {
        match self.unnamed() {
            Ok(file) => Ok(StateFile {
                file,
                name: None,
                directory: self.directory.clone(),
            }),
            // This file system has no such files, or there is no way to name one later.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => self.named(),
            Err(errno) => Err(errno.into()),
        }
    }

    fn unnamed(&self) -> Result<File, Errno> {
        if !Path::new("/proc/self/fd").is_dir() {
            return Err(Errno::EOPNOTSUPP);
        }
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        openat(&self.directory.0, ".", flags, PRIVATE).map(File::from)
    }

    fn named(&self) -> io::Result<StateFile> {
        let flags =
            OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let (file, name) =
            with_new_name(|name| openat(&self.directory.0, name, flags, PRIVATE).map(File::from))?;
        Ok(StateFile {
            file,
            name: Some(name),
            directory: self.directory.clone(),
        })
    }
}

/// A tenant's state is nobody else's to read.
const PRIVATE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Tries names that nobody has until one is free.
fn with_new_name<T>(
    mut attempt: impl FnMut(&OsStr) -> Result<T, Errno>,
) -> io::Result<(T, OsString)> {
    const TRIES: u32 = 100;
    let random = RandomState::new();
    for number in 0..TRIES {
        let name = format!(".vfio-migrate-{:016x}", random.hash_one(number));
        match attempt(OsStr::new(&name)) {
            Err(Errno::EEXIST) => {}
            other => return Ok((other?, name.into())),
        }
    }
    Err(Errno::EEXIST.into())
}

/// A file that is written, and has not got its name yet. Dropped, it is gone.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: File,
    /// The name that it has meanwhile, where it has to have one.
    name: Option<OsString>,
    directory: Directory,
}

impl StateFile {
    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Gives it a name of its own beside its target.
    fn name(&mut self) -> io::Result<OsString> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let ((), name) = with_new_name(|name| {
            let follow = AtFlags::AT_SYMLINK_FOLLOW;
            unistd::linkat(AT_FDCWD, from.as_str(), &self.directory.0, name, follow)
        })?;
        self.name = Some(name.clone());
        Ok(name)
    }

    /// Brings all of it to the disk, with the mode that it is to have.
    fn settle(&self, old: Option<Old>) -> io::Result<()> {
        if let Some(old) = old {
            // Only root may give a file away. Whoever may not keeps it, and his group, which is another's,
            // gets no right that it had not.
            let (uid, gid) = old.owner;
            let given = std::os::unix::fs::fchown(self.file.as_fd(), Some(uid), Some(gid));
            let kept = given.is_ok() || self.file.metadata()?.gid() == gid;
            let mode = if kept { old.mode } else { old.mode & !0o070 };
            self.file
                .set_permissions(fs::Permissions::from_mode(mode))?;
        }
        self.file.sync_all()
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.directory.remove(name);
        }
    }
}

/// Fails where two targets are one file.
pub(crate) fn check_distinct(targets: &[&Target]) -> anyhow::Result<()> {
    for (at, target) in targets.iter().enumerate() {
        for other in &targets[..at] {
            ensure!(
                !target.is(other)?,
                "{} and {} are one file",
                other.path.display(),
                target.path.display()
            );
        }
    }
    Ok(())
}

/// How a file system puts a file in its place: the best that it has. Those without hard links and without
/// an exchange are rare, and slow to find for a test.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Means {
    /// Two names change their files, at once; a link to a name that is free.
    Exchange,
    /// The old file gets a second name, then the new one takes its place.
    Link,
    /// Renames alone: for a moment nothing stands at PATH.
    Rename,
}

/// What is not this file system's to do.
const CANNOT: [Errno; 5] = [
    Errno::EINVAL,
    Errno::ENOSYS,
    Errno::EOPNOTSUPP,
    Errno::EPERM,
    Errno::EMLINK,
];

impl StateFile {
    /// Whether `name` is this file.
    fn is_at(&self, directory: &Directory, name: &OsStr) -> bool {
        let (Ok(meta), Ok(Some(there))) = (self.file.metadata(), directory.look(name)) else {
            return false;
        };
        (meta.dev(), meta.ino()) == there.inode
    }

    /// Puts the file in its place. What stood there has the file's own name then.
    fn put(&mut self, target: &Target, means: Means) -> anyhow::Result<()> {
        const CHANGED: &str = "another process has changed it meanwhile";
        let (directory, place) = (&target.directory, target.name.as_os_str());
        let name = self.name()?;
        let now = directory.look(place)?;
        let (before, now) = (target.old.map(|old| old.inode), now.map(|now| now.inode));
        ensure!(before == now, CHANGED);
        if before.is_none() {
            return match self.put_fresh(directory, &name, place, means) {
                Err(Errno::EEXIST) => bail!("another process has made it meanwhile"),
                put => Ok(put?),
            };
        }
        let aside = self.put_over(directory, &name, place, means)?;
        let was = directory.look(&aside)?.map(|was| was.inode);
        self.name = Some(aside);
        if was != before {
            // Between the look and the exchange: theirs goes back.
            self.take_back(target);
            bail!(CHANGED);
        }
        Ok(())
    }

    /// To a name that is free. Unlike a plain rename, neither way replaces anything.
    fn put_fresh(
        &mut self,
        directory: &Directory,
        name: &OsStr,
        place: &OsStr,
        means: Means,
    ) -> Result<(), Errno> {
        if means < Means::Rename {
            match directory.link(name, place) {
                Ok(()) => directory.remove(name),
                Err(errno) if CANNOT.contains(&errno) => {
                    return self.put_fresh(directory, name, place, Means::Rename);
                }
                Err(errno) => return Err(errno),
            }
        } else {
            match directory.rename(name, place, RenameFlags::RENAME_NOREPLACE) {
                Err(errno) if CANNOT.contains(&errno) => {
                    // It was free a moment ago: no more can be had here.
                    directory.rename(name, place, RenameFlags::empty())?;
                }
                renamed => renamed?,
            }
        }
        self.name = None;
        Ok(())
    }

    /// To the old file's place. Returns the name that the old one has then.
    fn put_over(
        &self,
        directory: &Directory,
        name: &OsStr,
        place: &OsStr,
        means: Means,
    ) -> io::Result<OsString> {
        if means == Means::Exchange {
            match directory.rename(name, place, RenameFlags::RENAME_EXCHANGE) {
                Ok(()) => return Ok(name.to_owned()),
                Err(errno) if CANNOT.contains(&errno) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        if means <= Means::Link {
            match with_new_name(|aside| directory.link(place, aside)) {
                Ok(((), aside)) => {
                    let renamed = directory.rename(name, place, RenameFlags::empty());
                    renamed.inspect_err(|_| directory.remove(&aside))?;
                    return Ok(aside);
                }
                Err(error) => {
                    let errno = error.raw_os_error().map(Errno::from_raw);
                    if !errno.is_some_and(|errno| CANNOT.contains(&errno)) {
                        return Err(error);
                    }
                }
            }
        }
        let none = RenameFlags::empty();
        let ((), aside) = with_new_name(|aside| match directory.look(aside) {
            Ok(None) => directory.rename(place, aside, none),
            _ => Err(Errno::EEXIST),
        })?;
        directory.rename(name, place, none).inspect_err(|_| {
            // Where that fails too, the old file is there under its other name.
            let _back = directory.rename(&aside, place, none);
        })?;
        Ok(aside)
    }

    /// Puts back what stood there, unless somebody has replaced this file since.
    fn take_back(&mut self, target: &Target) {
        let (directory, place) = (&target.directory, target.name.as_os_str());
        let old = self.name.take();
        if !self.is_at(directory, place) {
            // The old file stays under its other name, for whoever looks for it.
            return;
        }
        match old {
            // Where that fails it stays there as well.
            Some(old) => drop(directory.rename(&old, place, RenameFlags::empty())),
            None => directory.remove(place),
        }
    }
}

/// Puts all files in their places, or none. What has appeared is on the disk when this returns.
///
/// # Errors
///
/// By the target's path. Every target is as it was then.
pub(crate) fn publish(files: Vec<(&Target, StateFile)>) -> anyhow::Result<()> {
    publish_by(files, Means::Exchange)
}

fn publish_by(mut files: Vec<(&Target, StateFile)>, means: Means) -> anyhow::Result<()> {
    for (target, file) in &files {
        let settled = file.settle(target.old);
        settled.with_context(|| target.cannot_keep())?;
    }
    let mut put = 0;
    let result = files.iter_mut().try_for_each(|(target, file)| {
        file.put(target, means)
            .with_context(|| target.cannot_keep())?;
        put += 1;
        anyhow::Ok(())
    });
    let result = result.and_then(|()| {
        files.iter().try_for_each(|(target, _)| {
            let synced = target.directory.0.sync_all();
            synced.with_context(|| target.cannot_keep())
        })
    });
    if result.is_err() {
        for (target, file) in files[..put].iter_mut().rev() {
            file.take_back(target);
        }
    }
    // With the files goes whatever has their own names now: the old ones, or the new.
    result
}

#[cfg(test)]
mod tests {
    use std::io::Write;

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
                true => target.named(),
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
        drop(written(target.named(), "state"));
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
}
