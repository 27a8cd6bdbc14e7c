//! Random operations on every writable format against a byte vector.

use std::collections::VecDeque;
use std::ops::Range;

use vdtool::ErrorKind;
use vdtool::chain::{Chain, State};
use vdtool::image::check::Repair;
use vdtool::image::open::WriteOrder;
use vdtool::storage::Zeroing;
use vdtool::storage::open::Access;

use crate::layers::{Disk, LayerSpec, Place, filled, read_all};
use crate::util::{Seeded, assert_same, len, rounds};

/// Operations per format and shape; the issue asks for 10,000.
const OPERATIONS: usize = 10_000;

/// Those of a format whose smallest cluster is long.
const FEW: usize = OPERATIONS / 5;

/// Operations that change the disk, whatever their number, are followed by a full comparison
/// after this many.
const COMPARE_EVERY: usize = 250;

/// A disk, what it must read as, and what was done last.
struct Session {
    disk: Disk,
    chain: Option<Chain>,
    model: Vec<u8>,
    /// Unit of the format, to aim at its edges.
    cluster: u64,
    /// Virtual sizes are multiples of this.
    size_unit: u64,
    largest: u64,
    rng: Seeded,
    log: VecDeque<String>,
    done: usize,
}

impl Session {
    fn new(name: &str, place: Place, specs: &[LayerSpec]) -> Self {
        let mut rng = Seeded::new(name);
        let (disk, model) = filled(place, specs, &mut rng);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let cluster = chain.top().cluster_size().unwrap_or(4096).max(512);
        Self {
            largest: model.len() as u64 * 3 / 2,
            size_unit: match disk.driver().name {
                "raw" => 1,
                _ => chain.top().sector_size().unwrap_or(512),
            },
            disk,
            chain: Some(chain),
            model,
            cluster,
            rng,
            log: VecDeque::new(),
            done: 0,
        }
    }

    fn chain(&self) -> &Chain {
        self.chain.as_ref().expect("it is open")
    }

    fn note(&mut self, text: &str) {
        self.done += 1;
        if self.log.len() == 40 {
            self.log.pop_front();
        }
        self.log.push_back(format!("{}: {text}", self.done));
    }

    fn run(&mut self) {
        self.run_for(OPERATIONS);
    }

    fn run_for(&mut self, operations: usize) {
        while self.done < rounds(operations) {
            self.step();
            if self.done.is_multiple_of(COMPARE_EVERY) {
                self.compare_all();
            }
        }
        self.reopen();
        self.compare_all();
        self.check_at_the_end();
    }

    fn step(&mut self) {
        match self.rng.u32(0..100) {
            0..36 => self.write(),
            36..40 => self.compress(),
            40..60 => self.read(),
            60..70 => self.zero(Zeroing::MayUnmap),
            70..76 => self.zero(Zeroing::KeepSpace),
            76..86 => self.discard(),
            86..92 => self.flush(),
            92..96 => self.extents(),
            96..98 => self.resize(),
            _ => self.reopen(),
        }
    }

    /// A range of the disk: often at cluster edges, often where others have been.
    fn range(&mut self) -> Range<u64> {
        let size = self.model.len() as u64;
        let unit = match self.rng.u32(0..10) {
            0..2 => 1,
            2..5 => 512,
            5..7 => 4096,
            _ => self.cluster,
        };
        let longest = match self.rng.u32(0..10) {
            0..5 => 4096,
            5..9 => self.cluster.min(96 << 10) * 2,
            _ => self.cluster * 3,
        };
        let hot = if self.rng.bool() { size / 4 } else { size };
        let start = self.rng.u64(0..hot) / unit * unit;
        let length = self.rng.u64(1..=longest).next_multiple_of(unit);
        start..(start + length).min(size)
    }

    fn write(&mut self) {
        let range = self.range();
        let bytes = match self.rng.u32(0..8) {
            // Zeroes are data too, and drivers are tempted to treat them otherwise.
            0 => vec![0; len(range.end - range.start)],
            _ => self.rng.bytes(len(range.end - range.start)),
        };
        self.note(&format!("write {range:#x?}"));
        self.chain()
            .write_at(&bytes, range.start)
            .expect("the write is taken");
        self.model[bounds(&range)].copy_from_slice(&bytes);
    }

