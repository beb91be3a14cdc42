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
//! | an old file's mode | is kept; `Target::private` is 0600 and its maker's in any case |
//! | the process is killed | PATH is as it was; without O_TMPFILE a `.vfio-migrate-…` stays |
//!
//! | module | its idea |
//! |---|---|
//! | `directory` | what stands in an open directory, and the names that change in it |
//! | `target` | where a file shall be, and whether it can be put there |
//! | `file` | a file that has not got its name yet |
//! | `swap` | one file in its place, and what stood there back |
//! | this | all of them, or none |
//!
//! A [`StateFile`] belongs to whoever writes it; [`publish`] is called on the command's main thread.
//! Nothing here waits but for the file system.

mod directory;
mod file;
mod swap;
mod target;
#[cfg(test)]
mod tests;

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path};

use anyhow::Context;
use nix::fcntl::OFlag;

use self::swap::Means;
pub(crate) use self::{
    directory::Directory,
    file::StateFile,
    target::{Target, check_distinct},
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
        let settled = file.settle(target.old.filter(|_| !target.private));
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
            let synced = target.directory.sync();
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
