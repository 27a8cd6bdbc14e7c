//! `serve --ublk`, `--list` and `--delete`.

use std::sync::Arc;

use super::{Args, Export, Server, usage};
use crate::cli::Globals;
use crate::cli::common::{OutputFormat, print};
use crate::cli::exit::Exit;
use crate::output;
use crate::server::ublk::{self, Options};

/// What only block devices need.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Block devices (ublk)")]
pub struct UblkArgs {
    /// Serve each image as a block device of this machine, /dev/ublkbN.
    #[arg(long, conflicts_with = "nbd")]
    pub ublk: bool,
    /// Queues, each with a thread of its own.
    #[arg(long, value_name = "N", requires = "ublk")]
    pub queues: Option<u16>,
    /// Requests that a queue may have under way.
    #[arg(long, value_name = "N", requires = "ublk")]
    pub depth: Option<u16>,
    /// The N of /dev/ublkbN.
    #[arg(long, value_name = "N", requires = "ublk")]
    pub dev_id: Option<u32>,
    /// Take over the device --dev-id, whose server was killed.
    #[arg(long, requires = "ublk", requires = "dev_id")]
    pub recover: bool,
    /// Let the device go when its server is killed, instead of waiting for another.
    #[arg(long, requires = "ublk", conflicts_with = "recover")]
    pub no_recovery: bool,
    /// Copy all bytes, even where the kernel need not.
    #[arg(long, requires = "ublk")]
    pub no_zero_copy: bool,
    /// Take and answer requests one by one, even where the kernel has batches.
    #[arg(long, requires = "ublk")]
    pub no_batches: bool,
    /// A device of a user without privileges.
    #[arg(long, requires = "ublk", conflicts_with = "recover")]
    pub unprivileged: bool,
    /// List the ublk devices of this machine.
    #[arg(long, conflicts_with_all = ["ublk", "files", "delete"])]
    pub list: bool,
    /// Remove a ublk device whose server was killed.
    #[arg(long, value_name = "N", conflicts_with_all = ["ublk", "files"])]
    pub delete: Option<u32>,
}

impl UblkArgs {
    fn options(&self, max_io: Option<u64>) -> anyhow::Result<Options> {
        let defaults = Options::default();
        let max_io = match max_io {
            None => defaults.max_io,
            Some(size) => u32::try_from(size)
                .map_err(|_| usage(format!("--max-io {size} (allowed: up to {})", ublk::MAX_IO)))?,
        };
        Ok(Options {
            queues: self.queues.unwrap_or(defaults.queues),
            depth: self.depth.unwrap_or(defaults.depth),
            max_io,
            dev_id: self.dev_id,
            recover: self.recover,
            recoverable: !self.no_recovery,
            zero_copy: !self.no_zero_copy,
            batches: !self.no_batches,
            unprivileged: self.unprivileged,
        })
    }
}

/// Does what needs no image; nothing where that was not asked for.
///
/// # Errors
/// Those of the driver.
pub(super) fn manage(args: &Args, globals: &Globals) -> anyhow::Result<Option<Exit>> {
    let asked = &args.transport.ublk;
    if let Some(id) = asked.delete {
        ublk::delete(id)?;
        return Ok(Some(Exit::Done));
    }
    if !asked.list {
        return Ok(None);
    }
    let ublk::Listed { found, foreign } = ublk::list()?;
    for id in foreign {
        globals.note(&format!(
            "/dev/ublkb{id} belongs to another user and is not listed"
        ));
    }
    print(|out| {
        match args.output.output {
            OutputFormat::Human => output::ublk::human(out, &found)?,
            OutputFormat::Json => output::ublk::json(out, &found)?,
        }
        Ok(())
    })?;
    Ok(Some(Exit::Done))
}

/// Starts the devices, where they were asked for.
///
/// # Errors
/// Usage errors; those of the driver.
pub(super) fn start(args: &Args, exports: &[Export]) -> anyhow::Result<Option<Arc<dyn Server>>> {
    if !args.transport.ublk.ublk {
        return Ok(None);
    }
    let options = args.transport.ublk.options(args.max_io)?;
    let devices = ublk::start(exports, &options)?;
    Ok(Some(Arc::new(devices)))
}
