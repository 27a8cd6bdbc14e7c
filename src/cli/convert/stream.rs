//! `convert` from stdin and to stdout.

use std::ffi::OsString;
use std::io::{BufWriter, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::chain::{Base, Chain};
use crate::cli::convert::options::{codec_options, given, refuse};
use crate::cli::convert::{Args, damage, is_stream, place, source};
use crate::cli::create::creator;
use crate::cli::exit::{self, usage};
use crate::cli::patient::Patient;
use crate::cli::sealed;
use crate::cli::target::{Target, look};
use crate::cli::{Globals, interrupt, progress, target};
use crate::copy::{self, Before, Convert, Joined, Lost, stream};
use crate::error::Error;
use crate::formats;
use crate::formats::refused::REFUSED;
use crate::image::Driver;
use crate::image::compress::Sequence;
use crate::image::create::CreateOptions;
use crate::image::open::OpenOptions;
use crate::image::options::OptionValues;
use crate::image::probe;
use crate::storage;
use crate::storage::Storage;
use crate::storage::open::{Access, StorageOptions};

/// Bytes of an image that are written to stdout at a time.
pub(super) const BUFFER: usize = 1 << 20;

/// Where an image in the order of its bytes goes.
pub(super) enum Sink {
    /// Standard output.
    Stdout,
    /// A pipe that a process has open.
    Pipe(std::fs::File),
}

impl Sink {
    /// Of the target that was named, where it is one.
    ///
    /// # Errors
    /// Those of [`target::pipe`]; that nobody reads it any more.
    pub(super) fn of(path: &Path) -> anyhow::Result<Option<Self>> {
        if is_stream(path) {
            return Ok(Some(Self::Stdout));
        }
        match target::pipe(path) {
            Err(e) if e.errno() == libc::ENXIO => Err(exit::NobodyReads.into()),
            found => Ok(found?.map(Self::Pipe)),
        }
    }

    pub(super) fn open(self) -> anyhow::Result<std::fs::File> {
        match self {
            Self::Pipe(file) => Ok(file),
            Self::Stdout => {
                let out = std::io::stdout();
                if out.is_terminal() {
                    return Err(usage("stdout is a terminal, which is no place for a disk"));
                }
                // Not by way of `Stdout`, which looks for line ends.
                Ok(out.as_fd().try_clone_to_owned()?.into())
            }
        }
    }
}

/// Writes the sources to a stream.  Signals end it at once: there is nothing to clean up.
pub(super) fn send(
    args: &Args,
    sources: &[PathBuf],
    sink: Sink,
    globals: &Globals,
) -> anyhow::Result<()> {
    let driver = args.target_format.unwrap_or(formats::PLAIN);
    refuse(args, driver)?;
    let sequence = creator(driver)?.sequence;
    if sequence.is_none() {
        let streams = |driver: &Driver| {
            let creator = driver.creator.as_ref();
            driver.is_plain || creator.is_some_and(|c| c.sequence.is_some())
        };
        refuse_stream(driver, "written to", &formats::names(streams))?;
    }
    if args.no_create || args.backing.is_some() || args.verify || args.bitmaps {
        return Err(usage("-n, -B, --bitmaps and --verify are not for stdout"));
    }
    let given = given(args, driver)?;
    if given.new.backing.is_some() || given.new.backing_format.is_some() {
        return Err(usage("an image on stdout has no backing image"));
    }
    if given.new.hints.are_given() {
        return Err(usage(
            "extent_size_hint and nocow are for files, and not for stdout",
        ));
    }
    if sequence.is_none() && given.new.is_given() {
        return Err(usage("a raw disk on stdout takes no -o"));
    }
    let sources = source::open(args, sources)?;
    args.open.parents.after(sources.chains()).refuse_any()?;
    let file = sink.open()?;
    let lost = place::Losses::default();
    let salvage = |at: u64, len: u64, e: &Error| lost.warn(at, len, e);
    let salvage = args.salvage.then_some(&salvage as &Lost<'_>);
    let closed = AtomicBool::new(false);
    let out = Output::new(file, &closed);
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let sent = sealed::beside(args.no_manifest, &sources, || match sequence {
        None => {
            let bar = progress::start("convert", sources.len(), &args.progress, globals);
            let sent = stream::send(&sources, &mut out, args.workers(), salvage, &bar);
            sent.map(|()| bar.finish()).map_err(anyhow::Error::from)
        }
        Some(_) => {
            let image = Image {
                args,
                driver,
                compress: &given.compress,
            };
            let name = Path::new("-");
            let size = sources.len();
            let create = place::create_options(args, &given.new, driver, name, size, None)?;
            let settled = (creator(driver)?.settle)(&create).map_err(|e| e.at(name))?;
            given.refuse_idle(args, settled.in_order)?;
            image.write(&create, &sources, &mut out, salvage, globals)
        }
    });
    sent.map_err(|e| match closed.load(Ordering::Relaxed) {
        true => exit::NobodyReads.into(),
        false => match e.downcast::<Error>() {
            Ok(e) => damage::explained(e, &sources).into(),
            Err(e) => e,
        },
    })?;
    damage::tell(&sources);
    lost.sum_up(Path::new("stdout"));
    Ok(())
}

/// A stream, which remembers whether whoever read it has left: the source may be lost by a
/// broken pipe as well.
pub(super) struct Output<'a> {
    file: std::fs::File,
    closed: &'a AtomicBool,
}

impl<'a> Output<'a> {
    pub(super) fn new(file: std::fs::File, closed: &'a AtomicBool) -> Self {
        Self { file, closed }
    }
}

impl Write for Output<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        self.file.write(buf).inspect_err(|e| {
            if e.kind() == std::io::ErrorKind::BrokenPipe {
                self.closed.store(true, Ordering::Relaxed);
            }
        })
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An image that is written in the order of its bytes.
pub(super) struct Image<'a> {
    pub(super) args: &'a Args,
    pub(super) driver: &'static Driver,
    /// How its data is compressed.
    pub(super) compress: &'a [OsString],
}