    /// Whole clusters that are not there yet are stored compressed; others are refused, and
    /// nothing is changed.
    fn compress(&mut self) {
        let size = self.model.len() as u64;
        let start = self.rng.u64(0..size) / self.cluster * self.cluster;
        let end = (start + self.rng.u64(1..4) * self.cluster).min(size);
        let mut bytes = vec![self.rng.u8(..); len(end - start)];
        for _ in 0..self.rng.usize(0..40) {
            // The more of this, the less it shrinks.
            let noise = self.rng.bytes((bytes.len() / 40).max(1));
            let at = self.rng.usize(0..=bytes.len() - noise.len());
            bytes[at..at + noise.len()].copy_from_slice(&noise);
        }
        self.note(&format!("write compressed {start:#x}..{end:#x}"));
        match self.chain().write_compressed(&bytes, start) {
            Ok(()) => self.model[bounds(&(start..end))].copy_from_slice(&bytes),
            Err(e) if self.disk.driver().name == "qcow2" => {
                assert_eq!(e.kind(), ErrorKind::Invalid, "{e}");
                assert!(e.message().contains("allocated"), "{e}");
            }
            Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}"),
        }
        let found = self.read_range(&(start..end));
        let expected = &self.model[bounds(&(start..end))];
        assert_same(&found, expected, start, "compressed");
    }

    fn read(&mut self) {
        let range = self.range();
        self.note(&format!("read {range:#x?}"));
        let found = self.read_range(&range);
        assert_same(&found, &self.model[bounds(&range)], range.start, "read");
    }

    fn read_range(&self, range: &Range<u64>) -> Vec<u8> {
        let mut found = vec![0xee; len(range.end - range.start)];
        self.chain()
            .read_at(&mut found, range.start)
            .expect("the read is taken");
        found
    }

    fn zero(&mut self, how: Zeroing) {
        let range = self.range();
        self.note(&format!("zero {how:?} {range:#x?}"));
        self.chain()
            .zero(range.clone(), how)
            .expect("the zero is taken");
        self.model[bounds(&range)].fill(0);
    }

    /// Each byte reads afterwards as zero or as before; the model follows.
    fn discard(&mut self) {
        let range = self.range();
        self.note(&format!("discard {range:#x?}"));
        self.chain()
            .discard(range.clone())
            .expect("the discard is taken");
        let found = self.read_range(&range);
        for (offset, (now, before)) in found.iter().zip(&self.model[bounds(&range)]).enumerate() {
            assert!(
                *now == 0 || now == before,
                "discard: the byte at {:#x} was {before:#04x} and is {now:#04x}",
                len(range.start) + offset
            );
        }
        self.model[bounds(&range)].copy_from_slice(&found);
    }

    fn flush(&mut self) {
        self.note("flush");
        self.chain().flush().expect("the flush is taken");
    }

    /// Extents cover the range without gap, and those that are called zero read as zeroes.
    fn extents(&mut self) {
        let range = self.range();
        self.note(&format!("extents {range:#x?}"));
        let mut at = range.start;
        for extent in self.chain().extents(range.clone()).expect("inside") {
            let extent = extent.expect("maps");
            assert_eq!(extent.start, at, "extents follow each other");
            assert!(extent.len > 0 && extent.end() <= range.end);
            if matches!(extent.state, State::Zero | State::Hole) {
                let bytes = &self.model[bounds(&(extent.start..extent.end()))];
                assert!(bytes.iter().all(|b| *b == 0), "{extent:?} holds data");
            }
            at = extent.end();
        }
        assert_eq!(at, range.end, "extents reach the end");
    }

    fn resize(&mut self) {
        let old = self.model.len() as u64;
        let new = self.rng.u64(self.largest / 2..=self.largest);
        let new = new / self.size_unit * self.size_unit;
        self.note(&format!("resize {old:#x} to {new:#x}"));
        match self.chain().resize(new) {
            Ok(()) => self.model.resize(len(new), 0),
            Err(e) => {
                let refused = matches!(e.kind(), ErrorKind::Unsupported | ErrorKind::OutOfRange);
                assert!(refused && new < old, "resize: {e}");
            }
        }
        assert_eq!(self.chain().virtual_size(), self.model.len() as u64);
        if new > old && self.model.len() as u64 == new {
            let found = self.read_range(&(old..new));
            assert_same(&found, &self.model[len(old)..], old, "new bytes");
        }
    }

    /// Opens again, after a clean close or after none, as a kill leaves it.
    fn reopen(&mut self) {
        let clean = self.rng.bool();
        self.note(&format!("reopen, clean: {clean}"));
        let chain = self.chain.take().expect("it is open");
        if clean {
            chain.close().expect("closes");
        }
        drop(chain);
        if let Some(report) = self.disk.check(Repair::Nothing) {
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
        }
        if self.rng.u32(0..4) == 0 {
            self.look_only();
        }
        self.chain = Some(self.disk.open(Access::Write, WriteOrder::Ordered));
    }

    fn look_only(&self) {
        let chain = self.disk.open(Access::Read, WriteOrder::Ordered);
        assert_same(&read_all(&chain), &self.model, 0, "opened for reading");
        let error = chain.write_at(&[1], 0).expect_err("not open for writing");
        assert_eq!(error.kind(), ErrorKind::ReadOnly);
    }

    fn compare_all(&self) {
        let found = read_all(self.chain());
        assert_same(&found, &self.model, 0, "the whole disk");
    }

    /// Repairs leaks and finds the same content and no more to repair.
    fn check_at_the_end(&mut self) {
        let chain = self.chain.take().expect("it is open");
        chain.close().expect("closes");
        drop(chain);
        if let Some(report) = self.disk.check(Repair::Leaks) {
            assert_eq!(report.corruptions, 0, "{:?}", report.findings);
            let again = self.disk.check(Repair::Nothing).expect("it has a check");
            assert_eq!(again.leaks, 0, "{:?}", again.findings);
        }
        self.chain = Some(self.disk.open(Access::Read, WriteOrder::Ordered));
        self.compare_all();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the last operations:");
            self.log.iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}

