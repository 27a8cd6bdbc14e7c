//! What a commit would move.

use crate::chain::Chain;
use crate::cli::Globals;
use crate::error::Result;
use crate::image::info::HostInfo;
use crate::image::{Image, Source, Wait};
use crate::util::size;

/// What a commit comes to, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figures {
    /// Data that goes into the base.
    data: u64,
    /// Of it, where the base has no space yet.
    new: u64,
    /// What the images above the base take on the host.
    taken: u64,
}

impl Figures {
    /// Of the layers above the one at `depth`, which go into that.
    ///
    /// # Errors
    /// Those of the images; the host's.
    pub(super) fn of(chain: &Chain, depth: usize) -> Result<Self> {
        let mut figures = Self {
            data: 0,
            new: 0,
            taken: 0,
        };
        let (upper, lower) = chain.layers().split_at(depth);
        for layer in upper {
            for part in layer.parts() {
                figures.taken += HostInfo::of(part.storage)?.disk_size.unwrap_or(0);
            }
        }
        let base = lower.first().map(|layer| &**layer);
        let mut at = 0;
        while at < chain.virtual_size() {
            let len = figures.add(upper, base, at, chain.virtual_size() - at)?;
            at += len;
        }
        Ok(figures)
    }

    /// Adds what is at `at`; how far that goes.
    fn add(
        &mut self,
        upper: &[Box<dyn Image>],
        base: Option<&dyn Image>,
        at: u64,
        len: u64,
    ) -> Result<u64> {
        let mut len = len;
        let mut is_data = false;
        for layer in upper {
            let (found, source) = find(&**layer, at, len)?;
            len = found;
            match source {
                Source::Below => {}
                source => {
                    is_data = is_stored(source);
                    break;
                }
            }
        }
        if !is_data {
            return Ok(len);
        }
        let (len, in_base) = match base {
            Some(base) => find(base, at, len)?,
            None => (len, Source::Below),
        };
        self.data += len;
        if !is_stored(in_base) {
            self.new += len;
        }
        Ok(len)
    }

    /// Says it.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn say(self, globals: &Globals) -> anyhow::Result<()> {
        let [data, new, taken] = [self.data, self.new, self.taken].map(size::human);
        globals.say(&format!(
            "{data} would be moved, for which the base needs up to {new} more; the images above it take {taken}."
        ))
    }
}

fn is_stored(source: Source<'_>) -> bool {
    matches!(
        source,
        Source::Stored { .. } | Source::Encoded | Source::Moved(_)
    )
}

/// What a layer has at `at`; past its end, zeroes.
fn find(layer: &dyn Image, at: u64, len: u64) -> Result<(u64, Source<'_>)> {
    match layer.virtual_size().saturating_sub(at) {
        0 => Ok((len, Source::Zero)),
        inside => {
            let run = layer.map(at, len.min(inside), Wait::Yes)?;
            Ok((run.len, run.source))
        }
    }
}
