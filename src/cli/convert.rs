//! `vdtool convert`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::cli::cache::CacheMode;
use crate::cli::common::{
    OpenArgs, ProgressArgs, helped_driver, parse_driver, parse_size, print, target_driver,
};
use crate::cli::create::creator;
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, hints, signal};
use crate::copy::{Joined, MAX_WORKERS, Scan, default_workers};
use crate::error::Error;
use crate::formats;
use crate::formats::profiles::{self, Profile};
use crate::image::Driver;
use crate::image::options::OptionValues;
use crate::output;

mod assemble;
mod damage;
mod delta;
mod disc;
mod options;
mod place;
mod source;
mod stream;

pub(super) use disc::measure;
pub(crate) use source::pick;

const HELP: &str = "\
EXAMPLES:
  vdtool convert disk.vhd disk.raw
  vdtool convert -p --verify disk.raw disk.vhd
  vdtool convert -O vhd -o subformat=fixed disk.img azure.vhd
  vdtool convert part1.raw part2.raw whole.raw
  vdtool convert disk.vhd - | gzip > disk.raw.gz
  vdtool convert -c -o compression_type=zstd disk.raw disk.qcow2
  vdtool convert -c -O qcow2 disk.raw - | ssh host 'cat > disk.qcow2'
  vdtool convert -n disk.vhd /dev/sdb
  vdtool convert --member 2 appliance.ova disk.qcow2
  vdtool convert --for azure disk.qcow2 azure.vhd
  vdtool convert -o cpus=2,memory=4G,network='VM Network' system.qcow2 data.vhd appliance.ova
  vdtool convert game.cue track.iso
  vdtool convert -O cue -o mode=2352 disk.iso new.cue
  vdtool convert -O wav game.cue DIRECTORY
  vdtool convert --parent system.img update.cow new.img
  vdtool convert -O android-cow -B old.img -o version=3,compression=zstd new.img update.cow

The new image is written beside its name and renamed into place once it is whole; of a file that it
replaces it keeps owner, mode, access control list and user attributes, and other names (hard links)
of that file keep the old content. With -n, and on block devices, it is written in place. Where it
has further files (-o data_file, the BIN files of -O cue) all are replaced together: at any moment
the image is the old one or the new one, though after a kill such a file may have a name that begins
with a dot, which the next run over it removes.

A target that names what a process has open (/dev/stdout, /dev/fd/3, /proc/self/fd/3) is written
into where it is a pipe, as with -, and in place where it is a file, which must be open for writing
at its start.

SIGUSR1 has every long job say on stderr how far it is. After SIGINT or SIGTERM nothing is left; to a
job that is stuck, one that comes a second later is the end.

What comes from stdin (-) is raw. Where it begins or ends as an image in some format, it is refused;
-f raw takes its bytes as they are.

APPLIANCES:
  A disk of an OVA, or beside an OVF, is read where it is: nothing is unpacked. Where there are
  several, --member says which; info lists them. Where there is a manifest, the digests of the
  descriptor and of what holds the disk are compared meanwhile: another one is an error, and nothing
  new is under the target's name. --no-manifest leaves that out.

  With -O ova each source becomes a disk, in order, and nothing is joined: streamOptimized VMDK, behind
  a descriptor and a manifest, in the order that importers want. The file is written once; to stdout,
  where sizes and digests must be known first, each source is read and compressed twice. -o describes
  the machine; --ovf takes a descriptor of one's own, of which the disks have the capacities of the
  sources.

COMPRESSION:
  With -c whole clusters are compressed, on all cores; those that do not shrink are stored as they
  are, and zero clusters not at all. The file is the same whatever -j is. With -n, clusters that the
  image has are replaced. -o takes compression_level, 1 to 12 for zlib (1 unless given) and 1 to 22
  for zstd (2 unless given), and strict_window=on, for zlib with levels 1 to 9 (6 unless given).
  A streamOptimized VMDK is compressed with and without -c, by zlib at levels 1 to 12 (5 unless given).
  QEMU writes deflate that looks back 4 KiB at most, and says so to zlib when it reads. Without
  strict_window the limit is 32 KiB, which makes smaller images in a fifth of the time. QEMU reads
  them: it inflates a whole cluster in one call, and then the limit does not matter. So this is the
  default; strict_window=on is for readers that inflate a cluster piece by piece with a window of
  4 KiB.

