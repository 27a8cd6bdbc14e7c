//! The image that `convert` makes: created, written, verified, put in place.

use std::ffi::{OsStr, OsString};
use std::io::BufWriter;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::chain::open::ChainOptions;
use crate::chain::{self, Chain, HostFile};
use crate::cli::backing;
use crate::cli::cache::CacheMode;
use crate::cli::common::ParentArgs;
use crate::cli::convert::options::{Given, given};
use crate::cli::convert::{Args, damage, stream};
use crate::cli::create::{self, Generic, creator};
use crate::cli::dirty::marks;
use crate::cli::exit::{complain, usage};
use crate::cli::hints::Hints;
use crate::cli::sealed;
use crate::cli::target::{Target, refuse_open, settle};
use crate::cli::{Globals, kept, progress};
use crate::copy::bitmaps::{Broken, bitmaps_of, bitmaps_of_mut, copy_bitmaps};
use crate::copy::{self, Allocation, Before, Convert, Joined, Outcome, Scan};
use crate::dirty::Regions;
use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateOptions, Preallocation};
use crate::image::open::WriteOrder;
use crate::image::options::OptionValues;
use crate::image::{Driver, Role};
use crate::nbd::uri::is_uri;
use crate::storage;
use crate::storage::append::Appended;
use crate::storage::open::{Access, StorageOptions};
use crate::storage::{HostId, Storage};
use crate::util::text::printable;

/// Warnings about unreadable places that are printed; all are counted.
const MAX_WARNINGS: u64 = 20;

/// What is written to, and how.
struct Place<'a> {
    args: &'a Args,
    globals: &'a Globals,
    driver: &'static Driver,
    /// As the user named it.
    name: &'a Path,
    /// The file to open.
    path: PathBuf,
    before: Before,
    order: WriteOrder,
    /// What the user says lies below it.
    parents: ParentArgs,
    /// What the user says lies below one that exists.
    named: Option<PathBuf>,
    /// How data is compressed.
    compress: Vec<OsString>,
    /// What alone is copied.
    marks: Option<Regions>,
    /// Whether all of it was given space when it was made.
    given_space: bool,
    /// Its further files: what it calls them, and where they are until it is whole.
    files: Vec<(OsString, PathBuf)>,
    /// What the host is told about it, where it is new.
    hints: Hints,
}

/// Makes `target` hold what `sources` do.
pub(super) fn convert(
    args: &Args,
    sources: &Joined,
    driver: &'static Driver,
    target: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    let mut files: Vec<HostFile> = sources.chains().flat_map(Chain::files).collect();
    kept::refuse(target, &files)?;
    if args.no_create {
        return in_place(args, sources, driver, target, globals);
    }
    let given = given(args, driver)?;
    let backing = below(args, &given.new, target, sources, globals)?;
    if let Some(below) = &backing {
        backing::refuse_uri(driver, &below.create.name).map_err(|e| e.at(target))?;
        files.extend(below.disk.chains().flat_map(Chain::files));
        kept::refuse(target, &files)?;
    }
    let mut parents = rest(args, sources);
    match &backing {
        Some(below) => parents.parent.insert(0, below.create.absolute.clone()),
        None => parents.refuse_any()?,
    }
    let mut options = create_options(
        args,
        &given.new,
        driver,
        target,
        sources.len(),
        backing.as_ref(),
    )?;
    let settled = (creator(driver)?.settle)(&options).map_err(|e| e.at(target))?;
    (options.named, options.in_order) = (settled.named, settled.in_order);
    given.refuse_idle(args, options.in_order)?;
    let Given { new, compress } = given;
    let hints = new.hints;
    let new = create::target(target, &options, &files)?;
    new.note_replaced(globals);
    let given_space = matches!(
        options.preallocation(),
        Preallocation::Falloc | Preallocation::Full
    );
    let names: Vec<OsString> = options.further().map(|(_, name)| name.to_owned()).collect();
    let committed = options.clone();
    let place = Place {
        args,
        globals,
        driver,
        name: target,
        path: new.path().to_owned(),
        before: match (&backing, new.in_place()) {
            (Some(_), _) => Before::Backed,
            // Of a disk kept as it is, a device shows what it held.
            (None, true) if driver.is_plain => Before::Unknown,
            (None, _) => Before::Zeroes,
        },
        order: WriteOrder::Unordered,
        parents,
        named: None,
        compress,
        marks: None,
        given_space,
        files: names
            .into_iter()
            .zip(new.others().map(Path::to_owned))
            .collect(),
        hints,
    };
    let below = backing.as_ref().map(|b| &b.disk);
    let done = sealed::beside(args.no_manifest, sources, || match options.in_order {
        true => place.write_in_order(&options, sources, below),
        false => {
            let created = place.create(&mut options);
            created.and_then(|()| place.fill(sources, below))
        }
    });
    done.map_err(|e| named(e, &new))?;
    Ok(create::commit(
        new,
        args.target_cache.durable(),
        driver,
        &committed,
    )?)
}

