//! `ctl fork` and `ctl commit`: the layers of a disk changed while clients use it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vdtool::storage::Storage;
use vdtool::storage::open::{Access, StorageOptions, open};

use crate::serve::Serve;
use crate::util::{Seeded, assert_same, killable, len, rounds, scratch, vdtool};

const FORMATS: [&str; 5] = ["qcow2", "vhd", "vdi", "vhdx", "vmdk"];
/// Bytes of the disks.
const SIZE: u64 = 8 << 20;
/// Threads that write, each to a part of its own.
const WRITERS: u64 = 3;

fn ours(dir: &Path, line: &[&str]) {
    vdtool().current_dir(dir).args(line).assert().success();
}

/// Runs what fails with `code`; what it said.
fn fails(dir: &Path, line: &[&str], code: i32) -> String {
    let failed = vdtool().current_dir(dir).args(line).assert().code(code);
    String::from_utf8_lossy(&failed.get_output().stderr).into_owned()
}

fn create(dir: &Path, format: &str, below: Option<&str>, name: &str) {
    let made = ["create", "-q", "-f", format];
    let rest = match below {
        None => vec![name, "8M"],
        Some(below) => vec!["-b", below, "-F", format, name],
    };
    ours(dir, &[&made[..], &rest].concat());
}

/// A client of the one export.
fn client(serve: &Serve) -> Arc<dyn Storage> {
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    open(serve.uri("").as_ref(), &options).expect("connects")
}

/// Writes and reads back whatever comes, until it is told to stop; what the part that it has to itself
/// holds then.
fn write_on(client: &dyn Storage, part: u64, mut rng: Seeded, ends: &AtomicBool) -> Vec<u8> {
    let size = SIZE / WRITERS;
    let first = part * size;
    let mut model = vec![0; len(size)];
    client.read_at(&mut model, first).expect("reads");
    while !ends.load(Ordering::Relaxed) {
        let at = rng.u64(0..size - 1);
        let most = *rng
            .choice(&[512, 4096, 70_000, 300_000])
            .expect("there are some");
        let long = rng.u64(1..=most.min(size - at));
        let part = len(at)..len(at + long);
        match rng.u8(0..8) {
            0 => client.sync().expect("syncs"),
            1 | 2 => {
                let mut found = vec![1; part.len()];
                client.read_at(&mut found, first + at).expect("reads");
                assert_same(&found, &model[part], first + at, "read while layers change");
            }
            3 => {
                let range = first + at..first + at + long;
                vdtool::storage::zero_or_write(client, range, vdtool::storage::Zeroing::MayUnmap)
                    .expect("zeroes");
                model[part].fill(0);
            }
            _ => {
                let bytes = rng.bytes(part.len());
                client.write_at(&bytes, first + at).expect("writes");
                model[part].copy_from_slice(&bytes);
            }
        }
    }
    model
}

/// Runs `work` while clients write; the disk as it is then.
fn under_writes(serve: &Serve, seed: &str, work: impl FnOnce()) -> Vec<u8> {
    let client = client(serve);
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|part| {
                let (client, ends) = (&client, &ends);
                let rng = Seeded::new(&format!("{seed} {part}"));
                scope.spawn(move || write_on(&**client, part, rng, ends))
            })
            .collect();
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        {
            let _end = End(&ends);
            work();
        }
        let mut disk: Vec<u8> = writers
            .into_iter()
            .flat_map(|writer| writer.join().expect("no writer fails"))
            .collect();
        disk.resize(len(SIZE), 0);
        disk
    })
}

/// What the image holds, by itself.
fn content(dir: &Path, file: &str) -> Vec<u8> {
    let raw = dir.join("content.raw");
    ours(dir, &["convert", "-q", "-O", "raw", file, "content.raw"]);
    let bytes = fs::read(&raw).expect("reads");
    fs::remove_file(raw).expect("removes");
    bytes
}

/// The names in a directory, but for what the server makes.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("lists");
    let names = entries.map(|e| {
        e.expect("reads")
            .file_name()
            .into_string()
            .expect("is text")
    });
    let ours = ["n", "c", "events"];
    let mut names: Vec<String> = names.filter(|name| !ours.contains(&&**name)).collect();
    names.sort();
    names
}

