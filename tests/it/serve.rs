//! `serve` and `ctl` as processes, with the clients of others.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use vdtool::storage::open::{StorageOptions, open};

use crate::util::{peer, requires, scratch, skipped, vdtool};

/// A serving process; killed when dropped.
pub(crate) struct Serve {
    child: Child,
    lines: BufReader<ChildStdout>,
    home: PathBuf,
}

impl Serve {
    /// Serves in `home` by NBD on `n`, with commands on `c`, as `words` say further.
    pub(crate) fn start(home: &Path, words: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdtool"));
        command.args(["serve", "--nbd", "unix:n", "--persistent", "--control", "c"]);
        command.args(words);
        Self::spawn(home, command)
    }

    pub(crate) fn spawn(home: &Path, mut command: Command) -> Self {
        let mut child = command
            .current_dir(home)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(home.join("events")).expect("makes a file"))
            .spawn()
            .expect("starts");
        let lines = BufReader::new(child.stdout.take().expect("is a pipe"));
        let mut serve = Self {
            child,
            lines,
            home: home.to_owned(),
        };
        let address = serve.line();
        assert!(
            address.starts_with("nbd+unix://"),
            "{address}{}",
            serve.events()
        );
        serve
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("is text");
        line
    }

    pub(crate) fn events(&self) -> String {
        std::fs::read_to_string(self.home.join("events")).expect("is text")
    }

    pub(crate) fn ctl(&self, words: &[&str]) -> assert_cmd::assert::Assert {
        let mut command = vdtool();
        command.current_dir(&self.home);
        command
            .args(["ctl", "--output", "json", "c"])
            .args(words)
            .assert()
    }

    /// A command that succeeds, and its answer.
    pub(crate) fn tell(&self, words: &[&str]) -> Value {
        let output = self.ctl(words).success().get_output().stdout.clone();
        serde_json::from_slice(&output).expect("is JSON")
    }

    pub(crate) fn status(&self) -> Value {
        self.tell(&["status"])["exports"][0].clone()
    }

    fn reads(&self) -> u64 {
        let stats = self.tell(&["stats"]);
        let reads = &stats["exports"][0]["total"]["read"]["operations"];
        reads.as_u64().expect("is a number")
    }

    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}/n", self.home.display())
    }

    /// Commands of qemu-io on an export.
    fn io(&self, name: &str, commands: &[&str]) -> String {
        peer("qemu-io", &self.home, io_words(&self.uri(name), commands))
    }

    /// The same, left to run.
    fn io_begun(&self, commands: &[&str]) -> Child {
        Command::new("qemu-io")
            .args(io_words(&self.uri(""), commands))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("starts")
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.child.id()).expect("is small");
        let id = rustix::process::Pid::from_raw(id).expect("is one");
        rustix::process::kill_process(id, signal).expect("is there");
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("is text");
        assert_eq!(rest, "", "nothing more on standard output");
        self.child.wait().expect("ends")
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        // One that has ended is past killing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn io_words(uri: &str, commands: &[&str]) -> Vec<String> {
    let commands = commands.iter().flat_map(|c| ["-c", c]);
    let words = ["-f", "raw", uri].into_iter().chain(commands);
    words.map(ToOwned::to_owned).collect()
}

/// A directory with a disk of 16 MiB in it, and whether there is a client.
fn ready(name: &str) -> Option<TempDir> {
    if !requires("qemu-io") {
        return None;
    }
    let dir = scratch();
    let create = ["create", "-q", name, "16M"];
    vdtool().current_dir(&dir).args(create).assert().success();
    Some(dir)
}

fn check(dir: &Path, name: &str) {
    vdtool()
        .current_dir(dir)
        .args(["check", name])
        .assert()
        .success();
}

#[test]
fn a_disk_of_a_server_that_takes_one_client_is_opened_again() {
    let dir = scratch();
    let [near, far] = ["near", "far"].map(|name| dir.path().join(name));
    for home in [&near, &far] {
        std::fs::create_dir(home).expect("makes a directory");
    }
    std::fs::write(far.join("d.raw"), [7; 1 << 16]).expect("writes");
    let far = Serve::start(&far, &["--connections", "1", "d.raw"]);
    let near = Serve::start(&near, &[&*far.uri("")]);
    let storage = open(near.uri("").as_ref(), &StorageOptions::default()).expect("connects");
    for round in 0..30 {
        let mut buf = [0; 512];
        storage.read_at(&mut buf, round * 512).expect("reads");
        assert_eq!(buf, [7; 512]);
        near.tell(&["reopen"]);
        assert_eq!(near.status()["state"], "running", "round {round}");
    }
}

