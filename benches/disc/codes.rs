//! How fast the codes of CD-ROM sectors are made and verified, on one core.
//!
//! `cargo run --release --example disc-codes`

use std::hint::black_box;
use std::time::{Duration, Instant};

use vdtool::image::disc::{Declared, Form, RAW, Raw, correct, edc, judge, make};

/// Sectors that are gone through: some more than the caches hold.
const SECTORS: usize = 20_000;
/// How long each is measured.
const TIME: Duration = Duration::from_secs(2);
/// Nanoseconds of a round: what the host counts it brings up to date every few milliseconds.
const ROUND: u64 = 200_000_000;

fn sectors() -> Vec<Raw> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    let one = |_| {
        let mut raw = [0; RAW];
        raw[16..2064].fill_with(&mut next);
        make(&mut raw, Form::Mode1, [0, 2, 0]);
        raw
    };
    (0..SECTORS).map(one).collect()
}

/// Nanoseconds that this thread has had a core.
fn on_cpu() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux tells");
    text.split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .expect("is a number")
}

/// The best of all rounds: others use the machine too.
fn measure(name: &str, sectors: &mut [Raw], mut work: impl FnMut(&mut Raw)) {
    let start = Instant::now();
    let mut best = 0;
    while start.elapsed() < TIME {
        let (cpu, mut spent, mut bytes) = (on_cpu(), 0, 0);
        while spent < ROUND {
            sectors.iter_mut().for_each(&mut work);
            bytes += (sectors.len() * RAW) as u64;
            // Of a core that others use as well only our share counts.
            spent = on_cpu() - cpu;
        }
        best = best.max(bytes * 1000 / spent);
    }
    println!("{name:<28} {best:>6} MB/s");
}

fn main() {
    let mut all = sectors();
    measure("EDC alone", &mut all, |raw| {
        black_box(edc::edc(&raw[..2064]));
    });
    measure("EDC, P and Q made", &mut all, |raw| {
        make(black_box(raw), Form::Mode1, [0, 2, 0]);
    });
    measure("EDC, P and Q verified", &mut all, |raw| {
        assert!(judge(black_box(raw), Declared::Mode1).faults.is_none());
    });
    measure("one byte corrected", &mut all[..200], |raw| {
        let mut wrong = *raw;
        wrong[1000] ^= 1;
        assert!(correct(black_box(&wrong), Declared::Mode1).is_some());
    });
    measure("400 bytes wrong: given up", &mut all[..200], |raw| {
        let mut wrong = *raw;
        wrong[100..2100]
            .iter_mut()
            .step_by(5)
            .for_each(|byte| *byte ^= 0x5a);
        assert!(correct(black_box(&wrong), Declared::Mode1).is_none());
    });
}
