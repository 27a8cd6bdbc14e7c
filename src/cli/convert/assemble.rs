//! Sources that become disks of one file, each of them one disk.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::open::ChainOptions;
use crate::chain::{self, Chain, HostFile};
use crate::cli::convert::options::codec_options;
use crate::cli::convert::place::{Losses, named};
use crate::cli::convert::stream::{Image, Output, Sink};
use crate::cli::convert::{Args, is_stream, source};
use crate::cli::create::{Generic, creator};
use crate::cli::exit::{self, usage};
use crate::cli::hints::Hints;
use crate::cli::sealed;
use crate::cli::target::{Target, settle};
use crate::cli::{Globals, interrupt, kept, progress};
use crate::copy::assemble::{into_storage, into_stream, measured};
use crate::copy::{self, Allocation, Joined, Lost, Outcome};
use crate::error::Error;
use crate::formats;
use crate::image::Driver;
use crate::image::assemble::{Assembler, Assembly, Plan};
use crate::image::compress::Sequence;
use crate::image::create::CreateOptions;
use crate::image::options::OptionValues;
use crate::storage;
use crate::storage::open::{Access, StorageOptions};
use crate::storage::window::all_bytes;
use crate::util::text::split_equals;

/// Most bytes of a description of the user's own.
const MAX_DESCRIPTION: u64 = 16 << 20;

/// How files of a target's format are made of disks; `None`: they are disks themselves.
pub(super) fn assembler(driver: &Driver) -> Option<&'static Assembler> {
    formats::container(driver)?.assembler
}

/// Where the file goes.
pub(super) enum To<'a> {
    File(&'a Path),
    Stream(Sink),
}

/// The disks and what stands around them.
struct Job<'a> {
    args: &'a Args,
    globals: &'a Globals,
    /// The format of the file, and of the disks in it.
    driver: &'static Driver,
    disk_driver: &'static Driver,
    disks: Vec<(Joined, CreateOptions)>,
    compress: Vec<OsString>,
    assembly: Box<dyn Assembly>,
    lost: Losses,
}

/// Makes a file of `sources`.
pub(super) fn convert(
    args: &Args,
    driver: &'static Driver,
    assembler: &'static Assembler,
    sources: &[PathBuf],
    to: To<'_>,
    globals: &Globals,
) -> anyhow::Result<()> {
    refuse(args, driver, sources)?;
    let generic = Generic::take(&args.options)?;
    if generic.size.is_some() || generic.backing.is_some() || generic.backing_format.is_some() {
        return Err(usage(format!(
            "size and backing_file are not for format '{}'",
            driver.name
        )));
    }
    let chains = source::open_each(args, sources)?;
    args.open.parents.after(&chains).refuse_any()?;
    let name = match to {
        To::File(path) => path,
        To::Stream(_) => Path::new("-"),
    };
    let job = Job::new(args, driver, assembler, &generic, chains, name, globals)?;
    match to {
        To::File(path) => job.place(path, &generic.hints),
        To::Stream(sink) if generic.hints.are_given() || args.verify => {
            drop(sink);
            Err(usage("--verify and hints for files are not for stdout"))
        }
        To::Stream(sink) => job.send(sink),
    }
}

/// Refuses what such a file has not.
fn refuse(args: &Args, driver: &Driver, sources: &[PathBuf]) -> anyhow::Result<()> {
    if sources.iter().any(|path| is_stream(path)) {
        let text = format!("- (stdin) is not for format '{}'", driver.name);
        return Err(usage(text));
    }
    let backing = args.backing.is_some() || args.target_backing_format.is_some();
    if args.no_create || backing || args.bitmaps {
        let text = format!(
            "-n, -B, -F and --bitmaps are not for format '{}'",
            driver.name
        );
        return Err(usage(text));
    }
    Ok(())
}

impl<'a> Job<'a> {
    fn new(
        args: &'a Args,
        driver: &'static Driver,
        assembler: &'static Assembler,
        generic: &Generic,
        chains: Vec<Chain>,
        name: &Path,
        globals: &'a Globals,
    ) -> anyhow::Result<Self> {
        let disk_driver = formats::named(assembler.disk_format)?;
        let is_codec = |pair: &&OsString| {
            let key = split_equals(pair).map_or(pair.as_os_str(), |(key, _)| key);
            codec_options(disk_driver).iter().any(|s| s.name == key)
        };
        let (compress, others): (Vec<_>, Vec<_>) = generic.others.iter().partition(is_codec);
        let wrong = |e: Error| usage(e.at(name));
        let values = OptionValues::parse(assembler.options, driver.name, &others).map_err(wrong)?;
        let disk_options = (assembler.disk_options)(&values).map_err(wrong)?;
        let rows = creator(disk_driver)?;
        let mut disks = Vec::with_capacity(chains.len());
        for chain in chains {
            let joined = Joined::new(vec![chain])?;
            let options = CreateOptions {
                size: joined.len(),
                values: OptionValues::parse(rows.options, disk_driver.name, &disk_options)?,
                ..CreateOptions::default()
            };
            disks.push((joined, (rows.settle)(&options).map_err(|e| e.at(name))?));
        }
        let sizes: Vec<u64> = disks.iter().map(|(_, options)| options.size).collect();
        let description = args.ovf.as_deref().map(read_description).transpose()?;
        let plan = Plan {
            disks: &sizes,
            values: &values,
            stem: name.file_stem().and_then(OsStr::to_str),
            description: description.as_deref(),
        };
        Ok(Self {
            args,
            globals,
            driver,
            disk_driver,
            compress: compress.into_iter().cloned().collect(),
            assembly: (assembler.plan)(&plan).map_err(|e| match &args.ovf {
                Some(path) => e.at(path),
                None => e.at(name),
            })?,
            disks,
            lost: Losses::default(),
        })
    }