#[test]
fn a_disk_is_paused_resized_opened_again_and_ended_by_commands() {
    let Some(dir) = ready("d.qcow2") else { return };
    let serve = Serve::start(dir.path(), &["--pid-file", "pid", "d.qcow2"]);
    let id = std::fs::read_to_string(dir.path().join("pid")).expect("is there");
    assert_eq!(id.trim(), serve.child.id().to_string());
    serve.io("", &["write -P 5 1M 64k", "flush"]);
    serve.tell(&["pause"]);
    assert_eq!(serve.status()["state"], "paused");
    let mut held = serve.io_begun(&["read -P 5 1M 64k"]);
    serve.tell(&["flush"]);
    assert_eq!(held.try_wait().expect("is ours"), None);
    serve.tell(&["resume"]);
    assert!(held.wait().expect("ends").success());
    serve.tell(&["resize", "32M"]);
    serve.io("", &["write -P 6 24M 64k"]);
    serve.ctl(&["resize", "8M"]).code(1);
    serve.ctl(&["resize"]).code(2);
    serve.tell(&["reopen"]);
    serve.io("", &["read -P 5 1M 64k", "read -P 6 24M 64k"]);
    let stats = serve.tell(&["stats"])["exports"][0]["total"].clone();
    assert_eq!(stats["write"]["bytes"], 131_072);
    assert!(stats["read"]["histogram"][0]["count"].as_u64() > Some(0));
    serve.tell(&["stop"]);
    // The answer comes when the image is closed, and nobody has its locks.
    check(dir.path(), "d.qcow2");
    assert!(!dir.path().join("pid").exists());
    assert!(!dir.path().join("c").exists());
    assert_eq!(serve.wait().code(), Some(0));
}

#[test]
fn signals_end_it_with_the_image_closed_whoever_is_connected() {
    use rustix::process::Signal;
    let Some(dir) = ready("d.vhd") else { return };
    for (byte, signal) in [(1, Signal::TERM), (2, Signal::INT)] {
        let serve = Serve::start(dir.path(), &["d.vhd"]);
        serve.io("", &[&format!("write -P {byte} 0 64k")]);
        let mut held = serve.io_begun(&["read 0 64k", "sleep 200", "read 0 64k"]);
        while serve.reads() == 0 {
            std::thread::yield_now();
        }
        serve.tell(&["pause"]);
        serve.signal(signal);
        assert_eq!(serve.wait().code(), Some(0));
        assert!(!held.wait().expect("ends").success());
        check(dir.path(), "d.vhd");
        let read = format!("read -P {byte} 0 64k");
        vdtool()
            .current_dir(&dir)
            .args(["io", "-r", "-c", &read, "d.vhd"])
            .assert()
            .success();
    }
}

#[test]
fn one_signal_is_no_second_one_where_the_overlay_was_just_made() {
    let Some(dir) = ready("d.vhd") else { return };
    let serve = Serve::start(dir.path(), &["--overlay", "new.qcow2", "d.vhd"]);
    serve.io("", &["write -P 6 0 64k"]);
    serve.signal(rustix::process::Signal::TERM);
    assert_eq!(serve.wait().code(), Some(0));
    check(dir.path(), "new.qcow2");
}

#[test]
fn what_was_flushed_survives_a_kill_and_the_next_server_takes_the_place_of_the_dead_one() {
    use rustix::process::Signal;
    let Some(dir) = ready("d.qcow2") else { return };
    let serve = Serve::start(dir.path(), &["d.qcow2"]);
    serve.io("", &["write -P 7 3M 1M", "flush"]);
    serve.signal(Signal::KILL);
    assert_eq!(serve.wait().code(), None);
    assert!(dir.path().join("c").exists(), "a kill removes nothing");
    let serve = Serve::start(dir.path(), &["d.qcow2"]);
    serve.io("", &["read -P 7 3M 1M"]);
    // Ended by force, as by a kill, but for the files.
    serve.tell(&["stop", "--force"]);
    assert_eq!(serve.wait().code(), Some(1));
    assert!(!dir.path().join("c").exists());
    let check = vdtool()
        .current_dir(&dir)
        .args(["check", "d.qcow2"])
        .assert();
    let code = check.get_output().status.code();
    assert!(matches!(code, Some(0 | 3)), "no more than leaks: {code:?}");
}

