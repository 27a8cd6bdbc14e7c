//! What kills, power cuts and full disks leave of a session.
//!
//! A kill leaves every change made so far, in order: nothing acknowledged may be missing.  A power
//! cut leaves what was there at the last sync and, of the changes after it, any, in whole or in
//! sectors: nothing flushed may be missing.  Either way the image opens and checks without
//! corruption, and can be written again.

use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use vdtool::ErrorKind;
use vdtool::chain::{Base, Chain};
use vdtool::copy::compact;
use vdtool::image::check::Repair;
use vdtool::image::compress::{Existing, Form, Unit};
use vdtool::image::open::{OpenOptions, WriteOrder};
use vdtool::image::snapshot::Pick;
use vdtool::image::{Source, Wait};
use vdtool::storage::memory::{Change, Fault, MemoryStorage, Op};
use vdtool::storage::open::Access;
use vdtool::storage::{Storage, Zeroing};
use vdtool::util::progress::Silent;

use crate::layers::{Disk, LayerSpec, Place, check, filled, read_all};
use crate::moving::allocated;
use crate::util::{Seeded, len, rounds, up_to};

const SECTOR: u64 = 512;
const STEPS: usize = 70;

/// The disk after an acknowledged operation.
#[derive(Debug)]
struct Step {
    /// What was done.
    what: String,
    /// Changes recorded when it was acknowledged.
    changes: usize,
    /// What the disk reads as.
    model: Vec<u8>,
    /// It was a flush, so what it holds survives a power cut.
    flushed: bool,
}

/// What a session is told to do.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    Write(Range<u64>),
    Zero(Range<u64>),
    Discard(Range<u64>),
    /// Stores whole clusters compressed.
    Pack(Range<u64>),
    /// Stores whole clusters in one go, whatever is there.
    Place(Range<u64>),
    /// Has space assigned to ranges that will be written.
    Assign(Range<u64>),
    Resize(u64),
    Flush,
    Close,
    /// Frees what reads as zeroes and packs the file.
    Compact,
    /// Drops all that the top layer has, which is below it too.
    Empty,
}

impl Act {
    /// Does it to the disk and to its model.
    fn carry_out(
        &self,
        chain: &mut Chain,
        model: &mut Vec<u8>,
        rng: &mut Seeded,
    ) -> vdtool::Result<()> {
        let part = |range: &Range<u64>| len(range.start)..len(range.end);
        match self {
            Self::Write(range) => {
                let bytes = rng.bytes(part(range).len());
                model[part(range)].copy_from_slice(&bytes);
                chain.write_at(&bytes, range.start)
            }
            Self::Zero(range) => {
                model[part(range)].fill(0);
                chain.zero(range.clone(), Zeroing::MayUnmap)
            }
            Self::Discard(range) => {
                chain.discard(range.clone())?;
                chain.read_at(&mut model[part(range)], range.start)
            }
            Self::Pack(range) => {
                let mut bytes = rng.bytes(part(range).len());
                bytes.chunks_mut(100).for_each(|c| c[10..].fill(0));
                model[part(range)].copy_from_slice(&bytes);
                chain.write_compressed(&bytes, range.start)
            }
            Self::Place(range) => {
                let bytes = rng.bytes(part(range).len());
                model[part(range)].copy_from_slice(&bytes);
                let size = chain.top().cluster_size().expect("has clusters");
                let starts = (range.start..range.end).step_by(len(size));
                let units: Vec<Unit> = starts
                    .map(|at| Unit {
                        at,
                        form: Form::Plain,
                    })
                    .collect();
                let compress = chain.top().as_compress()?;
                compress.place(&units, Existing::Replace)?.store(&bytes)
            }
            Self::Assign(range) => {
                let layout = chain.top().as_layout().expect("has one");
                layout.assign(std::slice::from_ref(range))
            }
            Self::Resize(size) => {
                model.resize(len(*size), 0);
                chain.resize(*size)
            }
            Self::Flush => chain.flush(),
            Self::Close => chain.close(),
            Self::Compact => {
                let how = compact::Options {
                    scan: true,
                    dry_run: false,
                };
                chain.close()?;
                compact::compact(chain.top(), how, &Silent).map(drop)
            }
            Self::Empty => {
                chain.top().keep_state();
                let empty = chain.top_mut().as_empty().expect("can be emptied");
                empty.empty()
            }
        }
    }
}

/// What a session may do besides reading, writing, zeroing, discarding and flushing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Also {
    Nothing,
    Resizing,
    /// Compressed writes of clusters of 4 KiB.
    Compressing,
    /// Writes over what a snapshot shares, what is compressed and what is below.
    Moving,
}

