//! `vdtool amend`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use crate::chain::open::{ChainOptions, Follow};
use crate::chain::{self, Chain};
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, ProgressArgs, parse_driver, print};
use crate::cli::create::{itself, option};
use crate::cli::exit::{Exit, usage};
use crate::cli::resize::{self, PreallocationArg};
use crate::cli::{Globals, progress, signal};
use crate::error::{Context, Error, Result};
use crate::image::options::OptionValues;
use crate::image::{Amend, Driver};
use crate::output;
use crate::output::bar::Bar;
use crate::storage::HostId;
use crate::storage::open::Access;
use crate::util::progress::Watcher;

const HELP: &str = "\
EXAMPLES:
  vdtool amend -o compat=1.1 old.qcow2
  vdtool amend -o refcount_bits=64 disk.qcow2
  vdtool amend -o size=20G disk.qcow2
  vdtool amend -o backing_file=moved/base.qcow2,backing_fmt=qcow2 child.qcow2
  vdtool amend -o hidden=1 snapshot.vhd
  vdtool amend -o help disk.qcow2

NOTES:
  Only what is named is changed. A change is on stable media when the command ends; killed on the
  way, it leaves the image as it was or as it is to be, and perhaps leaks. With size= the disk
  grows; \"resize --shrink\" makes one smaller.

EXIT STATUS:
  0   done
  1   failed
  2   wrong usage
  63  the format has no such operation, or the image cannot be so";

/// Arguments of `amend`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// The options to change; "help" lists those that can be.
    #[arg(short = 'o', long, value_name = "K=V,..", required = true)]
    pub options: Vec<OsString>,
    /// Accepted for qemu-img's sake: it is about keys of encrypted images.
    #[arg(long, hide = true)]
    pub force: bool,
    /// How the page cache is used.
    #[arg(short = 't', long, value_enum, value_name = "CACHE")]
    pub cache: Option<CacheMode>,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How to open the image.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let help = OptionValues::ask_for_help(&args.options);
    let access = if help { Access::Read } else { Access::Write };
    let options = args.open.plan_cached(args.format, access, args.cache)?;
    let options = ChainOptions {
        follow: Follow::No,
        ..options
    };
    let mut chain = chain::open::open(&args.file, &options)?;
    let format = chain.top().driver();
    let specs = amend_of(&mut chain).at(&args.file)?.options();
    if help {
        print(|out| Ok(output::options::specs(out, specs)?))?;
        return Ok(Exit::Done);
    }
    let values = OptionValues::parse(specs, format.name, &args.options)
        .map_err(|e| usage(e.at(&args.file)))?;
    refuse_itself(&chain, &values).at(&args.file)?;
    if let Some(format) = values.text("backing_fmt").filter(|f| !f.is_empty()) {
        parse_driver(format).map_err(|e| option("backing_fmt", &e.at(format)))?;
    }
    let size = values.number("size");
    if let Some(size) = size {
        may_grow(&chain, size).at(&args.file)?;
    }
    signal::catch()?;
    let bar = Arc::new(progress::start("amend", 0, &args.progress, globals));
    let watcher = Arc::clone(&bar);
    chain.top_mut().watch(Watcher::new(watcher));
    amend_of(&mut chain)
        .and_then(|image| image.amend(&values))
        .at(&args.file)?;
    chain.close()?;
    drop(chain);
    Arc::into_inner(bar).into_iter().for_each(Bar::finish);
    size.map_or(Ok(()), |size| grow(args, format, size))?;
    Ok(Exit::Done)
}

/// Refuses to name the image as a further file of its own: nothing could open it then.
fn refuse_itself(chain: &Chain, values: &OptionValues) -> Result<()> {
    for (key, name) in values.files().filter(|(_, name)| !name.is_empty()) {
        let id = HostId::named(chain::open::home(chain)?.path().join(name));
        if id.is_some() && chain.top().storage().host_id() == id {
            return Err(itself(key));
        }
    }
    Ok(())
}

/// Refuses what loses data that nobody said may be lost.
fn may_grow(chain: &Chain, size: u64) -> Result<()> {
    match chain.virtual_size() {
        now if size < now => Err(Error::invalid(format!(
            "option 'size' is {size}, less than the {now} bytes of the disk (allowed: {now} and \
             more; resize --shrink makes a disk smaller)"
        ))),
        _ => Ok(()),
    }
}

/// Gives the disk its new size, with the layers below it open: what they have past the old size
/// must not show.
fn grow(args: &Args, format: &'static Driver, size: u64) -> anyhow::Result<()> {
    let options = args
        .open
        .plan_cached(Some(format), Access::Write, args.cache)?;
    let chain = chain::open::open(&args.file, &options)?;
    resize::set_size(&chain, size, PreallocationArg::Off)?;
    Ok(chain.close()?)
}

fn amend_of(chain: &mut Chain) -> Result<&mut dyn Amend> {
    let format = chain.top().driver().name;
    chain.top_mut().as_amend().ok_or_else(|| {
        Error::unsupported(format!(
            "images of format '{format}' have no options to change"
        ))
    })
}
