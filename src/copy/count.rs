//! How many clusters of a new image would hold data.

use crate::chain::State;
use crate::copy::find::Unwritten;
use crate::copy::joined::Joined;
use crate::copy::progress::Progress;
use crate::error::Result;

/// Clusters of `cluster` bytes (not 0) that data of `sources` touches, going by extents alone, as
/// [`Chain::extents`](crate::chain::Chain::extents) has them: data is not read.
///
/// # Errors
/// `Cancelled`; those of the chains.
pub fn data_clusters(sources: &Joined, cluster: u64, progress: &dyn Progress) -> Result<u64> {
    let _tickets = sources.enter();
    let unwritten = Unwritten::of(sources.chains());
    let mut count = 0;
    // First cluster that is not counted yet.
    let mut next = 0;
    let mut at = 0;
    while at < sources.len() {
        progress.check()?;
        let found = unwritten.ask(sources.locate(at, sources.len() - at)?)?;
        if matches!(found.state(), State::Data | State::Encoded) {
            let first = (at / cluster).max(next);
            let end = (at + found.len).div_ceil(cluster);
            count += end.saturating_sub(first);
            next = end.max(next);
        }
        at += found.len;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::copy::joined::tests::raw_chain;
    use crate::copy::progress::Silent;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn a_cluster_touched_twice_counts_once() {
        let storage = MemoryStorage::new();
        storage.set_len(1 << 20).expect("grows");
        for at in [0, 9000, 65536 + 4096, 131_072 - 10] {
            storage.write_at(&[1; 20], at).expect("writes");
        }
        let joined = Joined::new(vec![raw_chain(Arc::new(storage))]).expect("short");
        for (cluster, count) in [(4096, 5), (65536, 3), (1 << 20, 1)] {
            let found = data_clusters(&joined, cluster, &Silent).expect("memory answers");
            assert_eq!(found, count, "{cluster}");
        }
    }
}