/// A recorded session.
pub(crate) struct Session {
    disk: Disk,
    /// The top layer before the session.
    base: Vec<u8>,
    changes: Vec<Change>,
    steps: Vec<Step>,
    /// What the snapshot of the top layer reads as, where it has one.
    kept: Option<Vec<u8>>,
    rng: Seeded,
}

impl Session {
    fn record(name: &str, place: Place, specs: &[LayerSpec], also: Also) -> Self {
        let mut rng = Seeded::new(name);
        let (disk, mut model) = filled(place, specs, &mut rng);
        let kept = (also == Also::Moving).then(|| {
            keep(&disk, &mut model, &mut rng);
            model.clone()
        });
        let top = Arc::clone(&disk.memory()[0]);
        let base = top.to_bytes();
        top.record();
        let first = Step {
            what: "created".to_owned(),
            changes: 0,
            model,
            flushed: true,
        };
        let mut steps = vec![first];
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        while steps.len() < up_to(STEPS) {
            let mut model = steps[steps.len() - 1].model.clone();
            if rng.u32(0..20) == 0 {
                chain.close().expect("closes");
                chain = disk.open(Access::Write, WriteOrder::Ordered);
            }
            let what = operate(&chain, &mut model, &mut rng, also).expect("is taken");
            steps.push(Step {
                flushed: what == "flush",
                what,
                changes: top.changes().len(),
                model,
            });
        }
        chain.close().expect("closes");
        Self {
            changes: top.changes(),
            disk,
            base,
            steps,
            kept,
            rng,
        }
    }

    /// A session of what it is told to do, on a disk that is there.
    pub(crate) fn of(name: &str, disk: Disk, kept: Option<Vec<u8>>, acts: &[Act]) -> Self {
        let mut rng = Seeded::new(name);
        let top = Arc::clone(&disk.memory()[0]);
        let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
        let base = top.to_bytes();
        top.record();
        let mut steps = vec![Step {
            what: "made".to_owned(),
            changes: 0,
            model: read_all(&chain),
            flushed: true,
        }];
        for act in acts {
            let mut model = steps[steps.len() - 1].model.clone();
            let done = act.carry_out(&mut chain, &mut model, &mut rng);
            done.unwrap_or_else(|e| panic!("{name}: {act:x?}: {e}"));
            steps.push(Step {
                what: format!("{act:x?}"),
                changes: top.changes().len(),
                model,
                flushed: matches!(act, Act::Flush | Act::Close),
            });
        }
        chain.close().expect("closes");
        Self {
            changes: top.changes(),
            disk,
            base,
            steps,
            kept,
            rng,
        }
    }

    /// The top layer with these bytes.
    fn storage(&self, bytes: &[u8]) -> MemoryStorage {
        let storage = MemoryStorage::from_bytes(bytes);
        match self.disk.memory()[0].has_fixed_len() {
            true => storage.with_fixed_len(),
            false => storage,
        }
    }

    /// The last step acknowledged when `made` changes had been made, and the last flush.
    fn acknowledged(&self, made: usize) -> (usize, usize) {
        let last = self.steps.partition_point(|s| s.changes <= made) - 1;
        let flush = (0..=last).rev().find(|i| self.steps[*i].flushed);
        (last, flush.unwrap_or(0))
    }

    pub(crate) fn every_kill(&mut self) {
        let now = Arc::new(self.storage(&self.base));
        for made in 0..=self.changes.len() {
            if made > 0 {
                now.apply(&self.changes[made - 1]);
            }
            let (last, _) = self.acknowledged(made);
            self.verify(&now, last..last + 2, &|| format!("killed after {made}"));
        }
    }

    /// Of the changes since each sync, none, all but one, only one, and some, whole and torn.
    pub(crate) fn power_cuts(&mut self) {
        let now = self.storage(&self.base);
        let mut synced = 0;
        for made in 0..=self.changes.len() {
            if made < self.changes.len() && self.changes[made] != Change::Sync {
                continue;
            }
            let (last, flush) = self.acknowledged(made);
            let stable = now.to_bytes();
            for (kept, how) in self.choices(synced..made) {
                let state = Arc::new(self.storage(&stable));
                kept.iter().for_each(|change| state.apply(change));
                let what = || format!("power cut at {made}, synced at {synced}, {how}");
                self.verify(&state, flush..last + 2, &what);
            }
            for change in &self.changes[synced..made] {
                now.apply(change);
            }
            synced = (made + 1).min(self.changes.len());
        }
    }

