//! Dirty bitmaps that record while clients look at them.

use std::path::Path;
use std::sync::Arc;

use vdtool::backend::Backend;
use vdtool::chain::open::ChainOptions;
use vdtool::nbd::wire::{Headers, command, flag, option};

use super::requests::{extents, write};
use super::wire::Raw;
use super::{Options, Serving, export, lasting};
use crate::util::{Seeded, peer, requires, scratch, vdtool};

/// Bytes that one bit of the bitmap stands for.
const GRAIN: usize = 512;
const CONTEXT: &str = "qemu:dirty-bitmap:b0";

fn tool(dir: &Path, arguments: &str) {
    let arguments = arguments.split(' ');
    vdtool().current_dir(dir).args(arguments).assert().success();
}

fn serving(dir: tempfile::TempDir) -> (Serving, Arc<Backend>) {
    let image = dir.path().join("disk.qcow2");
    let options = Options {
        bitmaps: vec!["b0".to_owned()],
        ..lasting()
    };
    let export = export("", &image, &ChainOptions::write());
    let backend = Arc::clone(&export.backend);
    (Serving::new(dir, vec![export], options), backend)
}

/// Which grains the server calls dirty.
fn told(raw: &mut Raw, grains: usize) -> Vec<bool> {
    let mut found = Vec::new();
    while found.len() < grains {
        let at = (found.len() * GRAIN) as u64;
        let len = (grains * GRAIN) as u64 - at;
        let reply = raw.call(command::BLOCK_STATUS, 0, at, len);
        assert_eq!(reply.errno, 0);
        let (_, runs) = extents(&reply.extents[0], raw.headers);
        for (len, dirty) in runs {
            let len = crate::util::len(len);
            assert!(len.is_multiple_of(GRAIN));
            found.extend(std::iter::repeat_n(dirty == 1, len / GRAIN));
        }
    }
    found
}

/// What a bitmap may say: zeroes over zeroes change nothing, and need not be noted.
struct Model {
    must: Vec<bool>,
    may: Vec<bool>,
}

impl Model {
    fn check(&self, raw: &mut Raw) {
        let found = told(raw, self.must.len());
        assert_eq!(found.len(), self.must.len());
        let mut grains = found.iter().zip(self.must.iter().zip(&self.may));
        let wrong = grains.position(|(is, (must, may))| (*must && !is) || (*is && !may));
        assert_eq!(wrong, None, "the first grain that is wrong");
    }
}

#[test]
fn a_bitmap_that_records_shows_what_was_written_up_to_now() {
    let mut random = Seeded::new("live bitmap");
    // So large that the bitmap has several clusters, and each of them several pages.
    let size: usize = 96 << 20;
    let dir = scratch();
    tool(
        dir.path(),
        "create -q -f qcow2 -o cluster_size=4k disk.qcow2 96M",
    );
    tool(dir.path(), "bitmap --add -g 512 disk.qcow2 b0");
    let mut model = Model {
        must: vec![false; size / GRAIN],
        may: vec![false; size / GRAIN],
    };
    let mut dir = Some(dir);
    for headers in [Headers::Structured, Headers::Extended] {
        // The second time round the file has some of the bits.
        let (serving, backend) = serving(dir.take().expect("is there"));
        let mut raw = Raw::connect(&serving.socket);
        raw.raise(headers);
        raw.contexts(option::SET_META_CONTEXT, "", &[CONTEXT]);
        raw.go("");
        model.check(&mut raw);
        for round in 0..120 {
            let longest = if random.bool() { 3 << 20 } else { 3000 };
            let start = random.usize(0..size);
            let len = random.usize(1..longest).min(size - start);
            let at = start as u64;
            let grains = start / GRAIN..(start + len).div_ceil(GRAIN);
            model.may[grains.clone()].fill(true);
            let errno = match random.u8(0..3) {
                0 => {
                    model.must[grains].fill(true);
                    write(&mut raw, 0, at, &random.bytes(len))
                }
                1 => {
                    let reply = raw.call(command::WRITE_ZEROES, flag::NO_HOLE, at, len as u64);
                    reply.errno
                }
                _ => raw.call(command::WRITE_ZEROES, 0, at, len as u64).errno,
            };
            assert_eq!(errno, 0);
            if round % 10 == 0 {
                model.check(&mut raw);
            }
        }
        assert_eq!(raw.call(command::FLUSH, 0, 0, 0).errno, 0);
        model.check(&mut raw);
        drop(raw);
        let Serving {
            server, dir: kept, ..
        } = serving;
        server.stop();
        server.wait().expect("ends well");
        backend.chain().close().expect("leaves the image clean");
        drop((server, backend));
        dir = Some(kept);
    }
}

#[test]
fn qemu_img_and_nbdinfo_see_a_write_in_a_bitmap_at_once() {
    if !requires("qemu-img") || !requires("qemu-io") || !requires("nbdinfo") {
        return;
    }
    let dir = scratch();
    tool(dir.path(), "create -q -f qcow2 disk.qcow2 4M");
    tool(dir.path(), "bitmap --add disk.qcow2 b0");
    let (serving, _) = serving(dir);
    let (dir, uri) = (serving.dir.path(), serving.uri(""));
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap={CONTEXT}",
        serving.socket.display()
    );
    let theirs = || {
        let map = ["map", "--output=json", "--image-opts", &*options];
        let text = peer("qemu-img", dir, map);
        let map: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
        let rows = map.as_array().expect("a list").iter();
        // What is dirty is told as if it had no data.
        let dirty = rows.filter(|r| r["data"] == false);
        let number = |v: &serde_json::Value| v.as_u64().expect("a number");
        let dirty = dirty.map(|r| (number(&r["start"]), number(&r["length"])));
        dirty.collect::<Vec<_>>()
    };
    let info = || {
        let map = format!("--map={CONTEXT}");
        let text = peer("nbdinfo", dir, ["--json", &map, &*uri]);
        let map: serde_json::Value = serde_json::from_str(&text).expect("is JSON");
        let rows = map.as_array().expect("a list").iter();
        let dirty = rows.filter(|r| r["type"] == 1);
        let number = |v: &serde_json::Value| v.as_u64().expect("a number");
        let dirty = dirty.map(|r| (number(&r["offset"]), number(&r["length"])));
        dirty.collect::<Vec<_>>()
    };
    assert_eq!((theirs(), info()), (vec![], vec![]));
    let mut expected = Vec::new();
    for (write, range) in [
        ("write -P 1 1M 128k", (1 << 20, 128 << 10)),
        ("write -P 2 3M 100", (3 << 20, 64 << 10)),
    ] {
        peer("qemu-io", dir, ["-f", "raw", "-c", write, &*uri]);
        expected.push(range);
        assert_eq!(theirs(), expected);
        assert_eq!(info(), expected);
    }
}
