//! What is to be done with an extent: a pure function.

use std::ops::Range;

use crate::chain::State;

/// The first bytes of a range that are to be copied, as far as they go without a gap.
pub type Only<'a> = dyn Fn(Range<u64>) -> Option<Range<u64>> + Sync + 'a;

/// What the target reads as before anything is written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    /// Zeroes: a new image, or one of which the user says so.
    Zeroes,
    /// Anything.
    Unknown,
    /// What its backing image holds.
    Backed,
    /// What it reads as now, which is compared: what differs is written, and what the target has
    /// past the end of the sources stays.
    Itself,
}

/// What is to be done with an extent of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// Write its bytes; zero runs in it are treated as zero extents are.
    Copy,
    /// Make the target read as zeroes there.
    Zero,
    /// Write zeroes, so that the target has space for them.
    Fill,
    /// Write what differs from what the target reads as.
    Differ,
    /// Nothing.
    Skip,
}

/// Whether the target gets space for zeroes too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Space {
    /// Only where that is the way to state them.
    Sparse,
    /// Everywhere.
    Full,
}

/// What is to be done with an extent of `state` on a target that reads as `before`.
pub(super) fn action(state: State, before: Before, space: Space) -> Action {
    match (before, space, state) {
        (Before::Backed | Before::Itself, Space::Sparse, _) => Action::Differ,
        (_, _, State::Data | State::Encoded) => Action::Copy,
        (_, Space::Full, _) => Action::Fill,
        (Before::Zeroes, ..) => Action::Skip,
        (Before::Unknown, ..) => Action::Zero,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plan_is_this_table() {
        use Action::*;
        let states = [State::Data, State::Encoded, State::Zero, State::Hole];
        let table = [
            (Before::Zeroes, Space::Sparse, [Copy, Copy, Skip, Skip]),
            (Before::Unknown, Space::Sparse, [Copy, Copy, Zero, Zero]),
            (Before::Backed, Space::Sparse, [Differ; 4]),
            (Before::Itself, Space::Sparse, [Differ; 4]),
            (Before::Zeroes, Space::Full, [Copy, Copy, Fill, Fill]),
            (Before::Unknown, Space::Full, [Copy, Copy, Fill, Fill]),
            (Before::Backed, Space::Full, [Copy, Copy, Fill, Fill]),
            (Before::Itself, Space::Full, [Copy, Copy, Fill, Fill]),
        ];
        for (before, space, actions) in table {
            for (state, expected) in states.into_iter().zip(actions) {
                assert_eq!(
                    action(state, before, space),
                    expected,
                    "{before:?} {space:?} {state:?}"
                );
            }
        }
    }
}
