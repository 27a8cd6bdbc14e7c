//! What the command line prints, held against files under tests/golden.
//!
//! A session is a list of commands in a directory of its own.  What differs from run to run is
//! filtered first.  `VDTOOL_BLESS=1` writes the files anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::util::{scratch, vdtool};

/// Holds `text` against the file at `path`; with `VDTOOL_BLESS` set, writes it there.
pub(crate) fn assert_file(path: &Path, text: &str) {
    if std::env::var_os("VDTOOL_BLESS").is_some() {
        let directory = path.parent().expect("has a directory");
        std::fs::create_dir_all(directory).expect("can be made");
        std::fs::write(path, text).expect("can be written");
        return;
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    if expected != text {
        let differ = |(a, b): &(&str, &str)| a != b;
        let pair = expected.lines().zip(text.lines()).find(differ);
        let (old, new) = pair.unwrap_or(("its length differs", ""));
        panic!(
            "{} is stale (VDTOOL_BLESS=1 writes it anew); first difference:\n- {old}\n+ {new}\n\
             all of it:\n{text}",
            path.display()
        );
    }
}

/// Commands and what they printed.
struct Session {
    directory: TempDir,
    text: String,
}

impl Session {
    fn new() -> Self {
        Self {
            directory: scratch(),
            text: String::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs a command, whose words are separated by single spaces; `_` is a space in a word.
    fn run(&mut self, line: &str) -> &mut Self {
        let output = vdtool()
            .args(line.split(' ').map(|word| word.replace('_', " ")))
            .current_dir(&self.directory)
            .output()
            .expect("the binary runs");
        let _ = writeln!(self.text, "$ vdtool {}", typed(line));
        self.text.push_str(&String::from_utf8_lossy(&output.stdout));
        for line in String::from_utf8_lossy(&output.stderr).lines() {
            let _ = writeln!(self.text, "stderr: {line}");
        }
        let code = output.status.code().expect("it ends by itself");
        if code != 0 {
            let _ = writeln!(self.text, "exit: {code}");
        }
        self.text.push('\n');
        self
    }

    fn finish(&self, name: &str) {
        let directory = self.directory.path().canonicalize().expect("is there");
        let text = self
            .text
            .replace(&*directory.to_string_lossy(), "DIR")
            .lines()
            .map(|line| filter(line) + "\n")
            .collect::<String>();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        assert_file(&path.join(name), &text);
    }
}

/// The line as one would type it.
fn typed(line: &str) -> String {
    let words = line.split(' ').map(|word| match word.contains('_') {
        true => format!("'{}'", word.replace('_', " ")),
        false => word.to_owned(),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// One line without what depends on the host, the time or chance.
fn filter(line: &str) -> String {
    for key in ["disk size:", "\"actual-size\":"] {
        if let Some(at) = line.find(key) {
            let comma = if line.ends_with(',') { "," } else { "" };
            return format!("{}{key} SIZE{comma}", &line[..at]);
        }
    }
    let mut out = String::new();
    let mut rest = line;
    while let Some(c) = rest.chars().next() {
        if is_like(rest, UUID) {
            out.push_str("UUID");
            rest = &rest[UUID.len()..];
        } else if is_like(rest, TIME) {
            out.push_str("TIME");
            rest = &rest[TIME.len()..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

const UUID: &str = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx";
const TIME: &str = "9999-99-99T99:99:99Z";

/// Whether `text` begins as `shape` does: `x` is a hexadecimal digit, `9` a decimal one.
fn is_like(text: &str, shape: &str) -> bool {
    let alike = |(byte, shape): (u8, u8)| match shape {
        b'x' => byte.is_ascii_hexdigit(),
        b'9' => byte.is_ascii_digit(),
        other => byte == other,
    };
    text.len() >= shape.len() && text.bytes().zip(shape.bytes()).all(alike)
}

#[test]
fn the_filters_hide_what_changes_and_nothing_else() {
    assert_eq!(
        filter("    \"actual-size\": 4096,"),
        "    \"actual-size\": SIZE,"
    );
    assert_eq!(
        filter("uuid: 01234567-89ab-cdef-0123-456789abcdef."),
        "uuid: UUID."
    );
    assert_eq!(filter("made: 2026-11-20T22:02:46Z"), "made: TIME");
    assert_eq!(filter("länge: 0x10-20"), "länge: 0x10-20");
}

#[test]
fn a_raw_image_from_creation_to_shrinking() {
    let mut session = Session::new();
    session
        .run("create disk.raw 1M")
        .run("info disk.raw")
        .run("info --output json disk.raw")
        .run("info --backing-chain --output json disk.raw");
    std::fs::write(session.path("data.raw"), vec![1; 65536]).expect("has room");
    session
        .run("resize -f raw data.raw 192k")
        .run("map data.raw")
        .run("map --output json data.raw")
        .run("map --output json -s 100k -l 8k data.raw")
        .run("resize data.raw 64k")
        .run("resize data.raw --shrink -64k")
        .run("resize -q --preallocation full data.raw +64k")
        .run("map --output json data.raw")
        .run("check data.raw")
        .run("check -r all --output json data.raw");
    session.finish("raw.txt");
}

#[test]
fn a_vhd_and_its_child() {
    let mut session = Session::new();
    session
        .run("create base.vhd 10M")
        .run("io -q -c write_-P_1_0_64k base.vhd")
        .run("info base.vhd")
        .run("info --output json base.vhd")
        .run("create -f vhd -b base.vhd child.vhd")
        .run("io -q -c write_-P_2_2M_4k child.vhd")
        .run("info child.vhd")
        .run("map child.vhd")
        .run("map --output json child.vhd")
        .run("check base.vhd")
        .run("check --output json child.vhd")
        .run("resize base.vhd 12M")
        .run("resize base.vhd 1M")
        .run("create -f vhd big.vhd 3T")
        .run("create -f vhd -b none.vhd x.vhd");
    session.finish("vhd.txt");
}

#[test]
fn wrong_usage_is_one_line_and_the_right_code() {
    let mut session = Session::new();
    session
        .run("info")
        .run("info no-such-file")
        .run("info --no-such-option x")
        .run("info --image-opts x")
        .run("create x.raw 1x")
        .run("create x.raw")
        .run("create -f raw")
        .run("create x.raw 1M 2M")
        .run("create -f floppy x 1M")
        .run("create -o speed=fast x.raw 1M")
        .run("create -o preallocation=fast x.raw 1M")
        .run("create -f raw -b base.raw x 1M")
        .run("create x 1M")
        .run("create no/such/dir.raw 1M")
        .run("resize x -1x")
        .run("resize x -2M")
        .run("resize x 9E")
        .run("resize x")
        .run("resize --force-share x 2M")
        .run("check")
        .run("check --image-opts x")
        .run("check -T sometimes x")
        .run("check -r some x")
        .run("map -s none x")
        .run("completions tcsh")
        .run("frobnicate");
    session.finish("usage.txt");
}

#[test]
fn options_of_formats_are_listed() {
    let mut session = Session::new();
    session
        .run("create -f raw -o help")
        .run("create -f vhd -o help");
    session.finish("options.txt");
}
