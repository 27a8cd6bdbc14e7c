//! What the commands of the control socket do.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::disk::{Disk, same_file};
use super::run::Front;
use super::{fork, limit, merge, report};
use crate::cli::ctl::{Order, Which};
use crate::cli::exit::usage;
use crate::error::{Error, ErrorKind};
use crate::image::Driver;
use crate::nbd::uri::is_uri;
use crate::util::text::printable;

/// Carries out one command; what it returns is the answer.
///
/// # Errors
/// What a command cannot do; nothing has changed then, unless the text says so.
pub(super) fn carry_out(order: &Order, front: &Front) -> anyhow::Result<Value> {
    match order {
        Order::Status { which } => status(front, which),
        Order::Stats { which } => {
            let all = some(front, which)?;
            let stats =
                |(index, disk): &(usize, &Arc<Disk>)| report::stats(front, *index, &disk.export);
            let all: Vec<Value> = all.iter().map(stats).collect();
            Ok(json!({ "exports": all }))
        }
        Order::Pause { which } => each(front, which, |disk| {
            disk.export.backend.pause();
            Ok(())
        }),
        Order::Resume { which } => each(front, which, |disk| {
            disk.export.backend.resume();
            Ok(())
        }),
        Order::Flush { which } => each(front, which, |disk| disk.export.backend.flush()),
        Order::Resize {
            which,
            shrink,
            size,
        } => resize(front, one(front, which)?, *size, *shrink),
        Order::Change {
            which,
            format,
            file,
        } => change(front, one(front, which)?, file, *format),
        Order::Reopen { which } => {
            let disk = one(front, which)?;
            let merge = disk.merge.lock().clone();
            // Its thread may wait for its turn.
            merge.iter().for_each(|merge| merge.end());
            let _turn = disk.turn.lock();
            let (path, format) = disk.image.lock().clone();
            reopen(front, disk, &path, Some(format))
        }
        Order::Fork { which, new } => fork::fork(front, one(front, which)?, new),
        Order::Commit {
            which,
            called,
            what,
        } => commit(front, one(front, which)?, called.as_ref(), what.as_ref()),
        Order::Limit { which, limits } => {
            let limits = limit::change(&one(front, which)?.export, limits)?;
            // Those that share the group, too.
            front.disks.iter().for_each(|d| d.export.backend.wake());
            Ok(limits)
        }
        // `control` ends the process once it has answered.
        Order::Stop { force: true, .. } => Ok(json!({})),
        Order::Stop {
            force: false,
            hand_over,
        } => {
            // Counted first: the process does not wait for whom it does not know of.
            front.ending.join();
            match hand_over {
                true => hand_over_all(front)?,
                false => front.stop(),
            }
            front.ending.wait()?;
            Ok(json!({}))
        }
    }
}

fn commit(
    front: &Front,
    disk: &Arc<Disk>,
    called: Option<&OsString>,
    what: Option<&OsString>,
) -> anyhow::Result<Value> {
    match (called, what) {
        (None, Some(what)) if what == "pause" => merge::hold(disk, true),
        (None, Some(what)) if what == "resume" => merge::hold(disk, false),
        (called, what) => {
            let base = what.map(|path| (called.unwrap_or(path).clone(), PathBuf::from(path)));
            merge::start(front, disk, base)
        }
    }
}

/// The exports that are meant: all, or the one that is named.
fn some<'f>(front: &'f Front, which: &Which) -> anyhow::Result<Vec<(usize, &'f Arc<Disk>)>> {
    let all = front.disks.iter().enumerate();
    let meant: Vec<_> = match &which.export {
        None => all.collect(),
        Some(name) => all.filter(|(_, d)| d.export.name == *name).collect(),
    };
    match (meant.is_empty(), &which.export) {
        (true, Some(name)) => {
            let text = format!("no export is called '{}'", printable(name));
            Err(Error::new(ErrorKind::NotFound, text).into())
        }
        _ => Ok(meant),
    }
}

/// The export that is meant: there is but one, or it is named.
fn one<'f>(front: &'f Front, which: &Which) -> anyhow::Result<&'f Arc<Disk>> {
    match some(front, which)?.as_slice() {
        [(_, disk)] => Ok(disk),
        disks => Err(usage(format!(
            "{} disks are served; --export says which is meant",
            disks.len()
        ))),
    }
}

