//! What users type: arguments, subcommands, exit codes.
//!
//! Arguments hold what was typed; each command's `run` turns them into a plan, carries it out and
//! says how the process ends.  Data goes to stdout, everything else to stderr.

use std::process::ExitCode;

use clap::error::ErrorKind as ClapKind;
use clap::{Parser, Subcommand};

pub mod check;
pub mod common;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod create;
pub mod exit;
pub mod info;
pub mod io;
pub mod map;
pub mod measure;
pub mod resize;
pub mod signal;

use exit::Exit;

/// Virtual disk images: create, inspect, convert, check.
#[derive(Debug, Parser)]
#[command(name = "vdtool", version, about, max_term_width = 100)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, clap::Args)]
pub struct Globals {
    /// Print errors only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new image.
    Create(create::Args),
    /// Show what an image is.
    Info(info::Args),
    /// Copy disks into a new image.
    Convert(convert::Args),
    /// Check an image's metadata, and repair it.
    Check(check::Args),
    /// List the extents of a disk.
    Map(map::Args),
    /// Compare two disks.
    Compare(compare::Args),
    /// Tell how large a converted image will be.
    Measure(measure::Args),
    /// Change the size of a disk.
    Resize(resize::Args),
    /// Read and write a disk's bytes by commands.
    Io(io::Args),
    /// Print completions for a shell.
    Completions(completions::Args),
}

/// Parses the arguments, runs the command, maps the result to an exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    exit::finish(run(&cli.command, &cli.globals))
}

fn run(command: &Command, globals: &Globals) -> anyhow::Result<Exit> {
    match command {
        Command::Create(args) => create::run(args, globals),
        Command::Info(args) => info::run(args, globals),
        Command::Convert(args) => convert::run(args, globals),
        Command::Check(args) => check::run(args, globals),
        Command::Map(args) => map::run(args, globals),
        Command::Compare(args) => compare::run(args, globals),
        Command::Measure(args) => measure::run(args, globals),
        Command::Resize(args) => resize::run(args, globals),
        Command::Io(args) => io::run(args, globals),
        Command::Completions(args) => completions::run(args, globals),
    }
}

/// Prints what clap has to say.  `check` and `compare` use 2 for findings, so their usage errors
/// are 1.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if matches!(
        error.kind(),
        ClapKind::DisplayHelp | ClapKind::DisplayVersion
    ) {
        return Exit::Done.into();
    }
    let command = std::env::args().nth(1);
    match command.as_deref() {
        Some("check" | "compare") => Exit::Failed.into(),
        _ => Exit::Usage.into(),
    }
}
