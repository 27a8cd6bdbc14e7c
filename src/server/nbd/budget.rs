//! Memory for requests, bounded over all connections, and used again.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use parking_lot::Mutex;

/// Shortest buffer there is; buffers are powers of two of bytes.
const SMALLEST: usize = 64 << 10;
/// Most bytes of buffers that are kept while nobody uses them.
const KEPT: usize = 32 << 20;

/// What may be used, and buffers to be used again.
#[derive(Debug)]
pub(super) struct Budget {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    left: usize,
    free: Vec<Vec<u8>>,
    kept: usize,
}

/// A buffer on loan.  What it holds at first is left from another request.
#[derive(Debug)]
pub(super) struct Lease {
    budget: Arc<Budget>,
    memory: Vec<u8>,
    len: usize,
}

impl Budget {
    /// `most` bytes in all.
    pub(super) fn new(most: usize) -> Self {
        Self {
            state: Mutex::new(State {
                left: most,
                free: Vec::new(),
                kept: 0,
            }),
        }
    }

    /// A buffer of `len` bytes; `None` where too much is on loan.  Never waits.
    pub(super) fn lease(self: &Arc<Self>, len: usize) -> Option<Lease> {
        let size = len.max(SMALLEST).checked_next_power_of_two()?;
        let mut state = self.state.lock();
        state.left = state.left.checked_sub(size)?;
        let found = state.free.iter().rposition(|b| b.len() == size);
        let memory = found.map(|i| state.free.swap_remove(i));
        if memory.is_some() {
            state.kept -= size;
        }
        drop(state);
        Some(Lease {
            budget: Arc::clone(self),
            memory: memory.unwrap_or_else(|| vec![0; size]),
            len,
        })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        let mut state = self.budget.state.lock();
        state.left += memory.len();
        if state.kept + memory.len() <= KEPT {
            state.kept += memory.len();
            state.free.push(memory);
        }
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_loan_is_bounded_and_comes_back() {
        let budget = Arc::new(Budget::new(256 << 10));
        let first = budget.lease(1).expect("fits");
        assert_eq!(first.len(), 1);
        let second = budget.lease(100 << 10).expect("fits");
        assert!(budget.lease(100 << 10).is_none());
        drop(second);
        let again = budget.lease(128 << 10).expect("came back");
        assert_eq!(again.len(), 128 << 10);
        assert!(budget.lease(usize::MAX).is_none());
        drop((first, again));
        assert!(budget.lease(256 << 10).is_some());
    }
}
