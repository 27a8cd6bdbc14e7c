//! Targets that hold what makes one disk of another.

use std::path::{Path, PathBuf};

use crate::chain::open::{ChainOptions, Home};
use crate::chain::{self, Chain, HostFile};
use crate::cli::backing::{home_of_new, locate};
use crate::cli::convert::place::named;
use crate::cli::convert::{Args, is_stream, source};
use crate::cli::create::Generic;
use crate::cli::exit::usage;
use crate::cli::sealed;
use crate::cli::target::{Durable, Target, settle};
use crate::cli::{Globals, kept, progress};
use crate::copy::{self, Allocation, Joined, Outcome};
use crate::error::Error;
use crate::image::Driver;
use crate::image::delta::{DeltaMaker, Plan};
use crate::image::options::OptionValues;
use crate::storage;
use crate::storage::open::{Access, StorageOptions};

/// Makes `target` hold what makes the disk of `sources` of the one that `-B` names.
pub(super) fn convert(
    args: &Args,
    driver: &'static Driver,
    maker: &'static DeltaMaker,
    sources: &[PathBuf],
    target: &Path,
    globals: &Globals,
) -> anyhow::Result<()> {
    refuse(args, driver, sources)?;
    let generic = Generic::take(&args.options)?;
    let Some(name) = args.backing.as_ref().or(generic.backing.as_ref()) else {
        return Err(usage(format!(
            "format '{}' holds what makes one disk of another: -B names the old one",
            driver.name
        )));
    };
    if generic.size.is_some() || generic.backing_format.is_some() {
        return Err(usage("options 'size' and 'backing_fmt' are not for it"));
    }
    let wrong = |e: Error| usage(e.at(target));
    let values = OptionValues::parse(maker.options, driver.name, &generic.others);
    let plan = (maker.plan)(&values.map_err(wrong)?).map_err(wrong)?;
    let new = source::open_each(args, sources)?;
    let home: Home = home_of_new(target)?;
    let path = locate(&home, name);
    let old = ChainOptions {
        parents: args.open.parents.after(&new).parent,
        values: Vec::new(),
        ..args.open.plan(args.target_backing_format, Access::Read)?
    };
    let old = chain::open::open_from(&home, name, &path, &old)?;
    let job = Job {
        args,
        globals,
        driver,
        plan: &*plan,
        old: Joined::new(vec![old])?,
        new: Joined::new(new)?,
    };
    job.place(target)
}

/// Refuses what such a file has not.
fn refuse(args: &Args, driver: &Driver, sources: &[PathBuf]) -> anyhow::Result<()> {
    let refused = [
        (sources.iter().any(|path| is_stream(path)), "- (stdin)"),
        (args.no_create, "-n"),
        (args.compress, "-c (-o compression=)"),
        (args.bitmaps, "--bitmaps"),
        (args.salvage, "--salvage"),
        (args.rate().is_some(), "-r"),
        (args.ovf.is_some(), "--ovf"),
        (args.sparse_size.is_some(), "-S"),
    ];
    match refused.iter().find(|(given, _)| *given) {
        None => Ok(()),
        Some((_, option)) => {
            let text = format!("{option} is not for targets of format '{}'", driver.name);
            Err(Error::unsupported(text).into())
        }
    }
}

struct Job<'a> {
    args: &'a Args,
    globals: &'a Globals,
    driver: &'static Driver,
    plan: &'a dyn Plan,
    old: Joined,
    new: Joined,
}

impl Job<'_> {
    fn files(&self) -> Vec<HostFile> {
        let chains = self.old.chains().chain(self.new.chains());
        chains.flat_map(Chain::files).collect()
    }

    /// Makes the file under its name.
    fn place(&self, path: &Path) -> anyhow::Result<()> {
        kept::refuse(path, &self.files())?;
        let new = Target::begin(path)?;
        new.note_replaced(self.globals);
        let done = self.fill(new.path(), path);
        done.map_err(|e| named(e, &new))?;
        Ok(new.commit(self.args.target_cache.durable())?)
    }

    fn fill(&self, written: &Path, path: &Path) -> anyhow::Result<()> {
        let args = self.args;
        let mut options = StorageOptions {
            access: Access::Write,
            flushing: args.target_cache.flushing(),
            ..StorageOptions::default()
        };
        if let Some(caching) = args.target_cache.caching() {
            options.caching = caching;
        }
        let storage = storage::open::open(written, &options)?;
        kept::refuse_open(path, storage.host_id(), &self.files())?;
        let bar = progress::start(
            "convert",
            copy::delta_work(&self.old, &self.new),
            &args.progress,
            self.globals,
        );
        sealed::beside(args.no_manifest, &self.new, || {
            storage::start_over(&*storage, 0)?;
            let (old, new) = (&self.old, &self.new);
            copy::delta(old, new, self.plan, &*storage, args.workers(), &bar)?;
            Ok(())
        })?;
        bar.finish();
        settle(&*storage)?;
        if args.target_cache.durable() == Durable::Yes {
            storage.sync()?;
        }
        drop(storage);
        match args.verify {
            true => self.verify(written),
            false => Ok(()),
        }
    }

    /// Reads the new file back over the old disk, and compares.
    fn verify(&self, written: &Path) -> anyhow::Result<()> {
        let paths = |joined: &Joined| -> Vec<PathBuf> {
            let layers = joined.chains().flat_map(Chain::layers);
            layers
                .filter_map(|layer| Some(layer.storage().path()?.to_owned()))
                .collect()
        };
        let options = ChainOptions {
            parents: paths(&self.old),
            backing_format: self.args.target_backing_format,
            values: Vec::new(),
            ..self.args.open.plan(Some(self.driver), Access::Read)?
        };
        let found = Joined::new(vec![chain::open::open(written, &options)?])?;
        let total = self.new.len();
        let bar = progress::start("verify", total, &self.args.progress, self.globals);
        let workers = self.args.workers();
        let outcome = copy::compare(&self.new, &found, Allocation::Ignored, workers, &bar);
        match outcome.map_err(|f| f.error)? {
            Outcome::Content(at) => {
                let text = format!("differs from its source at {at:#x} when read back");
                Err(Error::corrupt(text).at(written).into())
            }
            _ => {
                bar.finish();
                Ok(())
            }
        }
    }
}
