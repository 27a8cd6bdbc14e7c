//! What of a file is known to be data, so that the host is not asked for each table run again.
//!
//! A host that is asked where the next hole is walks there, page by page where the file is in the
//! page cache: asked for every cluster of a large file, it walks the file as often as there are
//! clusters.  Only data is remembered.  "Data" is a safe answer whatever others write meanwhile;
//! a "hole" that has been written since would pass for zeroes, so holes are always asked for.

use std::collections::BTreeMap;
use std::ops::Range;

use parking_lot::Mutex;

/// Hosts give space in pieces no smaller than this, or nearly none do.
const BLOCK: u64 = 4096;
/// Ranges remembered; when there are more, the one asked for last stays.
const MOST: usize = 1024;

/// What the host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The first data at or after an offset.
    Data,
    /// The first hole at or after an offset in data.
    Hole,
}

/// What is at an offset, and where that ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// Data up to this offset.
    Data(u64),
    /// A hole up to this offset; `None`: there is no data after it.
    Hole(Option<u64>),
}

/// Ranges of a file that are known to be data.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// Innermost: nothing is locked under it, and the host is not asked.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Starts and ends of ranges that do not touch.
    data: BTreeMap<u64, u64>,
    /// Where data begins, by the last answer that said hole.
    begins: Option<u64>,
    /// Rises when something is forgotten: what was asked for before is not remembered.
    forgotten: u64,
}

impl State {
    /// The end of the range that `host` lies in.
    fn end(&self, host: u64) -> Option<u64> {
        let (_, end) = self.data.range(..=host).next_back()?;
        (*end > host).then_some(*end)
    }

    /// Where to begin to look for what is at `host`: as far ahead of it as is known after it, so
    /// that looking from the end of data towards its start walks it twice and not once for each
    /// look.
    fn look_from(&self, host: u64) -> u64 {
        if let Some(begins) = self.begins
            && begins <= host
            && host - begins < BLOCK
        {
            return begins;
        }
        match self.data.range(host..).next() {
            Some((start, end)) if start - host <= end - start => {
                let before = self
                    .data
                    .range(..host)
                    .next_back()
                    .map_or(0, |(_, end)| *end);
                host.saturating_sub(end - start).max(before)
            }
            _ => host,
        }
    }

    fn remember(&mut self, range: Range<u64>) {
        let mut range = range;
        if let Some((start, end)) = self.data.range(..range.start).next_back()
            && *end >= range.start
        {
            range = *start..range.end.max(*end);
        }
        while let Some((start, end)) = self.data.range(range.start..=range.end).next() {
            let start = *start;
            range.end = range.end.max(*end);
            self.data.remove(&start);
        }
        if self.data.len() >= MOST {
            self.data.clear();
        }
        self.data.insert(range.start, range.end);
    }

    fn forget(&mut self, range: &Range<u64>) {
        self.forgotten += 1;
        self.begins = None;
        while let Some((start, end)) = self.data.range(..range.end).next_back()
            && *end > range.start
        {
            let (start, end) = (*start, *end);
            self.data.remove(&start);
            if end > range.end {
                self.data.insert(range.end, end);
            }
            if start < range.start {
                self.data.insert(start, range.start);
            }
        }
    }
}

impl Known {
    /// What is at `host`; `ask` has the host find something at or after an offset, `None` where
    /// there is no more of it before the end of the file.
    ///
    /// # Errors
    /// Those of `ask`.
    pub(super) fn find<E>(
        &self,
        host: u64,
        ask: impl Fn(Next, u64) -> Result<Option<u64>, E>,
    ) -> Result<Found, E> {
        let (from, begins, forgotten) = {
            let state = self.state.lock();
            if let Some(end) = state.end(host) {
                return Ok(Found::Data(end));
            }
            (state.look_from(host), state.begins, state.forgotten)
        };
        let note = |noted: &dyn Fn(&mut State)| {
            let mut state = self.state.lock();
            if state.forgotten == forgotten {
                noted(&mut state);
            }
        };
        let data = match begins {
            Some(begins) if begins == from => Some(from),
            _ if from < host => ask(Next::Data, from)?,
            _ => None,
        };
        if let Some(data) = data.filter(|data| *data <= host)
            && let Some(hole) = ask(Next::Hole, data)?
            && hole > data
        {
            note(&|state| state.remember(data..hole));
            if hole > host {
                return Ok(Found::Data(hole));
            }
        }
        match ask(Next::Data, host)? {
            None => return Ok(Found::Hole(None)),
            Some(data) if data > host => {
                note(&|state| state.begins = Some(data));
                return Ok(Found::Hole(Some(data)));
            }
            Some(_) => {}
        }
        match ask(Next::Hole, host)? {
            Some(hole) if hole > host => {
                note(&|state| state.remember(host..hole));
                Ok(Found::Data(hole))
            }
            // Punched or cut off between the two questions: reading it will tell.
            _ => Ok(Found::Data(host + 1)),
        }
    }