DISCS:
  A CUE sheet is read as the data of one track (--open-options track=N). Sectors whose codes are wrong
  are corrected where that is beyond doubt, and told; else they are listed and nothing is made, unless
  --salvage takes them as they are stored (those of form 2, which hold no data of a disk, are zeroes).
  -O cue makes a sheet, and beside it NEW.bin: of a disk one track (-o mode=2048|2352|mode2-form1), of a
  CUE sheet the whole disc as it is (-o layout=single|per-track; -o mode stores its data in another way),
  or the one track that --open-options names. -O wav writes the tracks of sound as trackNN.wav into a
  directory, which is made where it is not there, or the one that track=N names under the name given.

UPDATES:
  An Android COW is read over the disk that --parent names. -O android-cow makes one of two disks, the
  old one of -B and the new one: blocks that are elsewhere on the old disk are copied, those that differ
  little are stored as differences, zeroes and what did not change take no data, and the order is one in
  which a merge in place loses nothing. -o takes version, compression and, for version 3, block_factor.
  The file is the same whatever -j is.

STREAMS:
  To stdout (-) go raw and qcow2, compressed or not. An image is read, and compressed, twice: first
  to learn where everything will be, then to write it, so no more than the tables is in memory and
  nothing is on disk. A source that changes meanwhile is an error.

