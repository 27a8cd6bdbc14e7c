//! Workers and work ranges: taken in guest order, the first error stops all.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use crate::copy::progress::Progress;
use crate::error::{Error, Result};

/// A work range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// Its number, counted from 0 in the order of the disk.
    pub(super) index: u64,
    /// The guest bytes it stands for; never empty.
    pub(super) range: Range<u64>,
}

/// Tells how many bytes from the first offset, at most up to the second, need no work.
pub(super) type Idle<'a> = dyn Fn(u64, u64) -> Result<u64> + Sync + 'a;

/// What the workers share.
pub(super) struct Engine<'a> {
    progress: &'a dyn Progress,
    size: u64,
    idle: &'a Idle<'a>,
    /// Next job's number and start.  Innermost.
    next: Mutex<(u64, u64)>,
    end: AtomicU64,
    stopped: AtomicBool,
    /// Number of the job whose turn it is.  Innermost.
    turn: Mutex<u64>,
    turned: Condvar,
}

/// A worker that unwinds must not leave others waiting for its turn.
struct StopOnPanic<'e, 'a>(&'e Engine<'a>);

impl Drop for StopOnPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

impl<'a> Engine<'a> {
    /// An engine for `total` bytes in ranges that start at multiples of `size` (not 0) and are at
    /// most that long.  Where `idle` reports bytes without work, ranges that lie wholly in them are
    /// counted as done without being handed out.
    pub(super) fn new(
        total: u64,
        size: u64,
        idle: &'a Idle<'a>,
        progress: &'a dyn Progress,
    ) -> Self {
        Self::of(0..total, size, idle, progress)
    }

    /// As [`Engine::new`], for a part of them that starts at such a multiple.
    pub(super) fn of(
        part: Range<u64>,
        size: u64,
        idle: &'a Idle<'a>,
        progress: &'a dyn Progress,
    ) -> Self {
        Self {
            progress,
            size,
            idle,
            next: Mutex::new((0, part.start)),
            end: AtomicU64::new(part.end),
            stopped: AtomicBool::new(false),
            turn: Mutex::new(0),
            turned: Condvar::new(),
        }
    }