impl Image<'_> {
    pub(super) fn write(
        &self,
        create: &CreateOptions,
        sources: &Joined,
        out: &mut (dyn Write + Send),
        salvage: Option<&Lost<'_>>,
        globals: &Globals,
    ) -> anyhow::Result<()> {
        let mut sequence = self.plan(create, sources)?;
        self.send(&mut *sequence, sources, out, salvage, globals)
    }

    /// Plans it; the same plan may be written more than once.
    pub(super) fn plan(
        &self,
        create: &CreateOptions,
        sources: &Joined,
    ) -> anyhow::Result<Box<dyn Sequence>> {
        let (args, driver) = (self.args, self.driver);
        let sequence = creator(driver)?.sequence.ok_or_else(|| {
            let text = format!("format '{}' is not written in order", driver.name);
            Error::unsupported(text)
        })?;
        let values = OptionValues::parse(codec_options(driver), driver.name, self.compress);
        let values = values.map_err(usage)?;
        let options = self.options(None);
        let cluster = (creator(driver)?.cluster_size)(create)?;
        let options = Convert {
            // Whatever is lost, there is room for it.
            salvage: args.salvage.then_some(&|_, _, _| {}),
            ..options
        };
        let bar = progress::hidden("convert", sources.len());
        let most = copy::sequence::most_clusters(sources, cluster, &options, &bar)?;
        let compress = args.compress || !self.compress.is_empty();
        Ok(sequence(create, most, compress.then_some(&values))?)
    }

    pub(super) fn send(
        &self,
        sequence: &mut dyn Sequence,
        sources: &Joined,
        out: &mut (dyn Write + Send),
        salvage: Option<&Lost<'_>>,
        globals: &Globals,
    ) -> anyhow::Result<()> {
        let total = copy::sequence::total(sources);
        let bar = progress::start("convert", total, &self.args.progress, globals);
        copy::send_image(sources, sequence, out, &self.options(salvage), &bar)?;
        bar.finish();
        Ok(())
    }

    fn options<'a>(&self, salvage: Option<&'a Lost<'a>>) -> Convert<'a> {
        Convert {
            workers: self.args.workers(),
            scan: self.args.scan(),
            before: Before::Zeroes,
            backing: None,
            salvage,
            rate: self.args.rate(),
            only: None,
        }
    }
}

