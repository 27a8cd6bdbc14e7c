//! `vdtool measure`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::chain;
use crate::cli::Globals;
use crate::cli::common::{
    OpenArgs, OutputArgs, OutputFormat, parse_driver, parse_size, print, target_driver,
};
use crate::cli::create::{Generic, creator};
use crate::cli::exit::{Exit, usage};
use crate::copy::Joined;
use crate::copy::count::data_clusters;
use crate::copy::progress::Silent;
use crate::error::{Context, Error};
use crate::image::Driver;
use crate::image::create::CreateOptions;
use crate::image::options::OptionValues;
use crate::output;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool measure -O vhd disk.raw
  vdtool measure -O vhd -o subformat=fixed --size 20G

Data is found by what images and host files have space for; it is not read.

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
    pub options: Vec<String>,
    /// Measure an internal snapshot, in formats that have them.
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Size of a disk without data, instead of FILE.
    #[arg(long, value_parser = parse_size, conflicts_with = "file")]
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
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let raw = &crate::formats::raw::DRIVER;
    let driver = target_driver(args.target_format.or(Some(raw)), Path::new(""), globals);
    let creator = creator(driver)?;
    if args.options.iter().any(|o| o == "help" || o == "?") {
        print(|out| Ok(output::options::table(out, driver)?))?;
        return Ok(Exit::Done);
    }
    if args.snapshot.is_some() {
        let text = "the formats that can be read have no internal snapshots (-l)";
        return Err(Error::unsupported(text).into());
    }
    let source = source(args)?;
    let mut options = options(args, driver)?;
    let size = args.size.or(source.as_ref().map(Joined::len));
    let Some(size) = size.or((options.size > 0).then_some(options.size)) else {
        return Err(usage("measure needs FILE or --size"));
    };
    options.size = size;
    let cluster = (creator.cluster_size)(&options)?.max(1);
    let data = match &source {
        Some(source) => data_clusters(source, cluster, &Silent)?,
        None => 0,
    };
    let required = (creator.measure)(&options, data)?;
    let full = (creator.measure)(&options, size.div_ceil(cluster))?;
    print(|out| Ok(report(out, args.output.output, required, full)?))?;
    Ok(Exit::Done)
}

fn source(args: &Args) -> anyhow::Result<Option<Joined>> {
    let Some(file) = &args.file else {
        return Ok(None);
    };
    let options = args.open.plan(args.format, Access::Read)?;
    let chain = chain::open::open(file, &options)?;
    Ok(Some(Joined::new(vec![chain]).at(file)?))
}

fn options(args: &Args, driver: &'static Driver) -> anyhow::Result<CreateOptions> {
    let generic = Generic::take(&args.options)?;
    if generic.backing.is_some() || generic.backing_format.is_some() {
        return Err(usage(
            "a target with a backing image cannot be measured: what it needs depends on content",
        ));
    }
    let texts = generic.others.iter().map(String::as_str);
    let values =
        OptionValues::parse(creator(driver)?.options, driver.name, texts).map_err(usage)?;
    Ok(CreateOptions {
        size: generic.size.unwrap_or(0),
        backing: None,
        values,
        data_file: None,
    })
}

/// Both sizes, in qemu-img's words and keys.
fn report(
    out: &mut dyn Write,
    form: OutputFormat,
    required: u64,
    full: u64,
) -> std::io::Result<()> {
    match form {
        OutputFormat::Human => {
            writeln!(out, "required size: {required}")?;
            writeln!(out, "fully allocated size: {full}")
        }
        OutputFormat::Json => {
            let value = json!({ "required": required, "fully-allocated": full });
            writeln!(out, "{value:#}")
        }
    }
}
