//! Internal snapshots made, applied and deleted by qemu-img and by us in turn, between writes,
//! resizes and amendments: both checkers stay content, and every disk keeps its content.

use std::path::Path;

use crate::util::{Seeded, assert_same, peer, requires, rounds, scratch, up_to, vdtool};

/// Snapshots kept at a time.
const MOST: usize = 4;
/// Steps of one round.
const STEPS: usize = 14;

/// Who does a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Ours,
    Theirs,
}

/// An image, and what it must read as.
struct Round<'a> {
    dir: &'a Path,
    rng: &'a mut Seeded,
    /// It can be made version 2 and have other refcounts.
    plain: bool,
    disk: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
    made: usize,
    done: Vec<String>,
}

fn ours(dir: &Path, line: &[&str], done: &[String]) {
    let out = vdtool().current_dir(dir).args(line).output();
    let out = out.expect("runs");
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    let out_text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{line:?}: {text}{out_text}: {done:#?}"
    );
}

impl Round<'_> {
    fn img(&mut self, tool: Tool, line: &[&str]) {
        self.done.push(format!("{tool:?} {line:?}"));
        match tool {
            Tool::Ours => ours(self.dir, line, &self.done),
            Tool::Theirs => drop(peer("qemu-img", self.dir, line)),
        }
    }

    fn io(&mut self, tool: Tool, command: &str) {
        self.done.push(format!("{tool:?} {command}"));
        let line = ["-f", "qcow2", "-c", command, "a.qcow2"];
        match tool {
            Tool::Ours => ours(self.dir, &[&["io", "-q"][..], &line].concat(), &self.done),
            Tool::Theirs => drop(peer("qemu-io", self.dir, line)),
        }
    }

    fn write(&mut self, tool: Tool) {
        let len = self.disk.len();
        let at = self.rng.usize(..len / 512) * 512;
        let most = (len - at).min(200 << 10);
        let count = (self.rng.usize(1..=most / 512)) * 512;
        let range = at..at + count;
        match self.rng.u32(..4) {
            0 => {
                self.io(tool, &format!("write -z {at} {count}"));
                self.disk[range].fill(0);
            }
            1 => {
                self.io(tool, &format!("write -z -u {at} {count}"));
                self.disk[range].fill(0);
            }
            _ => {
                let byte = self.rng.u8(1..);
                self.io(tool, &format!("write -P {byte} {at} {count}"));
                self.disk[range].fill(byte);
            }
        }
    }

    fn snapshot(&mut self, tool: Tool) {
        let count = self.snapshots.len();
        let which = (count > 0).then(|| self.rng.usize(..count));
        match (self.rng.u32(..3), which) {
            (0, Some(which)) => {
                let (name, content) = self.snapshots[which].clone();
                self.img(tool, &["snapshot", "-a", &name, "a.qcow2"]);
                self.disk = content;
            }
            (1, Some(which)) => {
                let (name, _) = self.snapshots.remove(which);
                self.img(tool, &["snapshot", "-d", &name, "a.qcow2"]);
            }
            _ if count < MOST => {
                self.made += 1;
                let name = format!("s{}", self.made);
                self.img(tool, &["snapshot", "-c", &name, "a.qcow2"]);
                self.snapshots.push((name, self.disk.clone()));
            }
            _ => {}
        }
    }

    fn change(&mut self, tool: Tool) {
        let same_size = |(_, s): &(String, Vec<u8>)| s.len() == self.disk.len();
        match self.rng.u32(..4) {
            0 if self.plain && self.snapshots.iter().all(same_size) => {
                // Version 2 has no zero clusters, and only we take those of snapshots away.
                self.img(Tool::Ours, &["amend", "-o", "refcount_bits=16", "a.qcow2"]);
                self.img(Tool::Ours, &["amend", "-o", "compat=0.10", "a.qcow2"]);
                self.look();
                self.img(tool, &["amend", "-o", "compat=1.1", "a.qcow2"]);
            }
            1 if self.plain => {
                let bits = [8, 16, 32, 64][self.rng.usize(..4)];
                let option = format!("refcount_bits={bits}");
                self.img(tool, &["amend", "-o", &option, "a.qcow2"]);
            }
            _ => {
                let size = self.rng.usize(64..1024) * 1024;
                let shrink = size < self.disk.len();
                let text = size.to_string();
                // qemu-img shows what a shrink left in the last cluster, whoever shrank the disk.
                let tool = match shrink || self.disk.len().is_multiple_of(64 << 10) {
                    true => tool,
                    false => Tool::Ours,
                };
                match shrink {
                    true => self.img(tool, &["resize", "--shrink", "a.qcow2", &text]),
                    false => self.img(tool, &["resize", "a.qcow2", &text]),
                }
                self.disk.resize(size, 0);
            }
        }
    }

    /// Both checkers are content, and both tools read all disks right.
    fn look(&mut self) {
        let done = self.done.clone();
        ours(self.dir, &["check", "a.qcow2"], &done);
        let line = ["check", "a.qcow2"];
        let output = std::process::Command::new("qemu-img")
            .args(line)
            .current_dir(self.dir)
            .output()
            .expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}: {done:#?}");
        let disks = std::iter::once((None, &self.disk));
        let snapshots = self.snapshots.iter();
        for (name, content) in disks.chain(snapshots.map(|(n, c)| (Some(&**n), c))) {
            for tool in [Tool::Ours, Tool::Theirs] {
                let mut line = vec!["convert", "-O", "raw"];
                name.iter().for_each(|name| line.extend(["-l", name]));
                line.extend(["a.qcow2", "out.raw"]);
                match tool {
                    Tool::Ours => ours(self.dir, &line, &done),
                    Tool::Theirs => drop(peer("qemu-img", self.dir, &line)),
                }
                let found = std::fs::read(self.dir.join("out.raw")).expect("reads");
                let what = format!("{tool:?} {name:?}: {done:#?}");
                // qemu-img shows snapshots with the size that the disk has now.
                let expected = match tool {
                    Tool::Ours => content.len(),
                    Tool::Theirs => self.disk.len(),
                };
                assert_eq!(found.len(), expected, "{what}");
                let both = found.len().min(content.len());
                assert_same(&found[..both], &content[..both], 0, &what);
            }
        }
    }
}

fn round(rng: &mut Seeded, options: &str, plain: bool) {
    let dir = scratch();
    let size = 300 << 10;
    let mut round = Round {
        dir: dir.path(),
        rng,
        plain,
        disk: vec![0; size],
        snapshots: Vec::new(),
        made: 0,
        done: Vec::new(),
    };
    let size = size.to_string();
    let create = [
        "create", "-q", "-f", "qcow2", "-o", options, "a.qcow2", &size,
    ];
    round.img(Tool::Theirs, &create);
    for _ in 0..up_to(STEPS) {
        let tool = [Tool::Ours, Tool::Theirs][round.rng.usize(..2)];
        match round.rng.u32(..8) {
            0..=2 => round.write(tool),
            3..=6 => round.snapshot(tool),
            _ => round.change(tool),
        }
        round.look();
    }
}

#[test]
fn snapshots_changed_by_both_tools_in_turn_keep_every_disk_and_stay_clean() {
    if !requires("qemu-img") || !requires("qemu-io") {
        return;
    }
    let mut rng = Seeded::new("turns");
    for _ in 0..rounds(1) {
        for (options, plain) in [
            ("cluster_size=4k", true),
            ("cluster_size=512", true),
            ("cluster_size=64k", true),
            ("cluster_size=16k,extended_l2=on", false),
        ] {
            round(&mut rng, options, plain);
        }
    }
}