#[test]
fn a_disk_is_forked_again_and_again_while_clients_write() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        create(dir, format, None, "below");
        ours(dir, &["io", "-q", "-c", "write -P 9 1M 1M", "below"]);
        create(dir, format, Some("below"), "disk");
        let serve = Serve::start(dir, &["disk"]);
        let forks = rounds(3).min(20);
        let base = |n: usize| format!("base{n}");
        let mut bases = Vec::new();
        let disk = under_writes(&serve, &format!("live fork {format}"), || {
            for n in 0..forks {
                serve.tell(&["fork", &base(n)]);
                bases.push(fs::read(dir.join(base(n))).expect("reads"));
                // Nobody else may write to either.
                for file in ["disk", &base(n)] {
                    let said = fails(dir, &["io", "-c", "write 0 512", file], 1);
                    assert!(said.contains("locked"), "{format} {file}: {said}");
                }
                ours(dir, &["info", &base(n)]);
            }
        });
        serve.tell(&["stop"]);
        assert_same(&content(dir, "disk"), &disk, 0, format);
        for (n, bytes) in bases.iter().enumerate() {
            let found = fs::read(dir.join(base(n))).expect("reads");
            assert!(found == *bytes, "{format}: {n} is left alone");
        }
        ours(dir, &["chain", "."]);
        ours(dir, &["check", "-q", "--chain", "disk"]);
        assert_eq!(
            names(dir).len(),
            forks + 2,
            "{format}: nothing is left over"
        );
        // Opened again it is what it was.
        let serve = Serve::start(dir, &["disk"]);
        serve.tell(&["reopen"]);
        let mut found = vec![0; len(SIZE)];
        client(&serve).read_at(&mut found, 0).expect("reads");
        assert_same(&found, &disk, 0, format);
    }
}

#[test]
fn what_cannot_be_forked_is_refused_and_the_disk_goes_on() {
    let dir = scratch();
    let dir = dir.path();
    create(dir, "qcow2", None, "below");
    create(dir, "qcow2", Some("below"), "disk");
    create(dir, "qcow2", Some("below"), "other");
    fs::write(dir.join("taken"), "somebody's").expect("writes");
    fs::create_dir(dir.join("away")).expect("makes a directory");
    ours(dir, &["create", "-q", "raw.raw", "8M"]);
    for (words, fork, code, says) in [
        (&["disk"][..], &["taken"][..], 1, "is there already"),
        (&["disk"], &["no/where"], 1, "No such file"),
        (&["disk"], &["away/base"], 63, "names other files"),
        (&["disk"], &[], 2, "NEW"),
        (&["a=disk", "b=other"], &["new"], 2, "--export"),
        (
            &["a=disk", "b=other"],
            &["--export=c", "new"],
            1,
            "no export",
        ),
        (&["-r", "disk"], &["new"], 1, "for reading only"),
        (&["-s", "disk"], &["new"], 63, "snapshot"),
        (
            &["--overlay", "over.qcow2", "below"],
            &["new"],
            63,
            "overlay",
        ),
        (&["raw.raw"], &["new"], 63, "raw"),
    ] {
        let before = names(dir);
        let serve = Serve::start(dir, words);
        let failed = serve.ctl(&[&["fork"], fork].concat()).code(code);
        let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        assert!(said.contains(says), "{words:?} {fork:?}: {said}");
        assert_eq!(serve.status()["state"], "running");
        serve.tell(&["stop"]);
        let mut after = names(dir);
        after.retain(|name| name != "over.qcow2");
        assert_eq!(after, before, "{words:?} {fork:?}");
        let _ = fs::remove_file(dir.join("over.qcow2"));
    }
    assert_eq!(fs::read(dir.join("taken")).expect("reads"), b"somebody's");
    // An image that others have below them, and another file under the name.
    create(dir, "qcow2", Some("disk"), "child");
    let serve = Serve::start(dir, &["disk"]);
    let refused = |says: &str| {
        let failed = serve.ctl(&["fork", "new"]).code(1);
        let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        assert!(said.contains(says), "{said}");
        assert!(!dir.join("new").exists());
    };
    refused("lies below");
    fs::remove_file(dir.join("child")).expect("removes");
    fs::rename(dir.join("disk"), dir.join("moved")).expect("renames");
    fs::copy(dir.join("other"), dir.join("disk")).expect("copies");
    refused("was replaced while it was open");
    fs::rename(dir.join("moved"), dir.join("disk")).expect("renames");
    client(&serve).write_at(&[7; 512], 0).expect("goes on");
    serve.tell(&["fork", "new"]);
    // Said again it is done already.
    serve.tell(&["fork", "new"]);
    client(&serve).write_at(&[8; 512], 512).expect("goes on");
    serve.ctl(&["fork", "new"]).code(1);
    serve.tell(&["stop"]);
    ours(
        dir,
        &[
            "io",
            "-q",
            "-r",
            "-c",
            "read -P 7 0 512",
            "-c",
            "read -P 8 512 512",
            "disk",
        ],
    );
}

