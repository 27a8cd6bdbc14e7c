//! A chain that is used while layers of it are merged into one below them.

use std::path::Path;
use std::sync::Arc;

use crate::chain::files::HostFile;
use crate::chain::open::{ChainOptions, Layer, Walk, changed, look};
use crate::chain::{Base, Chain};
use crate::error::Result;
use crate::image::Image;
use crate::storage::open::Access;
use crate::util::grace::Grace;

/// One disk in three chains, which share their layers.
#[derive(Debug)]
pub struct Live {
    /// All of it.
    pub disk: Chain,
    /// The layers below its top and above the base.
    pub upper: Chain,
    /// The base, open for writing, and what lies below it.  Space that it frees waits for who reads
    /// `disk`, too.
    pub base: Chain,
}

/// As [`super::open`], with `base`, which lies below the layer right below the top, open for writing by
/// the same image that the disk is read through.  It must be what it was in a chain that was opened
/// before.
///
/// # Errors
/// Those of [`super::open`]; `Io` where the layer is another one now.
pub fn open_live(path: &Path, options: &ChainOptions, base: &HostFile) -> Result<Live> {
    let mut walk = Walk::begin(look(path, options.storage.access)?, options)?;
    loop {
        let access = match walk.layers.len() == base.layer {
            true => Access::Write,
            false => Access::Read,
        };
        if !walk.descend(access)? {
            break;
        }
    }
    let found = walk.layers.get(base.layer).map(|layer| &layer.namer);
    if base.layer < 2 || !found.is_some_and(|found| base.is_same(found.id, &found.path)) {
        return Err(changed(path));
    }
    walk.tell_sizes();
    let Walk { layers, grace, .. } = walk;
    let mut layers = layers.into_iter();
    let mut disk: Vec<Box<dyn Image>> = layers.by_ref().take(1).map(|top| top.image).collect();
    let below: Vec<Arc<dyn Image>> = layers.map(|Layer { image, .. }| image.into()).collect();
    let again = |layers: &[Arc<dyn Image>]| -> Vec<Box<dyn Image>> {
        let layers = layers.iter().map(Arc::clone);
        layers
            .map(|layer| -> Box<dyn Image> { Box::new(layer) })
            .collect()
    };
    disk.extend(again(&below));
    let (upper, lower) = below.split_at(base.layer - 1);
    Ok(Live {
        disk: Chain::new(disk, Base::Zeroes, Arc::clone(&grace))?,
        // Nothing of it changes: who reads it keeps nobody waiting.
        upper: Chain::new(again(upper), Base::NotOpened, Arc::<Grace>::default())?,
        base: Chain::new(again(lower), Base::Zeroes, grace)?,
    })
}
