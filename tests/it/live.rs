//! `ctl fork` and `ctl commit`: the layers of a disk changed while clients use it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vdtool::storage::Storage;
use vdtool::storage::open::{Access, StorageOptions, open};

use crate::serve::Serve;
use crate::util::{Seeded, assert_same, killable, len, rounds, scratch, skipped, vdtool};

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
    create(dir, "qcow2", None, "noted");
    ours(dir, &["bitmap", "--add", "noted", "bits"]);
    for (words, fork, code, says) in [
        (&["disk"][..], &["taken"][..], 1, "is there already"),
        (&["disk"], &["disk"], 1, "is FILE itself"),
        (&["disk"], &["./disk"], 1, "is FILE itself"),
        (&["--parent", "below", "disk"], &["new"], 63, "--parent"),
        (&["noted"], &["new"], 63, "takes note of writes"),
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
    for (at, format) in FORMATS.into_iter().enumerate() {
        let made = scratch();
        create(made.path(), format, None, "below");
        ours(
            made.path(),
            &["io", "-q", "-c", "write -P 9 1M 1M", "below"],
        );
        create(made.path(), format, Some("below"), "disk");
        let mut moments = 0;
        for moment in (1 + at as u64..).step_by(12 / rounds(1).min(12)) {
            let dir = scratch();
            let dir = dir.path();
            copied(made.path(), dir);
            let uri = format!("nbd+unix:///?socket={}/n", dir.display());
            let lived = killed(dir, moment, &["disk"], &|dir| {
                let io = ["io", "-q", "-c", "write -P 1 0 4k", "-c", "flush", &uri];
                // It would wait for a server that is gone.
                let patience = Duration::from_secs(1);
                let wrote = vdtool()
                    .current_dir(dir)
                    .args(io)
                    .timeout(patience)
                    .output();
                let wrote = wrote.is_ok_and(|io| io.status.success());
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
        assert!(moments > 0, "{format}: {moments}");
    }
}

/// Waits until the merge has ended, or has come to `state`; how it is then.
fn merged(serve: &Serve, state: &str) -> Value {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let job = serve.status()["job"].clone();
        if job["state"] == state {
            return job;
        }
        assert_eq!(job["state"], "running", "{job}{}", serve.events());
        assert!(Instant::now() < until, "{job}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// The images of a chain, top first.
fn chain(dir: &Path, file: &str) -> Vec<String> {
    let line = ["info", "-U", "--backing-chain", "--output", "json", file];
    let told = vdtool().current_dir(dir).args(line).assert().success();
    let told: Value = serde_json::from_slice(&told.get_output().stdout).expect("is JSON");
    let layers = told.as_array().expect("is a list").iter();
    let name = |layer: &Value| {
        let path = layer["filename"].as_str().expect("is text").to_owned();
        Path::new(&path)
            .file_name()
            .expect("has one")
            .to_str()
            .expect("is text")
            .to_owned()
    };
    layers.map(name).collect()
}

#[test]
fn random_forks_and_merges_under_writes_leave_the_disk_as_clients_wrote_it() {
    for format in FORMATS {
        let dir = scratch();
        let dir = dir.path();
        create(dir, format, None, "below");
        ours(dir, &["io", "-q", "-c", "write -P 9 0 7M", "below"]);
        create(dir, format, Some("below"), "middle");
        ours(
            dir,
            &[
                "io",
                "-q",
                "-c",
                "write -P 8 1M 70k",
                "-c",
                "discard 2M 1M",
                "middle",
            ],
        );
        create(dir, format, Some("middle"), "disk");
        let serve = Serve::start(dir, &["disk"]);
        let mut rng = Seeded::new(&format!("live merge {format}"));
        let disk = under_writes(&serve, &format!("live merge {format}"), || {
            for n in 0..rounds(8).min(100) {
                let layers = chain(dir, "disk");
                if layers.len() < 3 || rng.bool() {
                    serve.tell(&["fork", &format!("base{n}")]);
                    continue;
                }
                let base = rng.usize(2..layers.len());
                match base {
                    2 if rng.bool() => serve.tell(&["commit"]),
                    base => serve.tell(&["commit", &layers[base]]),
                };
                let job = merged(&serve, "done");
                assert_eq!(job["error"], Value::Null, "{format}: {job}");
                assert_eq!(job["done"], job["total"], "{format}");
                let mut left = layers.clone();
                left.drain(1..base);
                assert_eq!(chain(dir, "disk"), left, "{format}");
                for gone in &layers[1..base] {
                    // It is in nobody's way, and as empty as its format lets it be.
                    fs::remove_file(dir.join(gone)).expect("removes");
                }
            }
        });
        serve.tell(&["stop"]);
        assert_same(&content(dir, "disk"), &disk, 0, format);
        ours(dir, &["chain", "."]);
        let check = ["check", "-q", "--chain", "disk"];
        let check = vdtool().current_dir(dir).args(check).output();
        let code = check.expect("runs").status.code();
        assert!(matches!(code, Some(0)), "{format}: {code:?}");
    }
}

/// `b` below `m` below `l` below `t`, each with something of its own.
fn family(dir: &Path, format: &str) {
    for (below, name, write) in [
        ("", "b", "write -P 1 0 6M"),
        ("b", "m", "write -P 2 1M 100k"),
        ("m", "l", "write -P 3 1030k 8k"),
        ("l", "t", "write -P 4 5M 4k"),
    ] {
        create(
            dir,
            format,
            Some(below).filter(|below| !below.is_empty()),
            name,
        );
        ours(dir, &["io", "-q", "-c", write, name]);
    }
}

/// What `t` reads as.
const TOP: [&str; 6] = [
    "read -P 1 0 1M",
    "read -P 2 1M 6k",
    "read -P 3 1030k 8k",
    "read -P 2 1038k 86k",
    "read -P 4 5M 4k",
    "read -P 0 6M 2M",
];

fn reads_top(dir: &Path, what: &str) {
    let commands = TOP.iter().flat_map(|read| ["-c", read]);
    let line = ["io", "-q", "-r"].into_iter().chain(commands).chain(["t"]);
    let read = vdtool().current_dir(dir).args(line).output().expect("runs");
    let said = String::from_utf8_lossy(&read.stderr).into_owned();
    let found = String::from_utf8_lossy(&read.stdout).into_owned();
    assert!(read.status.success(), "{what}: {said}{found}");
}

#[test]
fn a_server_killed_in_a_merge_leaves_what_the_same_command_offline_ends() {
    for (at, format) in FORMATS.into_iter().enumerate() {
        let made = scratch();
        family(made.path(), format);
        let mut moments = 0;
        for moment in (1 + at as u64..).step_by(23 / rounds(1).min(23)) {
            let dir = scratch();
            let dir = dir.path();
            copied(made.path(), dir);
            let lived = killed(dir, moment, &["t"], &|dir| {
                if try_tell(dir, &["commit", "b"]) {
                    for _ in 0..500 {
                        let told = ["ctl", "c", "--output", "json", "status"];
                        let told = vdtool().current_dir(dir).args(told).output();
                        let told = String::from_utf8(told.expect("runs").stdout);
                        let told = told.expect("is text");
                        if !told.contains("\"running\"")
                            || told.contains("\"done\":") && told.contains("\"state\": \"done\"")
                        {
                            break;
                        }
                        thread::sleep(Duration::from_millis(5));
                    }
                }
                try_tell(dir, &["stop"]);
            });
            let what = format!("{format} killed at {moment}");
            reads_top(dir, &what);
            ours(dir, &["commit", "-q", "-b", "b", "--children", "t", "l"]);
            reads_top(dir, &what);
            assert_eq!(chain(dir, "t"), ["t", "b"], "{what}");
            ours(dir, &["chain", "."]);
            if lived {
                break;
            }
            moments += 1;
        }
        assert!(moments > 0, "{format}: {moments}");
    }
}

/// Commands to a server by one connection, one right after the other; the answers.
fn at_once(dir: &Path, lines: &[&str]) -> Vec<Value> {
    use std::io::Write;
    let mut stream = std::os::unix::net::UnixStream::connect(dir.join("c")).expect("connects");
    for line in lines {
        writeln!(stream, "{line}").expect("is heard");
    }
    let mut answers = BufReader::new(stream);
    let answer = |_: &&str| {
        let mut answer = String::new();
        answers.read_line(&mut answer).expect("answers");
        serde_json::from_str(&answer).expect("is JSON")
    };
    lines.iter().map(answer).collect()
}

#[test]
fn a_merge_is_held_goes_on_and_is_ended_by_another_command_where_the_server_stops() {
    for format in ["qcow2", "vhd"] {
        let dir = scratch();
        let dir = dir.path();
        family(dir, format);
        let serve = Serve::start(dir, &["t"]);
        serve.ctl(&["commit", "pause"]).code(1);
        let held = at_once(dir, &["commit m", "commit pause", "status"]);
        assert_eq!(held[1]["return"]["state"], "paused", "{held:?}");
        let job = &held[2]["return"]["exports"][0]["job"];
        assert_eq!(
            (&job["job"], &job["state"]),
            (&"commit".into(), &"paused".into())
        );
        assert_eq!(job["total"], SIZE);
        // Clients are served, and what would pull the layers away is refused.
        let client = client(&serve);
        client.write_at(&[4; 4096], 5 << 20).expect("writes");
        let mut found = [0; 4096];
        client.read_at(&mut found, 1 << 20).expect("reads");
        assert_eq!(found, [2; 4096]);
        for words in [&["commit"][..], &["fork", "new"], &["change", "b"]] {
            let failed = serve.ctl(words).code(1);
            let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
            assert!(said.contains("being merged into"), "{words:?}: {said}");
        }
        for file in ["t", "m"] {
            let said = fails(dir, &["io", "-r", "-c", "read 0 512", file], 1);
            assert!(said.contains("locked"), "{file}: {said}");
        }
        fails(dir, &["io", "-c", "write 0 512", "l"], 1);
        for offline in [
            &["fork", "t", "new"][..],
            &["commit", "-b", "m", "--children", "t", "l"],
            &["commit", "-b", "b", "--children", "l", "--remove", "m"],
            &["commit", "m"],
        ] {
            let said = fails(dir, offline, 1);
            assert!(said.contains("locked"), "{offline:?}: {said}");
        }
        // The end of the server is no end of the merge.
        serve.tell(&["stop"]);
        reads_top(dir, format);
        ours(dir, &["check", "-q", "--chain", "t"]);
        let serve = Serve::start(dir, &["t"]);
        at_once(dir, &["commit m", "commit pause"]);
        // Opened again, it is given up.
        serve.tell(&["reopen"]);
        let job = serve.status()["job"].clone();
        assert_eq!(job["state"], "failed", "{job}");
        ours(dir, &["io", "-q", "-r", "-c", "read -P 2 1M 6k", "m"]);
        at_once(dir, &["commit m", "commit pause"]);
        serve.tell(&["commit", "resume"]);
        merged(&serve, "done");
        serve.ctl(&["commit", "resume"]).code(1);
        // What was left over lies over that, and nobody needs it.
        serve.ctl(&["commit", "b"]).code(1);
        fs::remove_file(dir.join("l")).expect("removes");
        serve.tell(&["commit", "b"]);
        merged(&serve, "done");
        serve.tell(&["stop"]);
        reads_top(dir, format);
        assert_eq!(chain(dir, "t"), ["t", "b"], "{format}");
        ours(dir, &["check", "-q", "--chain", "t"]);
    }
}

#[test]
fn what_cannot_be_merged_is_refused_before_anything_is_moved() {
    let dir = scratch();
    let dir = dir.path();
    family(dir, "vhd");
    create(dir, "vhd", Some("b"), "other");
    let before = ["b", "m", "l"].map(|name| fs::read(dir.join(name)).expect("reads"));
    for (words, commit, code, says) in [
        (&["t"][..], &["b"][..], 1, "other"),
        (&["t"], &["l"], 1, "no image below it"),
        (&["t"], &["nowhere"], 1, "nowhere"),
        (&["-r", "t"], &["m"], 1, "for reading only"),
        (&["-s", "t"], &["m"], 63, "snapshot"),
        (&["b"], &[], 1, "no two images"),
        (&["--parent", "l", "t"], &["m"], 63, "--parent"),
    ] {
        let serve = Serve::start(dir, words);
        let failed = serve.ctl(&[&["commit"], commit].concat()).code(code);
        let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        assert!(said.contains(says), "{words:?} {commit:?}: {said}");
        assert_eq!(serve.status()["job"], Value::Null);
        serve.tell(&["stop"]);
    }
    // Somebody else reads the base.
    let serve = Serve::start(dir, &["t"]);
    let far = dir.join("far");
    fs::create_dir(&far).expect("makes a directory");
    let other = Serve::start(&far, &["-r", "../m"]);
    let failed = serve.ctl(&["commit", "m"]).code(1);
    let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(said.contains("is locked"), "{said}");
    drop(other);
    let after = ["b", "m", "l"].map(|name| fs::read(dir.join(name)).expect("reads"));
    assert!(before == after, "nothing is moved");
    // Nor is anything lost of what keeps others from it.
    for file in ["b", "m", "l"] {
        fails(dir, &["io", "-c", "write 0 512", file], 1);
    }
    serve.tell(&["commit", "m"]);
    merged(&serve, "done");
    serve.tell(&["stop"]);
    reads_top(dir, "vhd");
}

#[test]
fn a_full_host_stops_the_merge_and_no_client_until_there_is_space() {
    let can = Command::new("unshare").args(["-m", "true"]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        skipped("mounting needs privileges");
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    // Made in a directory that is mounted over: there is no other way to the base.
    let line = "mkdir m && mount -t tmpfs -o size=4M none m || exit 9
                \"$0\" create -q -f qcow2 m/b 8M && \"$0\" create -q -f qcow2 -b m/b -F qcow2 n &&
                \"$0\" io -q -c 'write -P 3 0 3M' n && \"$0\" create -q -f qcow2 -b n -F qcow2 t || exit 9
                head -c 2M /dev/zero >m/filler
                \"$0\" serve --nbd unix:n.sock --persistent --control c --output json t &
                while [ ! -e freed ]; do sleep 0.05; done
                rm m/filler; rm freed; wait $!";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", line, env!("CARGO_BIN_EXE_vdtool")]);
    let serve = Serve::spawn(dir, command);
    let uri = format!("nbd+unix:///?socket={}/n.sock", dir.display());
    let options = StorageOptions {
        access: Access::Write,
        ..StorageOptions::default()
    };
    let client = open(uri.as_ref(), &options).expect("connects");
    serve.tell(&["commit"]);
    for again in [false, true] {
        if again {
            serve.tell(&["commit", "resume"]);
        }
        let job = merged(&serve, "failed");
        assert_eq!(job["io-status"], "nospace", "{job}");
        assert_eq!(job["errno"], libc::ENOSPC, "{job}");
        serve.ctl(&["commit", "pause"]).code(1);
        let mut found = vec![0; 3 << 20];
        client.read_at(&mut found, 0).expect("reads");
        assert!(found[4096..].iter().all(|byte| *byte == 3));
        client.write_at(&[4; 4096], 0).expect("writes");
    }
    assert_eq!(serve.status()["state"], "running");
    assert!(
        serve.events().contains("\"state\":\"failed\""),
        "{}",
        serve.events()
    );
    fs::write(dir.join("freed"), "").expect("writes");
    while dir.join("freed").exists() {
        thread::sleep(Duration::from_millis(20));
    }
    serve.tell(&["commit", "resume"]);
    merged(&serve, "done");
    let mut found = vec![0; 3 << 20];
    client.read_at(&mut found, 0).expect("reads");
    assert!(found[..4096].iter().all(|byte| *byte == 4));
    assert!(found[4096..].iter().all(|byte| *byte == 3));
    serve.tell(&["stop"]);
    assert_eq!(serve.wait().code(), Some(0));
}

#[test]
fn images_that_links_lead_to_are_merged_from_where_they_are_and_their_neighbours_looked_at() {
    for format in ["qcow2", "vhd"] {
        for live in [true, false] {
            let dir = scratch();
            let dir = dir.path();
            fs::create_dir(dir.join("vm")).expect("makes a directory");
            family(&dir.join("vm"), format);
            std::os::unix::fs::symlink("vm/t", dir.join("t")).expect("links");
            if live {
                let serve = Serve::start(dir, &["t"]);
                serve.tell(&["commit", "vm/b"]);
                merged(&serve, "done");
                serve.tell(&["stop"]);
            } else {
                ours(dir, &["commit", "-q", "-b", "b", "--children", "t", "vm/l"]);
            }
            reads_top(dir, format);
            reads_top(&dir.join("vm"), format);
            assert_eq!(chain(&dir.join("vm"), "t").len(), 2, "{format} {live}");
        }
    }
    // A neighbour of the disk, which names the same images further down.
    let dir = scratch();
    let dir = dir.path();
    fs::create_dir(dir.join("l")).expect("makes a directory");
    create(&dir.join("l"), "qcow2", None, "b");
    create(&dir.join("l"), "qcow2", Some("b"), "m");
    create(dir, "qcow2", Some("l/m"), "t");
    create(dir, "qcow2", Some("l/b"), "other");
    let serve = Serve::start(dir, &["t"]);
    let failed = serve.ctl(&["commit"]).code(1);
    let said = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(said.contains("other"), "{said}");
    fs::remove_file(dir.join("other")).expect("removes");
    serve.tell(&["commit"]);
    merged(&serve, "done");
    serve.tell(&["stop"]);
    assert_eq!(chain(dir, "t").len(), 2);
}