    /// Forgets a range, after it was given back, zeroed or cut off.
    pub(super) fn forget(&self, range: &Range<u64>) {
        self.state.lock().forget(range);
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// A file, and how often it was asked and how far it walked.
    struct Host {
        data: RefCell<Vec<Range<u64>>>,
        asked: Cell<u64>,
        walked: Cell<u64>,
    }

    impl Host {
        fn new(data: &[Range<u64>]) -> Self {
            Self {
                data: RefCell::new(data.to_vec()),
                asked: Cell::new(0),
                walked: Cell::new(0),
            }
        }

        #[allow(clippy::unnecessary_wraps)]
        fn ask(&self, next: Next, at: u64) -> Result<Option<u64>, ()> {
            self.asked.set(self.asked.get() + 1);
            let data = self.data.borrow();
            let met = data.iter().find(|d| d.end > at);
            let found = match (next, met) {
                (Next::Data, met) => met.map(|d| d.start.max(at)),
                (Next::Hole, Some(d)) if d.start <= at => Some(d.end),
                (Next::Hole, _) => Some(at),
            };
            let end = found.unwrap_or(at);
            self.walked.set(self.walked.get() + (end - at));
            Ok(found)
        }

        fn find(&self, known: &Known, host: u64) -> Found {
            let found = known.find(host, |next, at| self.ask(next, at));
            let found = found.expect("the host answers");
            let data = self.data.borrow();
            let at = data.iter().find(|d| d.contains(&host)).map(|d| d.end);
            let next = data.iter().map(|d| d.start).find(|s| *s > host);
            let right = at.map_or(Found::Hole(next), Found::Data);
            assert_eq!(found, right, "at {host}");
            found
        }
    }

    #[test]
    fn data_is_asked_for_a_few_times_for_each_extent_in_whatever_order() {
        let extents: Vec<_> = (0..8u64)
            .map(|i| i << 30..(i << 30) + (900 << 20))
            .collect();
        let clusters: Vec<u64> = extents
            .iter()
            .flat_map(|e| e.clone().step_by(64 << 10))
            .collect();
        let mut shuffled = clusters.clone();
        fastrand::Rng::with_seed(3).shuffle(&mut shuffled);
        let backwards: Vec<u64> = clusters.iter().rev().copied().collect();
        for (order, most) in [(&clusters, 2), (&backwards, 48), (&shuffled, 48)] {
            let (known, host) = (Known::default(), Host::new(&extents));
            for at in order {
                host.find(&known, *at);
            }
            let asked = host.asked.get();
            assert!(asked <= most * extents.len() as u64, "{asked} questions");
            let walked = host.walked.get() >> 20;
            assert!(walked <= 8 * 900 * 8, "{walked} MiB walked");
        }
    }

    #[test]
    fn holes_are_asked_for_each_time_so_that_what_others_write_shows() {
        let (known, host) = (Known::default(), Host::new(&[10..20]));
        assert_eq!(host.find(&known, 5), Found::Hole(Some(10)));
        host.data.borrow_mut().insert(0, 5..7);
        assert_eq!(host.find(&known, 5), Found::Data(7));
        assert_eq!(host.find(&known, 30), Found::Hole(None));
        host.data.borrow_mut().push(25..40);
        assert_eq!(host.find(&known, 30), Found::Data(40));
    }

    #[test]
    fn what_is_given_back_is_forgotten_and_its_neighbours_are_not() {
        let (known, host) = (Known::default(), Host::new(&[0..100]));
        host.find(&known, 0);
        *host.data.borrow_mut() = vec![0..40, 60..100];
        known.forget(&(40..60));
        let asked = host.asked.get();
        assert_eq!(host.find(&known, 39), Found::Data(40));
        assert_eq!(host.find(&known, 99), Found::Data(100));
        assert_eq!(host.asked.get(), asked);
        assert_eq!(host.find(&known, 50), Found::Hole(Some(60)));
    }

    #[test]
    fn an_answer_from_before_a_range_was_given_back_is_not_remembered() {
        let (known, host) = (Known::default(), Host::new(&[0..100]));
        let found = known.find(0, |next, at| {
            let answer = host.ask(next, at);
            if next == Next::Hole {
                *host.data.borrow_mut() = vec![50..100];
                known.forget(&(0..50));
            }
            answer
        });
        assert_eq!(found, Ok(Found::Data(100)));
        assert_eq!(host.find(&known, 0), Found::Hole(Some(50)));
    }

    #[test]
    fn any_questions_between_changes_are_answered_as_the_host_would() {
        let mut rng = fastrand::Rng::with_seed(9);
        let (known, host) = (Known::default(), Host::new(&[]));
        let mut pages = vec![false; 300];
        for _ in 0..5000 {
            let first = rng.usize(..300);
            let end = (first + rng.usize(1..40)).min(300);
            match rng.u8(..8) {
                0 => pages[first..end].fill(true),
                1 => pages[first..end].fill(false),
                _ => {
                    host.find_within(&known, first as u64);
                    continue;
                }
            }
            let runs = pages.chunk_by(|a, b| a == b);
            let mut at = 0;
            let mut data = Vec::new();
            for run in runs {
                let end = at + run.len() as u64;
                if run[0] {
                    data.push(at..end);
                }
                at = end;
            }
            *host.data.borrow_mut() = data;
            if !pages[first] {
                known.forget(&(first as u64..end as u64));
            }
        }
    }

    impl Host {
        /// As `find`; what has been written after known data need not be seen yet.
        fn find_within(&self, known: &Known, host: u64) {
            let found = known.find(host, |next, at| self.ask(next, at));
            let data = self.data.borrow();
            let at = data.iter().find(|d| d.contains(&host));
            match found.expect("the host answers") {
                Found::Data(end) => assert!(at.is_some_and(|d| end <= d.end && end > host)),
                Found::Hole(next) => {
                    assert!(at.is_none());
                    assert_eq!(next, data.iter().map(|d| d.start).find(|s| *s > host));
                }
            }
        }
    }
}
