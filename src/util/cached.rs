//! Slots for what is cached, found by number and without a lock.

use std::sync::OnceLock;

use arc_swap::ArcSwapOption;

use crate::util::align::{clamp_len, len64};

/// Slots that are made at a time.
const GROUP: usize = 16;

type Group<T> = Box<[ArcSwapOption<T>]>;

/// A fixed number of slots; two numbers that are that far apart share one.
///
/// They are made on first use, some neighbours at a time: each costs something when it goes, as much
/// as there are threads, and most files have little of them looked at.
#[derive(Debug)]
pub struct CacheSlots<T> {
    groups: Box<[OnceLock<Group<T>>]>,
    count: usize,
}

impl<T> CacheSlots<T> {
    /// `count` empty slots, at least one.
    pub fn new(count: usize) -> Self {
        let count = count.max(1);
        let groups = 0..count.div_ceil(GROUP);
        Self {
            groups: groups.map(|_| OnceLock::new()).collect(),
            count,
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count
    }

    fn place(&self, number: u64) -> (&OnceLock<Group<T>>, usize) {
        let slot = clamp_len(number % len64(self.count), usize::MAX);
        (&self.groups[slot / GROUP], slot % GROUP)
    }

    /// The slot of `number`; `None` where it is empty because it was never used.
    pub fn get(&self, number: u64) -> Option<&ArcSwapOption<T>> {
        let (group, slot) = self.place(number);
        group.get().map(|group| &group[slot])
    }

    /// The slot of `number`, to put something there.
    pub fn make(&self, number: u64) -> &ArcSwapOption<T> {
        let (group, slot) = self.place(number);
        let empty = || (0..GROUP).map(|_| ArcSwapOption::empty()).collect();
        &group.get_or_init(empty)[slot]
    }

    /// All slots that something may be in.
    pub fn made(&self) -> impl Iterator<Item = &ArcSwapOption<T>> {
        self.groups.iter().filter_map(OnceLock::get).flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn what_is_put_at_a_number_is_found_by_it_and_by_those_that_share_its_slot() {
        for count in [0, 1, 15, 16, 17, 100] {
            let slots = CacheSlots::new(count);
            let all = len64(slots.count());
            assert!(slots.get(3).is_none() && slots.made().next().is_none());
            for number in 0..all {
                slots.make(number).store(Some(Arc::new(number)));
            }
            for number in 0..2 * all {
                let found = slots.get(number).and_then(ArcSwapOption::load_full);
                assert_eq!(found.as_deref(), Some(&(number % all)), "{count}");
            }
            let full = slots.made().filter(|slot| slot.load().is_some());
            assert_eq!(len64(full.count()), all);
        }
    }
}