#[test]
fn an_overlay_takes_the_writes_and_is_read_by_others() {
    let Some(dir) = ready("d.vhd") else { return };
    let before = std::fs::read(dir.path().join("d.vhd")).expect("reads");
    for (byte, words) in [
        (3, &["--overlay", "o.qcow2", "d.vhd"][..]),
        (4, &["--overlay", "o.qcow2", "d.vhd"]),
        (5, &["-s", "d.vhd"]),
    ] {
        let serve = Serve::start(dir.path(), words);
        serve.io(
            "",
            &[
                &format!("write -P {byte} 1M 1M"),
                &format!("read -P {byte} 1M 1M"),
            ],
        );
        serve.tell(&["stop"]);
        assert_eq!(serve.wait().code(), Some(0));
    }
    assert!(std::fs::read(dir.path().join("d.vhd")).expect("reads") == before);
    let words = ["-r", "-f", "qcow2", "-c", "read -P 4 1M 1M", "o.qcow2"];
    peer("qemu-io", dir.path(), words);
    // It belongs to the image it was made for.
    let create = ["create", "-q", "e.vhd", "16M"];
    vdtool().current_dir(&dir).args(create).assert().success();
    let words = ["serve", "--nbd", "unix:n", "--overlay", "o.qcow2", "e.vhd"];
    let refused = vdtool().current_dir(&dir).args(words).assert().code(1);
    let error = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
    assert!(error.contains("is not an overlay of"), "{error}");
}

#[test]
fn several_disks_go_by_their_names() {
    let Some(dir) = ready("a.qcow2") else { return };
    let create = ["create", "-q", "b.raw", "1M"];
    vdtool().current_dir(&dir).args(create).assert().success();
    let words = ["--limit", "group=all,bps=1G", "x=a.qcow2", "y=b.raw"];
    let mut serve = Serve::start(dir.path(), &words);
    assert!(serve.line().contains("/y?"), "an address for each");
    serve.io("y", &["write -P 2 0 1M"]);
    serve.io("x", &["write -P 1 0 1M", "read -P 1 0 1M"]);
    serve.tell(&["limit", "--export", "y", "bps=2G,iops=100k"]);
    let status = serve.tell(&["status"])["exports"].clone();
    assert_eq!(status[0]["limits"], status[1]["limits"]);
    assert_eq!(status[0]["limits"]["iops"], 102_400);
    serve.ctl(&["change", "b.raw"]).code(2);
    serve.tell(&["stop"]);
    let bytes = std::fs::read(dir.path().join("b.raw")).expect("reads");
    assert!(bytes.iter().all(|b| *b == 2));
}

#[test]
fn a_mark_that_is_passed_is_told_as_json() {
    let Some(dir) = ready("d.qcow2") else { return };
    let words = ["--watermark", "2M", "--output", "json", "d.qcow2"];
    let serve = Serve::start(dir.path(), &words);
    serve.io("", &["write 0 1M"]);
    assert_eq!(serve.events(), "");
    serve.io("", &["write 4M 4M"]);
    let event: Value = serde_json::from_str(&serve.events()).expect("one line of JSON");
    assert_eq!(event["event"], "watermark");
    assert_eq!(event["watermark"], 2 << 20);
    let end = serve.status()["highest-offset"].as_u64();
    assert!(end >= event["highest-offset"].as_u64(), "{end:?}");
    assert!(end > Some(5 << 20), "{end:?}");
}

