//! Space made ready ahead of the writes that will want it.
//!
//! A unit that reads as zeroes before its entry appears, and would read as zeroes if only the entry
//! outlived a power cut, needs no order between its data and its entry.  Its space, what counts it,
//! and its zeroes must be on stable media before: one sync sees to that for many units, where each
//! of them would need one otherwise.  A kill leaves what was not used as leaks, no more than
//! [`Units::ahead`] allows.

use crate::error::{ErrorKind, Result};
use crate::image::open::WriteOrder;
use crate::image::units::{Allocator, Taken, Units, Unnamed};
use crate::storage::Zeroing;

/// Runs that they may be in.
const MAX_RUNS: usize = 64;

/// Space that is zero and on stable media, and that nothing points at.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The next one to use is last.
    runs: Vec<Taken>,
    /// Units to make ready next time: few for who writes little.
    next: u64,
    /// The host cannot make space zero without writing zeroes.
    useless: bool,
}

impl Ahead {
    /// All that is ready.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Taken> {
        self.runs.iter()
    }

    /// Up to `count` units in one piece.
    fn pop(&mut self, count: u64) -> Option<Taken> {
        let last = self.runs.last_mut()?;
        if last.count <= count {
            return self.runs.pop();
        }
        let first = last.part(0..count);
        *last = last.part(count..last.count);
        Some(first)
    }
}

impl Allocator {
    /// Up to `count` units of space whose entries need not wait for their data; `None` where order
    /// does not matter, or the host cannot make space zero without writing zeroes.
    ///
    /// # Errors
    /// Those of taking space, and the host's.
    pub fn ready_space<U: Units>(
        &self,
        units: &U,
        first: u64,
        count: u64,
    ) -> Result<Option<Taken>> {
        let wanted = units.ahead();
        if self.order.policy() == WriteOrder::Unordered || wanted.end == 0 {
            return Ok(None);
        }
        let mut ahead = self.ahead.lock();
        if ahead.useless {
            return Ok(None);
        }
        if ahead.runs.is_empty() {
            let want = ahead.next.max(wanted.start).max(count);
            ahead.next = (want * 2).min(wanted.end);
            ahead.runs = match self.make_ready(units, first, want) {
                // Room for who asks may be left.
                Err(e) if e.kind() == ErrorKind::NoSpace && want > count => {
                    self.make_ready(units, first, count)?
                }
                made => made?,
            };
            ahead.useless = ahead.runs.is_empty();
        }
        Ok(ahead.pop(count))
    }

    /// Takes some `want` units and sees to it that they may be used at once, the first of them last;
    /// none where the host cannot make them zero.
    fn make_ready<U: Units>(&self, units: &U, first: u64, want: u64) -> Result<Vec<Taken>> {
        let mut unnamed = Unnamed::new(units, Vec::new());
        let mut left = want;
        while left > 0 && unnamed.runs.len() < MAX_RUNS {
            let taken = match units.take(first, left) {
                Err(e) if e.kind() == ErrorKind::NoSpace && !unnamed.runs.is_empty() => break,
                taken => taken?,
            };
            left -= taken.count.min(left);
            unnamed.runs.push(taken);
            if !make_zero(units, &taken)? {
                return Ok(Vec::new());
            }
        }
        self.order.settle()?;
        let mut runs = unnamed.named();
        for run in &mut runs {
            (run.zeroed, run.ready) = (true, true);
        }
        runs.reverse();
        Ok(runs)
    }

    /// Gives back what was made ready; whether that was anything.
    pub(super) fn release_ahead<U: Units>(&self, units: &U) -> bool {
        let runs = std::mem::take(&mut self.ahead.lock().runs);
        runs.iter().rev().for_each(|run| units.untake(run));
        !runs.is_empty()
    }

    /// Gives back what was set aside or made ready and not used, and says what that was, the last of it
    /// first.  With no request under way.
    pub fn release_unused<U: Units>(&self, units: &U) -> Vec<Taken> {
        let mut runs: Vec<Taken> = self.assigned.lock().drain().collect();
        runs.append(&mut std::mem::take(&mut *self.ahead.lock()).runs);
        runs.sort_by_key(|run| std::cmp::Reverse(run.host));
        runs.iter().for_each(|run| units.untake(run));
        runs
    }
}

/// Makes space that was just taken read as zeroes, inside the file; false where the host has no way
/// to do so but to write them.
pub(super) fn make_zero<U: Units>(units: &U, taken: &Taken) -> Result<bool> {
    let storage = units.data()?;
    let host = taken.bytes(units.unit_len());
    if !taken.zeroed {
        let stored = host.start..host.end.min(storage.size());
        if !stored.is_empty() {
            match storage.zero(stored, Zeroing::MayUnmap) {
                Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(false),
                done => done?,
            }
        }
    }
    if storage.size() < host.end {
        // Grows the file and never cuts it, whatever other threads write behind us.
        storage.write_at(&[0], host.end - 1)?;
    }
    Ok(true)
}