EXIT STATUS:
  0              done
  1              failed, or --verify found a difference; nothing new is under the target's name
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Arguments of `convert`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(
    after_long_help = HELP,
    override_usage = "vdtool convert [OPTIONS] SRC.. DST\n       vdtool convert -O FMT -o help"
)]
pub struct Args {
    /// Format of the sources; without it their content decides.
    #[arg(short, long, alias = "source-format", value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Format of the target; without it the extension decides, else it is raw.
    #[arg(short = 'O', long, value_name = "FMT", value_parser = formats::target_named)]
    pub target_format: Option<&'static Driver>,
    /// Make what this place takes: sets the format and options of the target, before those of -o;
    /// lint tells what it takes.
    #[arg(long = "for", value_name = "NAME", value_parser = profiles::named)]
    pub place: Option<&'static Profile>,
    /// Options of the target's format; "help" lists them.
    #[arg(short = 'o', long, alias = "target-options", value_name = "K=V,..")]
    pub options: Vec<OsString>,
    /// Compress the data, in formats that can.
    #[arg(short, long)]
    pub compress: bool,
    /// Make an image that holds what differs from this one.
    #[arg(short = 'B', long, value_name = "BACKING")]
    pub backing: Option<OsString>,
    /// Format of the backing image of the target; without it its content decides.
    #[arg(short = 'F', long = "target-backing-format", value_name = "FMT", value_parser = parse_driver)]
    pub target_backing_format: Option<&'static Driver>,
    /// Leave out runs of zeroes of at least this size; 0: write everything, holes too [default: 4k]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_sparse)]
    pub sparse_size: Option<u64>,
    /// Write into an image or device that exists.
    #[arg(short = 'n', long)]
    pub no_create: bool,
    /// With -n: the target reads as zeroes already.
    #[arg(long, requires = "no_create")]
    pub target_is_zero: bool,
    /// With -n: copy only what this log of changes names, or this list of ranges.
    #[arg(long, value_name = "LOG", requires = "no_create",
          conflicts_with_all = ["compress", "target_is_zero", "bitmaps", "dirty_bitmap"])]
    pub dirty: Option<PathBuf>,
    /// With -n: copy only what this dirty bitmap of the source names, or of its server where it is an
    /// NBD URI.
    #[arg(long, value_name = "NAME", requires = "no_create",
          conflicts_with_all = ["compress", "target_is_zero", "bitmaps", "snapshot"])]
    pub dirty_bitmap: Option<OsString>,
    /// Convert an internal snapshot, in formats that have them.
    #[arg(short = 'l', long, alias = "source-snapshot", value_name = "SNAPSHOT")]
    pub snapshot: Option<OsString>,
    /// Threads that work [default: one per core, at most 8]
    #[arg(short = 'j', long, alias = "parallel", short_alias = 'm', value_name = "N",
          value_parser = clap::value_parser!(u8).range(1..=MAX_WORKERS as i64))]
    pub jobs: Option<u8>,
    /// Accepted: the layout of the target is in order all the same.
    #[arg(short = 'W', long = "oob-writes")]
    pub out_of_order: bool,
    /// Accepted: data is always copied by the host where it can.
    #[arg(short = 'C', long = "copy-range-offloading")]
    pub copy_range: bool,
    /// Read the new image back and compare it with the sources before it is put in place.
    #[arg(long, conflicts_with = "salvage")]
    pub verify: bool,
    /// Write zeroes for what cannot be read, say where, and go on.
    #[arg(long)]
    pub salvage: bool,
    /// Do not compare the sources with the digests that a manifest has of them.
    #[arg(long)]
    pub no_manifest: bool,
    /// With -O ova: a descriptor of one's own; the sizes of its files are replaced.
    #[arg(long, value_name = "FILE")]
    pub ovf: Option<PathBuf>,
    /// Copy dirty bitmaps, in formats that have them.
    #[arg(long)]
    pub bitmaps: bool,
    /// With --bitmaps: leave out those that a writer did not save.
    #[arg(long, requires = "bitmaps")]
    pub skip_broken_bitmaps: bool,
    /// Most bytes a second; 0: as many as there can be.
    #[arg(short, long, alias = "rate", value_name = "SIZE", value_parser = parse_size)]
    pub rate_limit: Option<u64>,
    /// How the page cache is used for the target.
    #[arg(
        short = 't',
        long,
        value_enum,
        value_name = "CACHE",
        default_value = "unsafe"
    )]
    pub target_cache: CacheMode,
    /// How the page cache is used for the sources.
    #[arg(
        short = 'T',
        long,
        value_enum,
        value_name = "CACHE",
        default_value = "writeback"
    )]
    pub source_cache: CacheMode,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How the sources are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The images to read, joined end to end, and the one to make; "-" is stdin or stdout.
    #[arg(value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

impl Args {
    fn workers(&self) -> usize {
        self.jobs.map_or_else(default_workers, usize::from)
    }

    fn rate(&self) -> Option<u64> {
        self.rate_limit.filter(|rate| *rate > 0)
    }

