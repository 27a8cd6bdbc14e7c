//! `vdtool serve --nbd` as users run it.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use vdtool::nbd::wire::{Headers, command};
use vdtool::storage::Storage;
use vdtool::storage::nbd::{NbdStorage, Options};
use vdtool::storage::open::Access;

use super::wire::Raw;
use super::{is_served, until, uri};
use crate::util::{Seeded, assert_same, peer, requires, scratch, vdtool};

/// `vdtool serve`, ended when it is dropped.
struct Process {
    child: Child,
    said: BufReader<std::process::ChildStdout>,
    /// The first line that it printed.
    address: String,
}

impl Process {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdtool"));
        command.arg("serve").args(arguments).current_dir(dir);
        Self::of(command.stdin(Stdio::null()))
    }

    fn of(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .expect("vdtool starts");
        let mut said = BufReader::new(child.stdout.take().expect("is piped"));
        let mut address = String::new();
        said.read_line(&mut address).expect("says where it is");
        Self {
            child,
            said,
            address: address.trim_end().to_owned(),
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = i32::try_from(self.child.id()).expect("an id");
        let id = rustix::process::Pid::from_raw(id).expect("an id");
        rustix::process::kill_process(id, signal).expect("is there");
    }

    /// A number that the kernel tells of it, such as `RssAnon`, in KiB.
    fn status(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).expect("is there");
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        number.expect("a number")
    }

    /// Waits for its end; it has said nothing more.
    fn ended(mut self) -> ExitStatus {
        let mut rest = String::new();
        self.said.read_to_string(&mut rest).expect("reads");
        assert_eq!(rest, "");
        self.child.wait().expect("ends")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended by itself is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("disk.raw");
    std::fs::write(&path, bytes).expect("writes");
    path
}

#[test]
fn the_uri_is_printed_and_a_signal_ends_it_cleanly() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    let options = [
        "--nbd",
        "unix:s.sock",
        "--persistent",
        "--name",
        "a disk",
        "--description",
        "what it is",
        "disk.raw",
    ];
    let process = Process::start(dir.path(), &options);
    assert_eq!(process.address, "nbd+unix:///a%20disk?socket=s.sock");
    let at = uri(&dir.path().join("s.sock"), "a%20disk");
    let storage = NbdStorage::connect(&at, &Options::new(Access::Write)).expect("connects");
    storage.write_at(&[8; 100], 50).expect("writes");
    drop(storage);
    vdtool().arg("info").arg(&at).assert().success();
    process.signal(rustix::process::Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
    assert!(!dir.path().join("s.sock").exists());
    let found = std::fs::read(dir.path().join("disk.raw")).expect("reads");
    assert_eq!(found[50..150], [8; 100]);
}

#[test]
fn without_persistence_it_ends_when_the_last_client_has_left() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    let process = Process::start(dir.path(), &["-r", "--nbd", "unix:s.sock", "disk.raw"]);
    let socket = dir.path().join("s.sock");
    let first = Raw::ready(&socket, Headers::Simple);
    let mut second = Raw::ready(&socket, Headers::Structured);
    drop(first);
    assert_eq!(second.call(command::READ, 0, 0, 10).data, [7; 10]);
    drop(second);
    assert_eq!(process.ended().code(), Some(0));
    assert!(!socket.exists());
}

#[test]
fn several_images_are_served_by_their_names() {
    let dir = scratch();
    let run = |arguments: &[&str]| {
        let mut vdtool = vdtool();
        vdtool.current_dir(dir.path()).args(arguments);
        vdtool.assert().success();
    };
    run(&["create", "-q", "-f", "qcow2", "a.qcow2", "1M"]);
    run(&["create", "-q", "b.vhd", "2M"]);
    let options = [
        "--nbd",
        "127.0.0.1:0",
        "--persistent",
        "one=a.qcow2",
        "two=b.vhd",
    ];
    let mut process = Process::start(dir.path(), &options);
    let mut second = String::new();
    process.said.read_line(&mut second).expect("says where");
    for (address, end, size) in [
        (&*process.address, "/one", 1 << 20),
        (second.trim(), "/two", 2 << 20),
    ] {
        assert!(address.ends_with(end), "{address}");
        let storage = NbdStorage::connect(address, &Options::new(Access::Write));
        let storage = storage.expect("connects");
        assert_eq!(storage.size(), size);
        storage.write_at(&[9; 70_000], 1000).expect("writes");
        storage.sync().expect("flushes");
    }
    process.signal(rustix::process::Signal::INT);
    assert_eq!(process.ended().code(), Some(0));
    run(&["check", "a.qcow2"]);
    run(&["io", "-c", "read -P 9 1000 70000", "b.vhd"]);
}

