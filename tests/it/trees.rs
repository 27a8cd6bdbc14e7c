//! Random trees of images of several formats against byte vectors: written, forked, merged, rebased,
//! resized, and each image that nothing was said to change reads as before.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use crate::util::{Seeded, rounds, scratch, vdtool};

const MIB: u64 = 1 << 20;
const DEEPEST: usize = 8;
const MOST: usize = 14;

/// One image.
#[derive(Debug)]
struct Node {
    name: String,
    format: &'static str,
    parent: Option<usize>,
    /// What it reads as; `None`: whatever it likes.
    content: Option<Vec<u8>>,
}

/// The images there are; of those that are gone nothing is left.
struct Trees {
    home: TempDir,
    nodes: Vec<Option<Node>>,
    rng: Seeded,
    named: usize,
    /// What was done, for messages.
    done: Vec<String>,
}

impl Trees {
    fn dir(&self) -> &Path {
        self.home.path()
    }

    /// Runs a command; whether it succeeded, and what it said.
    fn run(&mut self, line: &[&str]) -> (bool, String) {
        self.done.push(line.join(" "));
        let run = vdtool().current_dir(self.dir()).args(line).output();
        let run = run.expect("runs");
        let code = run.status.code();
        assert!(
            matches!(code, Some(0 | 1 | 63)),
            "{code:?}: {:#?}",
            self.done
        );
        let said = String::from_utf8_lossy(&run.stderr).into_owned();
        (run.status.success(), said)
    }

    /// Runs what must succeed.
    fn ours(&mut self, line: &[&str]) {
        let (done, said) = self.run(line);
        assert!(done, "{said}: {:#?}", self.done);
    }

    fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("is there")
    }

    fn alive(&self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|i| self.nodes[*i].is_some())
            .collect()
    }

    fn children(&self, of: usize) -> Vec<usize> {
        let alive = self.alive().into_iter();
        alive.filter(|i| self.node(*i).parent == Some(of)).collect()
    }

    fn leaves(&self) -> Vec<usize> {
        let alive = self.alive().into_iter();
        alive
            .filter(|i| self.children(*i).is_empty() && self.node(*i).content.is_some())
            .collect()
    }

    /// An image and those below it.
    fn chain(&self, from: usize) -> Vec<usize> {
        let mut chain = vec![from];
        while let Some(parent) = self.node(chain[chain.len() - 1]).parent {
            chain.push(parent);
        }
        chain
    }

    fn pick(&mut self, from: &[usize]) -> Option<usize> {
        match from.len() {
            0 => None,
            len => Some(from[self.rng.usize(0..len)]),
        }
    }

    fn name(&mut self) -> String {
        self.named += 1;
        format!("i{}", self.named)
    }

    fn make(&mut self, format: &'static str, parent: Option<usize>) {
        let name = self.name();
        let size = format!("{}M", self.rng.u64(2..5));
        let mut line = vec!["create", "-q", "-f", format];
        if let ("vhdx" | "vdi", None) = (format, parent) {
            line.extend(["-o", "block_size=1M"]);
        }
        let below = parent.map(|p| (self.node(p).name.clone(), self.node(p).format));
        if let Some((below, format)) = &below {
            line.extend(["-b", below, "-F", format]);
        }
        line.push(&name);
        let is_sized = parent.is_none() || format == "qcow2";
        if is_sized {
            line.push(&size);
        }
        self.ours(&line);
        let mut content = parent.map_or_else(Vec::new, |p| self.known(p).clone());
        if is_sized {
            let size: usize = size.trim_end_matches('M').parse().expect("a number");
            content.resize(size << 20, 0);
        }
        self.nodes.push(Some(Node {
            name,
            format,
            parent,
            content: Some(content),
        }));
    }

    fn known(&self, index: usize) -> &Vec<u8> {
        self.node(index).content.as_ref().expect("is known")
    }

    fn content(&mut self, index: usize) -> &mut Vec<u8> {
        let node = self.nodes[index].as_mut().expect("is there");
        node.content.as_mut().expect("is known")
    }

    fn write(&mut self, leaf: usize) {
        let size = self.known(leaf).len();
        let name = self.node(leaf).name.clone();
        let mut line = vec!["io".to_owned(), "-q".to_owned()];
        for _ in 0..3 {
            let at = self.rng.usize(0..size / 512) * 512;
            let len = (self.rng.usize(1..1200) * 512).min(size - at);
            let byte = self.rng.u8(0..5);
            let command = match byte {
                0 => format!("write -z {at} {len}"),
                byte => format!("write -P {byte} {at} {len}"),
            };
            line.extend(["-c".to_owned(), command]);
            self.content(leaf)[at..at + len].fill(byte);
        }
        line.push(name);
        let line: Vec<&str> = line.iter().map(String::as_str).collect();
        self.ours(&line);
    }

    fn fork(&mut self, leaf: usize) {
        let (new, second) = (self.name(), self.name());
        let (name, format) = (self.node(leaf).name.clone(), self.node(leaf).format);
        let both = self.rng.bool();
        let line = ["fork", "-q", &name, &new, &second];
        self.ours(&line[..if both { 5 } else { 4 }]);
        // Its file has the new name, and so is what lies below both.
        let content = self.node(leaf).content.clone();
        self.nodes[leaf].as_mut().expect("is there").name = new;
        let names = [name, second];
        for name in names.into_iter().take(if both { 2 } else { 1 }) {
            self.nodes.push(Some(Node {
                name,
                format,
                parent: Some(leaf),
                content: content.clone(),
            }));
        }
    }

    /// Takes `file`, and those between it and one below it, out of the chain.
    fn merge(&mut self, file: usize) {
        let below = self.chain(file);
        let children = self.children(file);
        if below.len() < 2 || children.is_empty() {
            return;
        }
        let depth = self.rng.usize(1..below.len());
        let (layers, base) = (&below[..depth], below[depth]);
        let removes = self.rng.bool();
        let name = |index: usize| self.node(index).name.clone();
        let mut line: Vec<String> = ["commit", "-q", "-b"].map(str::to_owned).into();
        line.push(name(base));
        for child in &children {
            line.extend(["--children".to_owned(), name(*child)]);
        }
        line.extend(removes.then(|| "--remove".to_owned()));
        line.push(name(file));
        let others = |index: &usize, own: Option<usize>| {
            self.children(*index).iter().any(|c| Some(*c) != own)
        };
        let hang = (1..=depth).any(|at| others(&below[at], Some(below[at - 1])));
        let is_unknown = below[..=depth]
            .iter()
            .any(|i| self.node(*i).content.is_none());
        let (size, base_size) = match is_unknown {
            true => return,
            false => (self.known(file).len(), self.known(base).len()),
        };
        let long = base_size > size && children.iter().any(|c| self.known(*c).len() > size);
        let fits = |child: &usize| {
            let format = self.node(*child).format;
            format == "qcow2" || format == self.node(base).format
        };
        let is_refused = hang || long || !children.iter().all(fits);
        let layers = layers.to_vec();
        let words: Vec<&str> = line.iter().map(String::as_str).collect();
        let (done, said) = self.run(&words);
        assert_eq!(done, !is_refused, "{said}: {:#?}", self.done);
        if !done {
            return;
        }
        let top = self.known(file).clone();
        let into = self.content(base);
        into.resize(base_size.max(size), 0);
        into[..size].copy_from_slice(&top);
        let into = into.clone();
        for child in children {
            self.nodes[child].as_mut().expect("is there").parent = Some(base);
        }
        let mut shortest = usize::MAX;
        for layer in layers.into_iter().rev() {
            let node = self.nodes[layer].as_mut().expect("is there");
            if removes {
                self.nodes[layer] = None;
                continue;
            }
            let own = node.content.as_ref().map_or(0, Vec::len);
            if own <= shortest {
                shortest = own;
                let mut now = into.clone();
                now.resize(own, 0);
                node.content = Some(now);
            } else if layer != file {
                node.content = None;
            }
        }
    }

    fn rebase(&mut self, leaf: usize) {
        let format = self.node(leaf).format;
        if self.node(leaf).parent.is_none() {
            return;
        }
        let targets: Vec<usize> = self
            .alive()
            .into_iter()
            .filter(|i| *i != leaf && self.node(*i).content.is_some())
            .filter(|i| format == "qcow2" || self.node(*i).format == format)
            .filter(|i| self.chain(*i).len() < DEEPEST)
            .collect();
        let Some(target) = self.pick(&targets) else {
            return;
        };
        let (name, below) = (self.node(leaf).name.clone(), self.node(target).name.clone());
        let below_format = self.node(target).format;
        let (done, _) = self.run(&["rebase", "-q", "-b", &below, "-F", below_format, &name]);
        if done {
            self.nodes[leaf].as_mut().expect("is there").parent = Some(target);
        }
    }

    fn resize(&mut self, leaf: usize) {
        let name = self.node(leaf).name.clone();
        let size = self.rng.u64(2..6) * MIB;
        let (done, _) = self.run(&["resize", "-q", "--shrink", &name, &size.to_string()]);
        if done {
            let size = usize::try_from(size).expect("is small");
            self.content(leaf).resize(size, 0);
        }
    }

    /// Merges a leaf into what lies below it and nothing else.
    fn commit(&mut self, leaf: usize) {
        let Some(parent) = self.node(leaf).parent else {
            return;
        };
        if self.children(parent).len() > 1 || self.node(parent).content.is_none() {
            return;
        }
        let name = self.node(leaf).name.clone();
        self.ours(&["commit", "-q", &name]);
        let top = self.known(leaf).clone();
        let into = self.content(parent);
        let size = into.len().max(top.len());
        into.resize(size, 0);
        into[..top.len()].copy_from_slice(&top);
    }

    fn step(&mut self) {
        let leaves = self.leaves();
        let alive = self.alive();
        let Some(leaf) = self.pick(&leaves) else {
            return;
        };
        match self.rng.u32(0..12) {
            0..3 => self.write(leaf),
            3..5 if alive.len() < MOST => {
                let known: Vec<usize> = alive
                    .into_iter()
                    .filter(|i| self.node(*i).content.is_some())
                    .filter(|i| self.chain(*i).len() < DEEPEST)
                    .collect();
                if let Some(parent) = self.pick(&known) {
                    let own = self.node(parent).format;
                    let format = if self.rng.u32(0..3) == 0 {
                        "qcow2"
                    } else {
                        own
                    };
                    self.make(format, Some(parent));
                    self.write(self.nodes.len() - 1);
                }
            }
            5..7 if alive.len() < MOST && self.chain(leaf).len() < DEEPEST => self.fork(leaf),
            7..10 => {
                if let Some(file) = self.pick(&alive) {
                    self.merge(file);
                }
            }
            10 => self.rebase(leaf),
            11 if self.rng.bool() => self.resize(leaf),
            _ => self.commit(leaf),
        }
    }

    fn verify(&mut self, index: usize) {
        let name = self.node(index).name.clone();
        let Some(content) = self.node(index).content.clone() else {
            return;
        };
        self.ours(&["convert", "-q", "-O", "raw", &name, "read.raw"]);
        let found = fs::read(self.dir().join("read.raw")).expect("reads");
        fs::remove_file(self.dir().join("read.raw")).expect("removes");
        assert_eq!(found.len(), content.len(), "{name}: {:#?}", self.done);
        let differs = (0..found.len()).find(|at| found[*at] != content[*at]);
        assert_eq!(differs, None, "{name}: {:#?}", self.done);
    }
}

#[test]
fn whatever_is_done_to_trees_of_images_all_others_read_as_before() {
    for format in ["qcow2", "vhd", "vdi", "vhdx", "vmdk"] {
        let mut trees = Trees {
            home: scratch(),
            nodes: Vec::new(),
            rng: Seeded::new(format),
            named: 0,
            done: Vec::new(),
        };
        trees.make(format, None);
        trees.write(0);
        for _ in 0..rounds(10) {
            trees.step();
            let alive = trees.alive();
            if let Some(one) = trees.pick(&alive) {
                trees.verify(one);
            }
        }
        for index in trees.alive() {
            trees.verify(index);
            if trees.children(index).is_empty() && trees.node(index).content.is_some() {
                let name = trees.node(index).name.clone();
                trees.ours(&["check", "-q", "--chain", &name]);
            }
        }
        trees.ours(&["chain", "."]);
    }
}