    /// What of the changes in `pending` may have reached the disk.
    fn choices(&mut self, pending: Range<usize>) -> Vec<(Vec<Change>, String)> {
        let all: Vec<Change> = self.changes[pending].to_vec();
        let mut choices = vec![(Vec::new(), "nothing kept".to_owned())];
        let some = |keep: &mut dyn FnMut(usize) -> bool| -> Vec<Change> {
            let kept = (0..all.len()).filter(|i| keep(*i));
            kept.map(|i| all[i].clone()).collect()
        };
        for one in 0..all.len().min(24) {
            choices.push((some(&mut |i| i != one), format!("without {one}")));
            choices.push((some(&mut |i| i == one), format!("only {one}")));
        }
        for round in 0..if all.len() > 1 { 4 } else { 0 } {
            let rng = &mut self.rng;
            choices.push((some(&mut |_| rng.bool()), format!("subset {round}")));
        }
        for round in 0..if all.is_empty() { 0 } else { 3 } {
            let rng = &mut self.rng;
            let kept = some(&mut |_| rng.u32(0..4) != 0);
            let torn = kept.iter().flat_map(|c| tear(c, rng)).collect();
            choices.push((torn, format!("torn {round}")));
        }
        choices
    }

    /// The image opens, checks without corruption, and every byte is as one of `steps` left it.
    fn verify(
        &mut self,
        state: &Arc<MemoryStorage>,
        steps: Range<usize>,
        what: &dyn Fn() -> String,
    ) {
        let steps = steps.start..steps.end.min(self.steps.len());
        let in_words = || {
            let names: Vec<&str> = self.steps[steps.clone()].iter().map(|s| &*s.what).collect();
            format!("{} (between {})", what(), names.join("; "))
        };
        let chain = self.open_on(state, Access::Read);
        let chain = chain.unwrap_or_else(|e| panic!("{}: does not open: {e}", in_words()));
        let found = read_all(&chain);
        if let Err(e) = explained(&found, &self.steps[steps.clone()]) {
            panic!("{}: {e}", in_words());
        }
        drop(chain);
        self.check_clean(state, &in_words);
        if let Some(kept) = &self.kept {
            let found = self.read_kept(state);
            assert!(found == *kept, "{}: the snapshot changed", in_words());
        }
        if self.rng.u32(0..16) == 0 {
            let copy = Arc::new(self.storage(&state.to_bytes()));
            let seed = self.rng.u64(..);
            self.write_again(&copy, found, seed, &in_words);
        }
    }

    /// What the snapshot reads as, above the layers below.
    fn read_kept(&self, state: &Arc<MemoryStorage>) -> Vec<u8> {
        let options = OpenOptions {
            snapshot: Some(Pick::Any("kept".into())),
            ..OpenOptions::default()
        };
        let top: Arc<dyn Storage> = state.clone();
        let mut layers = vec![(self.disk.driver().open)(top, &options).expect("opens")];
        let below = self.disk.memory().into_iter().skip(1);
        let driver = vdtool::formats::by_name("raw").expect("a known format");
        for storage in below {
            layers.push((driver.open)(storage, &OpenOptions::default()).expect("opens"));
        }
        let chain = Chain::new(layers, Base::Zeroes, options.grace).expect("has layers");
        read_all(&chain)
    }

    fn open_on(&self, state: &Arc<MemoryStorage>, access: Access) -> vdtool::Result<Chain> {
        let mut storages: Vec<Arc<dyn Storage>> = vec![state.clone()];
        let below = self.disk.memory().into_iter().skip(1);
        storages.extend(below.map(|s| s as Arc<dyn Storage>));
        self.disk
            .try_open_with(storages, access, WriteOrder::Ordered)
    }

    fn check_clean(&self, state: &Arc<MemoryStorage>, what: &dyn Fn() -> String) {
        if let Some(report) = check(self.disk.driver(), state.clone(), Repair::Nothing) {
            let bad = report.corruptions + report.check_errors;
            assert_eq!(bad, 0, "{}: {:#?}", what(), report.findings);
        }
    }

