//! Writers that go through a disk in order, and how far ahead of them it pays to work.
//!
//! A unit whose old content has to be copied before it may change needs a sync of its own.  Where a
//! writer goes through one after another, the next ones are copied with it, by the same sync, and
//! then change in place.  As with readahead, few are taken at first and more as the writer goes on,
//! so that one who stops has had no more copied than a few times what it wrote.

use std::ops::Range;

use parking_lot::Mutex;

use crate::util::range;

/// Writers that are told apart.
const WRITERS: usize = 8;
/// Bytes worked on at a time at most.
pub const MOST: u64 = 16 << 20;
/// A request of this length pays for its sync itself.
const LONG: u64 = 8 << 20;
/// By how much more is worked on from one time to the next.
const GROWTH: u64 = 4;

/// What was worked on last for one writer.
#[derive(Debug, Clone, Default)]
struct Writer {
    range: Range<u64>,
    used: u64,
}

impl Writer {
    /// Whether a range goes on where this one ended, or comes right before it: no further away than
    /// was worked on, so that requests may overtake each other.
    fn is_near(&self, range: &Range<u64>) -> bool {
        let len = range::len(&self.range);
        let after = range.start.checked_sub(self.range.end);
        let before = self.range.start.checked_sub(range.end);
        len > 0 && after.or(before).is_some_and(|gap| gap < len)
    }
}

#[derive(Debug, Default)]
struct State {
    writers: [Writer; WRITERS],
    clock: u64,
}

/// The writers of one image.
#[derive(Debug, Default)]
pub struct Followed {
    state: Mutex<State>,
}

impl Followed {
    /// The range around `request` that should be worked on with it.
    pub fn around(&self, request: &Range<u64>) -> Range<u64> {
        let state = self.state.lock();
        let near = state.writers.iter().find(|w| w.is_near(request));
        let len = range::len(request);
        let Some(last) = near.filter(|_| len < LONG) else {
            return request.clone();
        };
        let more = range::len(&last.range).saturating_mul(GROWTH).min(MOST);
        match request.start >= last.range.end {
            true => request.start..request.end.max(request.start.saturating_add(more)),
            false => request.start.min(request.end.saturating_sub(more))..request.end,
        }
    }

    /// A range was worked on.
    pub fn worked_on(&self, range: Range<u64>) {
        let mut state = self.state.lock();
        state.clock += 1;
        let used = state.clock;
        let rank = |w: &&mut Writer| (!w.is_near(&range), w.used);
        if let Some(writer) = state.writers.iter_mut().min_by_key(rank) {
            *writer = Writer { range, used };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 64 << 10;

    /// How often something was worked on until `size` bytes were, by requests of `len` bytes.
    fn times(size: u64, len: u64) -> u64 {
        let followed = Followed::default();
        let (mut done, mut times) = (0, 0);
        while done < size {
            let around = followed.around(&(done..done + len));
            assert!(around.start == done && around.end - done <= MOST);
            followed.worked_on(around.clone());
            done = around.end;
            times += 1;
        }
        times
    }

    #[test]
    fn a_writer_that_goes_on_has_ever_more_done_for_it() {
        assert_eq!(times(64 << 20, UNIT), 8);
        assert_eq!(times(64 << 20, 1 << 20), 6);
        assert_eq!(times(64 << 20, LONG), 8);
    }

    #[test]
    fn one_that_goes_backwards_too() {
        let followed = Followed::default();
        let (mut at, mut times) = (64 << 20, 0);
        while at > 0 {
            let around = followed.around(&(at - UNIT..at));
            assert_eq!(around.end, at);
            at = around.start;
            followed.worked_on(around);
            times += 1;
        }
        assert_eq!(times, 8);
    }

    #[test]
    fn one_that_jumps_has_no_more_done_than_it_asks_for() {
        let followed = Followed::default();
        for jump in 0..100 {
            let request = jump * 10 * UNIT..jump * 10 * UNIT + UNIT;
            assert_eq!(followed.around(&request), request);
            followed.worked_on(request);
        }
    }

    #[test]
    fn writers_do_not_disturb_each_other() {
        let followed = Followed::default();
        let mut ends: Vec<u64> = (0..7).map(|writer| writer << 30).collect();
        for round in 0..8 {
            for end in &mut ends {
                let around = followed.around(&(*end..*end + UNIT));
                let expected = (UNIT << (2 * round)).min(MOST);
                assert_eq!(range::len(&around), expected);
                *end = around.end;
                followed.worked_on(around);
            }
        }
    }
}