    fn scan(&self) -> Scan {
        match self.sparse_size {
            None => Scan::Cheapest,
            Some(0) => Scan::Full,
            Some(min) => Scan::Runs(min),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done; what was under the target's name is then still there.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    let args = &for_place(args)?;
    let target = args.files.last().map(PathBuf::as_path);
    if OptionValues::ask_for_help(&args.options) {
        let driver = helped_driver(args.target_format, target, globals)?;
        let options = formats::disc_maker(driver).map(|maker| maker.options);
        let options = options.or(formats::delta_maker(driver).map(|maker| maker.options));
        if let Some(options) = options {
            print(|out| Ok(output::options::specs(out, options)?))?;
            return Ok(Exit::Done);
        }
        let assembler = assemble::assembler(driver);
        if assembler.is_none() {
            creator(driver)?;
        }
        let options = assembler.map(|a| a.options);
        print(|out| {
            Ok(output::options::table(
                out,
                driver,
                options,
                hints::OPTIONS,
            )?)
        })?;
        return Ok(Exit::Done);
    }
    let Some((target, sources)) = args.files.split_last().filter(|(_, s)| !s.is_empty()) else {
        return Err(usage(
            "convert needs SRC, what to read, and DST, what to make",
        ));
    };
    if let Some(sink) = stream::Sink::of(target)? {
        let driver = args.target_format.unwrap_or(formats::PLAIN);
        disc::refuse_stream(driver, "written to")?;
        if formats::delta_maker(driver).is_some() {
            let text = format!("format '{}' is not written to a stream", driver.name);
            return Err(Error::unsupported(text).into());
        }
        match assemble::assembler(driver) {
            None => {
                refuse_description(args, driver)?;
                stream::send(args, sources, sink, globals)?;
            }
            Some(assembler) => {
                let to = assemble::To::Stream(sink);
                assemble::convert(args, driver, assembler, sources, to, globals)?;
            }
        }
        return Ok(Exit::Done);
    }
    let made = target
        .extension()
        .and_then(OsStr::to_str)
        .and_then(formats::made_by_extension);
    let driver = target_driver(args.target_format.or(made), target, globals)?;
    if let Some(maker) = formats::disc_maker(driver) {
        if sources.iter().any(|path| is_stream(path)) {
            disc::refuse_stream(driver, "made of")?;
        }
        signal::catch()?;
        let sources = source::open_for(args, sources)?;
        disc::convert(args, &sources, driver, maker, target, globals)?;
        return Ok(Exit::Done);
    }
    if let Some(maker) = formats::delta_maker(driver) {
        signal::catch()?;
        delta::convert(args, driver, maker, sources, target, globals)?;
        return Ok(Exit::Done);
    }
    if let Some(assembler) = assemble::assembler(driver) {
        signal::catch()?;
        let to = assemble::To::File(target);
        assemble::convert(args, driver, assembler, sources, to, globals)?;
        return Ok(Exit::Done);
    }
    refuse_description(args, driver)?;
    options::refuse(args, driver)?;
    signal::catch()?;
    match sources {
        [source] if is_stream(source) => stream::from_stdin(args, driver, target, globals)?,
        _ => {
            let sources = source::open(args, sources)?;
            place::convert(args, &sources, driver, target, globals)?;
        }
    }
    Ok(Exit::Done)
}

/// Makes `target` hold what `sources` do, as `args` say, which name neither.
///
/// # Errors
/// Those of [`run`].
pub(super) fn write(
    args: &Args,
    sources: &Joined,
    driver: &'static Driver,
    target: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    options::refuse(args, driver)?;
    place::convert(args, sources, driver, target, globals)
}

/// The arguments, with what the place they are for asks for.
fn for_place(args: &Args) -> anyhow::Result<Args> {
    let mut args = args.clone();
    let Some(place) = args.place else {
        return Ok(args);
    };
    let driver = formats::named(place.format)?;
    if let Some(other) = args.target_format.filter(|other| *other != driver) {
        return Err(usage(format!(
            "--for {} makes format '{}', and -O says '{}'",
            place.name, driver.name, other.name
        )));
    }
    args.target_format = Some(driver);
    // The last one of an option counts.
    let options = place.options.iter().map(OsString::from);
    args.options = options.chain(args.options).collect();
    Ok(args)
}

fn refuse_description(args: &Args, driver: &Driver) -> anyhow::Result<()> {
    match args.ovf {
        None => Ok(()),
        Some(_) => Err(usage(format!(
            "--ovf is not for format '{}', which has one disk",
            driver.name
        ))),
    }
}

fn is_stream(path: &Path) -> bool {
    path.as_os_str() == OsStr::new("-")
}

/// The shortest run of zeroes to leave out, for clap.
fn parse_sparse(text: &str) -> Result<u64, String> {
    const MOST: u64 = 16 << 20;
    match parse_size(text)? {
        size if size.is_multiple_of(512) && size <= MOST => Ok(size),
        size => Err(format!(
            "{size} bytes (allowed: multiples of 512 up to {MOST}, and 0 to write everything)"
        )),
    }
}