    /// What a crash left can be repaired and used like any other image.
    fn write_again(
        &self,
        state: &Arc<MemoryStorage>,
        mut model: Vec<u8>,
        seed: u64,
        what: &dyn Fn() -> String,
    ) {
        let mut rng = Seeded::new(&format!("again {seed}"));
        if rng.bool() {
            check(self.disk.driver(), state.clone(), Repair::All);
        }
        let chain = self.open_on(state, Access::Write).expect("opens again");
        for _ in 0..6 {
            operate(&chain, &mut model, &mut rng, Also::Nothing).expect("is taken");
        }
        chain.close().expect("closes");
        drop(chain);
        self.check_clean(state, what);
        let chain = self.open_on(state, Access::Read).expect("opens again");
        let same = read_all(&chain) == model;
        assert!(same, "{}: written again, it reads otherwise", what());
    }
}

/// Fills a qcow2 in places, plain and compressed, and keeps that as a snapshot.
fn keep(disk: &Disk, model: &mut [u8], rng: &mut Seeded) {
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    let unit = len(chain.top().cluster_size().expect("has clusters"));
    for round in 0..12 {
        let at = rng.usize(..model.len() / unit) * unit;
        let end = model.len().min(at + rng.usize(1..6) * unit);
        let bytes = match round % 3 {
            0 => vec![rng.u8(..); end - at],
            _ => rng.bytes(end - at),
        };
        let done = match round % 3 {
            0 => chain.write_compressed(&bytes, at as u64),
            _ => chain.write_at(&bytes, at as u64),
        };
        match done {
            // What is there already is not compressed.
            Err(e) => assert_eq!(e.kind(), ErrorKind::Invalid),
            Ok(()) => model[at..end].copy_from_slice(&bytes),
        }
    }
    let snapshots = chain.top_mut().as_snapshots().expect("has some");
    snapshots
        .create("kept".as_ref(), SystemTime::UNIX_EPOCH)
        .expect("has room");
    chain.close().expect("closes");
}

/// One random operation on the disk and on its model; what it was.
fn operate(
    chain: &Chain,
    model: &mut Vec<u8>,
    rng: &mut Seeded,
    also: Also,
) -> vdtool::Result<String> {
    let size = model.len() as u64;
    let unit = [1, SECTOR, SECTOR, 4096][rng.usize(0..4)];
    let start = rng.u64(0..size) / unit * unit;
    let longest = [600, 5000, 20_000][rng.usize(0..3)];
    let length = rng.u64(1..=longest);
    let range = start..(start + length.next_multiple_of(unit)).min(size);
    let part = len(range.start)..len(range.end);
    match rng.u32(0..20) {
        0..10 => {
            let bytes = rng.bytes(part.len());
            model[part].copy_from_slice(&bytes);
            chain.write_at(&bytes, range.start)?;
            Ok(format!("write {range:#x?}"))
        }
        10..13 => {
            model[part].fill(0);
            chain.zero(range.clone(), Zeroing::MayUnmap)?;
            Ok(format!("zero {range:#x?}"))
        }
        13..15 => {
            let done = chain.discard(range.clone());
            if done.is_err() {
                // Then any part of it may read as zeroes.
                model[part.clone()].fill(0);
            }
            done?;
            // What a discard leaves is known only from reading.
            chain.read_at(&mut model[part], range.start)?;
            Ok(format!("discard {range:#x?}"))
        }
        15..17 if also == Also::Resizing => {
            let new = rng.u64(size / 2..=size * 3 / 2).min(MOST) / SECTOR * SECTOR;
            let done = chain.resize(new);
            if done.is_err() && new < size {
                // Shrinking may be refused; then nothing has changed.
                return Ok(format!("refused to shrink to {new:#x}"));
            }
            model.resize(len(new), 0);
            done.map(|()| format!("resize {size:#x} to {new:#x}"))
        }
        15..18 if also == Also::Compressing => {
            let start = rng.u64(0..size) / 4096 * 4096;
            let range = start..(start + rng.u64(1..4) * 4096).min(size);
            let part = len(range.start)..len(range.end);
            let mut bytes = vec![rng.u8(..); part.len()];
            let noise = rng.usize(0..part.len());
            let random = rng.bytes(noise);
            bytes[..noise].copy_from_slice(&random);
            match chain.write_compressed(&bytes, range.start) {
                // What is there already is refused, and stays.
                Err(e) if e.kind() == ErrorKind::Invalid => Ok(format!("refused {range:#x?}")),
                done => {
                    model[part].copy_from_slice(&bytes);
                    done.map(|()| format!("write compressed {range:#x?}"))
                }
            }
        }
        _ => chain.flush().map(|()| "flush".to_owned()),
    }
}

/// Longest that resizing makes a disk.
const MOST: u64 = 300 << 10;