/// A server that ends by a kill before its change of this number, and what it is told; whether it
/// lived to its end.
fn killed(dir: &Path, moment: u64, words: &[&str], work: &dyn Fn(&Path)) -> bool {
    let mut command = killable();
    command.args(["serve", "--nbd", "unix:n", "--persistent", "--control", "c"]);
    command
        .args(words)
        .env("VDTOOL_KILL_AT", moment.to_string());
    let mut child = command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut line = String::new();
    let out = child.stdout.take().expect("is a pipe");
    let _ = BufReader::new(out).read_line(&mut line);
    if !line.is_empty() {
        work(dir);
    }
    let status = child.wait().expect("ends");
    assert!(status.success() || status.signal() == Some(9), "{status}");
    status.success()
}

/// As `ctl` to a server that may be gone.
fn try_tell(dir: &Path, words: &[&str]) -> bool {
    let line = [&["ctl", "c"], words].concat();
    let told = vdtool().current_dir(dir).args(line).output();
    told.expect("runs").status.success()
}

fn copied(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("lists") {
        let entry = entry.expect("lists");
        fs::copy(entry.path(), to.join(entry.file_name())).expect("copies");
    }
}

#[test]
fn a_server_killed_in_a_fork_leaves_the_old_file_or_the_new_image() {
    for format in FORMATS {
        let made = scratch();
        create(made.path(), format, None, "below");
        ours(
            made.path(),
            &["io", "-q", "-c", "write -P 9 1M 1M", "below"],
        );
        create(made.path(), format, Some("below"), "disk");
        let mut moments = 0;
        for moment in (1..).step_by(5 / rounds(1).min(5)) {
            let dir = scratch();
            let dir = dir.path();
            copied(made.path(), dir);
            let uri = format!("nbd+unix:///?socket={}/n", dir.display());
            let lived = killed(dir, moment, &["disk"], &|dir| {
                let io = ["io", "-q", "-c", "write -P 1 0 4k", "-c", "flush", &uri];
                let wrote = vdtool().current_dir(dir).args(io).output();
                let wrote = wrote.expect("runs").status.success();
                fs::write(dir.join("wrote"), [u8::from(wrote)]).expect("writes");
                try_tell(dir, &["fork", "base"]);
                try_tell(dir, &["stop"]);
            });
            let what = format!("{format} killed at {moment}");
            let wrote = fs::read(dir.join("wrote")).is_ok_and(|said| said == [1]);
            let mut reads = vec!["io", "-q", "-r", "-c", "read -P 9 1M 1M", "disk"];
            if wrote {
                reads.splice(3..3, ["-c", "read -P 1 0 4k"]);
            }
            let read = |what: &str| {
                let read = vdtool()
                    .current_dir(dir)
                    .args(&reads)
                    .output()
                    .expect("runs");
                let said = String::from_utf8_lossy(&read.stderr).into_owned();
                assert!(read.status.success(), "{what}: {said}");
            };
            read(&what);
            ours(dir, &["fork", "-q", "disk", "base"]);
            read(&what);
            let left = names(dir).into_iter().filter(|name| name != "wrote");
            assert_eq!(
                left.collect::<Vec<_>>(),
                ["base", "below", "disk"],
                "{what}"
            );
            if lived {
                break;
            }
            moments += 1;
        }
        assert!(moments > 3, "{format}: {moments}");
    }
}