/// What `--dirty` or `--dirty-bitmap` names of the one source.
fn marks(args: &Args, sources: &Joined) -> anyhow::Result<Option<Regions>> {
    let size = sources.len();
    let mut chains = sources.chains();
    let (Some(source), None) = (chains.next(), chains.next()) else {
        return match args.dirty.is_some() || args.dirty_bitmap.is_some() {
            true => Err(usage("--dirty and --dirty-bitmap are for one source")),
            false => Ok(None),
        };
    };
    Ok(match (&args.dirty, &args.dirty_bitmap) {
        (Some(log), _) => Some(marks::read(log, size).map_err(|e| e.at(log))?),
        (None, Some(name)) => {
            let path = source.top().storage().path();
            let marks = marks::of_bitmap(source, name, size).map_err(|e| e.at_opt(path))?;
            Some(marks)
        }
        (None, None) => None,
    })
}

/// Writes into an image that exists.
fn in_place(
    args: &Args,
    sources: &Joined,
    driver: &'static Driver,
    target: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    let given = given(args, driver)?;
    given.refuse_idle(args, false)?;
    let Given { new, compress } = given;
    if new.is_given() {
        return Err(usage("-o is for new images, and -n makes none"));
    }
    let below = below_existing(args, target)?;
    let place = Place {
        args,
        globals,
        driver,
        name: target,
        path: target.to_owned(),
        before: match (&below, args.target_is_zero) {
            (Some(_), true) => {
                let why = "--target-is-zero and -B exclude each other: what the target does not \
                           have itself reads as its backing image does";
                return Err(usage(why));
            }
            (Some(_), false) => Before::Itself,
            (None, true) => Before::Zeroes,
            (None, false) => Before::Unknown,
        },
        order: WriteOrder::Ordered,
        parents: rest(args, sources),
        named: below,
        compress,
        marks: marks(args, sources)?,
        given_space: false,
        files: Vec::new(),
        hints: Hints::default(),
    };
    sealed::beside(args.no_manifest, sources, || place.fill(sources, None))
}