fn bounds(range: &Range<u64>) -> Range<usize> {
    len(range.start)..len(range.end)
}

const RAW: LayerSpec = LayerSpec {
    format: "raw",
    options: "",
    size: 1_500_001,
};

fn vhd(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhd",
        options,
        size,
    }
}

#[test]
fn a_raw_image_agrees_with_a_byte_vector() {
    Session::new("raw", Place::Memory, &[RAW]).run();
}

#[test]
fn a_raw_file_agrees_with_a_byte_vector() {
    Session::new("raw file", Place::Files, &[RAW]).run();
}

#[test]
fn a_fixed_vhd_agrees_with_a_byte_vector() {
    let specs = [vhd("subformat=fixed", 1_000 * 512)];
    Session::new("fixed", Place::Memory, &specs).run();
    Session::new("fixed file", Place::Files, &specs).run();
}

#[test]
fn a_dynamic_vhd_with_the_smallest_blocks_agrees_with_a_byte_vector() {
    let specs = [vhd("block_size=4k", 400 * 1024 + 512)];
    Session::new("4k", Place::Memory, &specs).run();
}

#[test]
fn a_dynamic_vhd_with_small_blocks_agrees_with_a_byte_vector() {
    let specs = [vhd("block_size=64k", (1 << 20) + 1536)];
    Session::new("64k", Place::Memory, &specs).run();
    Session::new("64k file", Place::Files, &specs).run();
}

#[test]
fn a_dynamic_vhd_with_the_usual_blocks_agrees_with_a_byte_vector() {
    let specs = [vhd("", (9 << 20) + 512)];
    Session::new("2m", Place::Memory, &specs).run();
}

#[test]
fn a_vhd_on_a_device_agrees_with_a_byte_vector() {
    let specs = [vhd("block_size=64k", (1 << 20) + 1536)];
    Session::new("64k device", Place::Device(2 << 20), &specs).run();
    let specs = [vhd("subformat=fixed", 1_000 * 512)];
    Session::new("fixed device", Place::Device(2 << 20), &specs).run();
    let specs = [
        vhd("block_size=16k", 300 * 512),
        vhd("block_size=4k", 300 * 512),
    ];
    Session::new("child on a device", Place::Device(2 << 20), &specs).run();
}