/// What a power cut may leave of a change: for a write, any of its sectors.
fn tear(change: &Change, rng: &mut Seeded) -> Vec<Change> {
    let Change::Write { host, bytes } = change else {
        return vec![change.clone()];
    };
    let mut parts = Vec::new();
    let end = host + bytes.len() as u64;
    let mut at = *host;
    while at < end {
        let next = ((at / SECTOR + 1) * SECTOR).min(end);
        if rng.u32(0..3) != 0 {
            let part = len(at - host)..len(next - host);
            parts.push(Change::Write {
                host: at,
                bytes: bytes[part].to_vec(),
            });
        }
        at = next;
    }
    parts
}

/// Whether every byte is as one of the steps left it.
fn explained(found: &[u8], steps: &[Step]) -> Result<(), String> {
    if steps.iter().any(|s| s.model == found) {
        return Ok(());
    }
    if !steps.iter().any(|s| s.model.len() == found.len()) {
        return Err(format!("no step left {:#x} bytes", found.len()));
    }
    for (at, byte) in found.iter().enumerate() {
        if steps.iter().any(|s| s.model.get(at) == Some(byte)) {
            continue;
        }
        let wanted: Vec<Option<&u8>> = steps.iter().map(|s| s.model.get(at)).collect();
        return Err(format!(
            "the byte at {at:#x} is {byte:#04x}, the steps left {wanted:x?}"
        ));
    }
    Ok(())
}

fn vhd(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhd",
        options,
        size,
    }
}

const RAW: LayerSpec = LayerSpec {
    format: "raw",
    options: "",
    size: 50_000,
};

fn sessions(name: &str, specs: &[LayerSpec], also: Also) {
    sessions_on(Place::Memory, name, specs, also);
}

fn sessions_on(place: Place, name: &str, specs: &[LayerSpec], also: Also) {
    for round in 0..rounds(3) {
        let mut session = Session::record(&format!("{name} {round}"), place, specs, also);
        session.every_kill();
        session.power_cuts();
    }
}

#[test]
fn a_dynamic_vhd_survives_kills_and_power_cuts() {
    sessions("4k", &[vhd("block_size=4k", 130 * 512)], Also::Nothing);
    sessions("16k", &[vhd("block_size=16k", 200 * 512)], Also::Nothing);
    sessions("2M", &[vhd("", 200 * 512)], Also::Nothing);
}

#[test]
fn a_dynamic_vhd_that_is_resized_survives_kills_and_power_cuts() {
    sessions("4k", &[vhd("block_size=4k", 130 * 512)], Also::Resizing);
    sessions("8k", &[vhd("block_size=8k", 200 * 512)], Also::Resizing);
}

#[test]
fn a_fixed_vhd_that_is_resized_survives_kills_and_power_cuts() {
    let specs = [vhd("subformat=fixed", 130 * 512)];
    sessions("fixed", &specs, Also::Resizing);
}

#[test]
fn a_differencing_vhd_survives_kills_and_power_cuts() {
    let specs = [vhd("block_size=8k", 130 * 512), RAW];
    sessions("over raw", &specs, Also::Nothing);
    let specs = [vhd("block_size=4k", 130 * 512), vhd("", 130 * 512)];
    sessions("over dynamic", &specs, Also::Nothing);
}

#[test]
fn a_differencing_vhd_that_is_resized_survives_kills_and_power_cuts() {
    let specs = [vhd("block_size=8k", 130 * 512), RAW];
    sessions("over raw", &specs, Also::Resizing);
}

#[test]
fn a_vhd_on_a_device_survives_kills_and_power_cuts() {
    let dynamic = [vhd("block_size=16k", 200 * 512)];
    sessions_on(Place::Device(1 << 20), "16k", &dynamic, Also::Resizing);
    let fixed = [vhd("subformat=fixed", 130 * 512)];
    sessions_on(Place::Device(1 << 20), "fixed", &fixed, Also::Resizing);
    let child = [
        vhd("block_size=8k", 130 * 512),
        vhd("block_size=4k", 130 * 512),
    ];
    sessions_on(Place::Device(1 << 20), "child", &child, Also::Nothing);
}

fn vdi(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vdi",
        ..vhd(options, size)
    }
}

