//! Digests that were recorded of what the sources are kept in, compared while they are read.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::cli::exit::complain;
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

/// Does `work`, which reads the sources whole, and compares their digests meanwhile, unless
/// `no_manifest` says not to; digests that nobody knows are warned of.
///
/// # Errors
/// Those of `work`; `Corrupt` where a digest differs.
pub fn beside<T>(
    no_manifest: bool,
    sources: &Joined,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let layers = sources.chains().flat_map(|chain| chain.layers());
    beside_all(no_manifest, layers, work)
}

/// As [`beside`], of the sources that these are the layers of.
///
/// # Errors
/// Those of [`beside`].
pub fn beside_all<'a, T>(
    no_manifest: bool,
    layers: impl Iterator<Item = &'a Box<dyn Image>>,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    if no_manifest {
        return work();
    }
    let seals: Vec<&dyn Sealed> = layers.filter_map(|layer| layer.sealed()).collect();
    if seals.is_empty() {
        return work();
    }
    let stop = AtomicBool::new(false);
    let until = Until(&stop);
    std::thread::scope(|scope| {
        let compared = scope.spawn(|| verify_all(&seals, &until));
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

/// Compares the digests of what these layers are kept in; those that nobody knows are warned of.
///
/// # Errors
/// `Corrupt` where one differs; `Cancelled` by a signal; the host's.
pub fn verify<'a>(layers: impl Iterator<Item = &'a Box<dyn Image>>) -> Result<()> {
    let seals: Vec<&dyn Sealed> = layers.filter_map(|layer| layer.sealed()).collect();
    verify_all(&seals, &Until(&AtomicBool::new(false)))
}

fn verify_all(seals: &[&dyn Sealed], until: &Until<'_>) -> Result<()> {
    for seal in seals {
        for text in seal.verify(until)? {
            complain(&format!("warning: {text}"));
        }
    }
    Ok(())
}