fn each(
    front: &Front,
    which: &Which,
    f: impl Fn(&Disk) -> crate::Result<()>,
) -> anyhow::Result<Value> {
    for (_, disk) in some(front, which)? {
        f(disk)?;
    }
    Ok(json!({}))
}

fn status(front: &Front, which: &Which) -> anyhow::Result<Value> {
    let addresses = front.server.addresses();
    let all = some(front, which)?;
    let all: Vec<Value> = all
        .iter()
        .map(|(index, disk)| {
            report::status(disk, addresses.get(*index), front.server.in_use(*index))
        })
        .collect();
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "exports": all,
    }))
}

fn resize(front: &Front, disk: &Disk, size: u64, shrink: bool) -> anyhow::Result<Value> {
    let backend = &disk.export.backend;
    let before = backend.geometry().virtual_size;
    if size < before && !shrink {
        let text = format!(
            "the disk would shrink from {before} to {size} bytes, and what lies behind the new \
             end would be lost (--shrink allows it)"
        );
        return Err(Error::invalid(text).into());
    }
    front.server.may_resize(&disk.export)?;
    backend.resize(size)?;
    tell(front, disk, before)?;
    Ok(json!({ "virtual-size": backend.geometry().virtual_size }))
}

/// Ends serving, and leaves what clients have open to the next server.
fn hand_over_all(front: &Front) -> crate::Result<()> {
    if front.disks.iter().any(|disk| disk.opener.is_snapshot()) {
        return Err(Error::unsupported("a snapshot would lose its writes"));
    }
    front.server.hand_over()
}

/// Refuses another size where clients cannot be told of it.
fn may_become(front: &Front, disk: &Disk, size: u64) -> crate::Result<()> {
    match disk.export.backend.geometry().virtual_size == size {
        true => Ok(()),
        false => front.server.may_resize(&disk.export),
    }
}

/// Tells clients of a size that is not what it was.
fn tell(front: &Front, disk: &Disk, before: u64) -> crate::Result<()> {
    if disk.export.backend.geometry().virtual_size == before {
        return Ok(());
    }
    front.server.resized(&disk.export).map_err(|e| {
        let text = format!("the size is changed, but clients could not be told: {e}");
        Error::new(e.kind(), text)
    })
}

fn change(
    front: &Front,
    disk: &Disk,
    file: &Path,
    format: Option<&'static Driver>,
) -> anyhow::Result<Value> {
    let _turn = disk.turn.lock();
    merge::refuse_under_way(disk)?;
    if disk.opener.is_overlay() {
        let text = "the image lies under an overlay that is kept (--overlay) and cannot be changed";
        return Err(Error::unsupported(text).into());
    }
    let current = disk.image.lock().0.clone();
    if same_file(&current, file) && !disk.opener.is_snapshot() {
        return reopen(front, disk, file, format);
    }
    let before = disk.export.backend.geometry().virtual_size;
    let medium = disk.opener.open(file, format)?;
    may_become(front, disk, medium.chain.virtual_size())?;
    let found = disk.opener.format_of(&medium);
    disk.export.backend.change(medium)?;
    *disk.image.lock() = (file.to_owned(), found);
    tell(front, disk, before)?;
    Ok(json!({ "virtual-size": disk.export.backend.geometry().virtual_size }))
}

fn reopen(
    front: &Front,
    disk: &Disk,
    path: &Path,
    format: Option<&'static Driver>,
) -> anyhow::Result<Value> {
    if disk.opener.is_snapshot() {
        let text = "a snapshot would lose its writes";
        return Err(Error::unsupported(text).at(path).into());
    }
    let before = disk.export.backend.geometry().virtual_size;
    // Before anything is closed, and again once nobody else can change it.  Not a server's: it may
    // take one client only, which is us.
    if !is_uri(path) && front.server.may_resize(&disk.export).is_err() {
        may_become(front, disk, disk.opener.size_of(path, format)?)?;
    }
    let mut found = None;
    let merge = disk.merge.lock().clone();
    disk.export.backend.reopen(|| {
        // Nobody reads by it any more.
        merge.map_or(Ok(()), |merge| merge.close())?;
        let medium = disk.opener.open(path, format)?;
        may_become(front, disk, medium.chain.virtual_size())?;
        found = Some(disk.opener.format_of(&medium));
        Ok(medium)
    })?;
    if let Some(found) = found {
        *disk.image.lock() = (path.to_owned(), found);
    }
    tell(front, disk, before)?;
    Ok(json!({ "virtual-size": disk.export.backend.geometry().virtual_size }))
}