fn vhdx(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vhdx",
        ..vhd(options, size)
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_vhdx_survives_kills_and_power_cuts() {
    let small = [vhdx("block_size=1M", MIB + 8 * 512)];
    sessions("vhdx", &small, Also::Nothing);
    let child = [vhdx("block_size=1M", MIB + 16 * 512), small[0]];
    sessions("vhdx over vhdx", &child, Also::Nothing);
    sessions_on(Place::Device(16 << 20), "vhdx", &small, Also::Nothing);
}

#[test]
fn a_vhdx_that_is_resized_survives_kills_and_power_cuts() {
    for options in ["block_size=1M", "block_size=1M,subformat=fixed"] {
        sessions(options, &[vhdx(options, MIB / 2)], Also::Resizing);
    }
    let child = [
        vhdx("block_size=1M", MIB / 2),
        vhdx("block_size=1M", MIB + 130 * 512),
    ];
    sessions("vhdx over vhdx", &child, Also::Resizing);
}

#[test]
fn a_vdi_survives_kills_and_power_cuts() {
    sessions("vdi 4k", &[vdi("block_size=4k", 130 * 512)], Also::Nothing);
    sessions("vdi", &[vdi("", 200 * 512)], Also::Nothing);
    let child = [
        vdi("block_size=8k", 130 * 512),
        vdi("block_size=4k", 130 * 512),
    ];
    sessions("vdi over vdi", &child, Also::Nothing);
    sessions_on(Place::Device(3 << 20), "vdi", &child[1..], Also::Nothing);
}

#[test]
fn a_vdi_that_is_resized_survives_kills_and_power_cuts() {
    for options in ["block_size=4k", "block_size=8k,subformat=fixed"] {
        sessions(options, &[vdi(options, 130 * 512)], Also::Resizing);
    }
    let child = [
        vdi("block_size=8k", 130 * 512),
        vdi("block_size=4k", 190 * 512),
    ];
    sessions("vdi over vdi", &child, Also::Resizing);
}

fn vmdk(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "vmdk",
        ..vhd(options, size)
    }
}

#[test]
fn a_vmdk_survives_kills_and_power_cuts() {
    for options in ["grain_size=4k", "grain_size=8k,zeroed_grain=on"] {
        sessions(options, &[vmdk(options, 128 * 512)], Also::Nothing);
    }
    for options in ["grain_size=8k", "grain_size=4k,zeroed_grain=on"] {
        let child = [vmdk(options, 128 * 512), vmdk("grain_size=4k", 128 * 512)];
        sessions("vmdk over vmdk", &child, Also::Nothing);
    }
}

#[test]
fn a_vmdk_that_is_resized_survives_kills_and_power_cuts() {
    for options in ["grain_size=4k", "grain_size=8k,zeroed_grain=on"] {
        sessions(options, &[vmdk(options, 128 * 512)], Also::Resizing);
    }
    let options = "grain_size=4k,zeroed_grain=on";
    let child = [vmdk(options, 128 * 512), vmdk("grain_size=8k", 192 * 512)];
    sessions("vmdk over vmdk", &child, Also::Resizing);
}

fn qcow2(options: &'static str, size: u64) -> LayerSpec {
    LayerSpec {
        format: "qcow2",
        options,
        size,
    }
}

#[test]
fn a_qcow2_survives_kills_and_power_cuts() {
    for options in [
        "cluster_size=512",
        "cluster_size=512,refcount_bits=64",
        "cluster_size=4k,refcount_bits=1",
        "compat=0.10,cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
    ] {
        sessions(options, &[qcow2(options, 130 * 512)], Also::Nothing);
    }
}

#[test]
fn a_qcow2_that_is_resized_survives_kills_and_power_cuts() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "extended_l2=on,cluster_size=16k",
    ] {
        sessions(options, &[qcow2(options, 130 * 512)], Also::Resizing);
    }
}

#[test]
fn a_qcow2_with_compressed_writes_survives_kills_and_power_cuts() {
    for options in [
        "cluster_size=4k",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=4k,compression_type=zstd,refcount_bits=2",
    ] {
        sessions(options, &[qcow2(options, 130 * 512)], Also::Compressing);
    }
}

#[test]
fn a_qcow2_with_a_snapshot_survives_kills_and_power_cuts() {
    for options in [
        "cluster_size=512",
        "compat=0.10,cluster_size=2k",
        "extended_l2=on,cluster_size=16k",
    ] {
        sessions(options, &[qcow2(options, 130 * 512)], Also::Moving);
    }
    let specs = [qcow2("cluster_size=1k", 130 * 512), RAW];
    sessions("over raw", &specs, Also::Moving);
}

