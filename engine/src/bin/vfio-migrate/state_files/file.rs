//! A file that is written, and has not got its name yet: without any where the file system has such files,
//! with one of its own otherwise.
//!
//! It belongs to whoever writes it.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use nix::{errno::Errno, fcntl::OFlag};

use super::directory::{Directory, Old, with_new_name};

/// A file that is written, and has not got its name yet. Dropped, it is gone.
#[derive(Debug)]
pub(crate) struct StateFile {
    file: File,
    /// The name that it has meanwhile, where it has to have one.
    pub(super) name: Option<OsString>,
    directory: Directory,
}

impl StateFile {
    /// Makes the file, empty, without a name or with one of its own.
    pub(super) fn create(directory: &Directory) -> io::Result<Self> {
        match Self::unnamed(directory) {
            // This file system has no such files, or there is no way to name one later.
            Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {
                Self::named(directory)
            }
            unnamed => Ok(unnamed?),
        }
    }

    fn unnamed(directory: &Directory) -> Result<Self, Errno> {
        if !Path::new("/proc/self/fd").is_dir() {
            return Err(Errno::EOPNOTSUPP);
        }
        Ok(Self {
            file: directory.make(OsStr::new("."), OFlag::O_TMPFILE)?,
            name: None,
            directory: directory.clone(),
        })
    }

    pub(super) fn named(directory: &Directory) -> io::Result<Self> {
        let new = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let (file, name) = with_new_name(|name| directory.make(name, new))?;
        Ok(Self {
            file,
            name: Some(name),
            directory: directory.clone(),
        })
    }

    pub(crate) const fn file(&self) -> &File {
        &self.file
    }

    /// Gives it a name of its own beside its target.
    pub(super) fn name(&mut self) -> io::Result<OsString> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let from = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let ((), name) = with_new_name(|name| self.directory.link_from(&from, name))?;
        self.name = Some(name.clone());
        Ok(name)
    }

    /// Brings all of it to the disk, with the mode that it is to have.
    pub(super) fn settle(&self, old: Option<Old>) -> io::Result<()> {
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
