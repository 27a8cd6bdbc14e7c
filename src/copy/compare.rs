//! Whether two disks hold the same.

use std::ops::Range;

use parking_lot::Mutex;

use crate::chain::State;
use crate::copy::engine::{Engine, Job};
use crate::copy::find::{Found, Place, same_object};
use crate::copy::joined::Joined;
use crate::copy::progress::Progress;
use crate::error::{Error, Result};
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;

/// Bytes of each disk that are read at a time; both fit into a processor's cache.
const STEP: usize = 128 << 10;
/// Work range.
const RANGE: u64 = 8 << 20;

/// Whether allocation counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Allocation {
    /// Only content does; the longer disk may end in zeroes.
    #[default]
    Ignored,
    /// Lengths must be equal, and data, zeroes and holes must be in the same places.
    Compared,
}

/// What comparing two disks showed; where they differ, by the first difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// No difference.
    Same,
    /// The bytes at this offset differ.
    Content(u64),
    /// One has data, zeroes or a hole at this offset where the other has another of them.
    Allocation(u64),
    /// Their lengths differ.
    Length,
}

/// What could not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Finding out where data is.
    Extents,
    /// Reading data.
    Read,
}

/// Why two disks could not be compared.
#[derive(Debug)]
pub struct Failure {
    /// What could not be done.
    pub step: Step,
    /// Why.
    pub error: Error,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            step: Step::Extents,
            error,
        }
    }
}

fn unread(error: Error) -> Failure {
    Failure {
        step: Step::Read,
        error,
    }
}

/// Compares two disks with `workers` threads; tells `progress` of as many bytes as the longer one
/// has, or fewer where they differ.
///
/// The first difference is the same whatever the number of workers.
///
/// # Errors
/// What could not be done; with an error of kind `Cancelled`, because the user stopped.
pub fn compare(
    a: &Joined,
    b: &Joined,
    allocation: Allocation,
    workers: usize,
    progress: &dyn Progress,
) -> Result<Outcome, Failure> {
    if allocation == Allocation::Compared && a.len() != b.len() {
        return Ok(Outcome::Length);
    }
    let idle = |at: u64, end: u64| match allocation {
        Allocation::Ignored => both_zero(a, b, at, end),
        Allocation::Compared => Ok(0),
    };
    let engine = Engine::new(a.len().max(b.len()), RANGE, &idle, progress);
    let comparer = Comparer {
        a,
        b,
        allocation,
        first: Mutex::new(None),
    };
    let workers = workers.clamp(1, super::MAX_WORKERS);
    engine.run(workers, Buffers::default, |buffers, job| {
        if let Some(difference) = comparer.range(job, buffers)? {
            engine.end_at(difference.0);
            comparer.note(difference);
        }
        Ok::<(), Failure>(())
    })?;
    let first = comparer.first.into_inner();
    Ok(first.map_or(Outcome::Same, |(_, outcome)| outcome))
}

fn both_zero(a: &Joined, b: &Joined, at: u64, end: u64) -> Result<u64> {
    let _tickets = (a.enter(), b.enter());
    // An error here is met again, and reported, by the worker that gets the range.
    let zeroes = |disk: &Joined| match disk.find(at, end - at) {
        Ok(found) if found.is_zero() => found.len,
        _ => 0,
    };
    Ok(match zeroes(a) {
        0 => 0,
        len => len.min(zeroes(b)),
    })
}

#[derive(Default)]
struct Buffers {
    a: Vec<u8>,
    b: Vec<u8>,
}

impl Buffers {
    fn both(&mut self, len: usize) -> (&mut [u8], &mut [u8]) {
        if self.a.is_empty() {
            self.a = vec![0; STEP];
            self.b = vec![0; STEP];
        }
        (&mut self.a[..len], &mut self.b[..len])
    }
}

struct Comparer<'a> {
    a: &'a Joined,
    b: &'a Joined,
    allocation: Allocation,
    /// The lowest difference so far.  Innermost.
    first: Mutex<Option<(u64, Outcome)>>,
}

