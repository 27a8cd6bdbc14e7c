//! Damaged sectors, as a disk: corrected, refused by address, or taken as they are.

use vdtool::image::disc::{self, Declared, Form, RAW};

use super::made::{Files, sector, sectors};
use crate::util::{Seeded, rounds};

#[test]
fn what_the_codes_tell_is_corrected_and_told() {
    let (files, user) = Files::mode1("cue-correct", 100);
    // One byte, a burst, the codes themselves.
    let burst = 20 * RAW + 1000..20 * RAW + 1050;
    files.damage(
        "x.bin",
        [3 * RAW + 100, 50 * RAW + 2070, 51 * RAW + 2300]
            .into_iter()
            .chain(burst),
    );
    let (code, _, errors) = files.run(&["convert", "x.cue", "out.iso"]);
    assert_eq!(code, 0, "{errors}");
    assert!(
        errors.contains("4 sectors were damaged and are corrected"),
        "{errors}"
    );
    assert!(errors.contains(": 3, 20, 50-51"), "{errors}");
    assert!(files.read("out.iso") == user);
    assert!(
        files
            .done(&["compare", "x.cue", "out.iso"])
            .contains("identical")
    );
    let (_, _, errors) = files.run(&["convert", "-q", "x.cue", "-"]);
    assert!(errors.contains(": 3, 20, 50-51"), "{errors}");
}

#[test]
fn what_they_do_not_tell_is_refused_by_address_or_taken_as_it_is_stored() {
    let (files, mut user) = Files::mode1("cue-refuse", 100);
    for lba in [7, 8, 60] {
        files.damage("x.bin", (100..2000).map(|n| lba * RAW + n));
        for byte in &mut user[lba * 2048 + 84..lba * 2048 + 1984] {
            *byte ^= 0x5a;
        }
    }
    files.fails(
        &["convert", "x.cue", "out.iso"],
        1,
        "cannot be read: 7-8, 60 (--salvage",
    );
    assert!(!files.file("out.iso").exists());
    files.fails(&["convert", "x.cue", "-"], 1, "cannot be read: 7-8, 60");
    let (code, _, errors) = files.run(&["convert", "--salvage", "x.cue", "out.iso"]);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("3 sectors are damaged and taken as they are stored: 7-8, 60"));
    assert!(files.read("out.iso") == user);
}

#[test]
fn sectors_without_data_of_a_disk_are_refused_by_address_or_become_zeroes() {
    let mut rng = Seeded::new("cue-form2");
    let (mut bin, mut user) = sectors(&mut rng, Form::Form1, 0, 40);
    for lba in [11usize, 30, 31] {
        let form = if lba == 30 {
            Form::Formless
        } else {
            Form::Form2
        };
        let other = sector(form, lba as u64, &rng.bytes(2300));
        bin[lba * RAW..(lba + 1) * RAW].copy_from_slice(&other);
        user[lba * 2048..(lba + 1) * 2048].fill(0);
    }
    let sheet = b"FILE x.bin BINARY\nTRACK 01 MODE2/2352\nINDEX 01 00:00:00\n";
    let files = Files::new(&[("x.cue", sheet), ("x.bin", &bin)]);
    files.fails(
        &["convert", "x.cue", "out.iso"],
        1,
        "cannot be read: 11, 30-31",
    );
    files.fails(
        &["io", "-r", "-c", "read 22k 2k", "x.cue"],
        1,
        "sector 11 (00:02:11) is of mode 2 form 2",
    );
    let (code, _, errors) = files.run(&["convert", "--salvage", "x.cue", "out.iso"]);
    assert_eq!(code, 0, "{errors}");
    assert!(errors.contains("sector 30"), "{errors}");
    assert!(errors.contains("6144 bytes could not be read"), "{errors}");
    assert!(files.read("out.iso") == user);
    assert_eq!(files.run(&["check", "x.cue"]).0, 0);
}

/// What lies within the strength of the codes whatever it hits: one byte in each of a few
/// codewords.
fn few(rng: &mut Seeded, first: usize) -> Vec<usize> {
    let count = rng.usize(1..9);
    let mut places: Vec<usize> = (0..count).map(|_| rng.usize(first..RAW)).collect();
    places.sort_unstable();
    places.dedup();
    places
}

#[test]
fn damage_at_random_is_corrected_or_left_and_never_made_worse() {
    // All that the code was made for: 100,000 (`VDTOOL_ROUNDS=20`).
    let count = rounds(5000);
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut rng = Seeded::new(&format!("cue-damage-{thread}"));
                (0..count.div_ceil(threads)).for_each(|_| one(&mut rng));
            });
        }
    });
}

fn one(rng: &mut Seeded) {
    let (form, declared, first) = match rng.bool() {
        true => (Form::Mode1, Declared::Mode1, 12),
        false => (Form::Form1, Declared::Mode2, 16),
    };
    let data = rng.bytes(2048);
    let right = sector(form, rng.u64(0..400_000), &data);
    let mut wrong = right;
    let is_few = rng.u8(0..50) > 0;
    let places = match is_few {
        true => few(rng, first),
        false => (0..rng.usize(20..400))
            .map(|_| rng.usize(first..RAW))
            .collect(),
    };
    for at in &places {
        wrong[*at] ^= rng.u8(1..);
    }
    match disc::correct(&wrong, declared) {
        Some((found, raw)) => {
            assert_eq!(found, form);
            assert!(raw == right, "{places:?}");
        }
        None => assert!(!is_few || wrong == right, "{form:?} {places:?}"),
    }
    // In mode 2 a subheader that is no longer twice the same may be data of a sector without codes.
    if wrong != right && (is_few || form == Form::Mode1) {
        assert!(
            disc::judge(&wrong, declared).faults.has_wrong_codes(),
            "{places:?}"
        );
    }
}
