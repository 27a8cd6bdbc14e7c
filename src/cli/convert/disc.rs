//! Targets that are discs, or made of their tracks: a sheet with its files, sound files in a
//! directory.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::chain::open::ChainOptions;
use crate::chain::{self, Chain, HostFile};
use crate::cli::common::OpenArgs;
use crate::cli::convert::options::{Given, given};
use crate::cli::convert::place::Losses;
use crate::cli::convert::{Args, damage};
use crate::cli::exit::usage;
use crate::cli::hints::Hints;
use crate::cli::target::{Existing, Target, look, refuse_open};
use crate::cli::{Globals, kept, progress};
use crate::copy::disc::{self as sectors, From, Made, total};
use crate::copy::{self, Allocation, Joined, Outcome};
use crate::error::{Error, Result};
use crate::formats;
use crate::image::Driver;
use crate::image::disc::Disc;
use crate::image::disc::plan::{Maker, NewFile, Plan, Template};
use crate::image::options::OptionValues;
use crate::storage::open::{Access, StorageOptions, open};
use crate::util::align::len64;

/// Makes `target` of what `sources` are.
pub(super) fn convert(
    args: &Args,
    sources: &Joined,
    driver: &'static Driver,
    maker: &'static Maker,
    target: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    refuse(args, driver)?;
    let Given { new, .. } = given(args, driver)?;
    if new.size.is_some() || new.backing.is_some() || new.backing_format.is_some() {
        return Err(usage("options 'size' and 'backing_file' are not for discs"));
    }
    let values = OptionValues::parse(maker.options, driver.name, &new.others);
    let values = values.map_err(|e| usage(e.at(target)))?;
    let source = Source::of(&args.open, sources)?;
    // What the image names lies beside it, and not beside a link to it.
    let (home, _) = match target.is_dir() {
        true => (target.to_owned(), Existing::Nothing),
        false => look(target)?,
    };
    let plan = source.plan(
        sources,
        maker,
        &values,
        home.file_stem().unwrap_or_default(),
    )?;
    let files: Vec<HostFile> = sources.chains().flat_map(Chain::files).collect();
    let placed = Placed::begin(target, &home, &plan, &files, source.only)?;
    placed
        .targets
        .iter()
        .for_each(|new| new.note_replaced(globals));
    let job = Job {
        args,
        globals,
        driver,
        plan: &plan,
        hints: new.hints,
        target,
    };
    let done = job.fill(&source, sources, &placed);
    let done = done.map_err(|e| placed.named(e));
    let directory = placed.directory.clone();
    done.and_then(|()| placed.commit(args, &plan))
        .inspect_err(|_| {
            // It stays where something is in it.
            directory.map(std::fs::remove_dir);
        })
}

/// Bytes of the files that would be made of `sources`, or of a disk of `size` bytes.
///
/// # Errors
/// Usage; what [`convert`] refuses.
pub(in crate::cli) fn measure(
    open: &OpenArgs,
    sources: Option<&Joined>,
    size: u64,
    maker: &Maker,
    values: &OptionValues,
) -> anyhow::Result<u64> {
    let plan = match sources {
        Some(sources) => {
            let source = Source::of(open, sources)?;
            let stem = source.path(sources).and_then(Path::file_stem);
            source.plan(sources, maker, values, stem.unwrap_or_default())?
        }
        None => (maker.of_disk)(size, values, OsStr::new("disk"))?,
    };
    let names: Vec<&OsStr> = plan.files.iter().map(|file| &*file.name).collect();
    let text = plan.text.map_or(0, |text| len64(text.with(&names).len()));
    Ok(plan.files.iter().fold(text, |sum, file| sum + file.len))
}

/// Refuses streams for what is several files, of lengths that must be known.
pub(super) fn refuse_stream(driver: &'static Driver, how: &str) -> Result<()> {
    match formats::disc_maker(driver) {
        None => Ok(()),
        Some(_) => Err(Error::unsupported(format!(
            "format '{}' is not {how} a stream: it has files whose lengths must be known (allowed: names of files)",
            driver.name
        ))),
    }
}

/// Refuses what discs are not made with.
fn refuse(args: &Args, driver: &Driver) -> anyhow::Result<()> {
    let refused = [
        (args.no_create, "-n"),
        (args.compress, "-c"),
        (
            args.backing.is_some() || args.target_backing_format.is_some(),
            "-B",
        ),
        (args.bitmaps, "--bitmaps"),
        (args.rate_limit.is_some(), "-r"),
    ];
    match refused.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, option)) => {
            let text = format!("{option} is not for targets of format '{}'", driver.name);
            Err(Error::unsupported(text).into())
        }
    }
}

/// What is converted.
struct Source<'a> {
    /// The disc, and the chain that it is.
    disc: Option<(&'a Chain, &'a dyn Disc)>,
    /// The track of it that was asked for.
    only: Option<u8>,
}

