//! Tables that lead to every cluster of a new disk, and the space for them.

use super::create::{Layout, Plan};
use super::entry::COPIED;
use crate::error::{ErrorKind, Result};
use crate::image::create::Preallocation;
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// Bytes of zeroes written at a time.
const STEP: usize = 1 << 20;

/// Writes the tables of a preallocated disk to `storage`, and gives its clusters space in `data`.
pub(super) fn preallocate(
    storage: &dyn Storage,
    data: &dyn Storage,
    plan: &Plan,
    layout: &Layout,
) -> Result<()> {
    if plan.preallocation == Preallocation::Off {
        return Ok(());
    }
    let size = plan.cluster_size();
    let first = if plan.external() {
        0
    } else {
        layout.data.start * size
    };
    write_tables(storage, plan, layout, first)?;
    if plan.external() {
        data.set_len(plan.size)?;
    }
    let end = match plan.external() {
        true => plan.size,
        false => layout.data.end * size,
    };
    match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => reserve(data, first..end),
        Preallocation::Full => {
            match reserve(data, first..end) {
                // Writing the zeroes gives them space as well.
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                done => done?,
            }
            write_zeroes(data, first..end)
        }
    }
}

/// Both table levels; cluster 0 of the disk is at `first`.
fn write_tables(storage: &dyn Storage, plan: &Plan, layout: &Layout, first: u64) -> Result<()> {
    let size = plan.cluster_size();
    let mut l1 = Vec::new();
    let per_table = size / if plan.extended() { 16 } else { 8 };
    for (index, cluster) in layout.l2.clone().enumerate() {
        let host = cluster * size;
        l1.extend((host | COPIED).to_be_bytes());
        let start = index as u64 * per_table;
        let mut table = Vec::with_capacity(clamp_len(size, usize::MAX));
        for guest in start..(start + per_table).min(plan.clusters()) {
            table.extend(((first + guest * size) | COPIED).to_be_bytes());
            if plan.extended() {
                // Space, but no subcluster in use: each reads as zeroes or as the layer below.
                table.extend([0; 8]);
            }
        }
        storage.write_at(&table, host)?;
    }
    storage.write_at(&l1, layout.l1.start * size)
}

/// Asks the host for space.
fn reserve(data: &dyn Storage, host: std::ops::Range<u64>) -> Result<()> {
    if host.is_empty() {
        return Ok(());
    }
    data.reserve(host)
}

fn write_zeroes(data: &dyn Storage, host: std::ops::Range<u64>) -> Result<()> {
    let zeroes = vec![0; STEP];
    let mut at = host.start;
    while at < host.end {
        let len = clamp_len(host.end - at, STEP);
        data.write_at(&zeroes[..len], at)?;
        at += len as u64;
    }
    Ok(())
}
