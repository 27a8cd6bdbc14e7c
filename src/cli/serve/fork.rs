//! `ctl fork`: the image of a disk in use becomes the base of an empty one that has its name.

use std::path::Path;

use serde_json::{Value, json};

use super::disk::Disk;
use super::merge::refuse_under_way;
use super::run::Front;
use crate::backend::Medium;
use crate::cli::common::OpenArgs;
use crate::cli::fork::{self, Live, ids};
use crate::error::Error;
use crate::image::bitmap::{Bitmap, Recording};
use crate::output::json::path as json_path;
use crate::util::text::printable;

/// Refuses disks whose layers are not what the images on disk are, or were told by who started it.
///
/// # Errors
/// `Unsupported`.
pub(super) fn refuse_temporary(disk: &Disk) -> crate::Result<()> {
    let file = disk.image.lock().0.clone();
    let opener = &disk.opener;
    let text = match (opener.is_snapshot(), opener.is_overlay()) {
        (true, _) => "is served as a snapshot (-s), so that its file is not what clients see",
        (_, true) => "is an overlay that is kept (--overlay), and is to lie right over its image",
        _ if !opener.reading(&file, &[]).parents.is_empty() => {
            "is served with --parent, which would be wrong afterwards (allowed: images that name \
             their parents, or lie in their directory; rebase makes them so)"
        }
        _ => return Ok(()),
    };
    Err(Error::unsupported(text).at(&file))
}

/// Refuses an image whose dirty bitmaps take note of writes: the new image has none that would.
///
/// # Errors
/// `Unsupported`.
fn refuse_recorded(chain: &crate::chain::Chain) -> crate::Result<()> {
    let Some(bitmaps) = chain.top().bitmaps() else {
        return Ok(());
    };
    let recording = |bitmap: &Bitmap| bitmap.recording == Recording::On;
    match bitmaps.list()?.into_iter().find(recording) {
        None => Ok(()),
        Some(bitmap) => {
            let text = format!(
                "has a dirty bitmap '{}' that takes note of writes, which the new image would not \
                 (allowed: after 'bitmap --disable')",
                printable(&bitmap.name)
            );
            Err(Error::unsupported(text).at_opt(chain.top().storage().path()))
        }
    }
}

/// Forks the image.
///
/// # Errors
/// Those of [`Live`]; the old image is served then, unless the text says otherwise.
pub(super) fn fork(front: &Front, disk: &Disk, new: &Path) -> anyhow::Result<Value> {
    let _turn = disk.turn.lock();
    refuse_temporary(disk)?;
    refuse_under_way(disk)?;
    let (file, format) = disk.image.lock().clone();
    let args = fork::Args {
        format: None,
        open: OpenArgs::default(),
        file: file.clone(),
        new: new.to_owned(),
        second: None,
    };
    let answer = json!({ "image": json_path(&file), "base": json_path(new) });
    let backend = &disk.export.backend;
    let chain = backend.chain();
    refuse_recorded(&chain)?;
    let Some(live) = Live::begin(&args, &disk.opener.reading(&file, &[]), &chain)? else {
        return Ok(answer);
    };
    let ours = ids(&chain.files());
    drop(chain);
    // So that little is left to do while requests wait.
    backend.flush()?;
    let (child, high_water) = disk.opener.watched(&file, Some(format), &ours);
    let lower = disk.opener.reading(&file, &ours);
    let mut doubt = None;
    let next = |old: &crate::chain::Chain| {
        let forked = live.finish(old, &child, &lower)?;
        doubt = forked.doubt;
        Ok(Medium {
            chain: forked.chain,
            high_water: Some(high_water),
        })
    };
    let back = || disk.opener.open_ours(&file, Some(format), &ours);
    backend.replace(next, back)?;
    tell(front, disk, &file, new);
    doubt.map_or(Ok(answer), |e| {
        let text =
            "is forked, and the disk goes on with the empty image, but a power cut may undo it";
        Err(e.noted(text).into())
    })
}

fn tell(front: &Front, disk: &Disk, file: &Path, new: &Path) {
    let human = format!(
        "{}: is an empty image over {}",
        printable(file),
        printable(new)
    );
    let machine = json!({
        "event": "fork",
        "export": disk.export.name,
        "image": json_path(file),
        "base": json_path(new),
    });
    front.events.print(&human, &machine);
}