impl<'a> Source<'a> {
    /// One disc as a whole, one track of sound, or else the disks.
    fn of(open: &OpenArgs, sources: &'a Joined) -> Result<Self> {
        let none = Self {
            disc: None,
            only: None,
        };
        let mut chains = sources.chains();
        let (Some(chain), None) = (chains.next(), chains.next()) else {
            return Ok(none);
        };
        let Some(disc) = chain.top().as_disc() else {
            return Ok(none);
        };
        let driver = chain.top().driver();
        let given = &open.open_options;
        let values = OptionValues::parse(driver.open_options, driver.name, given)?;
        let only = match values.number("track") {
            Some(_) => disc.track(),
            None => None,
        };
        Ok(match only {
            // A disk like any other.
            Some(track) if !track.mode.is_audio() => none,
            only => Self {
                disc: Some((chain, disc)),
                only: only.map(|track| track.number),
            },
        })
    }

    /// What is to be made of it.
    fn plan(
        &self,
        sources: &Joined,
        maker: &Maker,
        values: &OptionValues,
        stem: &OsStr,
    ) -> Result<Plan> {
        let plan = match &self.disc {
            Some((_, disc)) => (maker.of_disc)(disc.table(), self.only, values, stem),
            None => (maker.of_disk)(sources.len(), values, stem),
        };
        plan.map_err(|e| e.at_opt(self.path(sources)))
    }

    fn path<'s>(&self, sources: &'s Joined) -> Option<&'s Path> {
        sources
            .chains()
            .next()
            .and_then(|chain| chain.top().storage().path())
    }
}

/// New files on their way to their names.
struct Placed {
    /// One image with further files, or files that stand for themselves.
    targets: Vec<Target>,
    /// What the image calls its files.
    names: Vec<OsString>,
    /// The directory that was made for them.
    directory: Option<PathBuf>,
}

impl Placed {
    fn begin(
        target: &Path,
        home: &Path,
        plan: &Plan,
        files: &[HostFile],
        only: Option<u8>,
    ) -> anyhow::Result<Self> {
        let names: Vec<OsString> = plan.files.iter().map(|file| file.name.clone()).collect();
        let is_new = plan.text.is_none() && only.is_none() && !target.is_dir();
        let targets = match plan.text {
            Some(_) => vec![with_files(target, home, &names, files)?],
            None => alone(target, &names, files, only)?,
        };
        Ok(Self {
            targets,
            names,
            directory: is_new.then(|| target.to_owned()),
        })
    }

    /// Where the files are written.
    fn paths(&self, plan: &Plan) -> Vec<PathBuf> {
        let paths: Vec<&Path> = match plan.text {
            Some(_) => self.targets.iter().flat_map(Target::others).collect(),
            None => self.targets.iter().map(Target::path).collect(),
        };
        paths.into_iter().map(Path::to_owned).collect()
    }

    fn named(&self, error: anyhow::Error) -> anyhow::Error {
        match error.downcast::<Error>() {
            Ok(error) => self.targets.iter().fold(error, |e, new| new.name(e)).into(),
            Err(error) => error,
        }
    }

    fn commit(self, args: &Args, plan: &Plan) -> anyhow::Result<()> {
        let durable = args.target_cache.durable();
        for target in self.targets {
            match &plan.text {
                None => target.commit(durable)?,
                Some(text) => {
                    target.commit_named(durable, &|path, names| rewrite(path, text, names))?;
                }
            }
        }
        Ok(())
    }
}

/// An image, which is at `home`, and the files beside it that it names.
fn with_files(
    target: &Path,
    home: &Path,
    names: &[OsString],
    files: &[HostFile],
) -> anyhow::Result<Target> {
    kept::refuse(target, files)?;
    refuse_open(target, "further files")?;
    let mut new = Target::begin(target)?;
    for name in names {
        let path = home.with_file_name(name);
        if kept::is_same_place(&path, target)? {
            let text = "its file of sectors would have its own name (allowed: another extension)";
            return Err(Error::invalid(text).at(target).into());
        }
        kept::refuse(&path, files)?;
        new.add(&path, Path::new(name))?;
    }
    Ok(new)
}

/// Files that stand for themselves: in a directory, which is made where it is not there, or the
/// only one under the name that was given.
fn alone(
    target: &Path,
    names: &[OsString],
    files: &[HostFile],
    only: Option<u8>,
) -> anyhow::Result<Vec<Target>> {
    let paths: Vec<PathBuf> = match only.is_some() && !target.is_dir() {
        true => vec![target.to_owned()],
        false => {
            if !target.is_dir() {
                let made = std::fs::create_dir(target);
                made.map_err(|e| Error::io("make the directory", e).at(target))?;
            }
            names.iter().map(|name| target.join(name)).collect()
        }
    };
    let mut targets = Vec::with_capacity(paths.len());
    for path in paths {
        kept::refuse(&path, files)?;
        targets.push(Target::begin(&path)?);
    }
    Ok(targets)
}

