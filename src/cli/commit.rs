//! `vdtool commit`.

mod children;
mod figures;
mod merge;
mod refuse;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::chain::open::ChainOptions;
use crate::chain::{self, Chain, HostFile};
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, ProgressArgs, parse_driver};
use crate::cli::exit::Exit;
use crate::cli::{Globals, progress, signal};
use crate::copy::{self, default_workers};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Driver, Image, Role};
use crate::storage::HostId;
use crate::storage::open::{Access, StorageOptions};
use crate::util::text::printable;

pub(super) use children::{Plan, Wanted, link, relinks};

const HELP: &str = "\
EXAMPLES:
  vdtool commit child.qcow2
  vdtool commit -d child.vhd
  vdtool commit -b base.qcow2 grandchild.qcow2
  vdtool commit -b base.vhd --children top.vhd --remove middle.vhd
  vdtool commit --parent system.img update.cow

NOTES:
  What the image has goes into its backing image, or, with -b, what all images above BASE have, the
  top-most where several have it, each byte once. A base that is smaller grows. Without -b and -d
  the image is emptied afterwards, in formats that can; its disk reads the same before, during and
  after. Images between the top and BASE, and others that have BASE below them, hold nonsense
  afterwards and are to be deleted. Of an image that records the state of its backing image, such as
  vdi and vhdx, the record is brought up to date; where the program is killed before,
  --parent-changed accept reads it, and commit can be run again with it.

  With --children FILE may lie in the middle of a chain. All that it and the images down to BASE have
  goes into BASE, then each CHILD has BASE below it, and at every moment each CHILD reads as before
  and is accepted by all checks. In the end FILE and the images between are emptied and read as FILE
  did, unless an image between one of them and BASE is shorter; --remove removes them. Nothing may
  have any of these images below it but the ones that are named; they are looked for in the
  directories of FILE and BASE, and images elsewhere cannot be known. Where FILE is shorter than
  BASE, no CHILD may be longer than FILE. Where the program is killed, or the host fails, the same
  command goes on from there; once all is done it says so, and changes nothing. The identity and the
  recorded state of BASE stay what they are, but where FILE lies right over it and can have both
  states recorded (vhdx).

  An Android COW is merged as a phone does it, into the image right below it, which --parent names: blocks
  that are made of old ones go through the scratch area of the file, a window of up to 510 at a time, and
  the file says how far the merge is. Whatever stops it, a power cut too, FILE over its base reads as
  before, and the same command goes on from there. SIGINT and SIGTERM stop it between two windows. One
  whose order would lose data is refused, and nothing is changed. It is left as it is, and all its
  operations are then said to be merged.

EXIT STATUS:
  0              done
  1              failed: the disk of FILE is unharmed, and commit can be run again
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; as 1";

/// Arguments of `commit`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// The image below FILE to commit into, by the name that the chain has for it, else by its path;
    /// without it, the one right below. Implies -d.
    #[arg(short, long, value_name = "BASE")]
    pub base: Option<OsString>,
    /// Leave the image as it is instead of emptying it.
    #[arg(short, long)]
    pub drop: bool,
    /// An image that has FILE below it, and is to have BASE below it instead; repeatable, one for
    /// each. FILE may then lie in the middle of a chain.
    #[arg(long, value_name = "CHILD", conflicts_with = "drop")]
    pub children: Vec<PathBuf>,
    /// Remove FILE and the images between it and BASE, once all is on stable media.
    #[arg(long, requires = "children")]
    pub remove: bool,
    /// Say what would be moved, and change nothing.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// How the page cache is used.
    #[arg(short = 't', long, value_enum, value_name = "CACHE")]
    pub cache: Option<CacheMode>,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the images are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The top image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    if !args.children.is_empty() {
        return children::run(args, globals);
    }
    let (target, is_merged) = find(args)?;
    if is_merged {
        return merge::run(args, &target, globals);
    }
    if args.dry_run {
        let options = args
            .open
            .plan_cached(args.format, Access::Read, args.cache)?;
        let chain = chain::open::open(&args.file, &options)?;
        figures::Figures::of(&chain, target.layer)?.say(globals)?;
        return Ok(Exit::Done);
    }
    let empties = !args.drop && args.base.is_none();
    let access = if empties { Access::Write } else { Access::Read };
    let options = args.open.plan_cached(args.format, access, args.cache)?;
    let (mut upper, base) = chain::open::open_in_two(&args.file, &options, &target)?;
    if empties {
        expect(&mut upper, &base).map_err(|e| e.at(&args.file))?;
    }
    signal::catch()?;
    let total = upper.virtual_size();
    let bar = progress::start("commit", total, &args.progress, globals);
    let done = copy::commit(&upper, &base, default_workers(), &bar);
    if done.is_ok() {
        bar.finish();
    }
    // On stable media before the top image lets go of it.
    let done = done.and_then(|()| base.close());
    let emptied = match (&done, empties) {
        (Ok(()), true) => empty(&mut upper, &args.file, globals),
        _ => Ok(()),
    };
    // However it ended: its disk is what it was, over what the base has become.
    accept(upper, &base, &options, globals);
    done?;
    emptied?;
    globals.say("Image committed.")?;
    Ok(Exit::Done)
}

