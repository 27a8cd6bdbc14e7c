//! `vdtool serve`.
//!
//! Everything that does not depend on the kind of server: what is opened and how, who is told
//! what, and how it ends.  The servers themselves are chosen in one place, [`transport`].

use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};

use crate::backend::OnError;
use crate::cli::Globals;
use crate::cli::cache::{AioMode, CacheMode, DiscardMode};
use crate::cli::common::{OpenArgs, OutputArgs, parse_driver, parse_size};
use crate::cli::exit::{Exit, usage};
use crate::image::Driver;
use crate::server::{Export, Server};

mod control;
mod disk;
mod event;
mod fork;
mod job;
mod limit;
mod merge;
mod order;
mod ready;
mod report;
mod run;
pub mod transport;
pub mod ublk;

#[cfg(test)]
mod tests;

use disk::Named;

/// What is done about errors of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ErrorPolicy {
    /// The client is told.
    Report,
    /// The client is told that it was done.
    Ignore,
    /// All requests are held until `ctl resume`.
    Stop,
    /// Stop when there is no space left, report anything else.
    Enospc,
}

impl From<ErrorPolicy> for OnError {
    fn from(policy: ErrorPolicy) -> Self {
        match policy {
            ErrorPolicy::Report => Self::Report,
            ErrorPolicy::Ignore => Self::Ignore,
            ErrorPolicy::Stop => Self::Stop,
            ErrorPolicy::Enospc => Self::Enospc,
        }
    }
}

/// What becomes of writes that hold nothing but zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum DetectZeroes {
    /// They are written.
    #[default]
    Off,
    /// The range is zeroed, and keeps its space.
    On,
    /// The range is zeroed, and may give its space back.
    Unmap,
}

const HELP: &str = "\
EXAMPLES:
  vdtool serve --nbd unix:/run/disk.sock disk.qcow2
  vdtool serve --nbd unix:/run/disk.sock -s --control /run/disk.ctl disk.vhd
  vdtool serve --nbd unix:/run/disk.sock --limit bps=50M,iops=2000 disk.raw
  vdtool serve --nbd unix:/run/disk.sock --overlay changes.qcow2 base.qcow2

NOTES:
  One line for each export is printed on standard output when clients may use it, and nothing
  before: its address. Events are printed on standard error, one line each.
  SIGINT and SIGTERM let requests under way end, flush and close the images; a second one of the
  same kind ends the process at once.

LIMITS:
  --limit takes bps, bps-rd, bps-wr (bytes a second) and iops, iops-rd, iops-wr (requests a second).
  A total excludes the same limit for reads or writes. KEY-burst is what a burst may reach,
  KEY-burst-length for how many seconds; size: a larger request counts as several. group: exports
  that name the same group share its limits.

EXIT STATUS:
  0   ended by a signal, by 'ctl stop', or because the last client left
  1   failed
  2   wrong usage
  63  the format, or the host, has no such operation";

/// Arguments of `serve`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Which server.
    #[command(flatten)]
    pub transport: transport::TransportArgs,
    /// Format of the images; without it their content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Take no writes.
    #[arg(short, long)]
    pub read_only: bool,
    /// Writes go to a temporary layer, and are lost at the end.
    #[arg(short, long, conflicts_with = "read_only")]
    pub snapshot: bool,
    /// Writes go to this image, made where it is not there, with FILE below it.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["read_only", "snapshot"])]
    pub overlay: Option<PathBuf>,
    /// Which caches are used.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// What becomes of discards.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub discard: DiscardMode,
    /// Accepted for qemu-nbd's sake, without effect.
    #[arg(long, hide = true, value_enum, value_name = "MODE")]
    pub aio: Option<AioMode>,
    /// What becomes of writes of zeroes.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub detect_zeroes: DetectZeroes,
    /// What is done when a read fails.
    #[arg(long, value_enum, default_value = "report", value_name = "POLICY")]
    pub on_read_error: ErrorPolicy,
    /// What is done when a write fails.
    #[arg(long, value_enum, default_value = "enospc", value_name = "POLICY")]
    pub on_write_error: ErrorPolicy,
    /// Limits of each export, or of the one named; repeatable.
    #[arg(long, value_name = "[NAME:]K=V,..", value_parser = limit::parse)]
    pub limit: Vec<limit::Limit>,
    /// Size of the blocks that requests are made of.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub logical_block_size: Option<u64>,
    /// Size of the blocks that clients should keep to.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub physical_block_size: Option<u64>,
    /// Longest transfer that clients should ask for.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_io: Option<u64>,
    /// Tell, once, when something is written past this offset of an image's file.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub watermark: Option<u64>,
    /// Print statistics on standard error every so many seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub stats_interval: Option<u64>,
    /// Take commands of `vdtool ctl` on this socket.
    #[arg(long, value_name = "SOCKET")]
    pub control: Option<PathBuf>,
    /// Write the addresses to this file descriptor too.
    #[arg(long, value_name = "N")]
    pub ready_fd: Option<u32>,
    /// Write the process id to this file while clients may use the exports.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// What clients are told that the export is.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// How events and statistics are printed.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How the images are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The images; NAME is what clients ask for.
    #[arg(value_name = "[NAME=]FILE", required_unless_present_any = ["list", "delete"],
        value_parser = OsStringValueParser::new().try_map(|text| disk::parse_named(&text)))]
    pub files: Vec<Named>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the disks from being served or from being closed cleanly.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    if let Some(exit) = ublk::manage(args, globals)? {
        return Ok(exit);
    }
    run::run(args, globals, |exports| transport::start(args, exports))
}
