//! `vdtool measure`.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use serde_json::json;

use crate::chain;
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, parse_size, print};
use crate::cli::convert::{measure, pick};
use crate::cli::create::{Generic, creator};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, hints, progress};
use crate::copy::Joined;
use crate::copy::count::data_clusters;
use crate::error::Context;
use crate::formats;
use crate::image::Driver;
use crate::image::create::{CreateBacking, CreateOptions};
use crate::image::disc::plan::Maker;
use crate::image::open::Purpose;
use crate::image::options::OptionValues;
use crate::output;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool measure -O vhd disk.raw
  vdtool measure -O vhd -o subformat=fixed --size 20G

Data is what \"map\" shows as data: what images have space for, and the files of raw ones; it is
not read. With a backing file (-o backing_file=) all data counts: how much of it lies below is not
known. The size of bitmaps counts for \"convert --bitmaps\"; that of discs (-O cue) is the sheet and its
files together.

EXIT STATUS:
  0   done
  1   failed
  2   wrong usage
  63  the format has no such operation";

/// Arguments of `measure`.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = HELP,
    override_usage = "vdtool measure [OPTIONS] FILE\n       vdtool measure [OPTIONS] --size SIZE"
)]
pub struct Args {
    /// Format of FILE; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Format of the new image [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", value_parser = parse_driver)]
    pub target_format: Option<&'static Driver>,
    /// Options of the new image's format; "help" lists them.
    #[arg(short = 'o', long, value_name = "K=V,..")]
    pub options: Vec<OsString>,
    /// Measure an internal snapshot, in formats that have them.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<OsString>,
    /// Size of a disk without data, instead of FILE.
    #[arg(short, long, value_parser = parse_size, conflicts_with = "file")]
    pub size: Option<u64>,
    /// How the result is printed.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How FILE is opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image to convert.
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being told.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    args.open.absent.refuse()?;
    let driver = args.target_format.unwrap_or(formats::PLAIN);
    if let Some(maker) = formats::disc_maker(driver) {
        return of_disc(args, driver, maker);
    }
    let creator = creator(driver)?;
    if OptionValues::ask_for_help(&args.options) {
        print(|out| Ok(output::options::table(out, driver, None, hints::OPTIONS)?))?;
        return Ok(Exit::Done);
    }
    let source = source(args, Purpose::Use)?;
    let mut options = options(args, driver)?;
    let size = args.size.or(source.as_ref().map(Joined::len));
    let Some(size) = size.or((options.size > 0).then_some(options.size)) else {
        return Err(usage("measure needs FILE or --size"));
    };
    options.size = size;
    let cluster = (creator.cluster_size)(&options)?.max(1);
    let all = size.div_ceil(cluster);
    let data = match &source {
        // How much the backing image has of it is not known.
        Some(_) if options.backing.is_some() => all,
        Some(source) => {
            let bar = progress::hidden("measure", source.len());
            data_clusters(source, cluster, &bar)?
        }
        None => 0,
    };
    let sizes = Sizes {
        required: (creator.measure)(&options, data)?,
        full: (creator.measure)(&options, all)?,
        bitmaps: match source
            .as_ref()
            .and_then(|s| s.chains().next()?.top().bitmaps())
        {
            Some(bitmaps) => (creator.measure_bitmaps)(&options, &bitmaps.list()?),
            None => None,
        },
    };
    print(|out| Ok(report(out, args.output.output, &sizes)?))?;
    Ok(Exit::Done)
}

/// The same of discs and what is made of them, whose files have all that they will ever have.
fn of_disc(args: &Args, driver: &'static Driver, maker: &Maker) -> anyhow::Result<Exit> {
    if OptionValues::ask_for_help(&args.options) {
        print(|out| Ok(output::options::specs(out, maker.options)?))?;
        return Ok(Exit::Done);
    }
    let generic = Generic::take(&args.options)?;
    if generic.backing.is_some() {
        return Err(usage("option 'backing_file' is not for discs"));
    }
    let values = OptionValues::parse(maker.options, driver.name, &generic.others);
    let values = values.map_err(usage)?;
    // A disc need not be a disk.
    let source = source(args, Purpose::Describe)?;
    let size = args.size.or(generic.size);
    if source.is_none() && size.is_none() {
        return Err(usage("measure needs FILE or --size"));
    }
    let bytes = measure(
        &args.open,
        source.as_ref(),
        size.unwrap_or(0),
        maker,
        &values,
    )?;
    let sizes = Sizes {
        required: bytes,
        full: bytes,
        bitmaps: None,
    };
    print(|out| Ok(report(out, args.output.output, &sizes)?))?;
    Ok(Exit::Done)
}

/// What is told.
struct Sizes {
    required: u64,
    full: u64,
    bitmaps: Option<u64>,
}

fn source(args: &Args, purpose: Purpose) -> anyhow::Result<Option<Joined>> {
    let Some(file) = &args.file else {
        return Ok(None);
    };
    let mut options = args.open.plan(args.format, Access::Read)?;
    options.purpose = purpose;
    options.snapshot = args.snapshot.as_deref().map(pick).transpose()?;
    let chain = chain::open::open(file, &options)?;
    Ok(Some(Joined::new(vec![chain]).at(file)?))
}

fn options(args: &Args, driver: &'static Driver) -> anyhow::Result<CreateOptions> {
    let generic = Generic::take(&args.options)?;
    let values = OptionValues::parse(creator(driver)?.options, driver.name, &generic.others)
        .map_err(usage)?;
    Ok(CreateOptions {
        size: generic.size.unwrap_or(0),
        backing: generic
            .backing
            .map(|name| unopened(name, generic.backing_format)),
        values,
        ..CreateOptions::default()
    })
}

/// A backing image of which nothing but the name is known.
fn unopened(name: OsString, format: Option<&'static Driver>) -> CreateBacking {
    CreateBacking {
        absolute: PathBuf::from(&name),
        relative: PathBuf::from(&name),
        name,
        format: format.unwrap_or(formats::PLAIN).name,
        identity: None,
        state: None,
        modified: SystemTime::UNIX_EPOCH,
        virtual_size: 0,
        cluster_size: None,
        sector_size: None,
        physical_sector_size: None,
    }
}

/// The sizes, in qemu-img's words and keys.
fn report(out: &mut dyn Write, form: OutputFormat, sizes: &Sizes) -> std::io::Result<()> {
    let Sizes {
        required,
        full,
        bitmaps,
    } = sizes;
    match form {
        OutputFormat::Human => {
            writeln!(out, "required size: {required}")?;
            writeln!(out, "fully allocated size: {full}")?;
            bitmaps.map_or(Ok(()), |size| writeln!(out, "bitmaps size: {size}"))
        }
        OutputFormat::Json => {
            let mut value = json!({ "required": required, "fully-allocated": full });
            if let Some(size) = bitmaps {
                value["bitmaps"] = json!(size);
            }
            writeln!(out, "{value:#}")
        }
    }
}
