//! Merges, and what stops them.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use vdtool::ErrorKind;
use vdtool::chain::{Base, Chain};
use vdtool::copy;
use vdtool::formats::{android_cow, raw};
use vdtool::image::open::OpenOptions;
use vdtool::storage::memory::MemoryStorage;
use vdtool::storage::open::Access;
use vdtool::storage::syncs::Syncs;
use vdtool::storage::{HostId, HostRun, Limits, Storage, Zeroing};
use vdtool::util::progress::{Progress, Silent};

use super::made::{BLOCK, Do, Plan, text};
use super::write::{disks, made};
use super::{plans, reads_as};
use crate::util::{Seeded, assert_same, len, peer, rounds, scratch, vdtool};

/// What was done to one of the two files, in the order of both.
#[derive(Debug, Clone)]
enum Event {
    Write(usize, u64, Vec<u8>),
    Len(usize, u64),
    Sync(usize),
}

type Log = Arc<Mutex<Vec<Event>>>;

/// A file of two, whose changes are noted in one list.
#[derive(Debug)]
struct Noted {
    which: usize,
    inner: MemoryStorage,
    log: Log,
}

impl Storage for Noted {
    fn size(&self) -> u64 {
        self.inner.size()
    }
    fn has_fixed_len(&self) -> bool {
        false
    }
    fn limits(&self) -> Limits {
        self.inner.limits()
    }
    fn path(&self) -> Option<&Path> {
        None
    }
    fn host_id(&self) -> Option<HostId> {
        None
    }
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn read_at(&self, buf: &mut [u8], host: u64) -> vdtool::Result<()> {
        self.inner.read_at(buf, host)
    }
    fn write_at(&self, buf: &[u8], host: u64) -> vdtool::Result<()> {
        let event = Event::Write(self.which, host, buf.to_vec());
        self.log.lock().push(event);
        self.inner.write_at(buf, host)
    }
    fn zero(&self, _host: Range<u64>, _how: Zeroing) -> vdtool::Result<()> {
        Err(vdtool::Error::unsupported("writes do"))
    }
    fn discard(&self, _host: Range<u64>) -> vdtool::Result<()> {
        Err(vdtool::Error::unsupported("nothing is given back"))
    }
    fn run(&self, host: u64, len: u64) -> vdtool::Result<HostRun> {
        self.inner.run(host, len)
    }
    fn set_len(&self, len: u64) -> vdtool::Result<()> {
        self.log.lock().push(Event::Len(self.which, len));
        self.inner.set_len(len)
    }
    fn sync_now(&self) -> vdtool::Result<()> {
        self.log.lock().push(Event::Sync(self.which));
        Ok(())
    }
    fn syncs(&self) -> &Syncs {
        self.inner.syncs()
    }
    fn reserve(&self, _host: Range<u64>) -> vdtool::Result<()> {
        Err(vdtool::Error::unsupported("nothing is reserved"))
    }
}

/// A file and the disk below it.
#[derive(Debug, Clone)]
struct Pair([Vec<u8>; 2]);

impl Pair {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(which, host, bytes) => {
                let (file, at) = (&mut self.0[*which], len(*host));
                if file.len() < at + bytes.len() {
                    file.resize(at + bytes.len(), 0);
                }
                file[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Event::Len(which, length) => self.0[*which].resize(len(*length), 0),
            Event::Sync(_) => {}
        }
    }

    /// Merges; what was done meanwhile.
    fn merge(&mut self, progress: &dyn Progress) -> (vdtool::Result<()>, Vec<Event>) {
        let log = Log::default();
        let files = [0, 1].map(|which| {
            Arc::new(Noted {
                which,
                inner: MemoryStorage::from_bytes(&self.0[which]),
                log: Arc::clone(&log),
            })
        });
        let done = merge(&files, progress);
        for (file, bytes) in files.iter().zip(&mut self.0) {
            *bytes = file.inner.to_bytes();
        }
        let events = log.lock().clone();
        (done, events)
    }
}

fn merge(files: &[Arc<Noted>; 2], progress: &dyn Progress) -> vdtool::Result<()> {
    let options = OpenOptions {
        access: Access::Write,
        ..OpenOptions::default()
    };
    let storage = |which: usize| Arc::clone(&files[which]) as Arc<dyn Storage>;
    let base = (raw::DRIVER.open)(storage(1), &options)?;
    let cow = (android_cow::DRIVER.open)(storage(0), &options)?;
    cow.lies_over(base.virtual_size());
    let upper = Chain::new(vec![cow], Base::NotOpened, Arc::default())?;
    let base = Chain::new(vec![base], Base::Zeroes, Arc::default())?;
    copy::merge(&upper, &base, progress)
}

/// What is there reads as the new disk, and a merge goes on to the end from there.
fn goes_on(pair: &Pair, model: &[u8], what: &str) {
    reads_as(&pair.0[0], &pair.0[1], model, what);
    let mut pair = pair.clone();
    let (done, _) = pair.merge(&Silent);
    done.unwrap_or_else(|e| panic!("{what}: {e}"));
    assert_same(&pair.0[1], model, 0, what);
    reads_as(&pair.0[0], &pair.0[1], model, what);
    let (done, events) = pair.merge(&Silent);
    done.expect("there is nothing left");
    assert!(events.is_empty(), "{what}: {events:?}");
}

