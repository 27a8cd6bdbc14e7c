//! Tests that cannot run here say so.

use std::io::Write;

/// Says that the test of this thread is skipped, past the capture of the test harness, and to the
/// file that `VDTOOL_SKIPPED` names, so that it is seen at the end of all tests.
pub(crate) fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let line = format!("skipped: {name}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    let Some(list) = std::env::var_os("VDTOOL_SKIPPED") else {
        return;
    };
    let list = std::fs::File::options().append(true).open(list);
    let _ = list.and_then(|mut list| list.write_all(line.as_bytes()));
}
