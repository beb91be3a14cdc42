//! `man` and `completions`: what a package brings beside the command, made of the same arguments.
//!
//! ```text
//!   Cli ──▶ clap_mangen   ──▶ roff: one page to stdout, or a page for each subcommand to a directory
//!       └─▶ clap_complete ──▶ a shell's script, to stdout
//! ```
//!
//! Runs on the main thread alone.

use std::{fs, path::PathBuf};

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::{Cli, output};

/// The command's name, and its pages'.
const NAME: &str = "vfio-migrate";

/// Print this command's manual page
///
/// For `man -l`: vfio-migrate man | man -l -
#[derive(Debug, clap::Args)]
pub(crate) struct ManOptions {
    /// Write a page for the command and one for each subcommand to DIR, which is made if it does not exist
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Print a script that completes this command's arguments in a shell
///
/// For bash: vfio-migrate completions bash > /etc/bash_completion.d/vfio-migrate
#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsOptions {
    /// Which shell's
    #[arg(value_enum)]
    shell: Shell,
}

/// Runs `man`.
pub(crate) fn man(options: &ManOptions) -> anyhow::Result<()> {
    let command = Cli::command();
    if let Some(directory) = &options.out {
        let path = || directory.display().to_string();
        fs::create_dir_all(directory).with_context(path)?;
        return clap_mangen::generate_to(command, directory).with_context(path);
    }
    let mut page = Vec::new();
    Man::new(command).render(&mut page)?;
    output::print_raw(&String::from_utf8(page)?)
}

/// Runs `completions`.
pub(crate) fn completions(options: &CompletionsOptions) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), NAME, &mut script);
    output::print_raw(&String::from_utf8(script)?)
}
