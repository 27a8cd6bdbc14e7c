//! `vdtool dirty create`.

use std::path::PathBuf;

use crate::cli::Globals;
use crate::cli::common::{OpenArgs, parse_size};
use crate::cli::dirty::marks::image;
use crate::cli::dirty::{Format, storage};
use crate::cli::exit::usage;
use crate::cli::target::{Durable, Existing, Target, look};
use crate::dirty::{DirtyLog, Kind, New};
use crate::error::{Context, Error};
use crate::storage::open::{Access, StorageOptions};

/// Arguments of `dirty create`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose format the log is in.
    #[arg(short, long, value_enum, default_value = "vdtool", value_name = "FMT")]
    pub format: Format,
    /// Bytes of a region, a power of two from 4k to 64M [default: 64k]
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    pub granularity: Option<u64>,
    /// Bytes of the disk.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, required_unless_present = "image")]
    pub size: Option<u64>,
    /// The disk, from which its size and its identity are taken.
    #[arg(long, value_name = "IMAGE", conflicts_with = "size")]
    pub image: Option<PathBuf>,
    /// How the image is opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The new log.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Makes the log; what is there under its name stays.
pub(super) fn run(args: &Args, globals: &Globals) -> anyhow::Result<()> {
    let disk = match &args.image {
        Some(path) => Some(image(path, &args.open)?),
        None => None,
    };
    let size = disk.as_ref().map(|disk| disk.virtual_size()).or(args.size);
    let Some(size) = size else {
        return Err(usage("a log needs the size of its disk: --size or --image"));
    };
    let new = New {
        kind: Kind::from(args.format),
        size,
        granularity: args.granularity,
        disk: disk.as_ref().and_then(|disk| disk.top().identity()),
    };
    drop(disk);
    if matches!(look(&args.file)?.1, Existing::File(_) | Existing::Open(_)) {
        let text = "is there already (allowed: another name; 'dirty clear --all' empties a log)";
        return Err(Error::invalid(text).at(&args.file).into());
    }
    let target = Target::begin(&args.file)?;
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    let made = storage(target.path(), options).and_then(|file| DirtyLog::create(file, &new));
    let log = made.map_err(|e| target.name(e)).at(&args.file)?;
    let regions = log.regions().geometry();
    drop(log);
    target.commit(Durable::Yes)?;
    globals.say(&format!(
        "Log of {} regions of {} bytes created.",
        regions.regions(),
        regions.granularity()
    ))
}
