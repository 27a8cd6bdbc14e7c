//! Scratch directories, the vdtool command, what a test requires.

use std::io::Write;

use std::path::Path;
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A directory of its own for a test, removed at its end.
pub(crate) fn scratch() -> TempDir {
    tempfile::Builder::new()
        .prefix("vdtool-test-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("the target directory takes a scratch directory")
}

/// The built binary; a failed assertion on its result prints all that it printed.
pub(crate) fn vdtool() -> assert_cmd::Command {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_vdtool"));
    command.env_remove("VDTOOL_SEED").timeout(TIME_LIMIT);
    command
}

const TIME_LIMIT: std::time::Duration = std::time::Duration::from_secs(120);

/// Whether `tool` can be run; says that the test is skipped where it cannot.
pub(crate) fn requires(tool: &str) -> bool {
    let there = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|dir| dir.join(tool).is_file());
    if !there {
        skipped(&format!("{tool} is not installed"));
    }
    there
}

/// Says that a test is skipped, past the capture of the test harness, so that it is seen.
pub(crate) fn skipped(why: &str) {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let _ = writeln!(std::io::stderr(), "skipped: {name}: {why}");
}

/// Runs a peer; its output and a panic where it fails.
pub(crate) fn peer<S: AsRef<std::ffi::OsStr>>(
    tool: &str,
    directory: &Path,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .expect("the peer starts");
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{tool} failed: {}\n{stdout}\n{stderr}",
        output.status
    );
    stdout
}