/// Makes `target` hold what stdin has: at once where it is a new raw file, else by way of a file
/// without a name beside it, since formats want the size first.
pub(super) fn from_stdin(
    args: &Args,
    driver: &'static Driver,
    path: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    refuse_stream(
        args.format.unwrap_or(formats::PLAIN),
        "read from",
        formats::PLAIN.name,
    )?;
    let mut input = Input::new(args)?;
    let new_file = !args.no_create
        && !matches!(
            look(path)?.1,
            target::Existing::Device(_) | target::Existing::Remote
        );
    let plain = args.options.is_empty() && args.backing.is_none() && !args.verify;
    if driver.is_plain && new_file && plain && args.sparse_size.is_none() {
        args.open.parents.refuse_any()?;
        let new = Target::begin(path)?;
        new.note_replaced(globals);
        let storage = writable(new.path()).map_err(|e| new.name(e))?;
        let received = input.receive(args, &*storage, globals);
        received.map_err(|e| new.name(e))?;
        drop(storage);
        return Ok(new.commit(args.target_cache.durable())?);
    }
    let spool = target::unnamed_beside(path, &write_options())?;
    let received = input.receive(args, &*spool, globals);
    received.map_err(|e| e.renamed(path, Path::new("-")))?;
    let options = OpenOptions::default();
    let image = (formats::PLAIN.open)(spool, &options)?;
    let chain = Chain::new(vec![image], Base::Zeroes, options.grace)?;
    place::convert(args, &Joined::new(vec![chain])?, driver, path, globals)
}

/// What stdin has, of which the beginning was looked at.
struct Input {
    head: Vec<u8>,
    rest: Patient<std::io::StdinLock<'static>>,
}

impl Input {
    /// Reads the beginning, and refuses what is a disk in a format, unless the user said that it is
    /// raw: its bytes as they are would not be the disk.
    fn new(args: &Args) -> crate::Result<Self> {
        let mut rest = Patient::new(std::io::stdin().lock());
        let mut head = vec![0; probe::HEAD];
        let mut len = 0;
        while len < head.len() {
            interrupt::check()?;
            match rest.read(&mut head[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io("read from the stream", e)),
            }
        }
        head.truncate(len);
        if args.format.is_none() {
            let seen = probe::ProbeInput {
                head: &head,
                tail: &[],
                len: u64::MAX,
                extension: None,
            };
            refuse_found(probe::best(formats::DRIVERS, REFUSED, &seen))?;
        }
        Ok(Self { head, rest })
    }

    /// Moves all of it to `storage`; a format that only the end tells is refused then.
    fn receive(
        &mut self,
        args: &Args,
        storage: &dyn Storage,
        globals: &Globals,
    ) -> crate::Result<()> {
        let bar = progress::start("read", 0, &args.progress, globals);
        let mut input = self.head.as_slice().chain(&mut self.rest);
        stream::receive(&mut input, storage, &bar)?;
        bar.finish();
        match args.format {
            Some(_) => Ok(()),
            None => {
                let found = probe::probe(formats::DRIVERS, REFUSED, storage);
                let path = storage.path().unwrap_or(Path::new("-"));
                refuse_found(found.map_err(|e| e.renamed(path, Path::new("-"))))
            }
        }
    }
}

fn refuse_found(found: crate::Result<&'static Driver>) -> crate::Result<()> {
    let plain = formats::PLAIN.name;
    let allowed = format!("{plain}; -f {plain} takes its bytes as they are");
    let stdin = Path::new("-");
    match found {
        Ok(driver) => refuse_stream(driver, "read from", &allowed).map_err(|e| e.at(stdin)),
        Err(e) => Err(e.at(stdin)),
    }
}

fn write_options() -> StorageOptions {
    StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    }
}

fn writable(path: &Path) -> crate::Result<Arc<dyn Storage>> {
    storage::open::open(path, &write_options())
}

fn refuse_stream(driver: &Driver, done: &str, allowed: &str) -> crate::Result<()> {
    if driver.is_plain {
        return Ok(());
    }
    Err(Error::unsupported(format!(
        "format '{}' cannot be {done} a stream (allowed: {allowed})",
        driver.name
    )))
}
