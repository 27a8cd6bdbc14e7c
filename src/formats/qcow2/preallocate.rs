//! Tables that lead to every cluster of a new disk, and the space for them.

use super::create::{Layout, Plan};
use super::entry::COPIED;
use crate::error::Result;
use crate::image::create::Preallocation;
use crate::storage::{Storage, fill_space, give_space};
use crate::util::align::clamp_len;

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
        Preallocation::Falloc => give_space(data, first..end),
        Preallocation::Full => fill_space(data, first..end),
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