#[test]
fn a_socket_that_a_service_manager_opened_is_used() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    let socket = dir.path().join("handed.sock");
    let listener = UnixListener::bind(&socket).expect("binds");
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" serve -r \
                  --persistent --nbd inherited disk.raw";
    let mut command = Command::new("sh");
    command
        .args(["-c", script, env!("CARGO_BIN_EXE_vdtool")])
        .current_dir(dir.path())
        .stdin(Stdio::from(OwnedFd::from(listener)));
    let process = Process::of(&mut command);
    assert!(
        process.address.contains("handed.sock"),
        "{}",
        process.address
    );
    let mut raw = Raw::ready(&socket, Headers::Simple);
    assert_eq!(raw.call(command::READ, 0, 0, 10).data, [7; 10]);
    drop(process);
    let none = ["serve", "--nbd", "inherited", "disk.raw"];
    let done = vdtool().current_dir(dir.path()).args(none).assert().code(1);
    let told = String::from_utf8_lossy(&done.get_output().stderr).into_owned();
    assert!(told.contains("LISTEN_PID"), "{told}");
}

#[test]
fn a_server_that_was_killed_starts_again_by_the_same_command_line_and_its_manager_is_told() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    let manager = UnixDatagram::bind(dir.path().join("notify")).expect("binds");
    let patience = std::time::Duration::from_secs(20);
    manager.set_read_timeout(Some(patience)).expect("is set");
    let told = || {
        let mut buf = [0; 64];
        let len = manager.recv(&mut buf).expect("is told in time");
        String::from_utf8_lossy(&buf[..len]).into_owned()
    };
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vdtool"));
        command
            .args(["serve", "--nbd", "unix:s.sock", "--persistent", "disk.raw"])
            .args(["--control", "c.sock", "--pid-file", "pid"])
            .env("NOTIFY_SOCKET", dir.path().join("notify"))
            .current_dir(dir.path())
            .stdin(Stdio::null());
        Process::of(&mut command)
    };
    let socket = dir.path().join("s.sock");
    for round in 0..3_u8 {
        let process = start();
        assert_eq!(told(), "READY=1");
        let pid = std::fs::read_to_string(dir.path().join("pid")).expect("reads");
        assert_eq!(pid.trim(), process.child.id().to_string());
        let mut raw = Raw::ready(&socket, Headers::Simple);
        assert_eq!(raw.call(command::READ, 0, 0, 1).data, [7 + round]);
        raw.request(command::WRITE, 0, 0, 1);
        raw.send(&[8 + round]);
        assert_eq!(raw.reply(0, 0).errno, 0);
        let status = ["ctl", "c.sock", "status"];
        vdtool()
            .current_dir(dir.path())
            .args(status)
            .assert()
            .success();
        match round {
            2 => {
                process.signal(rustix::process::Signal::TERM);
                assert_eq!(process.ended().code(), Some(0));
                assert_eq!(told(), "STOPPING=1");
            }
            _ => {
                process.signal(rustix::process::Signal::KILL);
                assert_eq!(process.ended().code(), None);
                for left in ["s.sock", "c.sock", "pid"] {
                    assert!(dir.path().join(left).exists(), "{left} is left behind");
                }
            }
        }
    }
    for gone in ["s.sock", "c.sock", "pid"] {
        assert!(!dir.path().join(gone).exists(), "{gone} is removed");
    }
}

#[test]
fn nbdcopy_starts_us_by_itself() {
    if !requires("nbdcopy") {
        return;
    }
    let dir = scratch();
    let bytes = Seeded::new("nbdcopy starts us").bytes(3 << 20);
    image(dir.path(), &bytes);
    let vdtool = env!("CARGO_BIN_EXE_vdtool");
    let all = [
        "--",
        "[",
        vdtool,
        "serve",
        "-r",
        "--nbd",
        "inherited",
        "disk.raw",
        "]",
        "copy.raw",
    ];
    peer("nbdcopy", dir.path(), all);
    let found = std::fs::read(dir.path().join("copy.raw")).expect("reads");
    assert_same(&found, &bytes, 0, "copied");
}