#[test]
fn statistics_are_told_again_and_again() {
    let Some(dir) = ready("d.raw") else { return };
    let words = [
        "--stats-interval",
        "1",
        "--output",
        "json",
        "--name",
        "z",
        "d.raw",
    ];
    let serve = Serve::start(dir.path(), &words);
    serve.io("z", &["read 0 4k"]);
    let last = loop {
        let events = serve.events();
        if let Some(line) = events.lines().nth(1) {
            break line.to_owned();
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    let last: Value = serde_json::from_str(&last).expect("a line of JSON");
    assert_eq!(last["event"], "stats");
    assert_eq!(last["name"], "z");
    assert_eq!(last["total"]["read"]["bytes"], 4096);
    serve.tell(&["stop"]);
    assert_eq!(serve.wait().code(), Some(0));
}

#[test]
fn the_descriptor_is_told_the_address_too() {
    let Some(dir) = ready("d.raw") else { return };
    let mut command = Command::new("sh");
    let line = "exec \"$0\" serve --nbd unix:n --control c --ready-fd 7 d.raw 7>ready";
    command.args(["-c", line, env!("CARGO_BIN_EXE_vdtool")]);
    let serve = Serve::spawn(dir.path(), command);
    let told = std::fs::read_to_string(dir.path().join("ready")).expect("is text");
    assert!(told.starts_with("nbd+unix:///"), "{told}");
    // Without --persistent it ends with its last client.
    serve.io("", &["read 0 512"]);
    assert_eq!(serve.wait().code(), Some(0));
}

#[test]
fn a_full_host_stops_the_disk_until_there_is_space_and_it_is_resumed() {
    let Some(dir) = ready("d.raw") else { return };
    let mut command = Command::new("unshare");
    let line = "mkdir m && mount -t tmpfs -o size=4M none m && head -c 3M /dev/zero >m/filler \
                && truncate -s 4M m/d.raw || exit 9
                \"$0\" serve --nbd unix:n --persistent --control c --output json m/d.raw &
                while [ ! -e freed ]; do sleep 0.05; done
                rm m/filler; rm freed; wait $!";
    command.args(["-m", "sh", "-c", line, env!("CARGO_BIN_EXE_vdtool")]);
    let can = Command::new("unshare").args(["-m", "true"]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        skipped("mounting needs privileges");
        return;
    }
    let serve = Serve::spawn(dir.path(), command);
    let mut writer = serve.io_begun(&["write -P 3 0 2M", "flush", "read -P 3 0 2M"]);
    while serve.status()["io-status"] != "nospace" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(serve.status()["state"], "stopped");
    let event: Value = serde_json::from_str(serve.events().lines().next().unwrap_or_default())
        .expect("a line of JSON");
    assert_eq!(event["action"], "stop");
    assert_eq!(event["errno"], libc::ENOSPC);
    // Still no space: it stops again.
    serve.tell(&["resume"]);
    while serve.status()["io-status"] != "nospace" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(writer.try_wait().expect("is ours"), None);
    std::fs::write(dir.path().join("freed"), "").expect("writes");
    while dir.path().join("freed").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    serve.tell(&["resume"]);
    assert!(
        writer.wait().expect("ends").success(),
        "its bytes are there"
    );
    serve.tell(&["stop"]);
    assert_eq!(serve.wait().code(), Some(0));
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_served() {
    let dir = scratch();
    std::fs::write(dir.path().join("d.raw"), [0; 4096]).expect("writes");
    for (words, says) in [
        (&["d.raw"][..], "no server was named"),
        (&["--nbd", "unix:n"], "FILE"),
        (&["--nbd", "unix:n", "d.raw", "d.raw"], "two exports"),
        (
            &["--nbd", "unix:n", "-s", "-r", "d.raw"],
            "cannot be used with",
        ),
        (
            &["--nbd", "unix:n", "--limit", "bps=1,bps-rd=1", "d.raw"],
            "bps-rd",
        ),
        (
            &["--nbd", "unix:n", "--limit", "x:bps=1", "d.raw"],
            "no export",
        ),
        (
            &["--nbd", "unix:n", "--limit", "group=g", "d.raw"],
            "has no limits",
        ),
        (
            &["--nbd", "unix:n", "--logical-block-size", "513", "d.raw"],
            "powers of two",
        ),
        (&["--nbd", "unix:n", "--max-io", "1G", "d.raw"], "--max-io"),
    ] {
        let mut command = vdtool();
        let refused = command
            .current_dir(&dir)
            .arg("serve")
            .args(words)
            .assert()
            .code(2);
        let error = String::from_utf8_lossy(&refused.get_output().stderr).into_owned();
        assert!(error.contains(says), "{words:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!dir.path().join("n").exists());
    }
}

#[test]
fn a_command_to_nobody_fails() {
    let dir = scratch();
    let words = ["ctl", "none", "status"];
    let failed = vdtool().current_dir(&dir).args(words).assert().code(1);
    let error = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(error.starts_with("vdtool: none: cannot connect"), "{error}");
}

#[test]
fn parents_that_were_typed_lie_below_what_was_typed_and_below_nothing_else() {
    if !requires("qemu-io") {
        return;
    }
    let dir = scratch();
    let run = |line: &str| {
        let words = line.split_whitespace();
        vdtool()
            .current_dir(dir.path())
            .args(words)
            .assert()
            .success();
    };
    let write = |what: &str, line: &str| {
        let words = ["io", "-q", "-c", what].into_iter();
        let words = words.chain(line.split_whitespace());
        vdtool()
            .current_dir(dir.path())
            .args(words)
            .assert()
            .success();
    };
    std::fs::create_dir(dir.path().join("Snapshots")).expect("a directory");
    run("create -q -f vdi base.vdi 1M");
    write("write -P 1 0 4k", "base.vdi");
    run("create -q -f vdi -b ../base.vdi Snapshots/child.vdi");
    write("write -P 2 8k 4k", "--parent base.vdi Snapshots/child.vdi");
    // This one would read whatever is put below it.
    run("create -q -f qcow2 other.base 1M");
    write("write -P 3 0 4k", "other.base");
    run("create -q -f qcow2 -b other.base -F qcow2 other.qcow2");
    let child = ["--parent", "base.vdi", "Snapshots/child.vdi"];
    let serve = Serve::start(dir.path(), &child);
    serve.io("", &["read -P 1 0 4k", "read -P 2 8k 4k"]);
    serve.tell(&["change", "other.qcow2"]);
    serve.io("", &["read -P 3 0 4k"]);
    serve.tell(&["reopen"]);
    serve.io("", &["read -P 3 0 4k"]);
    serve.tell(&["change", "./Snapshots/child.vdi"]);
    serve.io("", &["read -P 1 0 4k", "read -P 2 8k 4k"]);
    drop(serve);
    for overlay in ["o.qcow2", "o.vdi"] {
        for byte in [1, 4] {
            let words = [&["--overlay", overlay], &child[..]].concat();
            let serve = Serve::start(dir.path(), &words);
            let read = format!("read -P {byte} 0 4k");
            serve.io("", &[&*read, "read -P 2 8k 4k", "write -P 4 0 4k"]);
        }
    }
    // An overlay of something else stays one, whatever was typed.
    let words = [
        "serve",
        "--nbd",
        "unix:n",
        "--overlay",
        "o.qcow2",
        "--parent",
        "base.vdi",
    ];
    let mut command = vdtool();
    command
        .current_dir(dir.path())
        .args(words)
        .arg("other.qcow2");
    let output = command.assert().code(1).get_output().stderr.clone();
    let said = String::from_utf8_lossy(&output);
    assert!(said.contains("is not an overlay of"), "{said}");
}

#[test]
fn an_update_is_served_over_its_parent_and_written_to_an_overlay() {
    if !requires("qemu-io") {
        return;
    }
    let home = scratch();
    let home = home.path();
    let mut rng = crate::util::Seeded::new("android-cow serve");
    let (old, new) = crate::android_cow::write::disks(&mut rng, 64);
    let cow = crate::android_cow::write::made(&old, &new, "version=3", 2).expect("is made");
    for (name, bytes) in [("base.raw", &old), ("a.cow", &cow), ("new.raw", &new)] {
        std::fs::write(home.join(name), bytes).expect("writes");
    }
    let same = |serve: &Serve| {
        let uri = serve.uri("");
        peer(
            "qemu-img",
            home,
            ["compare", "-f", "raw", "-F", "raw", &uri, "new.raw"],
        );
    };
    let over = ["--parent", "base.raw"];
    same(&Serve::start(home, &["-r", over[0], over[1], "a.cow"]));
    std::fs::remove_file(home.join("n")).ok();
    let words = [over[0], over[1], "--overlay", "over.qcow2", "a.cow"];
    let serve = Serve::start(home, &words);
    same(&serve);
    serve.io("", &["write -P 7 8192 4096", "read -P 7 8192 4096"]);
    drop(serve);
    assert_eq!(std::fs::read(home.join("a.cow")).expect("reads"), cow);
    assert_eq!(std::fs::read(home.join("base.raw")).expect("reads"), old);
}
