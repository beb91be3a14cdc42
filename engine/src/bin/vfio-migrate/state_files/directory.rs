//! What stands in a directory that is held open, and the names that change in it. Nothing here is looked up by
//! a whole path again.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    hash::{BuildHasher, RandomState},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use anyhow::Context;
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat},
    sys::stat::{Mode, SFlag, fstatat},
    unistd::{self, AccessFlags, UnlinkatFlags},
};
use rustix::fs::{RenameFlags, renameat_with};

/// What tells one file from another, however it is spelled.
pub(super) type Inode = (u64, u64);

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

    pub(super) fn inode(&self) -> io::Result<Inode> {
        let meta = self.0.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The regular file of that name, if there is one.
    pub(super) fn look(&self, name: &OsStr) -> io::Result<Option<Old>> {
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
    pub(super) fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
        // nix has it with glibc alone.
        let renamed = renameat_with(&self.0, from, &self.0, to, flags);
        renamed.map_err(|errno| Errno::from_raw(errno.raw_os_error()))
    }

    /// Links within it.
    pub(super) fn link(&self, from: &OsStr, to: &OsStr) -> Result<(), Errno> {
        unistd::linkat(&self.0, from, &self.0, to, AtFlags::empty())
    }

    /// Links an open file, by its path in `/proc`, to a name in it.
    pub(super) fn link_from(&self, from: &str, to: &OsStr) -> Result<(), Errno> {
        unistd::linkat(AT_FDCWD, from, &self.0, to, AtFlags::AT_SYMLINK_FOLLOW)
    }

    /// Opens what is made there, which is its owner's alone.
    pub(super) fn make(&self, name: &OsStr, how: OFlag) -> Result<File, Errno> {
        let how = how | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        openat(&self.0, name, how, PRIVATE).map(File::from)
    }

    /// Brings its names to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    pub(super) fn remove(&self, name: &OsStr) {
        // Perhaps it has never been there.
        let _gone = unistd::unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir);
    }
}

/// What stands at a target before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Old {
    pub(super) inode: Inode,
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
}

/// A tenant's state is nobody else's to read.
const PRIVATE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

/// Tries names that nobody has until one is free.
pub(super) fn with_new_name<T>(
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