#[test]
fn a_qcow2_over_another_image_survives_kills_and_power_cuts() {
    let specs = [qcow2("cluster_size=4k", 130 * 512), RAW];
    sessions("qcow2 over raw", &specs, Also::Resizing);
    let specs = [
        qcow2("extended_l2=on,cluster_size=16k", 130 * 512),
        qcow2("cluster_size=512", 130 * 512),
    ];
    sessions("qcow2 over qcow2", &specs, Also::Resizing);
    let specs = [
        qcow2("compat=0.10,cluster_size=4k", 130 * 512),
        vhd("block_size=8k", 130 * 512),
    ];
    sessions("qcow2 over vhd", &specs, Also::Nothing);
}

/// An image that has in places what lies below it too: emptied and written again it reads the same at
/// every moment, and its space is given back.
#[test]
fn an_image_that_is_emptied_over_what_it_had_survives_kills_and_power_cuts() {
    const LEN: u64 = 2 * MIB;
    let vmdk = |size| LayerSpec {
        format: "vmdk",
        options: "grain_size=4k",
        size,
    };
    for (name, top, below, place) in [
        ("vhd", vhd("block_size=64k", LEN), RAW, Place::Memory),
        (
            "vhd device",
            vhd("block_size=64k", LEN),
            RAW,
            Place::Device(len(LEN) * 2),
        ),
        (
            "vdi",
            vdi("block_size=64k", LEN),
            vdi("", LEN),
            Place::Memory,
        ),
        (
            "vhdx",
            vhdx("block_size=1M", LEN),
            vhdx("block_size=1M", LEN),
            Place::Memory,
        ),
        ("qcow2", qcow2("cluster_size=4k", LEN), RAW, Place::Memory),
        ("vmdk", vmdk(LEN), vmdk(LEN), Place::Memory),
    ] {
        let mut rng = Seeded::new(name);
        let mut disk = Disk::create(place, &[LayerSpec { size: LEN, ..below }]);
        let bytes = rng.bytes(len(LEN));
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        chain.write_at(&bytes, 0).expect("writes");
        chain.close().expect("closes");
        drop(chain);
        disk.push(&top);
        let made = disk.memory()[0].size();
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        for _ in 0..8 {
            let at = rng.usize(0..bytes.len());
            let end = bytes.len().min(at + rng.usize(1..200_000));
            chain.write_at(&bytes[at..end], at as u64).expect("writes");
        }
        chain.close().expect("closes");
        drop(chain);
        let full = disk.memory()[0].size();
        let acts = [Act::Empty, Act::Write(MIB..MIB + 5000), Act::Close];
        let mut session = Session::of(name, disk, None, &acts);
        let emptied = Arc::new(session.storage(&session.base));
        let changes = &session.changes[..session.steps[1].changes];
        changes.iter().for_each(|change| emptied.apply(change));
        let left = allocated(&emptied);
        assert!(
            place != Place::Memory || left < made + (full - made) / 2,
            "{name}: {left} of {full}, made with {made}"
        );
        let chain = session.open_on(&emptied, Access::Read).expect("opens");
        let run = chain.top().map(0, LEN, Wait::Yes).expect("maps");
        assert!(matches!(run.source, Source::Below), "{name}");
        drop(chain);
        session.every_kill();
        session.power_cuts();
    }
}

/// Operations during which the host fails now and then: what was acknowledged stays, what failed
/// is there in part or not at all, and the image is sound.
fn with_faults(name: &str, specs: &[LayerSpec], op: Op, errno: i32) {
    let mut rng = Seeded::new(name);
    let (disk, mut model) = filled(Place::Memory, specs, &mut rng);
    let top = Arc::clone(&disk.memory()[0]);
    let mut chain = disk.open(Access::Write, WriteOrder::Ordered);
    let mut failed = 0;
    let all = rounds(600);
    for _ in 0..all {
        top.inject(Fault {
            op,
            after: rng.usize(0..12),
            count: rng.usize(1..4),
            errno,
        });
        if rng.usize(0..8) == 0 {
            failed += usize::from(resized(name, &chain, &mut model, &mut rng, &top));
            chain = sound(name, &disk, chain, &model);
            continue;
        }
        let mut wanted = model.clone();
        let done = operate(&chain, &mut wanted, &mut rng, Also::Nothing);
        top.heal();
        if let Err(e) = &done {
            assert_eq!(e.errno(), errno, "{name}: {e}");
            failed += 1;
            let found = read_all(&chain);
            let old_or_new = |(i, b): (usize, &u8)| *b == model[i] || *b == wanted[i] || *b == 0;
            let whole = found.iter().enumerate().all(old_or_new);
            assert!(whole, "{name}: a failed request left what nobody wrote");
            for (at, byte) in found.iter().enumerate() {
                let changed = model[at] != wanted[at];
                let kept = *byte == model[at] || *byte == wanted[at] || changed;
                assert!(kept, "{name}: a failed request changed {at:#x}");
            }
            wanted = found;
        }
        model = wanted;
        chain = sound(name, &disk, chain, &model);
    }
    // A short run may meet few of them.
    assert!(
        failed > all / 60 || all < 600,
        "{name}: only {failed} operations failed"
    );
    assert!(read_all(&chain) == model, "{name}: reads otherwise");
    chain.close().expect("closes");
    drop(chain);
    if let Some(report) = disk.check(Repair::Nothing) {
        assert_eq!(report.corruptions, 0, "{name}: {:?}", report.findings);
    }
    let chain = disk.open(Access::Read, WriteOrder::Ordered);
    assert!(read_all(&chain) == model, "{name}: reads otherwise");
}

