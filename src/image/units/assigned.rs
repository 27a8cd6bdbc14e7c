//! Host space set aside for units ahead of their writes, in guest order.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::image::units::Taken;

/// Runs of units that have space set aside, by the first of each.
#[derive(Debug, Default)]
pub(super) struct Assigned {
    runs: BTreeMap<u64, Taken>,
}

impl Assigned {
    /// Sets space aside for the units from `first` on, which have none.
    pub(super) fn insert(&mut self, first: u64, space: Taken) {
        if space.count > 0 {
            self.runs.insert(first, space);
        }
    }

    /// Takes the space of up to `count` units from `index` on.
    pub(super) fn take(&mut self, index: u64, count: u64) -> Option<Taken> {
        let (&first, &run) = self.runs.range(..=index).next_back()?;
        let before = index - first;
        if before >= run.count {
            return None;
        }
        self.runs.remove(&first);
        let taken = count.min(run.count - before);
        self.insert(first, run.part(0..before));
        self.insert(index + taken, run.part(before + taken..run.count));
        Some(run.part(before..before + taken))
    }

    /// The first run of units in a range that have none set aside; empty, at its end, where there
    /// are none.
    pub(super) fn gap(&self, units: Range<u64>) -> Range<u64> {
        let mut at = units.start;
        if let Some((first, run)) = self.runs.range(..=at).next_back() {
            at = at.max(first + run.count);
        }
        for (first, run) in self.runs.range(at..units.end.max(at)) {
            if *first > at {
                return at..*first;
            }
            at = first + run.count;
        }
        at.min(units.end)..units.end
    }

    /// All that is set aside.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Taken> {
        self.runs.values()
    }

    /// Takes out all that is left.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Taken> + use<> {
        std::mem::take(&mut self.runs).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_taken_out_of_the_middle_and_both_ends_stay() {
        let mut assigned = Assigned::default();
        let run = Taken::new(1000, 6, 100);
        assigned.insert(10, run);
        assert_eq!(assigned.gap(8..20), 8..10);
        assert_eq!(assigned.gap(10..20), 16..20);
        let taken = assigned.take(12, 2).expect("is there");
        assert_eq!((taken.host, taken.count), (1200, 2));
        assert_eq!(assigned.gap(10..20), 12..14);
        assert_eq!(assigned.take(12, 1).map(|t| t.host), None);
        assert_eq!(
            assigned.take(14, 9).map(|t| (t.host, t.count)),
            Some((1400, 2))
        );
        let left: Vec<u64> = assigned.drain().map(|t| t.host).collect();
        assert_eq!(left, [1000]);
        assert_eq!(assigned.gap(3..5), 3..5);
    }
}
