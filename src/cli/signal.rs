//! Signals that end a process: a long job stops at the next opportunity, cleans up, and the exit
//! code says which of them it was.  And the one that asks how far it is.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use signal_hook::consts::{
    SIGALRM, SIGHUP, SIGINT, SIGIO, SIGPROF, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGVTALRM, SIGXCPU,
};
use signal_hook::low_level::pipe;

use crate::cli::exit::Exit;
use crate::cli::removed;

/// The signals that stop a job: all that would end the process and that it can do something about.
const STOPPING: [i32; 12] = [
    SIGINT,
    SIGTERM,
    SIGHUP,
    SIGQUIT,
    SIGALRM,
    SIGIO,
    SIGPROF,
    SIGUSR2,
    SIGVTALRM,
    SIGXCPU,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];
/// A second signal sooner than this counts as the first: `timeout` sends two at once.
const INSIST: Duration = Duration::from_secs(1);

/// The number of the last one that came; 0: none.
static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();
static DONE: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);

/// From now on these signals set a flag instead of ending the process; one that comes a second or
/// more after the first, to a job that cannot stop, ends it, but leaves no temporary file either.
/// One that is ignored stays so, which is what `nohup` is for, but for SIGINT and SIGTERM.  A
/// command that runs another one may call it again.
///
/// # Errors
/// The host's.
pub fn catch() -> std::io::Result<()> {
    let mut done = DONE.lock();
    if *done {
        return Ok(());
    }
    let caught = CAUGHT.get_or_init(Arc::default);
    let (bytes, written) = UnixStream::pair()?;
    for signal in stopping() {
        let number = usize::try_from(signal).unwrap_or_default();
        signal_hook::flag::register_usize(signal, Arc::clone(caught), number)?;
        pipe::register(signal, written.try_clone()?)?;
    }
    let watching = std::thread::Builder::new().name("signals".to_owned());
    watching.spawn(move || insist(&bytes))?;
    *done = true;
    Ok(())
}

/// Ends the process once a signal comes that is not part of the first; each is a byte in `bytes`.
fn insist(mut bytes: &UnixStream) {
    let mut first: Option<Instant> = None;
    while matches!(bytes.read(&mut [0]), Ok(1)) {
        if first.get_or_insert_with(Instant::now).elapsed() >= INSIST {
            removed::abandon(exit());
        }
    }
}

/// The signals that are heeded.
pub fn stopping() -> impl Iterator<Item = i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let heeded = move |signal: &i32| match *signal {
        SIGINT | SIGTERM => true,
        signal => !ignores(&status, signal),
    };
    STOPPING.into_iter().filter(heeded)
}

/// Whether whoever started this process had it ignore the signal; not where nobody can tell.
fn ignores(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// Whether one of them came.
pub fn caught() -> bool {
    CAUGHT.get().is_some_and(|c| c.load(Ordering::Relaxed) != 0)
}

/// The exit code for the one that came.
pub fn exit() -> Exit {
    let number = CAUGHT.get().map_or(0, |c| c.load(Ordering::Relaxed));
    match u8::try_from(number) {
        Ok(number) if number > 0 => Exit::Stopped(number),
        _ => Exit::Failed,
    }
}

/// From now on SIGUSR1 asks how far a job is, and SIGXFSZ, that a file may not become so long, is
/// an error of the write; neither ends the process.
///
/// # Errors
/// The host's.
pub fn hear() -> std::io::Result<()> {
    let asked = ASKED.get_or_init(Arc::default);
    signal_hook::flag::register(SIGUSR1, Arc::clone(asked))?;
    // The write says so itself.
    signal_hook::flag::register(libc::SIGXFSZ, Arc::default()).map(drop)
}

/// Whether somebody asked how far the job is since this was called last.
pub fn asked() -> bool {
    let asked = ASKED.get();
    asked.is_some_and(|a| a.load(Ordering::Relaxed) && a.swap(false, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_about_ignored_signals_is_understood() {
        let ignored = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\t0\n";
        assert!(ignores(ignored, SIGHUP));
        assert!(!ignores(ignored, SIGINT));
        assert!(!ignores("", SIGHUP));
    }
}
