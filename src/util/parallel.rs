//! Many jobs on all cores.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Most threads that [`cores`] says: more do not move bytes any faster.
const MAX: usize = 8;

/// As many threads as pay.
pub fn cores() -> usize {
    std::thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(MAX)
}

/// Does every job, in any order, on so many threads, each with a state of its own.
///
/// # Errors
/// One of those that `work` returned; jobs that were not begun by then are not done.
pub fn for_each<J, S, E>(
    threads: usize,
    jobs: &mut (dyn Iterator<Item = J> + Send),
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, J) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    J: Send,
    E: Send,
{
    let jobs = Mutex::new(jobs);
    let failed = AtomicBool::new(false);
    let run = || {
        let mut state = state();
        while !failed.load(Ordering::Relaxed) {
            let job = jobs.lock().next();
            let Some(job) = job else {
                break;
            };
            let done = work(&mut state, job);
            done.inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let own = run();
        others
            .into_iter()
            .fold(own, |all, other| match other.join() {
                Ok(one) => all.and(one),
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_job_is_done_once_and_an_error_ends_them() {
        let sum = AtomicU64::new(0);
        let done = for_each(
            4,
            &mut (1..=1000u64),
            || (),
            |(), n| {
                sum.fetch_add(n, Ordering::Relaxed);
                Ok::<(), u64>(())
            },
        );
        assert_eq!((done, sum.into_inner()), (Ok(()), 500_500));
        let begun = AtomicU64::new(0);
        let failed = for_each(
            2,
            &mut (0..u64::MAX),
            || (),
            |(), n| {
                begun.fetch_add(1, Ordering::Relaxed);
                if n == 100 { Err(n) } else { Ok(()) }
            },
        );
        assert_eq!(failed, Err(100));
    }
}
