//! How long the file of a new image gets: as qemu-img counts it, to the byte.

use super::create::Plan;
use super::refblock::Width;
use crate::error::Result;
use crate::image::create::{CreateOptions, Preallocation};

/// Length of the file with `data_clusters` clusters of data.  All tables are counted as if the
/// disk were full, so a sparse disk takes less.
pub(super) fn measure(options: &CreateOptions, data_clusters: u64) -> Result<u64> {
    let plan = Plan::new(options)?;
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
