//! `fork` and `commit --children` killed before each change that they make, of a file or of a name:
//! all images read as before, and the same command ends it.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use crate::util::{killable, rounds, scratch, vdtool};

fn ours(dir: &Path, line: &[&str]) {
    vdtool().current_dir(dir).args(line).assert().success();
}

const FORMATS: [&str; 5] = ["qcow2", "vhd", "vdi", "vhdx", "vmdk"];

/// `b` below `m` below `n` below `t` and `u`, each with something of its own and of the others.
fn family(dir: &Path, format: &str) {
    for (below, name) in [("", "b"), ("b", "m"), ("m", "n"), ("n", "t"), ("n", "u")] {
        let over = ["-b", below, "-F", format, name];
        let made = ["create", "-q", "-f", format];
        match below {
            "" => ours(dir, &[&made[..], &["b", "6M"]].concat()),
            _ => ours(dir, &[&made[..], &over].concat()),
        }
        let writes = match name {
            "b" => ["write -P 1 0 64k", "write -P 1 4M 64k"],
            "m" => ["write -P 2 32k 64k", "write -P 2 2M 4k"],
            "n" => ["write -P 3 64k 8k", "write -P 3 2M 512"],
            _ => ["write -P 4 5M 4k", "write -P 4 2050k 512"],
        };
        ours(dir, &["io", "-q", "-c", writes[0], "-c", writes[1], name]);
    }
}

/// What `t` and `u` read as.
const CHILD: [&str; 10] = [
    "read -P 1 0 32k",
    "read -P 2 32k 32k",
    "read -P 3 64k 8k",
    "read -P 2 72k 24k",
    "read -P 0 96k 1952k",
    "read -P 3 2M 512",
    "read -P 2 2097664 1536",
    "read -P 4 2050k 512",
    "read -P 1 4M 64k",
    "read -P 4 5M 4k",
];

fn reads(dir: &Path, files: &[&str], what: &str) {
    for file in files {
        let commands = CHILD.iter().flat_map(|read| ["-c", read]);
        let mut line = vec!["io", "-q", "-r"];
        line.extend(commands);
        line.push(file);
        let read = vdtool().current_dir(dir).args(&line).output();
        let read = read.expect("runs");
        let said = String::from_utf8_lossy(&read.stderr);
        let found = String::from_utf8_lossy(&read.stdout);
        assert!(read.status.success(), "{what}: {file}: {said}{found}");
    }
}

/// Runs `line` on what `make` makes, killed before each change; `files` read as children then, and when
/// it was run again, `ended` too.  How many changes there were.
fn at_every_moment(
    format: &str,
    line: &[&str],
    files: &[&str],
    ended: &dyn Fn(&Path, &str),
) -> usize {
    let made = scratch();
    family(made.path(), format);
    if line[0] == "fork" {
        fs::remove_file(made.path().join("u")).expect("removes");
    }
    // All of them in a long run.
    let stride = 7 / rounds(1).min(7);
    let mut moment = 1;
    loop {
        let dir = scratch();
        let dir = dir.path();
        for entry in fs::read_dir(made.path()).expect("lists") {
            let entry = entry.expect("lists");
            fs::copy(entry.path(), dir.join(entry.file_name())).expect("copies");
        }
        let run = killable()
            .current_dir(dir)
            .args(line)
            .env("VDTOOL_KILL_AT", moment.to_string())
            .stderr(Stdio::null())
            .status()
            .expect("runs");
        if run.success() {
            return moment;
        }
        let what = format!("{format}: {line:?} killed at {moment}");
        assert_eq!(run.signal(), Some(9), "{what}");
        reads(dir, files, &what);
        ours(dir, line);
        reads(dir, files, &what);
        ended(dir, &what);
        moment += stride;
    }
}

#[test]
fn a_merge_that_is_killed_before_any_change_is_ended_by_the_same_command() {
    for (at, format) in FORMATS.into_iter().enumerate() {
        let children = ["--children", "t", "--children", "u"];
        // The state of a base that one image alone goes into is another then, where it has two.
        let base = if format == "vhdx" { "m" } else { "b" };
        let mut line = [&["commit", "-q", "-b", base][..], &children].concat();
        let removes = at % 2 == 0;
        line.extend(removes.then_some("--remove"));
        line.push("n");
        let moments = at_every_moment(format, &line, &["t", "u"], &|dir, what| {
            for file in ["m", "n"].into_iter().filter(|file| *file != base) {
                assert_eq!(dir.join(file).exists(), !removes, "{what}");
            }
            ours(dir, &["chain", "."]);
            // A kill may leave space that nothing names.
            let check = ["check", "-q", "--chain", "t"];
            let check = vdtool().current_dir(dir).args(check).output();
            let code = check.expect("runs").status.code();
            assert!(matches!(code, Some(0 | 3)), "{what}: {code:?}");
        });
        assert!(moments > 15, "{format}: {moments}");
    }
}

#[test]
fn a_fork_that_is_killed_before_any_change_is_ended_by_the_same_command() {
    for format in FORMATS {
        let line = ["fork", "-q", "t", "base", "u"];
        let moments = at_every_moment(format, &line, &["t"], &|dir, what| {
            reads(dir, &["u", "base"], what);
            ours(dir, &["chain", "."]);
            let left = fs::read_dir(dir).expect("lists").count();
            assert_eq!(left, 6, "{what}: nothing is left over");
        });
        assert!(moments > 6, "{format}: {moments}");
    }
}