/// The image that is committed into, and whether FILE is merged into it in place.
fn find(args: &Args) -> anyhow::Result<(HostFile, bool)> {
    let chain = chain::open::open(
        &args.file,
        &args
            .open
            .plan_cached(args.format, Access::Read, args.cache)?,
    )?;
    let depth = match &args.base {
        None => 1,
        Some(base) => depth_of(&chain, base, &args.file)?,
    };
    let mut files = chain.files().into_iter();
    let found = files.find(|f| f.layer == depth && f.role == Role::Header);
    let found = found.ok_or_else(|| {
        let text = "has no backing file to commit into";
        Error::new(ErrorKind::Invalid, text).at(&args.file)
    })?;
    Ok((found, chain.top().as_merge().is_some()))
}

/// The layer of a chain, below its top, that the image above it calls `base`; else the one that is
/// the file of that path.
fn depth_of(chain: &Chain, base: &OsStr, file: &Path) -> Result<usize> {
    let is_called = |image: &dyn Image| {
        let names = image.backing().map(|b| b.names).unwrap_or_default();
        names.iter().any(|name| name.path == base)
    };
    let below = chain.layers().len() - 1;
    let named = chain
        .layers()
        .iter()
        .take(below)
        .position(|l| is_called(&**l));
    if let Some(above) = named {
        return Ok(above + 1);
    }
    let path = Path::new(base);
    let id = HostId::named(path);
    let mut files = chain.files().into_iter();
    let found = files.find(|f| f.layer > 0 && f.role == Role::Header && f.is_same(id, path));
    found.map(|f| f.layer).ok_or_else(|| {
        let text = format!(
            "has no image below it that is called '{}', and none at that path",
            printable(base)
        );
        Error::new(ErrorKind::Invalid, text).at(file)
    })
}

/// Has the image right above the base, if that is the only one above it, say which state the base is
/// about to come to, where its format has a place for that: whatever ends the program, both are one disk
/// then.  Whether it says so.
fn expect(upper: &mut Chain, base: &Chain) -> Result<bool> {
    let (now, next) = (base.top().state(), base.top().next_state()?);
    let recorded = upper.top().backing().and_then(|backing| backing.state);
    let (1, Some(next), Some(relink)) = (upper.layers().len(), next, upper.top_mut().as_relink())
    else {
        return Ok(false);
    };
    // Where a run that was killed had brought it to another state.
    if let Some(now) = now.filter(|now| recorded != Some(*now)) {
        relink.accept_state(now)?;
    }
    relink.expect_state(next)?;
    Ok(true)
}

/// A layer above the base.
struct Above {
    driver: &'static Driver,
    path: PathBuf,
    id: Option<HostId>,
    /// The state that it says the image below it is in.
    recorded: Option<Uuid>,
    /// Another one that it may be in.
    other: Option<Uuid>,
}

/// Has the images above the base, up to the one that was committed, say that what is below them is in
/// the state that it is in now, where they say which.  What those between read as has changed with the
/// base, so they are in another state too.
fn accept(upper: Chain, base: &Chain, options: &ChainOptions, globals: &Globals) {
    let above = |layer: &dyn Image| Above {
        driver: layer.driver(),
        path: layer
            .storage()
            .path()
            .map(Path::to_owned)
            .unwrap_or_default(),
        id: layer.storage().host_id(),
        recorded: layer.backing().and_then(|backing| backing.state),
        other: layer.other_state(),
    };
    let mut layers: Vec<Above> = upper.layers().iter().map(|l| above(&**l)).collect();
    // Their own locks would keep it out.
    drop(upper);
    let mut below = base.top().state();
    while let Some(layer) = layers.pop() {
        let Some(state) = below.filter(|_| layer.recorded.is_some()) else {
            return;
        };
        if layer.recorded == Some(state) && layer.other.is_none() {
            return;
        }
        match tell(&layer, state, !layers.is_empty(), options) {
            Ok(own) => below = own,
            Err(e) => {
                return globals.note(&format!(
                    "{}: still says that its backing image is in another state ({}); \
                     --parent-changed accept reads it",
                    printable(&layer.path),
                    e.message()
                ));
            }
        }
    }
}

/// Tells a layer the state of what is below it, and gives it another one itself where it `changed`;
/// the state it is in then.
fn tell(
    layer: &Above,
    state: Uuid,
    changed: bool,
    options: &ChainOptions,
) -> crate::Result<Option<Uuid>> {
    let options = ChainOptions {
        format: Some(layer.driver),
        order: options.order,
        storage: StorageOptions {
            access: Access::Write,
            ..options.storage
        },
        ..ChainOptions::write()
    };
    let mut chain = chain::open::open_top(&layer.path, &options)?;
    if chain.top().storage().host_id() != layer.id {
        return Err(Error::new(ErrorKind::Io, "was replaced meanwhile"));
    }
    let relink = chain.top_mut().as_relink();
    let relink = relink.ok_or_else(|| Error::unsupported("the format cannot"))?;
    if changed {
        // First, so that no child of it reads what it does not know of.
        relink.renew_state()?;
    }
    relink.accept_state(state)?;
    Ok(chain.top().state())
}

/// Takes from the top image what its backing image has now.
fn empty(upper: &mut Chain, file: &Path, globals: &Globals) -> anyhow::Result<()> {
    let format = upper.top().driver().name;
    // It reads as before.
    upper.top().keep_state();
    let done = match upper.top_mut().as_empty() {
        Some(top) => top.empty(),
        None => Err(Error::unsupported("the format cannot")),
    };
    match done {
        Err(e) if e.kind() == ErrorKind::Unsupported => globals.note(&format!(
            "{}: is not emptied ({}, format '{format}'); what it has is in the backing image too",
            printable(file),
            e.message()
        )),
        done => done.map_err(|e| e.at(file))?,
    }
    Ok(upper.close()?)
}