impl Place<'_> {
    fn storage(&self, access: Access) -> StorageOptions {
        let mut options = StorageOptions {
            access,
            flushing: self.args.target_cache.flushing(),
            ..StorageOptions::default()
        };
        if let Some(caching) = self.args.target_cache.caching() {
            options.caching = caching;
        }
        options
    }

    fn create(&self, options: &mut CreateOptions) -> anyhow::Result<()> {
        let storage = storage::open::open(&self.path, &self.storage(Access::Write))?;
        self.hints.give(&*storage, self.name);
        for (_, path) in &self.files {
            let file = storage::open::open(path, &self.storage(Access::Write))?;
            options.files.push(file);
        }
        let options = &std::mem::take(options);
        (creator(self.driver)?.create)(&*storage, options).map_err(|e| e.at(&self.path))?;
        if self.args.scan() == Scan::Full && self.driver.is_plain {
            // All of it will be written: whether there is room is known at once.
            reserve(&*storage, 0..options.size)?;
        }
        for written in std::iter::once(&storage).chain(&options.files) {
            settle(&**written)?;
        }
        Ok(())
    }

    /// Makes an image that is written from its first byte to its last.
    fn write_in_order(
        &self,
        options: &CreateOptions,
        sources: &Joined,
        backing: Option<&Joined>,
    ) -> anyhow::Result<()> {
        if backing.is_some() || self.args.bitmaps {
            return Err(usage(
                "-B and --bitmaps are not for an image that is written in order",
            ));
        }
        let storage = storage::open::open(&self.path, &self.storage(Access::Write))?;
        self.hints.give(&*storage, self.name);
        storage::start_over(&*storage, 0)?;
        let lost = Losses::default();
        let salvage = |at: u64, len: u64, e: &Error| lost.warn(at, len, e);
        let salvage = self.args.salvage.then_some(&salvage as &copy::Lost<'_>);
        let mut out = BufWriter::with_capacity(stream::BUFFER, Appended::new(&*storage, 0));
        let image = stream::Image {
            args: self.args,
            driver: self.driver,
            compress: &self.compress,
        };
        image.write(options, sources, &mut out, salvage, self.globals)?;
        settle(&*storage)?;
        if self.args.target_cache != CacheMode::Unsafe {
            storage.sync()?;
        }
        lost.sum_up(self.name);
        match self.args.verify {
            true => self.verify(sources),
            false => Ok(()),
        }
    }

    fn open(&self, access: Access) -> anyhow::Result<Chain> {
        let plan = self.args.open.plan(Some(self.driver), Access::Read)?;
        let mut references = plan.references;
        references.allow(self.named.clone());
        let remote = self.named.as_ref().filter(|path| is_uri(path));
        let remote = remote.and_then(|path| Some(path.to_str()?.to_owned()));
        let mut options = ChainOptions {
            storage: self.storage(access),
            format: Some(self.driver),
            backing_format: self.args.target_backing_format,
            references,
            remotes: plan.remotes.into_iter().chain(remote).collect(),
            order: self.order,
            values: self.compress.clone(),
            files: self.files.clone(),
            ..ChainOptions::default()
        };
        self.parents.give(&mut options);
        Ok(chain::open::open(&self.path, &options)?)
    }

    /// Copies, closes, and verifies where that was asked for.
    fn fill(&self, sources: &Joined, backing: Option<&Joined>) -> anyhow::Result<()> {
        let mut chain = self.open(Access::Write)?;
        let read: Vec<HostFile> = sources.chains().flat_map(Chain::files).collect();
        for written in chain.files().iter().filter(|f| f.layer == 0) {
            kept::refuse_open(self.name, written.id, &read)?;
        }
        if self.before == Before::Itself {
            self.check_backing(&chain)?;
        }
        if self.args.bitmaps {
            // Before hours of copying.
            bitmaps_of_mut(&mut chain)?;
            bitmaps_of(self.bitmap_source(sources)?)?;
        }
        let lost = Losses::default();
        let salvage = |at: u64, len: u64, e: &Error| lost.warn(at, len, e);
        let only = |range: Range<u64>| self.marks.as_ref().and_then(|marks| marks.next(range));
        let options = Convert {
            workers: self.args.workers(),
            scan: self.args.scan(),
            before: self.before,
            backing,
            salvage: self.args.salvage.then_some(&salvage),
            rate: self.args.rate(),
            only: self.marks.is_some().then_some(&only),
        };
        let total = copy::convert::total(sources, &chain, self.before);
        let bar = progress::start("convert", total, &self.args.progress, self.globals);
        let copied = match self.args.compress {
            true => copy::compress(sources, &chain, &options, &bar),
            false => copy::convert(sources, &chain, &options, &bar),
        };
        copied.map_err(|e| damage::explained(e, sources))?;
        bar.finish();
        damage::tell(sources);
        if self.given_space {
            keep_space(&chain)?;
        }
        if self.args.bitmaps {
            self.copy_bitmaps(self.bitmap_source(sources)?, &mut chain)?;
        }
        chain.close()?;
        // What is at a server is not even written yet, for all that can be told, unless it says so.
        let is_remote = is_uri(&self.path) || self.files.iter().any(|(_, path)| is_uri(path));
        if self.args.target_cache != CacheMode::Unsafe || is_remote {
            chain.flush()?;
        }
        drop(chain);
        lost.sum_up(self.name);
        match self.args.verify {
            true => self.verify(sources),
            false => Ok(()),
        }
    }

    /// Refuses a target that exists and does not have the backing image that the user named.
    fn check_backing(&self, chain: &Chain) -> Result<()> {
        let Some(named) = &self.named else {
            return Ok(());
        };
        let mut files = chain.files().into_iter();
        let below = files.find(|f| f.layer == 1 && f.role == Role::Header);
        let id = HostId::named(named);
        if below.as_ref().is_some_and(|below| below.is_same(id, named)) {
            return Ok(());
        }
        let found = below.and_then(|below| below.path);
        let found = found.map_or("none".to_owned(), |path| printable(&path));
        let text = format!(
            "its backing image is {found}, and -B names {}",
            printable(named)
        );
        Err(Error::invalid(text).at(self.name))
    }

    /// The disk whose bitmaps are copied.
    fn bitmap_source<'s>(&self, sources: &'s Joined) -> anyhow::Result<&'s Chain> {
        let mut chains = sources.chains();
        match (chains.next(), chains.next()) {
            (Some(source), None) if self.args.snapshot.is_none() => Ok(source),
            _ => Err(usage(
                "--bitmaps is for one source, and not for a snapshot of it",
            )),
        }
    }

    fn copy_bitmaps(&self, source: &Chain, target: &mut Chain) -> anyhow::Result<()> {
        let broken = match self.args.skip_broken_bitmaps {
            true => Broken::Skip,
            false => Broken::Refuse,
        };
        let mut skipped = |name: &OsStr| {
            complain(&format!(
                "warning: bitmap '{}' is in use and is left out",
                printable(name)
            ));
        };
        Ok(copy_bitmaps(source, target, broken, &mut skipped)?)
    }

    /// Reads the image back through nothing that wrote it.
    fn verify(&self, sources: &Joined) -> anyhow::Result<()> {
        let written = Joined::new(vec![self.open(Access::Read)?])?;
        let total = sources.len().max(written.len());
        let bar = progress::start("verify", total, &self.args.progress, self.globals);
        let workers = self.args.workers();
        let outcome = copy::compare(sources, &written, Allocation::Ignored, workers, &bar)
            .map_err(|f| f.error)?;
        match outcome {
            // An image or device that existed and is larger keeps what it had there.
            Outcome::Content(at)
                if at < sources.len()
                    || !(self.args.no_create || self.before == Before::Unknown) =>
            {
                let text = format!("differs from the source at {at:#x} when read back");
                Err(Error::corrupt(text).at(&self.path).into())
            }
            _ => {
                bar.finish();
                Ok(())
            }
        }
    }
}

