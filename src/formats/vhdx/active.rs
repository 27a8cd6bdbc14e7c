//! Which entries of the log count ([MS-VHDX] 2.3.2).

use uuid::Uuid;

use crate::error::{Error, Result};
use crate::formats::vhdx::entry::{Head, PAGE, Ring, SECTOR, STEP};
use crate::storage::Storage;
use crate::util::align::clamp_len;

/// The entries that are to be replayed, oldest first: of all runs of entries that follow each other
/// and whose last one's tail is in the run, the one that ends latest, from that tail on.
///
/// # Errors
/// `Corrupt` where entries overlap so much that reading them would take for ever; the host's.
pub(super) fn active(storage: &dyn Storage, ring: &Ring, guid: Uuid) -> Result<Vec<Head>> {
    let heads = valid(storage, ring, guid)?;
    let at = |place: u64| heads.binary_search_by_key(&place, |head| head.at).ok();
    // Later numbers first: what follows an entry is done before it.
    let mut order: Vec<usize> = (0..heads.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(heads[*index].sequence));
    let mut ends: Vec<usize> = (0..heads.len()).collect();
    let follows = |head: &Head| {
        let next = at(ring.step(head.at, head.len));
        next.filter(|next| Some(heads[*next].sequence) == head.sequence.checked_add(1))
    };
    for index in &order {
        if let Some(next) = follows(&heads[*index]) {
            ends[*index] = ends[next];
        }
    }
    let is_active = |index: &&usize| {
        let tail = at(heads[**index].tail);
        ends[**index] == **index && tail.is_some_and(|tail| ends[tail] == **index)
    };
    let Some(last) = order.iter().find(is_active) else {
        return Ok(Vec::new());
    };
    let mut run = Vec::new();
    let mut next = at(heads[*last].tail);
    while let Some(index) = next {
        run.push(heads[index]);
        next = follows(&heads[index]);
    }
    Ok(run)
}

/// All entries that were written as a whole, by their place.
fn valid(storage: &dyn Storage, ring: &Ring, guid: Uuid) -> Result<Vec<Head>> {
    // Entries that are there do not overlap, but for the beginnings of some that were overwritten.
    let mut budget = ring.len().saturating_mul(4);
    let mut heads = Vec::new();
    let mut buf = vec![0; clamp_len(STEP, usize::MAX)];
    let mut at = 0;
    while at < ring.len() {
        let run = storage.run(ring.host.start + at, ring.len() - at)?;
        let end = (at + run.len).min(ring.len());
        if !run.data {
            at = (end / SECTOR * SECTOR).max(at + SECTOR);
            continue;
        }
        let part = clamp_len(end.next_multiple_of(SECTOR) - at, buf.len());
        ring.read(storage, &mut buf[..part], at)?;
        for sector in buf[..part].chunks_exact(PAGE) {
            if let Some(head) = Head::parse(sector, at, guid, ring) {
                budget = budget.checked_sub(head.len).ok_or_else(|| {
                    Error::corrupt("the log has more entries than it has room for")
                })?;
                if head.read(storage, ring)?.is_some() {
                    heads.push(head);
                }
            }
            at += SECTOR;
        }
    }
    Ok(heads)
}
