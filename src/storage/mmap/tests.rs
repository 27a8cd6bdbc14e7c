use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(bytes).expect("room");
    file
}

#[test]
fn a_window_reads_what_the_file_holds_at_any_offset() {
    let bytes: Vec<u8> = (0..251).cycle().take(200_000).collect();
    let file = file_of(&bytes);
    let window = Window::new(&file, &(70_001..150_000)).expect("maps");
    let mut buf = vec![0; 40_000];
    window.read(&mut buf, 70_003).expect("is there");
    assert_eq!(buf, bytes[70_003..110_003]);
    assert_eq!(window.read(&mut buf, 149_000), Err(Lost), "past its end");
    assert_eq!(window.read(&mut buf, 10), Err(Lost), "before its start");
}

#[test]
fn a_window_follows_the_growth_of_its_file() {
    use std::os::unix::fs::FileExt;
    let file = file_of(&[1; 100]);
    let window = Window::new(&file, &(0..1 << 20)).expect("maps past the end");
    file.write_all_at(&[2; 100], 500_000).expect("grows");
    let mut buf = [0; 100];
    window.read(&mut buf, 500_000).expect("is there now");
    assert_eq!(buf, [2; 100]);
}

#[test]
fn a_file_truncated_after_it_was_mapped_is_a_loss_and_not_a_signal() {
    let file = file_of(&[7; 1 << 20]);
    let window = Window::new(&file, &(0..1 << 20)).expect("maps");
    let mut buf = [0; 4096];
    window.read(&mut buf, 1 << 19).expect("is there");
    file.set_len(1000).expect("truncates");
    assert_eq!(window.read(&mut buf, 1 << 19), Err(Lost));
}

#[test]
fn truncation_while_many_threads_read_never_shows_bytes_that_were_not_there() {
    use std::os::unix::fs::FileExt;
    const BYTES: &[u8] = &[0xaa; 4 << 20];
    const LEN: u64 = 4 << 20;
    let file = file_of(BYTES);
    let mapping = Mapping::new();
    let stop = AtomicBool::new(false);
    let lost = std::thread::scope(|scope| {
        let reader = |seed| {
            let (file, mapping, stop) = (&file, &mapping, &stop);
            move || {
                let mut random = fastrand::Rng::with_seed(seed);
                let mut buf = vec![0; 3000];
                let mut lost = 0;
                while !stop.load(Ordering::Relaxed) {
                    let at = random.u64(0..LEN - 3000);
                    buf.fill(0xaa);
                    match mapping.read(file, &mut buf, at) {
                        // Bytes that a truncation cut and a rewrite has not yet restored read as
                        // zeroes when the file has grown again: those are the file's own.
                        Ok(()) => assert!(buf.iter().all(|b| matches!(b, 0xaa | 0))),
                        Err(Lost) => lost += 1,
                    }
                }
                lost
            }
        };
        let readers: Vec<_> = (0..4).map(|seed| scope.spawn(reader(seed))).collect();
        for round in 0..200 {
            file.set_len(round * 4099 % LEN).expect("truncates");
            std::thread::yield_now();
            file.write_all_at(BYTES, 0).expect("rewrites");
        }
        stop.store(true, Ordering::Relaxed);
        readers
            .into_iter()
            .map(|r| r.join().expect("no panic"))
            .sum::<u64>()
    });
    assert!(lost > 0, "no reader met a truncation");
}

#[test]
fn a_slot_that_another_window_holds_is_left_to_it() {
    let file = tempfile::tempfile().expect("a temporary file");
    let far = WINDOW * len64(SLOTS);
    file.set_len(far + WINDOW).expect("sparse");
    let mapping = Mapping::new();
    let mut buf = [1; 16];
    mapping.read(&file, &mut buf, 5).expect("maps");
    assert_eq!(mapping.read(&file, &mut buf, far + 5), Err(Lost));
    mapping.read(&file, &mut buf, 7).expect("is still mapped");
}

#[test]
fn a_read_across_two_windows_is_whole() {
    use std::os::unix::fs::FileExt;
    let file = tempfile::tempfile().expect("a temporary file");
    file.set_len(2 * WINDOW).expect("sparse");
    file.write_all_at(&[5; 64], WINDOW - 32).expect("writes");
    let mut buf = [0; 64];
    Mapping::new()
        .read(&file, &mut buf, WINDOW - 32)
        .expect("maps");
    assert_eq!(buf, [5; 64]);
}

/// Run by the test below in a process of its own, which this ends.
#[test]
#[ignore = "raises SIGBUS; only for the test that runs it in another process"]
fn a_fault_elsewhere() {
    let file = file_of(&[7; 4096]);
    let window = Window::new(&file, &(0..4096)).expect("maps, so the handler is there");
    window.read(&mut [0; 10], 0).expect("is there");
    let lost = MmapOptions::new().len(8192).map_raw_read_only(&file);
    let lost = lost.expect("maps past the end");
    // SAFETY: the byte is mapped; that there is nothing behind it is the point.
    unsafe { lost.as_ptr().add(5000).read_volatile() };
    unreachable!("the signal ends the process");
}

#[test]
fn a_fault_that_is_not_ours_ends_the_process_as_before() {
    use std::os::unix::process::ExitStatusExt;
    let test = "storage::mmap::tests::a_fault_elsewhere";
    let output = std::process::Command::new(std::env::current_exe().expect("has a path"))
        .args([test, "--exact", "--ignored"])
        .output()
        .expect("starts");
    assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
}
