//! What the server has told of data and holes, kept until something changes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::Result;
use crate::nbd::wire::allocation;
use crate::storage::HostRun;

/// The last answer of the server.
#[derive(Debug, Default)]
pub(super) struct Extents {
    /// Rises before and after each change: an answer that was asked for before is not kept.
    changes: AtomicU64,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The value of `changes` it holds for.
    at: u64,
    /// Ascending, without gaps; `true`: data.
    runs: Vec<(Range<u64>, bool)>,
}

/// A change is under way until this is dropped.
#[derive(Debug)]
pub(super) struct Change<'a>(&'a AtomicU64);

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl Extents {
    /// Says that something is about to change.
    pub(super) fn change(&self) -> Change<'_> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        Change(&self.changes)
    }

    /// The run at `host`, at most `len`; `ask` fetches extents from at or before an offset on, and
    /// says from where.
    pub(super) fn run(
        &self,
        host: u64,
        len: u64,
        ask: impl FnOnce(u64, &mut Vec<(u64, u32)>) -> Result<u64>,
    ) -> Result<HostRun> {
        let now = self.changes.load(Ordering::SeqCst);
        if let Some(run) = self.known.lock().find(now, host, len) {
            return Ok(run);
        }
        let mut found = Vec::new();
        let mut at = ask(host, &mut found)?;
        let mut runs: Vec<(Range<u64>, bool)> = Vec::with_capacity(found.len());
        for (len, flags) in found {
            let data = flags & allocation::ZERO == 0;
            let end = at.saturating_add(len);
            match runs.last_mut() {
                Some((range, same)) if *same == data => range.end = end,
                _ => runs.push((at..end, data)),
            }
            at = end;
        }
        let known = Known { at: now, runs };
        // A server that tells nothing of the first byte: it is data for all we know.
        let run = known.find(now, host, len);
        let run = run.unwrap_or(HostRun { data: true, len });
        *self.known.lock() = known;
        Ok(run)
    }
}

impl Known {
    fn find(&self, now: u64, host: u64, len: u64) -> Option<HostRun> {
        if self.at != now {
            return None;
        }
        let index = self.runs.partition_point(|(range, _)| range.end <= host);
        let (range, data) = self.runs.get(index)?;
        range.contains(&host).then(|| HostRun {
            data: *data,
            len: len.min(range.end - host),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_used_until_something_changes() {
        let extents = Extents::default();
        let told = |found: &mut Vec<(u64, u32)>| {
            found.extend([(10, 0), (5, allocation::HOLE), (5, 3), (10, 0)]);
            Ok(100)
        };
        let hole = |len| HostRun { data: false, len };
        let data = |len| HostRun { data: true, len };
        assert_eq!(
            extents.run(100, 99, |_, f| told(f)).expect("told"),
            data(15)
        );
        let known = |at, len| extents.run(at, len, |_, _| panic!("asked again"));
        assert_eq!(known(112, 99).expect("known"), data(3));
        assert_eq!(known(115, 99).expect("known"), hole(5));
        assert_eq!(known(116, 2).expect("known"), hole(2));
        drop(extents.change());
        let asked = extents.run(115, 9, |_, found| {
            // A write that comes while the server answers.
            drop(extents.change());
            told(found)
        });
        assert_eq!(asked.expect("told"), hole(5));
        let again = extents.run(115, 9, |_, f| told(f));
        assert_eq!(again.expect("asks again"), hole(5));
    }
}