#[test]
fn a_differencing_vhd_over_raw_agrees_with_a_byte_vector() {
    let specs = [vhd("block_size=16k", 1 << 20), RAW];
    Session::new("over raw", Place::Memory, &specs).run();
    Session::new("over raw, files", Place::Files, &specs).run();
}

#[test]
fn a_differencing_vhd_with_the_smallest_blocks_agrees_with_a_byte_vector() {
    let specs = [
        vhd("block_size=4k", 300 * 512),
        vhd("block_size=16k", 300 * 512),
    ];
    Session::new("4k over 16k", Place::Memory, &specs).run();
}

#[test]
fn a_differencing_vhd_longer_than_its_parent_agrees_with_a_byte_vector() {
    let specs = [
        vhd("block_size=64k", 1 << 20),
        vhd("subformat=fixed", 700 * 512),
    ];
    Session::new("longer", Place::Memory, &specs).run();
}

#[test]
fn a_chain_of_two_differencing_vhds_over_a_dynamic_one_agrees_with_a_byte_vector() {
    let specs = [
        vhd("block_size=64k", 3 << 19),
        vhd("block_size=16k", 1 << 20),
        vhd("block_size=2M", 5 << 19),
    ];
    Session::new("three layers", Place::Memory, &specs).run();
    Session::new("three layers in files", Place::Files, &specs).run();
}

#[test]
fn a_chain_of_two_differencing_vhds_over_raw_agrees_with_a_byte_vector() {
    let specs = [vhd("", 5 << 20), vhd("block_size=32k", 3 << 20), RAW];
    Session::new("three layers over raw", Place::Memory, &specs).run();
}

fn vdi(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vdi",
        options,
        size,
    }
}

#[test]
fn a_vdi_agrees_with_a_byte_vector() {
    for options in [
        "block_size=4k",
        "block_size=64k",
        "subformat=fixed,block_size=16k",
    ] {
        let specs = [vdi(options, (1 << 20) + 1536)];
        Session::new(options, Place::Memory, &specs).run();
    }
    Session::new("vdi file", Place::Files, &[vdi("", (5 << 20) + 512)]).run();
    let specs = [vdi("block_size=16k", (1 << 20) + 1536)];
    Session::new("vdi device", Place::Device(4 << 20), &specs).run();
}

#[test]
fn a_differencing_vdi_agrees_with_a_byte_vector() {
    let specs = [
        vdi("block_size=16k", 1 << 20),
        vdi("block_size=4k", 900 * 512),
    ];
    Session::new("vdi over vdi", Place::Memory, &specs).run();
    // The parent goes on behind the end of the child.
    let specs = [
        vdi("block_size=16k", 1 << 20),
        vdi("block_size=4k", 3 << 20),
    ];
    Session::new("vdi over a longer one", Place::Memory, &specs).run();
}

fn vmdk(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vmdk",
        options,
        size,
    }
}

#[test]
fn a_vmdk_agrees_with_a_byte_vector() {
    for options in [
        "grain_size=4k",
        "grain_size=64k",
        "grain_size=16k,zeroed_grain=on",
    ] {
        Session::new(options, Place::Memory, &[vmdk(options, 1 << 20)]).run();
    }
    Session::new("vmdk file", Place::Files, &[vmdk("", 5 << 20)]).run();
    for options in [
        "subformat=twoGbMaxExtentSparse,grain_size=16k",
        "subformat=twoGbMaxExtentFlat",
        "subformat=vmfs",
    ] {
        Session::new(options, Place::Files, &[vmdk(options, 3 << 20)]).run();
    }
}

#[test]
fn a_vmdk_over_another_agrees_with_a_byte_vector() {
    for child in [
        "grain_size=16k,zeroed_grain=on",
        "grain_size=4k,zeroed_grain=on",
    ] {
        let specs = [vmdk(child, 1 << 20), vmdk("grain_size=8k", 464 << 10)];
        Session::new(child, Place::Memory, &specs).run();
        // The parent goes on behind the end of the child.
        let specs = [vmdk(child, 1 << 20), vmdk("grain_size=8k", 3 << 20)];
        Session::new("vmdk over a longer one", Place::Memory, &specs).run();
    }
}

