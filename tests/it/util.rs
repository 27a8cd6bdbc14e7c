//! Scratch directories, the vdtool command, what a test requires, seeded random numbers.

use std::io::Write;
use std::ops::{Deref, DerefMut};
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

/// The built binary, started with every signal as it is by default: under `nohup` the tests ignore
/// one, and so would whoever they start.
pub(crate) fn killable() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_vdtool")]);
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

/// A Python that has `module`: that which `tests/run` makes, the user's, or the system's; says that the
/// test is skipped where none has it.
pub(crate) fn python(module: &str) -> Option<String> {
    // Beside the scratch directories, or above where cargo names the machine between them.
    let above = Path::new(env!("CARGO_TARGET_TMPDIR")).ancestors().skip(1);
    let own = above.take(2).map(|dir| dir.join("python/bin/python3"));
    let own: Vec<String> = own.map(|path| path.display().to_string()).collect();
    let import = format!("import {module}");
    let has = |python: &&str| {
        let mut command = Command::new(python);
        let status = command.args(["-c", &import]).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let mut all = own
        .iter()
        .map(|path| &**path)
        .chain(["python3", "/usr/bin/python3"]);
    let found = all.find(has);
    if found.is_none() {
        skipped(&format!("no Python module {module}"));
    }
    found.map(str::to_owned)
}

/// Says that a test is skipped, past the capture of the test harness, and to the file that
/// `VDTOOL_SKIPPED` names, so that it is seen at the end of all tests.
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

/// How many rounds a test of random things makes: `count`, times the number in `VDTOOL_ROUNDS`,
/// which may be a fraction; at least one.
pub(crate) fn rounds(count: usize) -> usize {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a count of rounds, rounded as it comes"
    )]
    let count = (count as f64 * times()) as usize;
    count.max(1)
}

/// As [`rounds`], but never more than `count`: the length of one of several rounds.
pub(crate) fn up_to(count: usize) -> usize {
    rounds(count).min(count)
}

/// The cases of a test that tries all there are: with `VDTOOL_ROUNDS` below 1, that share of them.
pub(crate) fn share<I: IntoIterator>(all: I) -> std::iter::StepBy<I::IntoIter> {
    all.into_iter().step_by(1000 / up_to(1000))
}

fn times() -> f64 {
    let times = std::env::var("VDTOOL_ROUNDS");
    let times = times.map_or(1.0, |t| t.parse().expect("VDTOOL_ROUNDS is a number"));
    f64::max(times, 0.0)
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

/// Random numbers that can be had again: a failing test prints the seed, and `VDTOOL_SEED` sets
/// it (`random`: another one each time).
#[derive(Debug)]
pub(crate) struct Seeded {
    rng: fastrand::Rng,
    seed: u64,
}

impl Seeded {
    /// The numbers of the test called `test`, which keeps two tests from drawing the same ones.
    pub(crate) fn new(test: &str) -> Self {
        let seed = match std::env::var("VDTOOL_SEED").as_deref() {
            Ok("random") => fastrand::u64(..),
            Ok(text) => text.parse().expect("VDTOOL_SEED is a number or 'random'"),
            Err(_) => 0x5eed,
        };
        // FNV-1a: short, and the same on every machine.
        let salt = test.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self {
            rng: fastrand::Rng::with_seed(seed ^ salt),
            seed,
        }
    }

    /// `len` random bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rng.fill(&mut bytes);
        bytes
    }
}

impl Deref for Seeded {
    type Target = fastrand::Rng;

    fn deref(&self) -> &fastrand::Rng {
        &self.rng
    }
}

impl DerefMut for Seeded {
    fn deref_mut(&mut self) -> &mut fastrand::Rng {
        &mut self.rng
    }
}

impl Drop for Seeded {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to see this again: VDTOOL_SEED={}", self.seed);
        }
    }
}

/// A length in memory; these tests are small.
pub(crate) fn len(value: u64) -> usize {
    usize::try_from(value).expect("fits in memory")
}

/// Panics at the first byte that differs, naming it; the arguments may be of any length.
pub(crate) fn assert_same(found: &[u8], expected: &[u8], first: u64, what: &str) {
    if found == expected {
        return;
    }
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let differ = |(a, b): (&u8, &u8)| a != b;
    let at = found.iter().zip(expected).position(differ).unwrap_or(0);
    let count = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    panic!(
        "{what}: {count} bytes differ, the first at {:#x}: found {:#04x}, expected {:#04x}",
        first + at as u64,
        found[at],
        expected[at]
    );
}
