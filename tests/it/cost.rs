//! What works cost, counted: syncs of the image, and space of the target.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use vdtool::chain::{Base, Chain};
use vdtool::copy::rebase::{Store, rebase};
use vdtool::copy::{Before, Convert, Joined, Scan, commit, convert};
use vdtool::formats;
use vdtool::image::check::Repair;
use vdtool::image::open::{OpenOptions, WriteOrder};
use vdtool::storage::Storage;
use vdtool::storage::memory::{Change, MemoryStorage};
use vdtool::storage::open::Access;
use vdtool::util::grace::Grace;
use vdtool::util::progress::Silent;

use crate::layers::{Disk, LayerSpec, Place, check, read_all};
use crate::util::{Seeded, len, peer, requires, rounds, scratch, vdtool};

const SIZE: u64 = 24 << 20;
const QCOW2: LayerSpec = LayerSpec {
    format: "qcow2",
    options: "",
    size: SIZE,
};

fn syncs(changes: &[Change]) -> usize {
    changes.iter().filter(|c| **c == Change::Sync).count()
}

/// Writes 300 little pieces into the top layer of `chain`, and into what it is to read as.
fn scatter(chain: &Chain, model: &mut [u8], rng: &mut Seeded) {
    for _ in 0..300 {
        let at = rng.u64(0..SIZE - 20_000);
        let bytes = rng.bytes(20_000);
        chain.write_at(&bytes, at).expect("writes");
        model[len(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// A chain of three images with little pieces in each, top first, and what it reads as.
fn three(rng: &mut Seeded) -> (Vec<Arc<MemoryStorage>>, Disk, Vec<u8>) {
    let mut disk = Disk::create(Place::Memory, &[]);
    let mut model = vec![0; len(SIZE)];
    for _ in 0..3 {
        disk.push(&QCOW2);
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        scatter(&chain, &mut model, rng);
        chain.close().expect("closes");
    }
    (disk.memory(), disk, model)
}

/// A chain of some of the layers, the first of which may be open for writing.
fn chain_of(storages: &[Arc<MemoryStorage>], access: Access, base: Base) -> Chain {
    let driver = formats::by_name("qcow2").expect("a known format");
    let grace = Arc::new(Grace::default());
    let images = storages.iter().enumerate().map(|(depth, storage)| {
        let options = OpenOptions {
            access: if depth == 0 { access } else { Access::Read },
            grace: Arc::clone(&grace),
            ..OpenOptions::default()
        };
        (driver.open)(Arc::clone(storage) as Arc<dyn Storage>, &options).expect("opens")
    });
    Chain::new(images.collect(), base, Arc::clone(&grace)).expect("a chain")
}

/// What power cuts may leave of `base` with `changes`: all of what was synced, and of what came
/// after that nothing, or some.
fn after_power_cuts(
    base: &[u8],
    changes: &[Change],
    rng: &mut Seeded,
    mut look: impl FnMut(Arc<MemoryStorage>, usize),
) {
    let stable = MemoryStorage::from_bytes(base);
    let mut synced = 0;
    for made in 0..=changes.len() {
        if made < changes.len() && changes[made] != Change::Sync {
            continue;
        }
        for round in 0..rounds(3) {
            let state = MemoryStorage::from_bytes(&stable.to_bytes());
            let kept = changes[synced..made].iter().filter(|_| match round {
                0 => false,
                _ => rng.bool(),
            });
            kept.for_each(|change| state.apply(change));
            look(Arc::new(state), made);
        }
        for change in &changes[synced..made] {
            stable.apply(change);
        }
        synced = made;
    }
}

#[test]
fn a_rebase_of_many_little_pieces_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of rebase");
    let (layers, disk, model) = three(&mut rng);
    let base = layers[0].to_bytes();
    layers[0].record();
    let chain = chain_of(&layers, Access::Write, Base::Zeroes);
    let nothing = Joined::new(Vec::new()).expect("is short");
    rebase(&chain, &nothing, Store::Plain, 2, &Silent).expect("rebases");
    chain.flush().expect("flushes");
    let changes = layers[0].changes();
    assert!(syncs(&changes) <= 16, "{} syncs", syncs(&changes));
    assert!(read_all(&chain) == model);
    chain.close().expect("closes");
    let alone = chain_of(&layers[..1], Access::Read, Base::Zeroes);
    assert!(read_all(&alone) == model, "it needs nothing below it");
    let report = disk.check(Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
    after_power_cuts(&base, &changes, &mut rng, |state, made| {
        let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
        let layers = [state, layers[1].clone(), layers[2].clone()];
        let chain = chain_of(&layers, Access::Read, Base::Zeroes);
        assert!(read_all(&chain) == model, "after {made}");
    });
}

#[test]
fn a_commit_of_many_little_pieces_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of commit");
    let (layers, disk, model) = three(&mut rng);
    let old = layers[1].to_bytes();
    layers[1].record();
    let upper = chain_of(&layers[..1], Access::Read, Base::NotOpened);
    let base = chain_of(&layers[1..], Access::Write, Base::Zeroes);
    commit(&upper, &base, 2, &Silent).expect("commits");
    base.flush().expect("flushes");
    let changes = layers[1].changes();
    assert!(syncs(&changes) <= 16, "{} syncs", syncs(&changes));
    assert!(read_all(&base) == model);
    base.close().expect("closes");
    let report = check(disk.driver(), layers[1].clone(), Repair::Nothing).expect("checks");
    assert_eq!((report.leaks, report.corruptions), (0, 0));
    after_power_cuts(&old, &changes, &mut rng, |state, made| {
        let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
        assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
        let layers = [layers[0].clone(), state, layers[2].clone()];
        let chain = chain_of(&layers, Access::Read, Base::Zeroes);
        assert!(read_all(&chain) == model, "after {made}");
    });
}

#[test]
fn a_conversion_into_an_image_that_is_there_needs_few_syncs_and_survives_power_cuts() {
    let mut rng = Seeded::new("cost of convert -n");
    let mut model = vec![0; len(SIZE)];
    for _ in 0..300 {
        let at = rng.usize(..model.len() - 20_000);
        let bytes = rng.bytes(20_000);
        model[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    let driver = formats::by_name("raw").expect("a known format");
    let source = Arc::new(MemoryStorage::from_bytes(&model));
    let source = (driver.open)(source, &OpenOptions::default()).expect("opens");
    let source = Chain::new(vec![source], Base::Zeroes, Arc::default()).expect("a chain");
    let sources = Joined::new(vec![source]).expect("is short");
    // Many pieces meet in one of the large clusters.
    for (workers, options) in [(1, ""), (3, ""), (3, "cluster_size=2M")] {
        let disk = Disk::create(Place::Memory, &[LayerSpec { options, ..QCOW2 }]);
        let target = disk.memory().remove(0);
        let before = target.to_bytes();
        target.record();
        let chain = disk.open(Access::Write, WriteOrder::Ordered);
        let options = Convert {
            workers,
            scan: Scan::Cheapest,
            before: Before::Unknown,
            backing: None,
            salvage: None,
            rate: None,
        };
        convert(&sources, &chain, &options, &Silent).expect("converts");
        let changes = target.changes();
        assert!(syncs(&changes) <= 8, "{} syncs", syncs(&changes));
        assert!(read_all(&chain) == model);
        chain.close().expect("closes");
        let report = disk.check(Repair::Nothing).expect("checks");
        assert_eq!((report.leaks, report.corruptions), (0, 0));
        assert!(target.size() <= SIZE + (10 << 20), "{}", target.size());
        after_power_cuts(&before, &changes, &mut rng, |state, made| {
            let report = check(disk.driver(), state.clone(), Repair::Nothing).expect("checks");
            assert_eq!(report.corruptions, 0, "after {made}: {:?}", report.findings);
            let found = read_all(&chain_of(&[state], Access::Read, Base::Zeroes));
            let parts = found.chunks(4096).zip(model.chunks(4096));
            let mut differing = parts.filter(|(found, wanted)| found != wanted);
            let old_or_new = |f: &[u8], w: &[u8]| f.iter().zip(w).all(|(f, w)| f == w || *f == 0);
            let explained = differing.all(|(f, w)| old_or_new(f, w));
            assert!(explained, "after {made}: neither old nor new");
        });
    }
}

/// KiB that a file takes on its host.
fn taken(dir: &Path, name: &str) -> u64 {
    let file = std::fs::File::open(dir.join(name)).expect("opens");
    file.sync_all().expect("syncs");
    file.metadata().expect("tells").blocks() / 2
}

#[test]
fn a_raw_target_takes_space_for_data_and_not_for_the_zeroes_among_it() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let size = 16 << 20;
    for step in [64 << 10, 1 << 20] {
        let mut bytes = vec![0; size];
        for at in (0..size).step_by(step) {
            bytes[at..at + 4096].fill(7);
        }
        std::fs::write(dir.join("raw"), &bytes).expect("writes");
        let make = |name: &str, options: &[&str]| {
            let line = [
                &["convert", "-f", "raw", "-O", "qcow2"],
                options,
                &["raw", name],
            ];
            drop(peer("qemu-img", dir, line.concat()));
        };
        make("plain", &[]);
        make("packed", &["-c"]);
        make("large", &["-c", "-o", "cluster_size=2M"]);
        for source in ["raw", "plain", "packed", "large"] {
            for how in [&[][..], &["-S", "4k"], &["-S", "4k", "-j", "1"]] {
                let line = [&["convert", "-q", "-O", "raw"], how, &[source, "target"]];
                vdtool()
                    .current_dir(dir)
                    .args(line.concat())
                    .assert()
                    .success();
                assert!(std::fs::read(dir.join("target")).expect("reads") == bytes);
                let (found, data) = (taken(dir, "target"), (size / step * 4) as u64);
                // Extents of the file itself may need a block or a few.
                let most = data + data / 20 + 16;
                assert!(
                    found <= most,
                    "{source}, one in {step}, {how:?}: {found} KiB"
                );
            }
        }
    }
}