/// Files whose merges take several windows, with the disk below and what they make of it.
fn cases(name: &str) -> Vec<(Pair, Vec<u8>, String)> {
    let mut cases = Vec::new();
    for (mut plan, old) in plans(name).filter(|(plan, _)| plan.version > 1) {
        // Room for two blocks.
        plan.scratch = 16 << 10;
        let what = format!("version {} compression {}", plan.version, plan.compression);
        if plan.version == 3 || plan.cluster > 0 {
            let mut listed = plan.clone();
            listed
                .ops
                .insert(0, (0, Do::Sequence(vec![21, 1, 0, 20, 9, 10, 45, 4])));
            let pair = Pair([listed.bytes(&old), old.clone()]);
            cases.push((pair, listed.model(&old), format!("{what} listed")));
        }
        cases.push((
            Pair([plan.bytes(&old), old.clone()]),
            plan.model(&old),
            what,
        ));
    }
    cases
}

#[test]
fn a_merge_that_is_killed_at_any_write_goes_on_from_there() {
    for (start, model, what) in cases("android-cow killed") {
        let mut whole = start.clone();
        let (done, events) = whole.merge(&Silent);
        done.expect("merges");
        assert_same(&whole.0[1], &model, 0, &what);
        let mut now = start;
        goes_on(&now, &model, &what);
        for (index, event) in events.iter().enumerate() {
            now.apply(event);
            goes_on(&now, &model, &format!("{what}: after {index}: {event:.0?}"));
        }
    }
}

#[test]
fn what_a_kill_leaves_is_the_new_disk_to_an_independent_reader_too() {
    let dir = scratch();
    let dir = dir.path();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/android_cow/apply.py");
    let gz = |what: &str| what.contains("compression 1");
    let cases = cases("android-cow rules")
        .into_iter()
        .filter(|(_, _, what)| gz(what));
    for (start, model, what) in cases {
        let (_, events) = start.clone().merge(&Silent);
        let mut now = start;
        for (index, event) in events.iter().enumerate() {
            now.apply(event);
            if index % 5 != 0 {
                continue;
            }
            std::fs::write(dir.join("a.cow"), &now.0[0]).expect("writes");
            std::fs::write(dir.join("base.raw"), &now.0[1]).expect("writes");
            peer(
                "python3",
                dir,
                [script, "build", "base.raw", "a.cow", "out.raw"],
            );
            let found = std::fs::read(dir.join("out.raw")).expect("reads");
            assert_same(&found, &model, 0, &format!("{what}: after {index}"));
        }
    }
}

/// Some of what was not synced, some of that in part.
fn lose(pair: &mut Pair, pending: &[Event], rng: &mut Seeded) {
    for event in pending {
        match (event, rng.u32(0..3)) {
            (_, 0) => {}
            (Event::Write(which, host, bytes), 1) => {
                let mut at = *host;
                let end = host + bytes.len() as u64;
                while at < end {
                    let next = ((at / 512 + 1) * 512).min(end);
                    if rng.bool() {
                        let part = bytes[len(at - host)..len(next - host)].to_vec();
                        pair.apply(&Event::Write(*which, at, part));
                    }
                    at = next;
                }
            }
            (event, _) => pair.apply(event),
        }
    }
}

#[test]
fn a_merge_that_a_power_cut_stops_goes_on_from_there() {
    let mut rng = Seeded::new("android-cow power");
    for (start, model, what) in cases("android-cow power") {
        let (_, events) = start.clone().merge(&Silent);
        for end in 0..=events.len() {
            let is_sync =
                |event: &Event, which: usize| matches!(event, Event::Sync(w) if *w == which);
            let last = [0, 1].map(|which| {
                events[..end]
                    .iter()
                    .rposition(|event| is_sync(event, which))
                    .unwrap_or(0)
            });
            for round in 0..rounds(2) {
                let (mut now, mut pending) = (start.clone(), Vec::new());
                for (index, event) in events[..end].iter().enumerate() {
                    let (Event::Write(which, ..) | Event::Len(which, _) | Event::Sync(which)) =
                        event;
                    match index < last[*which] {
                        true => now.apply(event),
                        false => pending.push(event.clone()),
                    }
                }
                lose(&mut now, &pending, &mut rng);
                goes_on(
                    &now,
                    &model,
                    &format!("{what}: power cut {round} after {end}"),
                );
            }
        }
    }
}

/// Stops a job the `n`-th time that it asks.
struct Stops(AtomicUsize);

impl Progress for Stops {
    fn advance(&self, _bytes: u64) {}
    fn cancelled(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) == 0
    }
}