impl Comparer<'_> {
    fn note(&self, difference: (u64, Outcome)) {
        let mut first = self.first.lock();
        if first.is_none_or(|(at, _)| difference.0 < at) {
            *first = Some(difference);
        }
    }

    /// The first difference in a work range.
    fn range(&self, job: &Job, buffers: &mut Buffers) -> Result<Option<(u64, Outcome)>, Failure> {
        let _tickets = (self.a.enter(), self.b.enter());
        let mut at = job.range.start;
        while at < job.range.end {
            let a = self.a.find(at, job.range.end - at)?;
            let b = self.b.find(at, a.len)?;
            if self.allocation == Allocation::Compared && class(&a) != class(&b) {
                return Ok(Some((at, Outcome::Allocation(at))));
            }
            let range = at..at + b.len;
            at = range.end;
            if (a.is_zero() && b.is_zero()) || same_place(&a, &b) {
                continue;
            }
            let found = self.content(range, (a.is_zero(), b.is_zero()), buffers);
            if let Some(at) = found.map_err(unread)? {
                return Ok(Some((at, Outcome::Content(at))));
            }
        }
        Ok(None)
    }

    /// The first byte that differs; what is known to be zero is not read.
    fn content(
        &self,
        range: Range<u64>,
        zero: (bool, bool),
        buffers: &mut Buffers,
    ) -> Result<Option<u64>> {
        let mut at = range.start;
        while at < range.end {
            let len = clamp_len(range.end - at, STEP);
            let (a, b) = buffers.both(len);
            if !zero.0 {
                self.a.read_at(a, at)?;
            }
            if !zero.1 {
                self.b.read_at(b, at)?;
            }
            let first = match zero {
                (true, _) => first_set(b),
                (_, true) => first_set(a),
                _ if a == b => None,
                _ => a.iter().zip(&*b).position(|(a, b)| a != b),
            };
            if let Some(first) = first {
                return Ok(Some(at + len64(first)));
            }
            at += len64(len);
        }
        Ok(None)
    }
}

fn first_set(bytes: &[u8]) -> Option<usize> {
    match is_zero(bytes) {
        true => None,
        false => bytes.iter().position(|&b| b != 0),
    }
}

/// What strict comparison tells apart.
fn class(found: &Found<'_>) -> State {
    match found.state() {
        State::Data | State::Encoded => State::Data,
        other => other,
    }
}

/// Whether both are the same bytes of the same object.
fn same_place(a: &Found<'_>, b: &Found<'_>) -> bool {
    match (a.place, b.place) {
        (
            Place::Stored { storage, host },
            Place::Stored {
                storage: other,
                host: there,
            },
        ) => host == there && same_object(storage, other),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::copy::joined::tests::{joined, raw_chain};
    use crate::copy::progress::Silent;
    use crate::storage::memory::{Fault, MemoryStorage, Op};

    fn outcome(a: &Joined, b: &Joined, allocation: Allocation) -> Outcome {
        let outcomes = [1, 4].map(|n| compare(a, b, allocation, n, &Silent).expect("memory reads"));
        assert_eq!(outcomes[0], outcomes[1]);
        outcomes[0]
    }

    #[test]
    fn the_first_of_several_differences_is_told_whatever_the_workers() {
        let mut bytes = vec![7u8; 40 << 20];
        let a = joined(&[&bytes]);
        for at in [39 << 20, (17 << 20) + 5, 30 << 20] {
            bytes[at] = 8;
        }
        let b = joined(&[&bytes]);
        let first = Outcome::Content((17 << 20) + 5);
        assert_eq!(outcome(&a, &b, Allocation::Ignored), first);
        assert_eq!(outcome(&a, &a, Allocation::Ignored), Outcome::Same);
    }

    #[test]
    fn a_longer_disk_may_only_end_in_zeroes() {
        let (short, zeroes) = (joined(&[&[1; 5000]]), joined(&[&[1; 5000], &[0; 9000]]));
        assert_eq!(outcome(&short, &zeroes, Allocation::Ignored), Outcome::Same);
        assert_eq!(
            outcome(&short, &zeroes, Allocation::Compared),
            Outcome::Length
        );
        let data = joined(&[&[1; 5000], &[0; 8999], &[2]]);
        let expected = Outcome::Content(13_999);
        assert_eq!(outcome(&short, &data, Allocation::Ignored), expected);
        assert_eq!(outcome(&data, &short, Allocation::Ignored), expected);
    }

    #[test]
    fn a_hole_and_written_zeroes_differ_only_when_allocation_is_compared() {
        let sparse = MemoryStorage::new();
        crate::storage::Storage::set_len(&sparse, 8192).expect("grows");
        let sparse = Joined::new(vec![raw_chain(Arc::new(sparse))]).expect("short");
        let written = joined(&[&[0; 8192]]);
        assert_eq!(
            outcome(&sparse, &written, Allocation::Ignored),
            Outcome::Same
        );
        assert_eq!(
            outcome(&sparse, &written, Allocation::Compared),
            Outcome::Allocation(0)
        );
    }

    #[test]
    fn a_failed_read_is_told_from_a_failed_look_up() {
        let storage = MemoryStorage::from_bytes(&[1; 4096]);
        storage.inject(Fault {
            op: Op::Read,
            after: 0,
            count: 9,
            errno: libc::EIO,
        });
        let bad = Joined::new(vec![raw_chain(Arc::new(storage))]).expect("short");
        let failure = compare(
            &bad,
            &joined(&[&[1; 4096]]),
            Allocation::Ignored,
            2,
            &Silent,
        )
        .expect_err("cannot be read");
        assert_eq!(failure.step, Step::Read);
    }
}
