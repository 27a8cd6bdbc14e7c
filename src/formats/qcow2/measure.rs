//! How long the file of a new image gets: as qemu-img counts it, to the byte.

use super::bitmap_dir::entry_len;
use super::create::Plan;
use super::refblock::Width;
use crate::error::Result;
use crate::image::bitmap::Bitmap;
use crate::image::create::{CreateOptions, Preallocation};

/// Length of the file with `data_clusters` clusters of data.  All tables are counted as if the
/// disk were full, so a sparse disk takes less.
pub(super) fn measure(options: &CreateOptions, data_clusters: u64) -> Result<u64> {
    let plan = Plan::unchecked(options)?;
    let (size, clusters) = (plan.cluster_size(), plan.clusters());
    let data = match plan.preallocation {
        Preallocation::Off | Preallocation::Metadata => data_clusters.min(clusters),
        Preallocation::Falloc | Preallocation::Full => clusters,
    };
    let entry = if plan.extended() { 16 } else { 8 };
    let l2 = clusters.div_ceil(size / entry);
    let l1 = l2.div_ceil(size / 8);
    let fixed = 1 + l1 + l2;
    Ok((fixed + refcounts(&plan, fixed + clusters) + data) * size)
}

/// Length of copies of bitmaps, none of their clusters left out, and of their directory.  Bitmaps
/// that are in use are not copied.
pub(super) fn measure_bitmaps(options: &CreateOptions, bitmaps: &[Bitmap]) -> Option<u64> {
    let plan = Plan::unchecked(options).ok().filter(Plan::has_bitmaps)?;
    let size = plan.cluster_size();
    let whole = |bytes: u64| bytes.next_multiple_of(size);
    let sound = || bitmaps.iter().filter(|b| !b.in_use);
    let one = |bitmap: &Bitmap| {
        let bytes = options.size.div_ceil(bitmap.granularity.max(1)).div_ceil(8);
        whole(bytes) + whole(bytes.div_ceil(size) * 8)
    };
    let directory: u64 = sound().map(|b| entry_len(b.name.len())).sum();
    Some(sound().map(one).sum::<u64>() + whole(directory))
}

/// Clusters of refcount blocks and table that count `clusters` and themselves.
fn refcounts(plan: &Plan, clusters: u64) -> u64 {
    let per_block = 1u64 << Width::new(plan.refcount_order).block_bits(plan.cluster_bits);
    let per_table = plan.cluster_size() / 8;
    let (mut blocks, mut table) = (0, 0);
    loop {
        let next = (clusters + blocks + table).div_ceil(per_block);
        let next_table = next.div_ceil(per_table);
        if (next, next_table) == (blocks, table) {
            return blocks + table;
        }
        (blocks, table) = (next, next_table);
    }
}