fn vhdx(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhdx",
        options,
        size,
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_vhdx_agrees_with_a_byte_vector() {
    for options in [
        "block_size=1M",
        "block_size=1M,logical_sector_size=4096",
        "block_size=1M,subformat=fixed",
    ] {
        let specs = [vhdx(options, MIB + 8192)];
        Session::new(options, Place::Memory, &specs).run_for(FEW);
    }
    Session::new("vhdx file", Place::Files, &[vhdx("", 2 * MIB + 512)]).run_for(FEW);
    let specs = [vhdx("block_size=1M", MIB + 1536)];
    Session::new("vhdx device", Place::Device(24 << 20), &specs).run_for(FEW);
}

#[test]
fn a_differencing_vhdx_agrees_with_a_byte_vector() {
    let specs = [
        vhdx("block_size=2M", 2 * MIB + 4096),
        vhdx("block_size=1M", MIB + 1536),
    ];
    Session::new("vhdx over vhdx", Place::Memory, &specs).run_for(FEW);
    // The parent goes on behind the end of the child.
    let specs = [
        vhdx("block_size=1M", MIB + 512),
        vhdx("block_size=2M", 3 * MIB),
    ];
    Session::new("vhdx over a longer one", Place::Memory, &specs).run_for(FEW);
}

fn qcow2(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "qcow2",
        options,
        size,
    }
}

#[test]
fn a_qcow2_with_the_smallest_clusters_agrees_with_a_byte_vector() {
    let specs = [qcow2("cluster_size=512", 300 * 1024 + 512)];
    Session::new("qcow2 512", Place::Memory, &specs).run();
    let specs = [qcow2("cluster_size=512,refcount_bits=64", 100 * 1024)];
    Session::new("qcow2 512, 64 bits", Place::Memory, &specs).run();
}

#[test]
fn a_qcow2_with_small_clusters_agrees_with_a_byte_vector() {
    let specs = [qcow2("cluster_size=4k,refcount_bits=1", (1 << 20) + 1536)];
    Session::new("qcow2 4k", Place::Memory, &specs).run();
    Session::new("qcow2 4k file", Place::Files, &specs).run();
}

#[test]
fn a_qcow2_with_the_usual_clusters_agrees_with_a_byte_vector() {
    let specs = [qcow2("", (3 << 20) + 512)];
    Session::new("qcow2 64k", Place::Memory, &specs).run();
    Session::new("qcow2 64k file", Place::Files, &specs).run();
}

#[test]
fn a_qcow2_of_version_2_agrees_with_a_byte_vector() {
    let specs = [qcow2("compat=0.10,cluster_size=8k", 1 << 20)];
    Session::new("qcow2 v2", Place::Memory, &specs).run();
    let specs = [qcow2("compat=0.10,cluster_size=4k", 1 << 20), RAW];
    Session::new("qcow2 v2 over raw", Place::Memory, &specs).run();
}

#[test]
fn a_qcow2_with_subclusters_agrees_with_a_byte_vector() {
    let specs = [qcow2("extended_l2=on,cluster_size=16k", (1 << 20) + 512)];
    Session::new("qcow2 extended 16k", Place::Memory, &specs).run();
    let specs = [qcow2("extended_l2=on,cluster_size=64k", 2 << 20), RAW];
    Session::new("qcow2 extended over raw", Place::Memory, &specs).run();
}

#[test]
fn a_qcow2_over_other_images_agrees_with_a_byte_vector() {
    let specs = [qcow2("cluster_size=4k", 1 << 20), RAW];
    Session::new("qcow2 over raw", Place::Memory, &specs).run();
    let specs = [
        qcow2("cluster_size=4k", 1 << 20),
        qcow2("cluster_size=64k", 900 << 10),
    ];
    Session::new("qcow2 over qcow2", Place::Memory, &specs).run();
    let specs = [
        qcow2("cluster_size=512", 300 << 10),
        vhd("block_size=16k", 1 << 20),
    ];
    Session::new("qcow2 over vhd", Place::Memory, &specs).run();
}