#[test]
fn a_crowd_is_turned_away_and_those_who_are_in_go_on() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    let options = [
        "-r",
        "--persistent",
        "--connections",
        "3",
        "--nbd",
        "unix:s.sock",
        "disk.raw",
    ];
    let process = Process::start(dir.path(), &options);
    let socket = dir.path().join("s.sock");
    let mut inside = Raw::ready(&socket, Headers::Structured);
    let most = room_for_files();
    let mut crowd = std::collections::VecDeque::new();
    for _ in 0..10_000 {
        let stream = std::os::unix::net::UnixStream::connect(&socket).expect("is accepted");
        crowd.push_back(stream);
        if crowd.len() > most {
            crowd.pop_front();
        }
    }
    assert_eq!(inside.call(command::READ, 0, 0, 10).data, [7; 10]);
    // Two that may stay, and those who are being told that they may not.
    let (threads, memory) = (process.status("Threads"), process.status("RssAnon"));
    assert!(threads < 50 && memory < 64 << 10, "{threads} {memory} KiB");
    drop(crowd);
    until("there is room again", || is_served(&socket));
    process.signal(rustix::process::Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
}

/// How many files this process may have open besides those it needs; as many as it is let.
fn room_for_files() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // What there is will do.
    let _ = setrlimit(Resource::Nofile, limit);
    let now = getrlimit(Resource::Nofile).current;
    let now = now.map_or(usize::MAX, |n| usize::try_from(n).expect("fits"));
    (now / 2).min(10_000)
}

#[test]
fn clients_that_ask_for_much_and_read_nothing_cost_bounded_memory() {
    let dir = scratch();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).expect("creates");
    file.set_len(1 << 30).expect("sets the length");
    let options = ["--persistent", "--nbd", "unix:s.sock", "disk.raw"];
    let process = Process::start(dir.path(), &options);
    let socket = dir.path().join("s.sock");
    let mut greedy = Vec::new();
    for index in 0..64 {
        let headers = [Headers::Simple, Headers::Structured, Headers::Extended][index % 3];
        let mut raw = Raw::ready(&socket, headers);
        // Sixteen times 32 MiB each: 32 GiB in all.
        for at in 0..16 {
            raw.request(command::READ, 0, at * 5 + 1, 32 << 20);
        }
        greedy.push(raw);
    }
    std::thread::sleep(std::time::Duration::from_secs(1));
    let mut witness = Raw::ready(&socket, Headers::Simple);
    assert_eq!(witness.call(command::READ, 0, 5, 3).data, [0; 3]);
    // What the server may lend, and something for each client and its threads.
    let memory = process.status("RssAnon");
    assert!(memory < (256 + 64) << 10, "{memory} KiB");
    let threads = process.status("Threads");
    assert!(threads < 64 * 17, "{threads}");
    drop(greedy);
    assert_eq!(witness.call(command::READ, 0, 5, 3).data, [0; 3]);
    process.signal(rustix::process::Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn wrong_ways_to_serve_are_refused() {
    let dir = scratch();
    image(dir.path(), &[7; 8192]);
    for (arguments, code, said) in [
        (&["disk.raw"][..], 2, "--nbd"),
        (&["--nbd", "unix:", "disk.raw"], 2, "unix:PATH"),
        (
            &["--nbd", "unix:s", "--name", "x", "y=disk.raw"],
            2,
            "--name",
        ),
        (
            &["--nbd", "unix:s", "--connections", "0", "disk.raw"],
            2,
            "0",
        ),
        (&["--nbd", "unix:s", "--bitmap", "b", "disk.raw"], 1, "'b'"),
        (
            &["--nbd", "unix:s", "--tls", "nowhere", "disk.raw"],
            1,
            "nowhere",
        ),
        (
            &["--nbd", "unix:/no/such/directory/s", "disk.raw"],
            1,
            "/no/such",
        ),
    ] {
        let mut command = vdtool();
        command.current_dir(dir.path()).arg("serve").args(arguments);
        let done = command.assert().code(code);
        let output = done.get_output();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(told.contains(said), "{arguments:?}: {told}");
        assert!(output.stdout.is_empty());
    }
}