/// Gives back to the disk what space zeroes in the source took from it.
fn keep_space(chain: &Chain) -> Result<()> {
    let disk = 0..chain.virtual_size();
    // Where the host cannot, none was taken.
    chain.give_space(disk, &mut reserve)
}

/// Has the host give a range space, where it can.
fn reserve(storage: &dyn Storage, host: Range<u64>) -> Result<()> {
    match storage.reserve(host) {
        Err(e) if e.kind() == ErrorKind::Unsupported => Ok(()),
        done => done,
    }
}

/// What could not be read while salvaging.
#[derive(Debug, Default)]
pub(super) struct Losses {
    bytes: AtomicU64,
    warnings: AtomicU64,
}

impl Losses {
    pub(super) fn warn(&self, at: u64, len: u64, error: &Error) {
        self.bytes.fetch_add(len, Ordering::Relaxed);
        if self.warnings.fetch_add(1, Ordering::Relaxed) < MAX_WARNINGS {
            let cause = std::error::Error::source(error).map(|s| format!(": {s}"));
            complain(&format!(
                "warning: {error}{}; {len} bytes at {at:#x} become zeroes",
                cause.unwrap_or_default()
            ));
        }
    }

    /// Says how much it was in all, where it was anything.
    pub(super) fn sum_up(&self, name: &Path) {
        let bytes = self.bytes.load(Ordering::Relaxed);
        if bytes > 0 {
            complain(&format!(
                "warning: {}: {bytes} bytes could not be read and are zeroes",
                printable(name)
            ));
        }
    }
}