    fn files(&self) -> Vec<HostFile> {
        let chains = self.disks.iter().flat_map(|(joined, _)| joined.chains());
        chains.flat_map(Chain::files).collect()
    }

    /// Compares the digests of what the sources are kept in while `work` reads them.
    fn sealed<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let layers = self.disks.iter().flat_map(|(joined, _)| joined.chains());
        sealed::beside_all(self.args.no_manifest, layers.flat_map(Chain::layers), work)
    }

    /// Makes the file under its name.
    fn place(&self, path: &Path, hints: &Hints) -> anyhow::Result<()> {
        kept::refuse(path, &self.files())?;
        let new = Target::begin(path)?;
        new.note_replaced(self.globals);
        let done = self.fill(new.path(), path, hints);
        done.map_err(|e| named(e, &new))?;
        Ok(new.commit(self.args.target_cache.durable())?)
    }

    fn fill(&self, written: &Path, path: &Path, hints: &Hints) -> anyhow::Result<()> {
        let mut options = StorageOptions {
            access: Access::Write,
            flushing: self.args.target_cache.flushing(),
            ..StorageOptions::default()
        };
        if let Some(caching) = self.args.target_cache.caching() {
            options.caching = caching;
        }
        let storage = storage::open::open(written, &options)?;
        kept::refuse_open(path, storage.host_id(), &self.files())?;
        hints.give(&*storage, path);
        let mut writer = Writer::new(self);
        self.sealed(|| {
            let (assembly, count) = (&*self.assembly, self.disks.len());
            into_storage(assembly, count, &*storage, &mut |number, out| {
                writer.write(number, out)
            })
        })?;
        settle(&*storage)?;
        if self.args.target_cache.durable() == crate::cli::target::Durable::Yes {
            storage.sync()?;
        }
        drop(storage);
        self.lost.sum_up(path);
        match self.args.verify {
            true => self.verify(written),
            false => Ok(()),
        }
    }

    /// Reads the disks back through nothing that wrote them.
    fn verify(&self, written: &Path) -> anyhow::Result<()> {
        for (number, (sources, _)) in self.disks.iter().enumerate() {
            let options = ChainOptions {
                format: Some(self.driver),
                member: Some((number + 1).to_string().into()),
                ..ChainOptions::read()
            };
            let found = Joined::new(vec![chain::open::open(written, &options)?])?;
            let total = sources.len().max(found.len());
            let bar = progress::start("verify", total, &self.args.progress, self.globals);
            let workers = self.args.workers();
            let outcome = copy::compare(sources, &found, Allocation::Ignored, workers, &bar);
            match outcome.map_err(|f| f.error)? {
                Outcome::Content(at) => {
                    let text = format!(
                        "disk {} differs from its source at {at:#x} when read back",
                        number + 1
                    );
                    return Err(Error::corrupt(text).at(written).into());
                }
                _ => bar.finish(),
            }
        }
        Ok(())
    }

    /// Writes the file to a stream.  Signals end it at once: there is nothing to clean up.
    fn send(&self, sink: Sink) -> anyhow::Result<()> {
        let mut writer = Writer::new(self);
        // Before the first byte goes where it cannot be taken back.
        let stored = self.sealed(|| {
            let (assembly, count) = (&*self.assembly, self.disks.len());
            measured(assembly, count, &mut |number, out| {
                writer.write(number, out)
            })
        })?;
        let closed = AtomicBool::new(false);
        let out = Output::new(sink.open()?, &closed);
        let mut out = std::io::BufWriter::with_capacity(super::stream::BUFFER, out);
        let write = &mut |number, out: &mut (dyn Write + Send)| writer.write(number, out);
        let sent = into_stream(&*self.assembly, &stored, &mut out, write);
        sent.map_err(|e| match closed.load(Ordering::Relaxed) {
            true => exit::NobodyReads.into(),
            false => e,
        })?;
        self.lost.sum_up(Path::new("stdout"));
        Ok(())
    }
}

/// What writes the disks of a job.
struct Writer<'a> {
    job: &'a Job<'a>,
    /// How each is written, from when that begins: the same both times.
    sequences: Vec<Option<Box<dyn Sequence>>>,
}

impl<'a> Writer<'a> {
    fn new(job: &'a Job<'a>) -> Self {
        Self {
            job,
            sequences: job.disks.iter().map(|_| None).collect(),
        }
    }

    /// Writes the disk with this number to a stream.
    fn write(&mut self, number: usize, out: &mut (dyn Write + Send)) -> anyhow::Result<()> {
        interrupt::check()?;
        let Job {
            args,
            globals,
            disk_driver,
            compress,
            lost,
            ..
        } = self.job;
        let salvage = |at: u64, len: u64, e: &Error| lost.warn(at, len, e);
        let salvage = args.salvage.then_some(&salvage as &Lost<'_>);
        let image = Image {
            args,
            driver: disk_driver,
            compress,
        };
        let (sources, options) = &self.job.disks[number];
        let sequence = &mut self.sequences[number];
        let sequence = match sequence {
            Some(sequence) => sequence,
            None => sequence.insert(image.plan(options, sources)?),
        };
        image.send(&mut **sequence, sources, out, salvage, globals)
    }
}

fn read_description(path: &Path) -> crate::Result<Vec<u8>> {
    let storage = storage::open::open(path, &StorageOptions::default())?;
    all_bytes(&*storage, MAX_DESCRIPTION, "the description")
}
