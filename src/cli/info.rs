//! `vdtool info`.

use crate::cli::Globals;
use crate::cli::exit::Exit;

/// Arguments of `info`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let _ = (args, globals);
    Ok(Exit::Done)
}