/// The error about what the user named, not about the temporary file.
pub(super) fn named(error: anyhow::Error, target: &Target) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) => target.name(error).into(),
        Err(error) => error,
    }
}

/// The image below a new one: as its header names it, and open.
pub(super) struct Below {
    create: crate::image::create::CreateBacking,
    disk: Joined,
}

/// The image that `-B` names, which a target that exists has below it.
fn below_existing(args: &Args, target: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Some(name) = &args.backing else {
        return match args.target_backing_format {
            Some(_) => Err(usage("-F names the format of -B, which is missing")),
            None => Ok(None),
        };
    };
    let home = backing::home_of_new(target)?;
    Ok(Some(backing::locate(&home, name)))
}

/// What the user says lies below other images than the sources.
fn rest(args: &Args, sources: &Joined) -> ParentArgs {
    args.open.parents.after(sources.chains())
}

fn below(
    args: &Args,
    generic: &Generic,
    target: &Path,
    sources: &Joined,
    globals: &Globals,
) -> anyhow::Result<Option<Below>> {
    let Some(name) = args.backing.as_ref().or(generic.backing.as_ref()) else {
        if args.target_backing_format.is_some() || generic.backing_format.is_some() {
            return Err(usage("-F names the format of -B, which is missing"));
        }
        return Ok(None);
    };
    refuse_open(target, "a backing image")?;
    // The last is qemu-img's long word for the first.
    let format = args
        .target_backing_format
        .or(generic.backing_format)
        .or(args.open.backing_format);
    let home = backing::home_of_new(target)?;
    let absolute = backing::locate(&home, name);
    let mut options = args.open.plan(format, Access::Read)?;
    rest(args, sources).give(&mut options);
    let chain = chain::open::open_from(&home, name, &absolute, &options)?;
    let create = backing::describe(name, home.path(), &absolute, chain.top())?;
    if format.is_none() {
        globals.note(&format!(
            "{}: the content decided that its format is {} (-F names it)",
            printable(&absolute),
            create.format
        ));
    }
    Ok(Some(Below {
        create,
        disk: Joined::new(vec![chain])?,
    }))
}

pub(super) fn create_options(
    args: &Args,
    generic: &Generic,
    driver: &'static Driver,
    target: &Path,
    size: u64,
    backing: Option<&Below>,
) -> anyhow::Result<CreateOptions> {
    let values = OptionValues::parse(creator(driver)?.options, driver.name, &generic.others)
        .map_err(|e| usage(e.at(target)))?;
    if let Some(given) = generic.size.filter(|&s| s < size) {
        return Err(usage(format!(
            "option 'size' is {given} (allowed: {size}, the size of the source, and more)"
        )));
    }
    let options = CreateOptions {
        size: generic.size.unwrap_or(size),
        backing: backing.map(|b| b.create.clone()),
        values,
        name: target.file_name().unwrap_or_default().to_owned(),
        ..CreateOptions::default()
    };
    match args.compress && options.preallocation() != Preallocation::Off {
        true => Err(usage("-c and preallocation exclude each other")),
        false => Ok(options),
    }
}
