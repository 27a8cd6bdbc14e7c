//! Where tables are, and which of them lie over others or over other metadata.

use std::ops::Range;

/// Whose bytes they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    /// A header, a directory, the descriptor.
    Metadata,
    /// Table of this number, and its second copy.
    First(u64),
    Second(u64),
}

/// Host ranges of metadata.
#[derive(Debug, Default)]
pub(super) struct Spans {
    parts: Vec<(Range<u64>, Owner)>,
}

/// Numbers of tables that lie over something else, in ascending order.
#[derive(Debug, Default)]
pub(super) struct Overlaps {
    pub(super) first: Vec<u64>,
    pub(super) second: Vec<u64>,
}

impl Spans {
    pub(super) fn add(&mut self, host: Range<u64>) {
        self.parts.push((host, Owner::Metadata));
    }

    pub(super) fn add_first(&mut self, number: u64, host: Range<u64>) {
        self.parts.push((host, Owner::First(number)));
    }

    pub(super) fn add_second(&mut self, number: u64, host: Range<u64>) {
        self.parts.push((host, Owner::Second(number)));
    }

    /// Those that lie over something else: of two both, since nobody knows whose place it is.
    pub(super) fn overlaps(&mut self) -> Overlaps {
        self.parts
            .sort_unstable_by_key(|(host, owner)| (host.start, *owner));
        let mut found = Overlaps::default();
        let mut longest: Option<&(Range<u64>, Owner)> = None;
        for part in &self.parts {
            match longest.filter(|before| before.0.end > part.0.start) {
                // A copy that is the table itself is none.
                Some((_, Owner::First(number))) if part.1 == Owner::Second(*number) => {
                    found.add(part.1);
                }
                Some(before) => {
                    found.add(before.1);
                    found.add(part.1);
                }
                None => {}
            }
            if longest.is_none_or(|before| before.0.end < part.0.end) {
                longest = Some(part);
            }
        }
        for list in [&mut found.first, &mut found.second] {
            list.sort_unstable();
            list.dedup();
        }
        found
    }

    /// All ranges that reach behind `host`.
    pub(super) fn behind(self, host: u64) -> Vec<Range<u64>> {
        let ranges = self.parts.into_iter().map(|(range, _)| range);
        ranges.filter(|range| range.end > host).collect()
    }
}

impl Overlaps {
    fn add(&mut self, owner: Owner) {
        match owner {
            Owner::Metadata => {}
            Owner::First(number) => self.first.push(number),
            Owner::Second(number) => self.second.push(number),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_that_lie_over_each_other_both_are_told() {
        let mut spans = Spans::default();
        spans.add(0..10);
        spans.add_first(0, 10..20);
        spans.add_first(1, 20..30);
        spans.add_first(2, 25..35);
        spans.add_second(0, 40..50);
        spans.add_second(1, 20..30);
        spans.add_second(2, 5..6);
        spans.add_first(3, 60..70);
        spans.add_second(3, 60..70);
        let found = spans.overlaps();
        assert_eq!(found.first, [1, 2]);
        assert_eq!(found.second, [1, 2, 3]);
        assert_eq!(spans.behind(40), [40..50, 60..70, 60..70]);
    }
}
