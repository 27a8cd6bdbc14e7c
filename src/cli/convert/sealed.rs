//! Digests that were recorded of what the sources are kept in, compared while they are read.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::cli::convert::Args;
use crate::cli::signal;
use crate::copy::Joined;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::contents::Sealed;
use crate::util::progress::Progress;

/// Stops with a signal, and where the disk is not wanted any more.
struct Until<'a>(&'a AtomicBool);

impl Progress for Until<'_> {
    fn advance(&self, _bytes: u64) {}

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) || signal::caught()
    }
}

/// Does `work`, which reads the sources whole, and compares their digests meanwhile.
///
/// # Errors
/// Those of `work`; `Corrupt` where a digest differs.
pub(super) fn beside<T>(
    args: &Args,
    sources: &Joined,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let layers = sources.chains().flat_map(|chain| chain.layers());
    beside_all(args, layers, work)
}

/// As [`beside`], of the sources that these are the layers of.
///
/// # Errors
/// Those of [`beside`].
pub(super) fn beside_all<'a, T>(
    args: &Args,
    layers: impl Iterator<Item = &'a Box<dyn Image>>,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let seals: Vec<&dyn Sealed> = match args.no_manifest {
        true => Vec::new(),
        false => layers.filter_map(|layer| layer.sealed()).collect(),
    };
    if seals.is_empty() {
        return work();
    }
    let stop = AtomicBool::new(false);
    let until = Until(&stop);
    std::thread::scope(|scope| {
        let compared = scope.spawn(|| seals.iter().try_for_each(|seal| seal.verify(&until)));
        let done = work();
        stop.store(done.is_err(), Ordering::Relaxed);
        let compared: Result<()> = compared
            .join()
            .unwrap_or_else(|_| Err(Error::invalid("the manifest could not be compared")));
        let done = done?;
        compared?;
        Ok(done)
    })
}
