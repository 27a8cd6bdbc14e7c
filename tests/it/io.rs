//! `vdtool io`: sessions from arguments, scripts, pipes and a terminal, and beside qemu-io.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::util::{peer, requires, scratch, vdtool};

/// What a session printed and how it ended.
#[derive(Debug)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

/// A scratch directory with an image `disk` of 4 MiB.
struct Bench {
    directory: TempDir,
    disk: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let directory = scratch();
        let disk = directory.path().join("disk.raw");
        let file = fs::File::create(&disk).expect("an image");
        file.set_len(4 << 20).expect("a size");
        Self { directory, disk }
    }

    fn io(&self, arguments: &[&str], stdin: &str) -> Ended {
        let output = vdtool()
            .arg("io")
            .args(arguments)
            .arg(&self.disk)
            .current_dir(&self.directory)
            .write_stdin(stdin)
            .output()
            .expect("the binary runs");
        Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("text"),
            stderr: String::from_utf8(output.stderr).expect("text"),
        }
    }

    /// Runs commands given by `-c`.
    fn commands(&self, commands: &[&str]) -> Ended {
        let arguments: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
        self.io(&arguments, "")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.disk).expect("the image is there")
    }
}

#[test]
fn what_is_written_is_in_the_file_and_reads_back() {
    let bench = Bench::new();
    let ended = bench.commands(&[
        "write -P 0xaa 1000 64k",
        "read -P 0xaa 1000 64k",
        "read -P 0 0 1000",
        "length",
    ]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    let mut lines = ended.stdout.lines();
    assert_eq!(lines.next(), Some("wrote 65536/65536 bytes at offset 1000"));
    assert!(lines.next().expect("a rate").starts_with("64 KiB, 1 ops; "));
    assert_eq!(lines.next(), Some("read 65536/65536 bytes at offset 1000"));
    assert_eq!(lines.last(), Some("4 MiB"));
    let bytes = bench.bytes();
    assert_eq!(bytes.len(), 4 << 20);
    for (at, byte) in bytes.iter().enumerate() {
        let expected = if (1000..1000 + 65536).contains(&at) {
            0xaa
        } else {
            0
        };
        assert_eq!(*byte, expected, "{at}");
    }
}

#[test]
fn a_pattern_that_differs_makes_the_exit_code_1_and_the_session_goes_on() {
    let bench = Bench::new();
    let ended = bench.commands(&["read -q -P 1 512 16", "length"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (1, ""));
    let expected = "Pattern verification failed at offset 512, 16 bytes\n4 MiB\n";
    assert_eq!(ended.stdout, expected);
    assert_eq!(bench.commands(&["read -P 1 -s 0 -l 0 512 16"]).code, 0);
}

#[test]
fn a_difference_past_the_first_step_of_a_long_read_is_found() {
    let bench = Bench::new();
    let long = 40 << 20;
    let file = fs::File::options()
        .write(true)
        .open(&bench.disk)
        .expect("opens");
    file.set_len(long).expect("grows");
    let ended = bench.commands(&["write -q -P 7 0 40M", "read -P 7 1 39M"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    file.write_all_at(&[8], long - (1 << 20)).expect("writes");
    let ended = bench.commands(&["read -qP 7 1 39M"]);
    assert_eq!(ended.code, 1);
    let ended = bench.commands(&["read -qP 7 1 40893439", "read -qP 7 -s 3k 0 16M"]);
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn a_failed_command_is_one_line_and_does_not_keep_the_next_from_running() {
    let bench = Bench::new();
    let disk = bench.disk.display().to_string();
    let cases = [
        ("write 4M 1", format!("{disk}: write failed: ")),
        ("read 4194303 2", format!("{disk}: read failed: ")),
        ("discard 8M 1", format!("{disk}: discard failed: ")),
        ("write -z 7E 7E", format!("{disk}: write failed: ")),
        ("write -z 0 9E", "'9E' is not a size: too large".to_owned()),
        ("read 0 -5", "'-5' is not a size".to_owned()),
        ("read 0 1.2.3", "'1.2.3' is not a size".to_owned()),
        (
            "read 0",
            "read: bad argument count 1 (allowed: 2)".to_owned(),
        ),
        ("read -x 0 1", "read: no option -x".to_owned()),
        ("read -l 1 0 1", "read: -s and -l need -P".to_owned()),
        (
            "read -P 1 -s 2 0 1",
            "pattern verification range".to_owned(),
        ),
        (
            "read -P 256 0 1",
            "256 is not a valid pattern byte".to_owned(),
        ),
        ("write -u 0 1", "write: -u requires -z".to_owned()),
        (
            "write -zP 1 0 1",
            "write: Only one of -z, -P, and -s".to_owned(),
        ),
        (
            "write -c 0 64k",
            format!("{disk}: write failed: format 'raw'"),
        ),
        ("write -s none 0 1", "none: cannot open".to_owned()),
        ("write -s /dev/null 0 1", "/dev/null: is empty".to_owned()),
        ("read -b 0 1", "read failed: ".to_owned()),
        (
            "truncate -m metadata 8M",
            format!(
                "{disk}: truncate failed: an image of format 'raw' cannot grow with preallocation=metadata"
            ),
        ),
        (
            "truncate -m full 1M",
            format!("{disk}: truncate failed: preallocation is for growing"),
        ),
        ("open other", format!("{disk}: file open already")),
        ("frobnicate", "command 'frobnicate' not found".to_owned()),
        ("read 'a", "the quote ' is not closed".to_owned()),
        ("sleep soon", "sleep: soon is not a valid number".to_owned()),
    ];
    for (line, message) in cases {
        let ended = bench.commands(&[line, "length"]);
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (1, "4 MiB\n"),
            "{line}"
        );
        let starts = ended.stderr.starts_with(&format!("vdtool: {message}"));
        assert!(starts, "{line}: {}", ended.stderr);
        assert_eq!(ended.stderr.lines().count(), 1, "{line}: {}", ended.stderr);
    }
    assert!(bench.bytes().iter().all(|b| *b == 0));
}

#[test]
fn a_script_has_comments_quotes_and_blank_lines_and_errors_name_their_line() {
    let bench = Bench::new();
    let script = bench.directory.path().join("steps");
    let text = "# a comment\n\n  write -q -P 5 '0' \"512\"  # the first sector\r\nnonsense\nread -qP 5 0 512";
    fs::write(&script, text).expect("a script");
    let name = script.to_str().expect("text");
    let ended = bench.io(&["--script", name], "");
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    let expected = format!("vdtool: {name}:4: command 'nonsense' not found (try 'help')\n");
    assert_eq!(ended.stderr, expected);
    assert_eq!(bench.bytes()[..513], [[5; 512].as_slice(), &[0]].concat());
}

#[test]
fn lines_come_from_a_pipe_where_nothing_else_is_asked_for() {
    let bench = Bench::new();
    for arguments in [&[][..], &["--script", "-"]] {
        let ended = bench.io(arguments, "length\nfoo\nquit\nlength\n");
        assert_eq!((ended.code, ended.stdout.as_str()), (1, "4 MiB\n"));
        assert!(ended.stderr.starts_with("vdtool: stdin:2: "), "{ended:?}");
    }
    let ended = bench.io(&["-c", "length"], "write 0 4k\n");
    assert_eq!(ended.stdout, "4 MiB\n", "stdin is left alone");
    assert!(bench.bytes().iter().all(|b| *b == 0));
    let ended = bench.io(&["-c", "length", "--script", "-"], "map\n");
    assert_eq!(ended.stdout.lines().count(), 2);
}

#[test]
fn a_snapshot_shows_its_writes_and_leaves_the_image_alone() {
    let bench = Bench::new();
    fs::write(&bench.disk, vec![9; 1 << 20]).expect("an image");
    let commands = [
        "write -q -P 1 1000 200k",
        "read -qP 1 1000 200k",
        "read -qP 9 0 1000",
        "write -qz 300k 100k",
        "read -qP 0 300k 100k",
        "map",
        "truncate 2M",
        "read -qP 0 1M 1M",
        "write -q -P 2 1536k 1k",
        "length",
        "flush",
    ];
    let arguments: Vec<&str> = ["-s"]
        .into_iter()
        .chain(commands.iter().flat_map(|c| ["-c", c]))
        .collect();
    let ended = bench.io(&arguments, "");
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    assert!(ended.stdout.ends_with("2 MiB\n"), "{}", ended.stdout);
    assert_eq!(
        ended.stdout.lines().next(),
        Some("448 KiB (0x70000) bytes     allocated at offset 0 bytes (0x0)")
    );
    assert_eq!(bench.bytes(), vec![9; 1 << 20]);
}

/// A new dynamic VHD of 8 MiB beside the bench's image.
fn vhd(bench: &Bench) -> PathBuf {
    let path = bench.directory.path().join("x.vhd");
    let made = vdtool()
        .args(["create", "-q", "-f", "vhd"])
        .arg(&path)
        .arg("8M")
        .output()
        .expect("the binary runs");
    assert!(made.status.success(), "{made:?}");
    path
}

#[test]
fn a_snapshot_of_an_image_with_a_format_leaves_its_file_alone() {
    let mut bench = Bench::new();
    bench.disk = vhd(&bench);
    let before = bench.bytes();
    let commands = [
        "write -q 3M 3M",
        "read -qP 0xcd 3M 3M",
        "read -qP 0 0 3M",
        "map",
    ];
    let arguments: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
    let ended = bench.io(&[&["-s"], arguments.as_slice()].concat(), "");
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    let map = [
        "3 MiB (0x300000) bytes not allocated at offset 0 bytes (0x0)",
        "3 MiB (0x300000) bytes     allocated at offset 3 MiB (0x300000)",
        "2 MiB (0x200000) bytes not allocated at offset 6 MiB (0x600000)",
    ];
    assert_eq!(ended.stdout.lines().collect::<Vec<_>>(), map);
    assert!(bench.bytes() == before);
}

#[test]
fn a_zero_that_may_not_write_data_is_refused_within_a_cluster() {
    let mut bench = Bench::new();
    bench.disk = vhd(&bench);
    let ended = bench.commands(&["write -q 2M 2M", "zero -nu 2M 512", "read -qP 0xcd 2M 2M"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert!(
        ended
            .stderr
            .contains("write failed: zeroing 0x200000..0x200200 needs")
    );
    let ended = bench.commands(&[
        "zero -qnu 2M 2M",
        "read -qP 0 2M 2M",
        "write -q 0 1",
        "zero -q 0 1",
    ]);
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
}

#[test]
fn a_read_only_image_takes_no_change_and_reopening_lifts_that() {
    let bench = Bench::new();
    for line in ["write 0 1", "write -z 0 1", "discard 0 1", "truncate 1M"] {
        let ended = bench.io(&["-r", "-c", line], "");
        assert_eq!(ended.code, 1);
        assert!(
            ended.stderr.ends_with("is open read-only\n"),
            "{}",
            ended.stderr
        );
    }
    let ended = bench.io(
        &[
            "-r",
            "-c",
            "reopen -w",
            "-c",
            "write -q 0 1",
            "-c",
            "reopen -r",
            "-c",
            "write 1 1",
        ],
        "",
    );
    assert_eq!(ended.code, 1);
    assert!(
        ended.stderr.ends_with("is open read-only\n"),
        "{}",
        ended.stderr
    );
    assert_eq!(bench.bytes()[..2], [0xcd, 0]);
}

#[test]
fn images_are_opened_and_closed_within_a_session() {
    let bench = Bench::new();
    fs::write(bench.directory.path().join("a b.raw"), [3; 1000]).expect("an image");
    let ended = bench.commands(&[
        "close",
        "length",
        "open -o driver=raw 'a b.raw'",
        "read -qP 3 0 1000",
        "close",
        "open -o driver=raw -r none.raw",
        "open -o driver=floppy x",
        "open -s -o driver=raw \"a b.raw\"",
        "write -q 0 1000",
        "read -qP 0xcd 0 1000",
        "reopen -r",
        "close",
        "open -o driver=raw,read-only=on -t none -d ignore 'a b.raw'",
        "write 0 1",
        "length",
    ]);
    assert_eq!(ended.stdout, "1000 bytes\n");
    let errors: Vec<&str> = ended.stderr.lines().collect();
    let expected = [
        "vdtool: no file open",
        "vdtool: none.raw: ",
        "vdtool: open: driver=floppy: unknown format",
        "vdtool: reopen: a snapshot would lose its writes",
        "vdtool: a b.raw: write failed: is open read-only",
    ];
    assert_eq!(errors.len(), expected.len(), "{}", ended.stderr);
    for (error, start) in errors.iter().zip(expected) {
        assert!(error.starts_with(start), "{error}");
    }
    let other = fs::read(bench.directory.path().join("a b.raw")).expect("still there");
    assert_eq!(other, [3; 1000]);
}

#[test]
fn a_raw_image_that_was_probed_stays_raw_when_it_is_reopened() {
    let bench = Bench::new();
    // The footer of a VHD at both ends: probing it now would find another format.
    vhd(&bench);
    let ended = bench.commands(&["write -q -s x.vhd 0 512", "reopen", "info", "length"]);
    assert!(ended.stdout.starts_with("format name: raw\n"), "{ended:?}");
    assert!(ended.stdout.ends_with("4 MiB\n"), "{ended:?}");
}

#[test]
fn a_discard_gives_space_back_unless_discards_are_ignored() {
    use std::os::unix::fs::MetadataExt;
    let bench = Bench::new();
    fs::write(&bench.disk, vec![9; 1 << 20]).expect("an image");
    let blocks = || fs::metadata(&bench.disk).expect("is there").blocks();
    let before = blocks();
    let ended = bench.io(&["-d", "ignore", "-c", "discard 0 512k"], "");
    assert!(
        ended
            .stdout
            .starts_with("discard 524288/524288 bytes at offset 0\n")
    );
    assert_eq!((ended.code, blocks()), (0, before));
    assert_eq!(bench.commands(&["discard 0 512k"]).code, 0);
    assert!(blocks() < before);
    assert_eq!(
        bench
            .commands(&["read -qP 0 0 512k", "read -qP 9 512k 512k"])
            .code,
        0
    );
}

#[test]
fn a_closed_pipe_is_a_clean_end() {
    let bench = Bench::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_vdtool"))
        .args(["io", "-c", "read -v 0 4M", "-c", "read -v 0 4M"])
        .arg(&bench.disk)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut first = [0; 10];
    let mut stdout = child.stdout.take().expect("a pipe");
    stdout.read_exact(&mut first).expect("a dump begins");
    drop(stdout);
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", output.status);
    assert!(output.stderr.is_empty());
}

#[test]
fn names_in_errors_are_safe_for_terminals_and_errors_that_nobody_takes_are_no_crash() {
    let bench = Bench::new();
    let name = "a\nb\x1b[31m.raw";
    fs::rename(&bench.disk, bench.directory.path().join(name)).expect("renames");
    let beyond = |stderr: Stdio| {
        Command::new(env!("CARGO_BIN_EXE_vdtool"))
            .args(["io", "-c", "read 4M 1", name])
            .current_dir(&bench.directory)
            .stdin(Stdio::null())
            .stderr(stderr)
            .output()
            .expect("the binary runs")
    };
    let text = String::from_utf8(beyond(Stdio::piped()).stderr).expect("text");
    assert!(
        text.starts_with("vdtool: a\\u{a}b\\u{1b}[31m.raw: read failed: "),
        "{text}"
    );
    assert_eq!(text.lines().count(), 1, "{text}");
    let full = fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("is there");
    assert_eq!(beyond(full.into()).status.code(), Some(1));
}

/// Sends SIGINT and says how the process ended.
fn interrupt(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("not 0");
    kill_process(pid, Signal::INT).expect("it runs");
}

#[test]
fn sigint_ends_a_script_after_the_command_and_a_session_that_waits_for_lines() {
    let bench = Bench::new();
    for input in ["length\nsleep 100000\nwrite 0 4k\n", "length\n"] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_vdtool"))
            .args(["io", "-f", "raw"])
            .arg(&bench.disk)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin.write_all(input.as_bytes()).expect("takes a script");
        let mut line = [0; 6];
        let stdout = child.stdout.as_mut().expect("a pipe");
        stdout
            .read_exact(&mut line)
            .expect("the first command is done");
        interrupt(&child);
        let status = child.wait().expect("it ends");
        assert_eq!(status.code(), Some(130), "{input}");
        drop(stdin);
    }
    assert!(bench.bytes().iter().all(|b| *b == 0));
}

/// A session on a terminal that util-linux's `script` makes.
struct Terminal {
    child: Child,
    seen: Vec<u8>,
}

impl Terminal {
    fn new(bench: &Bench) -> Self {
        let command = format!(
            "{} io -f raw {}",
            env!("CARGO_BIN_EXE_vdtool"),
            bench.disk.display()
        );
        let child = Command::new("script")
            .args(["-qefc", &command, "/dev/null"])
            .env("TERM", "xterm")
            .env("XDG_STATE_HOME", bench.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("script starts");
        Self {
            child,
            seen: Vec::new(),
        }
    }

    /// Waits until `text` is on the terminal, and forgets what came up to there.
    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let found = self
                .seen
                .windows(text.len())
                .position(|w| w == text.as_bytes());
            if let Some(at) = found {
                self.seen.drain(..at + text.len());
                return;
            }
            let mut buf = [0; 4096];
            let stdout = self.child.stdout.as_mut().expect("a pipe");
            let count = stdout.read(&mut buf).expect("reads");
            let seen = String::from_utf8_lossy(&self.seen).into_owned();
            assert!(
                count > 0 && Instant::now() < deadline,
                "no {text:?} in {seen:?}"
            );
            self.seen.extend_from_slice(&buf[..count]);
        }
    }

    fn send(&mut self, text: &str) {
        let stdin = self.child.stdin.as_mut().expect("a pipe");
        stdin.write_all(text.as_bytes()).expect("is taken");
        stdin.flush().expect("is taken");
    }
}

#[test]
fn a_terminal_has_a_prompt_with_completion_and_a_history() {
    if !requires("script") {
        return;
    }
    let bench = Bench::new();
    let mut terminal = Terminal::new(&bench);
    terminal.wait_for("vdtool> ");
    terminal.send("len\t\r");
    terminal.wait_for("4 MiB");
    terminal.wait_for("vdtool> ");
    terminal.send("nonsense\x03");
    terminal.wait_for("vdtool> ");
    terminal.send("write -q -P 5 0 512\r");
    terminal.wait_for("vdtool> ");
    terminal.send("bogus\r");
    terminal.wait_for("command 'bogus' not found");
    terminal.wait_for("vdtool> ");
    terminal.send("\x04");
    let status = terminal.child.wait().expect("it ends");
    assert_eq!(status.code(), Some(1), "a command failed");
    assert_eq!(bench.bytes()[..513], [[5; 512].as_slice(), &[0]].concat());
    let history = bench.directory.path().join("vdtool/io-history");
    let history = fs::read_to_string(history).expect("a history");
    assert!(
        history.contains("length") && history.contains("bogus"),
        "{history}"
    );
    assert!(!history.contains("nonsense"));

    let mut terminal = Terminal::new(&bench);
    terminal.wait_for("vdtool> ");
    terminal.send("\x1b[A\x1b[A\x1b[A\r");
    terminal.wait_for("4 MiB");
    terminal.wait_for("vdtool> ");
    terminal.send("quit\r");
    assert!(terminal.child.wait().expect("it ends").success());
}

/// Commands that both tools take; `pattern` is a file beside the image.
const BOTH: &[&str] = &[
    "write 1000 1M",
    "write -P 0x61 5k 3000",
    "read -v 990 60",
    "read -v 4090 100",
    "read -P 0 0 512",
    "read -P 1 0 512",
    "read -P 010 -s 24 -l 100 976 512",
    "read -P 0xcd -s 24 -l 100 976 512",
    "read -v -P 1 0 20",
    "read 0 4k -Cq",
    "read -C 0 16",
    "read -q 0 16",
    "read 0 0",
    "r 0x10 1k",
    "write -s pattern 3 100",
    "read -v 0 111",
    "readv -v 0 16 17",
    "writev -P 3 0 4k 3",
    "aio_write 8k 4k",
    "aio_flush",
    "aio_read -P 0xcd 8k 4k",
    "aio_flush",
    "discard 0 64k",
    "discard -C 1M 4k",
    "write -z 0 64k",
    "write -zu 3 5k",
    "write -zfC 64k 64k",
    "write -f 2M 1",
    "flush",
    "l",
    "alloc 3M 8k",
    "alloc 0 0",
    "sleep 1",
    "truncate 8404992",
    "length",
    "read -P 0 4M 4M",
    "write -P 255 7M 1000k",
    "t 1.5M",
    "length",
    "write -qz 1M 512k",
];

/// What is left of a report once times and rates are gone.
fn without_times(stdout: &str) -> String {
    let filter = |line: &str| match (line.split_once(" ops; "), line.matches(',').count()) {
        (Some((amount, _)), _) => format!("{amount} ops"),
        (None, 4) => line.split(',').take(2).collect::<Vec<_>>().join(","),
        _ => line.to_owned(),
    };
    stdout
        .lines()
        .map(filter)
        .fold(String::new(), |all, line| all + &line + "\n")
}

fn beside_qemu_io(directory: &Path, format: &str, ours: &Path, theirs: &Path, lines: &[&str]) {
    fs::write(directory.join("pattern"), b"a pattern, 0..9\n\xff").expect("a pattern");
    let commands = || lines.iter().flat_map(|c| ["-c", c]);
    let we = vdtool()
        .args(["io", "-f", format])
        .args(commands())
        .arg(ours)
        .current_dir(directory)
        .output()
        .expect("the binary runs");
    let they = Command::new("qemu-io")
        .args(["-f", if format == "vhd" { "vpc" } else { format }])
        .args(commands())
        .arg(theirs)
        .current_dir(directory)
        .output()
        .expect("qemu-io runs");
    let text = |bytes: &[u8]| without_times(&String::from_utf8_lossy(bytes));
    assert_eq!(String::from_utf8_lossy(&we.stderr), "");
    assert_eq!(text(&we.stdout), text(&they.stdout));
    assert_eq!(we.status.code(), they.status.code());
}

#[test]
fn a_session_on_raw_prints_and_writes_what_qemu_io_does() {
    if !requires("qemu-io") {
        return;
    }
    let bench = Bench::new();
    let theirs = bench.directory.path().join("theirs.raw");
    fs::copy(&bench.disk, &theirs).expect("a copy");
    let lines: Vec<&str> = BOTH
        .iter()
        .copied()
        .chain(["map", "info", "alloc 9M"])
        .collect();
    beside_qemu_io(bench.directory.path(), "raw", &bench.disk, &theirs, &lines);
    assert!(bench.bytes() == fs::read(&theirs).expect("is there"));
}

#[test]
fn a_session_on_vhd_prints_what_qemu_io_does_and_leaves_the_same_disk() {
    if !requires("qemu-io") || !requires("qemu-img") {
        return;
    }
    let directory = scratch();
    let (ours, theirs) = ("ours.vhd", "theirs.vhd");
    for name in [ours, theirs] {
        peer(
            "qemu-img",
            directory.path(),
            ["create", "-q", "-f", "vpc", name, "100M"],
        );
    }
    // qemu cannot resize this format, and calls everything allocated.
    let skip = ["truncate", "t ", "alloc", "read -P 0 4M"];
    let kept = |line: &&str| !skip.iter().any(|s| line.starts_with(s));
    let lines: Vec<&str> = BOTH.iter().copied().filter(kept).collect();
    let (ours, theirs) = (directory.path().join(ours), directory.path().join(theirs));
    beside_qemu_io(directory.path(), "vhd", &ours, &theirs, &lines);
    peer(
        "qemu-img",
        directory.path(),
        [
            "compare",
            "-f",
            "vpc",
            "-F",
            "vpc",
            "ours.vhd",
            "theirs.vhd",
        ],
    );
}