/// Has a sheet name its files so, in one write: what it had before ends in blank lines meanwhile.
fn rewrite(path: &Path, text: &Template, names: &[PathBuf]) -> Result<()> {
    let storage = open(path, &writable())?;
    let mut bytes = text.with(names);
    let len = len64(bytes.len());
    let before = crate::util::align::clamp_len(storage.size(), usize::MAX);
    bytes.resize(bytes.len().max(before), b'\n');
    storage.write_at(&bytes, 0)?;
    storage.set_len(len)?;
    storage.sync()
}

fn writable() -> StorageOptions {
    StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    }
}

/// What is done.
struct Job<'a> {
    args: &'a Args,
    globals: &'a Globals,
    driver: &'static Driver,
    plan: &'a Plan,
    hints: Hints,
    /// As the user named it.
    target: &'a Path,
}

impl Job<'_> {
    fn fill(&self, source: &Source<'_>, sources: &Joined, placed: &Placed) -> anyhow::Result<()> {
        let paths = placed.paths(self.plan);
        let made = self
            .plan
            .files
            .iter()
            .zip(&paths)
            .map(|(file, path)| self.made(file, path));
        let made: Vec<Made<'_>> = made.collect::<Result<_>>()?;
        let lost = Losses::default();
        let salvage = |at: u64, len: u64, e: &Error| lost.warn(at, len, e);
        let from = From {
            sources,
            disc: source.disc.map(|(_, disc)| disc),
            salvage: self.args.salvage.then_some(&salvage),
        };
        let (args, globals) = (self.args, self.globals);
        let bar = progress::start("convert", total(&self.plan.files), &args.progress, globals);
        let bad = sectors::make(from, &made, args.workers(), &bar);
        let bad = bad.map_err(|e| damage::explained(e, sources))?;
        if !bad.is_empty() {
            return Err(damage::unreadable(bad).at_opt(source.path(sources)).into());
        }
        bar.finish();
        damage::tell(sources);
        lost.sum_up(self.target);
        drop(made);
        if let (Some(text), [image]) = (&self.plan.text, &*placed.targets) {
            rewrite(
                image.path(),
                text,
                &placed.names.iter().map(PathBuf::from).collect::<Vec<_>>(),
            )?;
        }
        match (self.args.verify, source.disc) {
            (true, None) => self.verify(sources, placed, &paths),
            (true, Some((_, disc))) => self.verify_disc(sources, disc, &paths),
            (false, _) => Ok(()),
        }
    }

    fn made<'f>(&self, file: &'f NewFile, path: &Path) -> Result<Made<'f>> {
        let storage = open(path, &writable())?;
        self.hints.give(&*storage, self.target);
        Ok(Made { file, storage })
    }

    /// Reads files that were made of a disc back, and the disc again.
    fn verify_disc(
        &self,
        sources: &Joined,
        disc: &dyn Disc,
        paths: &[PathBuf],
    ) -> anyhow::Result<()> {
        let files = self.plan.files.iter().zip(paths);
        let made = files.map(|(file, path)| {
            let storage = open(path, &StorageOptions::default())?;
            Ok(Made { file, storage })
        });
        let made: Vec<Made<'_>> = made.collect::<Result<_>>()?;
        let from = From {
            sources,
            disc: Some(disc),
            salvage: None,
        };
        let (args, globals) = (self.args, self.globals);
        let bar = progress::start("verify", total(&self.plan.files), &args.progress, globals);
        sectors::verify(from, &made, args.workers(), &bar)?;
        bar.finish();
        Ok(())
    }

    /// Reads the new disc back through nothing that wrote it.
    fn verify(&self, sources: &Joined, placed: &Placed, paths: &[PathBuf]) -> anyhow::Result<()> {
        let [image] = &*placed.targets else {
            return Ok(());
        };
        let options = ChainOptions {
            format: Some(self.driver),
            files: placed
                .names
                .iter()
                .cloned()
                .zip(paths.iter().cloned())
                .collect(),
            ..ChainOptions::read()
        };
        let written = Joined::new(vec![chain::open::open(image.path(), &options)?])?;
        let bar = progress::start("verify", written.len(), &self.args.progress, self.globals);
        let workers = self.args.workers();
        let outcome = copy::compare(sources, &written, Allocation::Ignored, workers, &bar);
        match outcome.map_err(|f| f.error)? {
            // The last sector may be filled up.
            Outcome::Content(at) if at < sources.len() => {
                let text = format!("differs from the source at {at:#x} when read back");
                Err(Error::corrupt(text).at(image.path()).into())
            }
            _ => {
                bar.finish();
                Ok(())
            }
        }
    }
}
