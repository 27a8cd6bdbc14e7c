//! Layers resolved into one disk.
//!
//! The one place where reads walk down the layers, where writes get space and copy what they do
//! not cover, and where zeroing and discarding fall back.  Nothing here knows a format.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, LayerBelow, Source, Wait};
use crate::util::grace::{Grace, Ticket};

mod compress;
pub mod extent;
pub mod family;
pub mod files;
pub mod open;
mod overlay;
mod read;
mod reference;
mod write;

#[cfg(test)]
mod tests;

pub use extent::{Extent, Extents, State};
pub use files::HostFile;
pub use write::Stored;

/// Most layers a chain may have: 500 links below the top.
pub const MAX_LAYERS: usize = 501;

/// What lies under the last layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Nothing: what no layer has reads as zeroes.
    Zeroes,
    /// An image that was not opened: what no layer has cannot be read.
    NotOpened,
}

/// All layers of a disk, top first.
///
/// Any number of threads may read, write, zero, discard and flush; [`Chain::resize`] and
/// [`Chain::close`] want no other request under way.
#[derive(Debug)]
pub struct Chain {
    layers: Vec<Box<dyn Image>>,
    base: Base,
    grace: Arc<Grace>,
}

/// Where a run of guest bytes is, through all layers.
#[derive(Debug, Clone, Copy)]
pub struct Resolved<'a> {
    /// Bytes from the offset asked for; never 0.
    pub len: u64,
    /// Where they are; `Below`: no layer has them, they read as zeroes.  Never `Moved`.
    pub source: Source<'a>,
    /// The layer that decides; the number of layers where none does.
    pub depth: usize,
    /// Offset of them in the disk of that layer: another one where a layer above it moved them.
    pub at: u64,
}