#[test]
fn a_merge_stops_between_two_windows_when_it_is_told_to() {
    for (mut pair, model, what) in cases("android-cow stopped") {
        let mut stops = 0;
        loop {
            let (done, _) = pair.merge(&Stops(AtomicUsize::new(1)));
            reads_as(&pair.0[0], &pair.0[1], &model, &what);
            match done {
                Ok(()) => break,
                Err(e) => assert_eq!(e.kind(), ErrorKind::Cancelled),
            }
            stops += 1;
        }
        assert!(stops >= 3, "{what}: {stops}");
        assert_same(&pair.0[1], &model, 0, &what);
    }
}

#[test]
fn files_made_of_two_disks_merge_into_the_new_one() {
    let mut rng = Seeded::new("android-cow merge made");
    for round in 0..rounds(20) {
        let options = ["version=2,compression=gz", "version=3,compression=zstd"][round % 2];
        let blocks = rng.usize(1..1500);
        let (old, new) = disks(&mut rng, blocks);
        let cow = made(&old, &new, options, 2).expect("is made");
        let same = old == new;
        let mut pair = Pair([cow, old]);
        let (done, events) = pair.merge(&Silent);
        done.expect("merges");
        assert_same(&pair.0[1], &new, 0, options);
        assert!(!events.is_empty() || same, "{options}");
        reads_as(&pair.0[0], &pair.0[1], &new, "merged");
    }
}

#[test]
fn what_could_not_be_gone_on_with_or_would_lose_data_is_not_merged() {
    let old = text(&mut Seeded::new("android-cow refused"), 40 * BLOCK);
    let lost = {
        let mut plan = Plan::new(3, 0);
        plan.add(6, Do::Copy(7)).add(8, Do::Copy(6));
        plan
    };
    let mut first = Plan::new(1, 0);
    first.add(6, Do::Copy(7));
    let mut past = Plan::new(2, 0);
    past.add(5, Do::Copy(1)).add(6, Do::Copy(40));
    for (plan, text) in [
        (lost, "data would be lost"),
        (first, "no block has room"),
        (past, "which has 163840 bytes"),
    ] {
        let mut pair = Pair([plan.bytes(&old), old.clone()]);
        let (done, events) = pair.merge(&Silent);
        let error = done.expect_err("is refused").to_string();
        assert!(error.contains(text), "{error}");
        assert!(events.is_empty(), "{events:?}");
    }
    // Without anything that is made of the old disk no scratch area is needed.
    let mut first = Plan::new(1, 0);
    first.add(6, Do::Zero);
    let mut pair = Pair([first.bytes(&old), old.clone()]);
    pair.merge(&Silent).0.expect("merges");
    assert_same(&pair.0[1], &first.model(&old), 0, "version 1");
}

#[test]
fn commit_merges_into_the_parent_and_says_when_it_is_done() {
    let dir = scratch();
    let dir = dir.path();
    let mut rng = Seeded::new("android-cow commit");
    let (old, new) = disks(&mut rng, 300);
    let cow = made(&old, &new, "version=2", 2).expect("is made");
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).expect("writes");
    let read = |name: &str| std::fs::read(dir.join(name)).expect("reads");
    write("base.raw", &old);
    write("a.cow", &cow);
    write("low.cow", &cow);
    let run = |args: &[&str]| vdtool().current_dir(dir).args(args).assert();
    let text = |done: &assert_cmd::assert::Assert| {
        String::from_utf8_lossy(&done.get_output().stderr).into_owned()
    };
    let done = run(&["commit", "a.cow"]).code(1);
    assert!(text(&done).contains("--parent"), "{}", text(&done));
    run(&["commit", "-n", "--parent", "base.raw", "a.cow"]).success();
    run(&["commit", "-d", "--parent", "base.raw", "a.cow"]).code(2);
    // Neither into another update nor past one.
    let done = run(&[
        "commit", "--parent", "low.cow", "--parent", "base.raw", "a.cow",
    ])
    .code(1);
    assert!(text(&done).contains("read-only"), "{}", text(&done));
    let past = [
        "commit", "-b", "base.raw", "--parent", "low.cow", "--parent", "base.raw", "a.cow",
    ];
    run(&past).code(63);
    assert_eq!(read("base.raw"), old);
    assert_eq!(read("a.cow"), cow);
    for _ in 0..2 {
        run(&["commit", "--parent", "base.raw", "a.cow"]).success();
        assert_same(&read("base.raw"), &new, 0, "committed");
    }
    run(&["compare", "--parent", "base.raw", "a.cow", "base.raw"]).success();
    let done = run(&["info", "a.cow"]).success();
    let out = String::from_utf8_lossy(&done.get_output().stdout).into_owned();
    assert!(out.contains("done"), "{out}");
    // What lies above an update cannot be moved down past it.
    write("base.raw", &old);
    run(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "low.cow",
        "-F",
        "android-cow",
        "-u",
        "top.qcow2",
        "4M",
    ])
    .success();
    let over = ["--parent", "low.cow", "--parent", "base.raw", "top.qcow2"];
    let done = run(&[&["commit", "-b", "base.raw"][..], &over[..]].concat()).code(63);
    assert!(text(&done).contains("merged in place"), "{}", text(&done));
    assert_eq!(read("base.raw"), old);
}
