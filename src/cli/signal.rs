//! SIGINT, SIGTERM and SIGHUP: a long job stops at the next opportunity, cleans up, and the exit
//! code says which of them it was.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::cli::exit::Exit;

/// The signals that stop a job, and how the process ends then.
const SIGNALS: [(i32, Exit); 3] = [
    (SIGINT, Exit::Interrupted),
    (SIGTERM, Exit::Terminated),
    (SIGHUP, Exit::HungUp),
];

/// The number of the last one that came; 0: none.
static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
static DONE: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);

/// From now on these signals set a flag instead of ending the process; a second one of the
/// same kind ends it.  A SIGHUP that is ignored stays so: that is what `nohup` is for.  A command
/// that runs another one may call it again.
///
/// # Errors
/// The host's.
pub fn catch() -> std::io::Result<()> {
    // Armed twice, the first signal would count as the second.
    let mut done = DONE.lock();
    if *done {
        return Ok(());
    }
    let caught = CAUGHT.get_or_init(Arc::default);
    for signal in stopping() {
        let armed = Arc::<AtomicBool>::default();
        let number = usize::try_from(signal).unwrap_or_default();
        // Order matters: the default action is armed by the first signal, for the second.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&armed))?;
        signal_hook::flag::register(signal, armed)?;
        signal_hook::flag::register_usize(signal, Arc::clone(caught), number)?;
    }
    *done = true;
    Ok(())
}

/// The signals that are heeded.
pub fn stopping() -> impl Iterator<Item = i32> {
    let numbers = SIGNALS.iter().map(|(signal, _)| *signal);
    numbers.filter(|signal| *signal != SIGHUP || !is_ignored(SIGHUP))
}

/// Whether whoever started this process had it ignore the signal; also where nobody can tell.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores(&status, signal)
}

fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.is_none_or(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Whether one of them came.
pub fn caught() -> bool {
    CAUGHT.get().is_some_and(|c| c.load(Ordering::Relaxed) != 0)
}

/// The exit code for the one that came.
pub fn exit() -> Exit {
    let number = CAUGHT.get().map_or(0, |c| c.load(Ordering::Relaxed));
    let found = SIGNALS
        .iter()
        .find(|(s, _)| usize::try_from(*s) == Ok(number));
    found.map_or(Exit::Interrupted, |(_, exit)| *exit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_about_ignored_signals_is_understood() {
        let ignored = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        assert!(ignores(ignored, SIGHUP));
        assert!(!ignores(ignored, SIGINT));
        assert!(ignores("", SIGHUP));
    }
}