impl Chain {
    /// A chain of layers, top first; `grace` is the one they were opened with.
    ///
    /// # Errors
    /// `Invalid` for no layers; `OutOfRange` for more than [`MAX_LAYERS`].
    pub fn new(layers: Vec<Box<dyn Image>>, base: Base, grace: Arc<Grace>) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::invalid("a chain has at least one layer"));
        }
        if layers.len() > MAX_LAYERS {
            return Err(Error::new(
                ErrorKind::OutOfRange,
                format!(
                    "the chain has {} layers (allowed: {MAX_LAYERS})",
                    layers.len()
                ),
            ));
        }
        Ok(Self {
            layers,
            base,
            grace,
        })
    }

    /// The layers of this chain, the lowest of which is known to have been made over the disk of
    /// `below`, above those of that, which is only read.
    ///
    /// # Errors
    /// Those of [`Chain::new`].
    pub fn over(self, below: Self) -> Result<Self> {
        let mut layers = self.layers;
        layers.extend(below.layers);
        Self::new(layers, below.base, self.grace)
    }

    /// The layers, top first; never empty.
    pub fn layers(&self) -> &[Box<dyn Image>] {
        &self.layers
    }

    /// The top layer, which takes the writes.
    pub fn top(&self) -> &dyn Image {
        &*self.layers[0]
    }

    /// The top layer, for changes that want no other request under way.
    pub fn top_mut(&mut self) -> &mut dyn Image {
        &mut *self.layers[0]
    }

    /// What lies under the last layer.
    pub fn base(&self) -> Base {
        self.base
    }

    /// By layer, whether what it stores may for long stretches never have been written.
    pub fn may_be_unwritten(&self) -> Vec<bool> {
        self.layers.iter().map(|l| l.may_be_unwritten()).collect()
    }

    /// Size of the disk in bytes: that of the top layer.
    pub fn virtual_size(&self) -> u64 {
        self.top().virtual_size()
    }

    /// Must be held for as long as offsets that `resolve` handed out are used.
    pub fn enter(&self) -> Ticket {
        self.grace.enter()
    }

    /// Returns once every completed write is on stable media.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> Result<()> {
        self.top().flush()
    }

    /// Refuses a disk a file of which failed to sync: what was written to it may be lost.
    ///
    /// # Errors
    /// `Io`, which names the file.
    pub fn sound(&self) -> Result<()> {
        let mut parts = self.layers.iter().flat_map(|layer| layer.parts());
        parts.try_for_each(|part| part.storage.syncs().sound(part.storage.path()))
    }

    /// Leaves the top layer's file as a clean close leaves it.  Does nothing on a read-only chain.
    ///
    /// # Errors
    /// The host's; where a sync has failed, the file is left as by a kill.
    pub fn close(&self) -> Result<()> {
        if self.top().caps().write {
            self.top().close()
        } else {
            Ok(())
        }
    }

    /// Sets the virtual size in bytes; new bytes read as zeroes.
    ///
    /// # Errors
    /// `Unsupported` where the format cannot; `ReadOnly`; those of the format.
    pub fn resize(&self, virtual_size: u64) -> Result<()> {
        let top = self.top();
        let path = top.storage().path();
        if !top.caps().write {
            return Err(top.read_only().at_opt(path));
        }
        let Some(resize) = top.as_resize() else {
            return Err(Error::unsupported(format!(
                "images of format '{}' cannot be resized",
                top.driver().name
            ))
            .at_opt(path));
        };
        let below = match self.layers.get(1) {
            Some(layer) => LayerBelow::Size(layer.virtual_size()),
            None if self.base == Base::NotOpened => LayerBelow::NotOpened,
            None => LayerBelow::Nothing,
        };
        resize
            .may_resize(virtual_size, below)
            .map_err(|e| e.at_opt(path))?;
        self.own_the_end(virtual_size, below)?;
        resize
            .resize(virtual_size, below)
            .map_err(|e| e.at_opt(path))
    }

    /// Before a disk grows over data of the layer below: the unit that its end cuts gets space of
    /// its own, so that the top layer can hide what follows.
    fn own_the_end(&self, virtual_size: u64, below: LayerBelow) -> Result<()> {
        let (old, unit) = (self.virtual_size(), self.top().limits().zero_align);
        let hides = matches!(below, LayerBelow::Size(size) if size > old) && virtual_size > old;
        if !hides || unit == 0 || old.is_multiple_of(u64::from(unit)) {
            return Ok(());
        }
        let mut last = [0];
        self.read_at(&mut last, old - 1)?;
        self.write_at(&last, old - 1)
    }

    /// Finds the bytes from `at`, looking no further than `len`, which is not 0; `at` lies inside
    /// the disk.  Hold a ticket of [`Chain::enter`] from before the call until the offsets in the
    /// answer are no longer used.
    ///
    /// # Errors
    /// Those of [`Image::map`]; `NotFound` where the answer is in an image that was not opened.
    pub fn resolve(&self, at: u64, len: u64, wait: Wait) -> Result<Resolved<'_>> {
        self.resolve_from(0, at, len, wait)
    }

    /// As `resolve`, for bytes that the top layer is known not to have.
    ///
    /// # Errors
    /// Those of [`Chain::resolve`].
    pub fn resolve_below(&self, at: u64, len: u64, wait: Wait) -> Result<Resolved<'_>> {
        self.resolve_from(1, at, len, wait)
    }

    /// As `resolve`, in these layers alone: `Below` where none of them has the bytes, whatever lies
    /// under them; past the end of a layer that is shorter than the one above, zeroes.
    ///
    /// # Errors
    /// Those of [`Image::map`]; `Unsupported` where a layer has bytes that lie elsewhere below it.
    pub fn resolve_layers(&self, at: u64, len: u64, wait: Wait) -> Result<Resolved<'_>> {
        let mut len = len;
        for (depth, layer) in self.layers.iter().enumerate() {
            let inside = layer.virtual_size().saturating_sub(at);
            let (found, source) = match inside {
                0 => (len, Source::Zero),
                inside => {
                    let run = layer
                        .map(at, len.min(inside), wait)
                        .map_err(|e| e.at_opt(layer.storage().path()))?;
                    (run.len, run.source)
                }
            };
            len = found;
            if matches!(source, Source::Moved(_)) {
                // Whatever is done by layers changes the one below, where others read this from.
                return Err(Error::unsupported(format!(
                    "has data at {at:#x} that lies elsewhere in the image below it"
                ))
                .at_opt(layer.storage().path()));
            }
            if !matches!(source, Source::Below) {
                return Ok(Resolved {
                    at,
                    len,
                    source,
                    depth,
                });
            }
        }
        Ok(Resolved {
            at,
            len,
            source: Source::Below,
            depth: self.layers.len(),
        })
    }

    /// As `resolve`, from the layer at `first` down.
    fn resolve_from(&self, first: usize, at: u64, len: u64, wait: Wait) -> Result<Resolved<'_>> {
        debug_assert!(len > 0);
        let (mut at, mut len) = (at, len);
        for (depth, layer) in self.layers.iter().enumerate().skip(first) {
            // A layer shorter than the one above reads as zeroes past its end.
            let inside = layer.virtual_size().saturating_sub(at);
            if inside == 0 {
                return Ok(Resolved {
                    at,
                    len,
                    source: Source::Below,
                    depth: self.layers.len(),
                });
            }
            let run = layer
                .map(at, len.min(inside), wait)
                .map_err(|e| e.at_opt(layer.storage().path()))?;
            len = run.len;
            match run.source {
                Source::Below => {}
                Source::Moved(there) => at = there,
                source => {
                    return Ok(Resolved {
                        at,
                        len,
                        source,
                        depth,
                    });
                }
            }
        }
        if self.base == Base::NotOpened {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the data at {at:#x} is in the backing image, which was not opened"),
            )
            .at_opt(self.layers.last().and_then(|l| l.storage().path())));
        }
        Ok(Resolved {
            at,
            len,
            source: Source::Below,
            depth: self.layers.len(),
        })
    }
}
