//! SIGINT and SIGTERM: a long job stops at the next opportunity, cleans up, and the exit code says
//! which of the two it was.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::cli::exit::Exit;

static CAUGHT: OnceLock<Arc<AtomicUsize>> = OnceLock::new();
static DONE: parking_lot::Mutex<bool> = parking_lot::Mutex::new(false);

/// From now on SIGINT and SIGTERM set a flag instead of ending the process; a second one of the
/// same kind ends it.  A command that runs another one may call it again.
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
    for signal in [SIGINT, SIGTERM] {
        let number = usize::try_from(signal).unwrap_or_default();
        // Order matters: the default action is armed by the first signal, for the second.
        signal_hook::flag::register_conditional_default(signal, armed(signal))?;
        signal_hook::flag::register(signal, armed(signal))?;
        signal_hook::flag::register_usize(signal, Arc::clone(caught), number)?;
    }
    *done = true;
    Ok(())
}

fn armed(signal: i32) -> Arc<std::sync::atomic::AtomicBool> {
    static ARMED: OnceLock<[Arc<std::sync::atomic::AtomicBool>; 2]> = OnceLock::new();
    Arc::clone(&ARMED.get_or_init(Default::default)[usize::from(signal == SIGTERM)])
}

/// Whether one of them came.
pub fn caught() -> bool {
    CAUGHT.get().is_some_and(|c| c.load(Ordering::Relaxed) != 0)
}

/// The exit code for the one that came.
pub fn exit() -> Exit {
    let signal = CAUGHT.get().map_or(0, |c| c.load(Ordering::Relaxed));
    if i32::try_from(signal) == Ok(SIGTERM) {
        Exit::Terminated
    } else {
        Exit::Interrupted
    }
}