    /// Runs `work` on every range, on `workers` threads, each with a state made by `state`.
    ///
    /// # Errors
    /// The first that `work` returned; `Cancelled`.
    pub(super) fn run<S, E: From<Error> + Send>(
        &self,
        workers: usize,
        state: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, &Job) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let first: Mutex<Option<E>> = Mutex::new(None);
        let worker = || {
            let _guard = StopOnPanic(self);
            if let Err(e) = self.work(state(), &work) {
                self.stop();
                first.lock().get_or_insert(e);
            }
        };
        if workers <= 1 {
            worker();
        } else {
            std::thread::scope(|scope| {
                for _ in 0..workers {
                    scope.spawn(worker);
                }
            });
        }
        first.into_inner().map_or(Ok(()), Err)
    }

    fn work<S, E: From<Error>>(
        &self,
        mut state: S,
        work: &impl Fn(&mut S, &Job) -> Result<(), E>,
    ) -> Result<(), E> {
        while !self.stopped.load(Ordering::Acquire) {
            self.progress.check()?;
            let Some(job) = self.take()? else { break };
            work(&mut state, &job)?;
            self.progress.advance(job.range.end - job.range.start);
        }
        Ok(())
    }

    fn take(&self) -> Result<Option<Job>> {
        let mut next = self.next.lock();
        let end = self.end.load(Ordering::Acquire);
        let (index, mut at) = *next;
        while at < end {
            let idle = (self.idle)(at, end)?.min(end - at);
            let skipped = match at + idle {
                reached if reached == end => end,
                reached => reached - reached % self.size,
            };
            if skipped <= at {
                break;
            }
            self.progress.advance(skipped - at);
            at = skipped;
        }
        if at >= end {
            next.1 = at;
            return Ok(None);
        }
        let range = at..at.saturating_add(self.size).min(end);
        *next = (index + 1, range.end);
        Ok(Some(Job { index, range }))
    }

    /// Hands out no more ranges that start at or past `end`.
    pub(super) fn end_at(&self, end: u64) {
        self.end.fetch_min(end, Ordering::AcqRel);
    }

    /// Waits until all jobs before this one have called [`Engine::turn_over`]; false when the
    /// engine was stopped, and the job is then to be left as it is.
    pub(super) fn wait_turn(&self, job: &Job) -> bool {
        let mut turn = self.turn.lock();
        while *turn != job.index && !self.stopped.load(Ordering::Acquire) {
            self.turned.wait(&mut turn);
        }
        *turn == job.index
    }

    /// Ends the job's turn.
    pub(super) fn turn_over(&self, job: &Job) {
        *self.turn.lock() = job.index + 1;
        self.turned.notify_all();
    }

    fn stop(&self) {
        let _turn = self.turn.lock();
        self.stopped.store(true, Ordering::Release);
        self.turned.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::progress::Silent;
    use crate::error::ErrorKind;

    #[derive(Default)]
    struct Counted(AtomicU64, AtomicBool);

    impl Progress for Counted {
        fn advance(&self, bytes: u64) {
            self.0.fetch_add(bytes, Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            self.1.load(Ordering::Relaxed)
        }
    }

    fn jobs(total: u64, idle: &Idle<'_>, workers: usize) -> (Vec<Range<u64>>, u64) {
        let counted = Counted::default();
        let seen = Mutex::new(Vec::new());
        let engine = Engine::new(total, 8, idle, &counted);
        engine
            .run(
                workers,
                || (),
                |(), job| -> Result<()> {
                    assert!(engine.wait_turn(job));
                    seen.lock().push(job.range.clone());
                    engine.turn_over(job);
                    Ok(())
                },
            )
            .expect("nothing fails");
        (seen.into_inner(), counted.0.into_inner())
    }

    #[test]
    fn every_byte_is_handed_out_once_and_turns_are_in_order() {
        for workers in [1, 4] {
            let (ranges, done) = jobs(27, &|_, _| Ok(0), workers);
            assert_eq!(ranges, [0..8, 8..16, 16..24, 24..27]);
            assert_eq!(done, 27);
        }
    }

    #[test]
    fn ranges_without_work_are_counted_but_not_handed_out() {
        let idle = |at: u64, end: u64| Ok(if at < 21 { (21 - at).min(end - at) } else { 0 });
        let (ranges, done) = jobs(100, &idle, 2);
        assert_eq!(ranges.first(), Some(&(16..24)));
        assert_eq!(done, 100);
        assert_eq!(jobs(100, &|at, end| Ok(end - at), 2), (Vec::new(), 100));
    }

    #[test]
    fn the_first_error_stops_all_even_those_that_wait_for_a_turn() {
        let engine = Engine::new(1 << 20, 8, &|_, _| Ok(0), &Silent);
        let error = engine
            .run(
                4,
                || (),
                |(), job| -> Result<()> {
                    if job.index == 5 {
                        return Err(Error::corrupt("five"));
                    }
                    if engine.wait_turn(job) {
                        engine.turn_over(job);
                    }
                    Ok(())
                },
            )
            .expect_err("job 5 fails");
        assert_eq!(error.message(), "five");
    }

    #[test]
    fn a_user_who_stops_gets_cancelled() {
        let counted = Counted::default();
        let engine = Engine::new(1 << 20, 8, &|_, _| Ok(0), &counted);
        let error = engine
            .run(
                2,
                || (),
                |(), job| -> Result<()> {
                    counted.1.store(job.index >= 3, Ordering::Relaxed);
                    Ok(())
                },
            )
            .expect_err("stopped");
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(counted.0.into_inner() < 1 << 20);
    }

    #[test]
    fn nothing_past_an_end_set_meanwhile_is_handed_out() {
        let engine = Engine::new(u64::MAX, 8, &|_, _| Ok(0), &Silent);
        let most = AtomicU64::new(0);
        engine
            .run(
                3,
                || (),
                |(), job| -> Result<()> {
                    most.fetch_max(job.index, Ordering::Relaxed);
                    engine.end_at(80);
                    Ok(())
                },
            )
            .expect("ends");
        assert!(most.into_inner() < 12);
    }
}
