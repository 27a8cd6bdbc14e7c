//! `vdtool dirty`.

mod create;
pub mod marks;
mod report;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Subcommand, ValueEnum};

use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_size};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, signal};
use crate::dirty::{Assumed, DirtyLog, Kind, Regions};
use crate::error::{Context, Error, Result};
use crate::storage::Storage;
use crate::storage::open::{self, Access, Sharing, StorageOptions};

const HELP: &str = "\
EXAMPLES:
  vdtool dirty create --image disk.qcow2 disk.dirty
  vdtool dirty info disk.dirty
  vdtool dirty dump --output json disk.dirty
  vdtool dirty set -s 1M -l 64k disk.dirty
  vdtool dirty merge week.dirty monday.dirty tuesday.dirty
  vdtool dirty merge --bitmap since-monday disk.dirty disk.qcow2
  vdtool convert -n --dirty disk.dirty disk.qcow2 backup.raw

NOTES:
  A region log has a bit for each region of a disk, which says whether it may differ from something
  else, such as the last backup. Formats: vdtool, its own; mirr, the log of device-mapper's mirrors
  on a disk (region sizes are in the mirror's table, so --granularity or --size tells); cbt, that of
  XenServer's changed block tracking, in regions of 64 KiB.
  \"dump --output json\" prints what \"merge\" and \"convert --dirty\" read in place of a log: an object
  with \"dirty\", a list of objects with \"start\" and \"length\" in bytes, or that list alone.
  A log in use was not closed by its writer: what changed is marked in it, and perhaps more. One that
  is unreliable (cbt) may lack marks.

EXIT STATUS:
  0   done
  1   failed
  2   wrong usage";

/// Arguments of `dirty`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// A format's name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Our own.
    Vdtool,
    /// device-mapper's disk log.
    Mirr,
    /// XenServer's changed block tracking.
    Cbt,
}

impl From<Format> for Kind {
    fn from(format: Format) -> Self {
        match format {
            Format::Vdtool => Self::Own,
            Format::Mirr => Self::Mirror,
            Format::Cbt => Self::Cbt,
        }
    }
}

/// What is known of a log.
#[derive(Debug, Clone, clap::Args)]
pub struct LogArgs {
    /// Format of the log; without it the content decides.
    #[arg(short, long, value_enum, value_name = "FMT")]
    pub format: Option<Format>,
    /// Bytes of a region, where the log does not say so (mirr).
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub granularity: Option<u64>,
    /// Bytes of the disk, where the log does not say so (mirr).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// The log.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// A part of the disk.
#[derive(Debug, Clone, clap::Args)]
#[group(required = true, multiple = true)]
pub struct PartArgs {
    /// All of it.
    #[arg(long, conflicts_with_all = ["start", "length"])]
    pub all: bool,
    /// Its first byte.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size, requires = "length")]
    pub start: Option<u64>,
    /// Its length.
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size, requires = "start")]
    pub length: Option<u64>,
}

