//! One file in its place, and what stood there back: by the best means that its file system has.
//!
//! Nobody's file is replaced unseen: what stands there is looked at before, and after.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::unix::fs::MetadataExt,
};

use anyhow::{bail, ensure};
use nix::errno::Errno;
use rustix::fs::RenameFlags;

use super::{
    directory::{Directory, with_new_name},
    file::StateFile,
    target::Target,
};

/// How a file system puts a file in its place: the best that it has. Those without hard links and without
/// an exchange are rare, and slow to find for a test.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Means {
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
        let (Ok(meta), Ok(Some(there))) = (self.file().metadata(), directory.look(name)) else {
            return false;
        };
        (meta.dev(), meta.ino()) == there.inode
    }

    /// Puts the file in its place. What stood there has the file's own name then.
    pub(super) fn put(&mut self, target: &Target, means: Means) -> anyhow::Result<()> {
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
            match directory.rename(name, place, RenameFlags::NOREPLACE) {
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
            match directory.rename(name, place, RenameFlags::EXCHANGE) {
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
    pub(super) fn take_back(&mut self, target: &Target) {
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
