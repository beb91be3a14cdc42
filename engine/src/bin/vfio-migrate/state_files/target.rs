//! Where a file shall be: whether it can be put there, before anything listens.

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};

use super::{
    directory::{Directory, Old},
    file::StateFile,
};

/// Where a file shall be.
#[derive(Debug)]
pub(crate) struct Target {
    path: PathBuf,
    pub(super) directory: Directory,
    pub(super) name: OsString,
    pub(super) old: Option<Old>,
    /// Whether the file is its owner's alone, whatever an old one's mode was.
    pub(super) private: bool,
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
                private: false,
            })
        };
        make().with_context(|| path.display().to_string())
    }

    /// The same, and the file's mode is 0600, whatever an old one's was.
    pub(crate) const fn private(mut self) -> Self {
        self.private = true;
        self
    }

    /// Whether there is a file already.
    pub(crate) const fn exists(&self) -> bool {
        self.old.is_some()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn cannot_keep(&self) -> String {
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
        StateFile::create(&self.directory)
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