/// What is done with a log.
#[derive(Debug, Subcommand)]
pub enum Action {
    /// Make a log in which nothing is marked.
    Create(create::Args),
    /// Show what a log is of, and how much is marked.
    Info {
        /// Read even where another process has the log open for writing.
        #[arg(short = 'U', long)]
        force_share: bool,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
        /// The log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// List the ranges that are marked.
    Dump {
        /// Read even where another process has the log open for writing.
        #[arg(short = 'U', long)]
        force_share: bool,
        /// How the result is printed.
        #[command(flatten)]
        output: OutputArgs,
        /// The log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Mark all regions that a part of the disk touches.
    Set {
        /// The part.
        #[command(flatten)]
        part: PartArgs,
        /// The log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Clear all regions that lie wholly in a part of the disk.
    Clear {
        /// The part.
        #[command(flatten)]
        part: PartArgs,
        /// The log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Mark in a log what is marked in others, whatever their regions are.
    Merge {
        /// The others are images, and this is their dirty bitmap to take.
        #[arg(long, value_name = "NAME")]
        bitmap: Option<std::ffi::OsString>,
        /// How images are opened.
        #[command(flatten)]
        open: OpenArgs,
        /// The log that takes the marks.
        #[command(flatten)]
        log: LogArgs,
        /// Logs, lists of ranges, or images.
        #[arg(value_name = "OTHER", required = true)]
        others: Vec<PathBuf>,
    },
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    match &args.action {
        Action::Create(args) => create::run(args, globals)?,
        Action::Info {
            force_share,
            output,
            log,
        } => report::info(&log.open(sharing(*force_share))?, log, *output)?,
        Action::Dump {
            force_share,
            output,
            log,
        } => {
            let found = log.open(sharing(*force_share))?;
            log.need_granularity(&found)?;
            report::dump(found.regions(), output.output == OutputFormat::Json)?;
        }
        Action::Set { part, log } => change(log, |regions| regions.mark(&part.range()))?,
        Action::Clear { part, log } => change(log, |regions| regions.clear(&part.range()))?,
        Action::Merge {
            bitmap,
            open,
            log,
            others,
        } => merge(log, bitmap.as_deref(), open, others)?,
    }
    Ok(Exit::Done)
}

fn sharing(force: bool) -> StorageOptions {
    StorageOptions {
        sharing: match force {
            true => Sharing::Force,
            false => Sharing::Locked,
        },
        ..StorageOptions::default()
    }
}

fn change(log: &LogArgs, change: impl FnOnce(&Regions)) -> anyhow::Result<()> {
    let found = log.open_to_change()?;
    log.need_granularity(&found)?;
    change(found.regions());
    Ok(found.save().at(&log.file)?)
}

fn merge(
    log: &LogArgs,
    bitmap: Option<&std::ffi::OsStr>,
    open: &OpenArgs,
    others: &[PathBuf],
) -> anyhow::Result<()> {
    let found = log.open_to_change()?;
    log.need_granularity(&found)?;
    let size = found.regions().geometry().size();
    for other in others {
        let marks = match bitmap {
            Some(name) => marks::of_bitmap(&marks::image(other, open)?, name, size),
            None => marks::read(other, size),
        };
        found.regions().merge(&marks.at(other)?).at(other)?;
    }
    Ok(found.save().at(&log.file)?)
}

impl LogArgs {
    fn open(&self, options: StorageOptions) -> Result<DirtyLog> {
        self.open_storage(storage(&self.file, options)?)
    }

    fn open_to_change(&self) -> Result<DirtyLog> {
        let options = StorageOptions {
            access: Access::Write,
            ..StorageOptions::default()
        };
        self.open(options)
    }

    fn open_storage(&self, storage: Arc<dyn Storage>) -> Result<DirtyLog> {
        let assumed = Assumed {
            kind: self.format.map(Kind::from),
            granularity: self.granularity,
            size: self.size,
        };
        DirtyLog::open(storage, &assumed).at(&self.file)
    }

    /// Refuses to count in bytes where nobody said how large regions are.
    fn need_granularity(&self, log: &DirtyLog) -> anyhow::Result<()> {
        match self.knows_granularity(log) {
            true => Ok(()),
            false => Err(usage(format!(
                "{}: the log does not say how large its regions are (allowed: with --granularity or --size)",
                self.file.display()
            ))),
        }
    }

    fn knows_granularity(&self, log: &DirtyLog) -> bool {
        log.kind() != Kind::Mirror || self.granularity.is_some() || self.size.is_some()
    }
}

/// Opens a log's file or device; nothing else is one.
fn storage(path: &Path, options: StorageOptions) -> Result<Arc<dyn Storage>> {
    match crate::nbd::uri::is_uri(path) {
        true => Err(Error::unsupported("a log on a server").at(path)),
        false => open::open(path, &options),
    }
}

impl PartArgs {
    fn range(&self) -> std::ops::Range<u64> {
        match (self.all, self.start, self.length) {
            (false, Some(start), Some(length)) => start..start.saturating_add(length),
            _ => 0..u64::MAX,
        }
    }
}
