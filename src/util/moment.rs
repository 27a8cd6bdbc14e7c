//! Moments at which a test ends this program: before each change of a file or of a name.

/// Comes before each such change.  In builds with assertions, which tests are made with, the process
/// ends here as by a kill where this is the moment that `VDTOOL_KILL_AT` says, counted from 1; in others
/// it is nothing.
#[inline]
pub fn moment() {
    #[cfg(debug_assertions)]
    counted::moment();
}

#[cfg(debug_assertions)]
mod counted {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use rustix::process::{Signal, getpid, kill_process};

    static LAST: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("VDTOOL_KILL_AT").ok()?.parse().ok());
    static COUNT: AtomicU64 = AtomicU64::new(1);

    pub(super) fn moment() {
        if let Some(last) = *LAST
            && COUNT.fetch_add(1, Ordering::Relaxed) == last
        {
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }
}
