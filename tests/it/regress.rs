//! Bugs that were found once, each named by what happened.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use vdtool::storage::open::{Access, StorageOptions, open};

use crate::util::scratch;

/// Children that another thread was just starting held a duplicate of the descriptor, and with it
/// the locks of a file that was closed.
#[test]
fn a_file_that_was_closed_stayed_locked_while_a_process_was_started() {
    let directory = scratch();
    let path = directory.path().join("a.raw");
    std::fs::write(&path, [0; 4096]).expect("writes");
    let stop = AtomicBool::new(false);
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    let failure = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let status = Command::new("true").stdin(Stdio::null()).status();
                assert!(status.is_ok_and(|s| s.success()));
            }
        });
        let failure = (0..4000).find_map(|_| open(&path, &options).err());
        stop.store(true, Ordering::Relaxed);
        failure
    });
    assert!(failure.is_none(), "{failure:?}");
}