/// The disk, opened anew where a sync of it has failed: it is as after a kill then.
fn sound(name: &str, disk: &Disk, chain: Chain, model: &[u8]) -> Chain {
    if chain.sound().is_ok() {
        return chain;
    }
    chain.flush().expect_err("is lost");
    chain.close().expect_err("is lost");
    drop(chain);
    if let Some(report) = disk.check(Repair::All) {
        assert_eq!(report.corruptions, 0, "{name}: {:?}", report.findings);
    }
    let chain = disk.open(Access::Write, WriteOrder::Ordered);
    assert!(
        read_all(&chain) == model,
        "{name}: opened anew, it reads otherwise"
    );
    chain
}

/// Resizes a disk on a host with faults; whether that failed.
fn resized(
    name: &str,
    chain: &Chain,
    model: &mut Vec<u8>,
    rng: &mut Seeded,
    top: &MemoryStorage,
) -> bool {
    let old = model.len() as u64;
    let new = rng.u64(old / 2..=old * 3 / 2).clamp(SECTOR, MOST) / SECTOR * SECTOR;
    let done = chain.resize(new);
    top.heal();
    let found = read_all(chain);
    let mut wanted = model.clone();
    wanted.resize(len(new), 0);
    match &done {
        Ok(()) => assert!(found == wanted, "{name}: resized from {old} to {new}"),
        Err(e) => {
            let sizes = [old, new].map(len);
            assert!(sizes.contains(&found.len()), "{name}: {}: {e}", found.len());
            for (at, byte) in found.iter().enumerate() {
                let was = model.get(at).copied().unwrap_or(0);
                assert!(*byte == was, "{name}: {at:#x} of {old}, {new}: {e}");
            }
        }
    }
    *model = found;
    done.is_err()
}

#[test]
fn a_full_disk_loses_nothing_that_was_acknowledged() {
    let dynamic = [vhd("block_size=4k", 130 * 512)];
    let child = [vhd("block_size=8k", 130 * 512), RAW];
    let vdis = [
        vdi("block_size=8k", 130 * 512),
        vdi("block_size=4k", 130 * 512),
    ];
    for (name, specs) in [
        ("dynamic", &dynamic[..]),
        ("child", &child[..]),
        ("vdi", &vdis[1..]),
        ("vdi over vdi", &vdis[..]),
        ("vhdx", &[vhdx("block_size=1M", 3 * MIB)][..]),
    ] {
        with_faults(name, specs, Op::Change, libc::ENOSPC);
    }
}

#[test]
fn a_host_that_fails_to_sync_loses_nothing_that_it_has() {
    let dynamic = [vhd("block_size=4k", 130 * 512)];
    let child = [vhd("block_size=8k", 130 * 512), RAW];
    let vdis = [
        vdi("block_size=4k", 900 * 512),
        vdi("block_size=8k", 900 * 512),
    ];
    for (name, specs) in [
        ("dynamic", &dynamic[..]),
        ("child", &child[..]),
        ("vdi over vdi", &vdis[..]),
        ("vhdx", &[vhdx("block_size=1M", 3 * MIB)][..]),
    ] {
        with_faults(name, specs, Op::Sync, libc::EIO);
    }
}

#[test]
fn a_qcow2_loses_nothing_to_a_host_that_fails() {
    let small = [qcow2("cluster_size=512", 130 * 512)];
    let over = [qcow2("extended_l2=on,cluster_size=16k", 130 * 512), RAW];
    for (name, specs) in [("qcow2", &small[..]), ("qcow2 child", &over[..])] {
        with_faults(name, specs, Op::Change, libc::ENOSPC);
        with_faults(name, specs, Op::Sync, libc::EIO);
    }
}
