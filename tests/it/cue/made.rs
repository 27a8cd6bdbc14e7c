//! Discs for tests: sectors of every kind, and sheets.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use vdtool::image::disc::{self, Form, Msf, RAW, Raw};

use crate::util::{Seeded, scratch, vdtool};

/// A sector of a form with these bytes of data, at an address.
pub(crate) fn sector(form: Form, lba: u64, data: &[u8]) -> Raw {
    let mut raw = [0; RAW];
    let start = match form {
        Form::Audio => 0,
        Form::Form1 | Form::Form2 => 24,
        _ => 16,
    };
    raw[start..start + data.len()].copy_from_slice(data);
    let submode = if form == Form::Form2 { 0x28 } else { 0x08 };
    if start == 24 {
        raw[16..24].copy_from_slice(&[1, 0, submode, 0, 1, 0, submode, 0]);
    }
    let msf = Msf::of_lba(lba).to_header().expect("is on a disc");
    disc::make(&mut raw, form, msf);
    raw
}

/// Sectors of one form with data at random, from an address on; the sectors, and the data.
pub(crate) fn sectors(rng: &mut Seeded, form: Form, lba: u64, count: u64) -> (Vec<u8>, Vec<u8>) {
    let (mut all, mut user) = (Vec::new(), Vec::new());
    for n in 0..count {
        let data = rng.bytes(match form {
            Form::Audio => 2352,
            Form::Form2 => 2324,
            Form::Formless => 2336,
            _ => 2048,
        });
        all.extend(sector(form, lba + n, &data));
        user.extend(data);
    }
    (all, user)
}

/// Only these bytes of each sector.
pub(crate) fn cut(sectors: &[u8], window: std::ops::Range<usize>) -> Vec<u8> {
    let parts = sectors.chunks(RAW).map(|sector| &sector[window.clone()]);
    parts.flatten().copied().collect()
}

/// Sound with its bytes in the other order.
pub(crate) fn swapped(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(2)
        .flat_map(|pair| [pair[1], pair[0]])
        .collect()
}

/// Sound as a file of its own.
pub(crate) fn wave(samples: &[u8]) -> Vec<u8> {
    let len = u32::try_from(samples.len()).expect("is short");
    let mut file = b"RIFF".to_vec();
    file.extend((len + 36).to_le_bytes());
    file.extend(b"WAVEfmt \x10\0\0\0\x01\0\x02\0\x44\xac\0\0\x10\xb1\x02\0\x04\0\x10\0data");
    file.extend(len.to_le_bytes());
    file.extend(samples);
    file
}

/// A directory with files in it.
#[derive(Debug)]
pub(crate) struct Files(TempDir);

impl Files {
    pub(crate) fn new(files: &[(&str, &[u8])]) -> Self {
        let directory = scratch();
        for (name, bytes) in files {
            fs::write(directory.path().join(name), bytes).expect("has room");
        }
        Self(directory)
    }

    /// A disc of one track of mode 1, and its data.
    pub(crate) fn mode1(test: &str, count: u64) -> (Self, Vec<u8>) {
        let (bin, user) = sectors(&mut Seeded::new(test), Form::Mode1, 0, count);
        let sheet = b"FILE x.bin BINARY\n TRACK 01 MODE1/2352\n  INDEX 01 00:00:00\n";
        (Self::new(&[("x.cue", sheet), ("x.bin", &bin)]), user)
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).expect("is there")
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.file(name), bytes).expect("has room");
    }

    /// Flips bits of a file.
    pub(crate) fn damage(&self, name: &str, places: impl IntoIterator<Item = usize>) {
        let mut bytes = self.read(name);
        for at in places {
            bytes[at] ^= 0x5a;
        }
        self.write(name, &bytes);
    }

    /// Runs a command here: exit code, stdout, stderr.
    pub(crate) fn run(&self, words: &[&str]) -> (i32, String, String) {
        let output = vdtool()
            .current_dir(self.path())
            .args(words)
            .output()
            .expect("runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().expect("ends by itself");
        (code, text(&output.stdout), text(&output.stderr))
    }

    /// Runs a command that is done; what it printed on stdout.
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let (code, out, errors) = self.run(words);
        assert_eq!(code, 0, "{words:?}: {out}{errors}");
        out
    }

    /// The same, as JSON.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.done(words)).expect("is JSON")
    }

    /// Runs a command that fails so, and says this.
    pub(crate) fn fails(&self, words: &[&str], code: i32, part: &str) {
        let (found, out, errors) = self.run(words);
        assert_eq!(found, code, "{words:?}: {out}{errors}");
        assert!(errors.contains(part), "{words:?}: {errors}");
    }

    /// The disk, as a file `out.iso` that is made here.
    pub(crate) fn disk(&self, options: &[&str]) -> Vec<u8> {
        self.done(&[&["convert"], options, &["x.cue", "out.iso"]].concat());
        self.read("out.iso")
    }

    /// What `info` says of the tracks.
    pub(crate) fn tracks(&self) -> Vec<Value> {
        let info = self.json(&["info", "--output", "json", "x.cue"]);
        let tracks = info["format-specific"]["data"]["tracks"].as_array();
        tracks.expect("has tracks").clone()
    }
}
