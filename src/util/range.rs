//! Half-open byte ranges: intersect, split at boundaries, merge.

use std::ops::Range;

use crate::util::align;

/// Length of a range; 0 where it is empty or reversed.
pub fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// The part both ranges have; `None` where they do not meet.
pub fn intersect(a: &Range<u64>, b: &Range<u64>) -> Option<Range<u64>> {
    let both = a.start.max(b.start)..a.end.min(b.end);
    (both.start < both.end).then_some(both)
}

/// A range cut at alignment boundaries: what lies before the first, between, and after the last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Unaligned start; may be empty.
    pub head: Range<u64>,
    /// Starts and ends at multiples of the unit; may be empty.
    pub body: Range<u64>,
    /// Unaligned end; may be empty.
    pub tail: Range<u64>,
}

/// Cuts `range` at multiples of `unit`, which must not be 0.
pub fn cut(range: &Range<u64>, unit: u64) -> Cut {
    let start = align::up(range.start, unit)
        .unwrap_or(range.end)
        .min(range.end);
    let end = align::down(range.end, unit).max(start);
    Cut {
        head: range.start..start,
        body: start..end,
        tail: end..range.end,
    }
}

/// Adds a range to a list in ascending order, joining it to the last where they touch.
pub fn push_merged(list: &mut Vec<Range<u64>>, range: Range<u64>) {
    if range.start >= range.end {
        return;
    }
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_keeps_every_byte_once() {
        for start in 0..20 {
            for end in start..20 {
                let cut = cut(&(start..end), 8);
                assert_eq!(cut.head.start, start);
                assert_eq!(cut.head.end, cut.body.start);
                assert_eq!(cut.body.end, cut.tail.start);
                assert_eq!(cut.tail.end, end);
                assert!(
                    cut.body.is_empty()
                        || [cut.body.start, cut.body.end]
                            .iter()
                            .all(|e| e.is_multiple_of(8))
                );
            }
        }
    }

    #[test]
    fn ranges_that_only_touch_do_not_intersect() {
        assert_eq!(intersect(&(0..4), &(4..8)), None);
        assert_eq!(intersect(&(0..5), &(4..8)), Some(4..5));
    }

    #[test]
    fn neighbours_are_merged() {
        let mut list = Vec::new();
        for range in [0..4, 4..8, 9..10, 10..10] {
            push_merged(&mut list, range);
        }
        assert_eq!(list, [0..8, 9..10]);
    }
}
