//! A front over a server without a kernel: whatever does not depend on the kind of server.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};

use crate::backend::Request;
use crate::cli::exit::Exit;
use crate::cli::{Cli, Command};
use crate::server::fake::FakeServer;

/// A serving thread, its server, and the scratch directory that the images are in.
struct Served {
    dir: tempfile::TempDir,
    server: Arc<FakeServer>,
    ended: Option<JoinHandle<Result<Exit, String>>>,
}

fn image(dir: &Path, name: &str, byte: u8, len: usize) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, vec![byte; len]).expect("writes");
    path
}

impl Served {
    /// Serves `a.raw`, 64 KiB of 1, and what else `words` say; `@` stands for the directory.
    fn new(words: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a scratch directory");
        image(dir.path(), "a.raw", 1, 64 << 10);
        image(dir.path(), "b.raw", 2, 32 << 10);
        let home = dir.path().to_str().expect("is text").to_owned();
        let control = format!("{home}/ctl");
        let line = ["vdtool", "serve", "-q", "-f", "raw", "--control", &control];
        let line = line.iter().map(ToString::to_string);
        let words = words.iter().map(|w| w.replace('@', &home));
        let cli = Cli::try_parse_from(line.chain(words)).expect("parses");
        let (sender, receiver) = mpsc::channel();
        let ended = thread::spawn(move || {
            let Command::Serve(args) = &cli.command else {
                panic!("serve was typed");
            };
            let start = move |exports| {
                let server = Arc::new(FakeServer::start(exports));
                sender.send(Arc::clone(&server)).expect("is waited for");
                Ok(server as _)
            };
            super::run::run(args, &cli.globals, start).map_err(|e| format!("{e:#}"))
        });
        let Ok(server) = receiver.recv() else {
            panic!("{:?}", ended.join().expect("no panic"));
        };
        Self {
            dir,
            server,
            ended: Some(ended),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("ctl")
    }

    fn client(&self) -> Client {
        let stream = UnixStream::connect(self.socket()).expect("connects");
        Client(BufReader::new(stream))
    }

    /// A command that succeeds.
    fn tell(&self, line: &str) -> Value {
        let line = line.replace('@', self.dir.path().to_str().expect("is text"));
        let mut answer = self.client().ask(&line);
        // A process that another test starts holds our locks until it is another program.
        for _ in 0..100 {
            if answer["error"]["class"] != "locked" {
                break;
            }
            thread::sleep(Duration::from_millis(10));
            answer = self.client().ask(&line);
        }
        assert!(answer.get("error").is_none(), "{line}: {answer}");
        answer["return"].clone()
    }

    /// A command that fails, and how: class and message.
    fn refused(&self, line: &str) -> (String, String) {
        let line = line.replace('@', self.dir.path().to_str().expect("is text"));
        let answer = self.client().ask(&line);
        let text = |key: &str| {
            answer["error"][key]
                .as_str()
                .expect("is an error")
                .to_owned()
        };
        (text("class"), text("message"))
    }

    fn status(&self) -> Value {
        self.tell("status")["exports"][0].clone()
    }

    fn read(&self, at: u64) -> crate::Result<u8> {
        let mut buf = [0];
        let request = Request::Read { at, buf: &mut buf };
        self.server.request(0, request).map(|()| buf[0])
    }

    fn write(&self, at: u64, byte: u8) -> crate::Result<()> {
        let request = Request::Write {
            at,
            buf: &[byte],
            fua: false,
        };
        self.server.request(0, request)
    }

    fn end(&mut self) -> Result<Exit, String> {
        let ended = self.ended.take().expect("ends once");
        ended.join().expect("no panic")
    }
}

struct Client(BufReader<UnixStream>);

impl Client {
    fn ask(&mut self, line: &str) -> Value {
        writeln!(self.0.get_mut(), "{line}").expect("is heard");
        let mut answer = String::new();
        self.0.read_line(&mut answer).expect("answers");
        serde_json::from_str(&answer).expect(&answer)
    }
}

#[test]
fn a_front_serves_tells_and_ends_with_the_image_closed() {
    let mut served = Served::new(&["--pid-file", "@/pid", "x=@/a.raw"]);
    assert_eq!(served.read(9).expect("reads"), 1);
    served.write(9, 7).expect("writes");
    let status = served.tell("status");
    assert_eq!(status["pid"], std::process::id());
    let export = &status["exports"][0];
    for (key, value) in [
        ("name", json!("x")),
        ("address", json!("fake:x")),
        ("format", json!("raw")),
        ("virtual-size", json!(65536)),
        ("read-only", json!(false)),
        ("state", json!("running")),
        ("io-status", json!("ok")),
        ("requests", json!(0)),
        ("highest-offset", json!(10)),
        ("limits", json!(null)),
    ] {
        assert_eq!(export[key], value, "{key}");
    }
    let stats = served.tell("stats")["exports"][0]["total"].clone();
    assert_eq!(stats["read"]["operations"], 1);
    assert_eq!(stats["write"]["bytes"], 1);
    assert_eq!(stats["max-depth"], 1);
    assert_eq!(stats["read"]["merged"], 3);
    assert_eq!(stats["flush"]["merged"], json!(null));
    let mode = std::fs::metadata(served.socket())
        .expect("is there")
        .permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    assert_eq!(served.tell("stop"), json!({}));
    assert_eq!(served.end(), Ok(Exit::Done));
    assert!(!served.socket().exists());
    assert!(!served.dir.path().join("pid").exists());
    let bytes = std::fs::read(served.dir.path().join("a.raw")).expect("reads");
    assert_eq!(bytes[8..11], [1, 7, 1]);
}

#[test]
fn a_paused_disk_holds_requests_and_a_resumed_one_makes_them() {
    let served = Served::new(&["@/a.raw"]);
    served.tell("pause");
    assert_eq!(served.status()["state"], "paused");
    thread::scope(|scope| {
        let held = scope.spawn(|| served.write(0, 3));
        served.tell("flush");
        assert!(!held.is_finished());
        served.tell("resume");
        held.join().expect("ends").expect("is made");
    });
    assert_eq!(served.status()["state"], "running");
}

#[test]
fn another_size_is_told_to_clients_and_less_needs_to_be_allowed() {
    let served = Served::new(&["@/a.raw"]);
    assert_eq!(served.tell("resize 1M")["virtual-size"], 1 << 20);
    assert_eq!(served.read(1 << 19).expect("reads"), 0);
    let (_, message) = served.refused("resize 4k");
    assert!(message.contains("--shrink"), "{message}");
    served.tell("resize --shrink 4k");
    let told = served.server.resized_to();
    let sizes: Vec<u64> = told.iter().map(|(_, size)| *size).collect();
    assert_eq!(sizes, [1 << 20, 4096]);
    served.read(4096).expect_err("is past the end");
}

#[test]
fn another_image_takes_the_place_of_the_first_which_is_let_go() {
    let served = Served::new(&["@/a.raw"]);
    let (class, _) = served.refused("change @/none.raw");
    assert_eq!(class, "not-found");
    assert_eq!(served.read(0).expect("reads"), 1);
    served.tell("change @/b.raw");
    assert_eq!(served.read(0).expect("reads"), 2);
    assert_eq!(served.server.resized_to(), [(String::new(), 32 << 10)]);
    let status = served.status();
    let name = status["image"].as_str().expect("is text");
    assert!(name.ends_with("/b.raw"), "{name}");
    // Another process may have the first one now; the second is locked.
    let other = Served::new(&["@/a.raw"]);
    let home = served.dir.path().to_str().expect("is text");
    other.tell(&format!("change {home}/a.raw"));
    let (class, _) = other.refused(&format!("change {home}/b.raw"));
    assert_eq!(class, "locked");
    assert_eq!(other.read(0).expect("reads"), 1);
}

#[test]
fn an_image_of_a_size_that_clients_cannot_be_told_of_is_refused_before_anything_changes() {
    let served = Served::new(&["@/a.raw"]);
    served.server.fix_size();
    let (class, message) = served.refused("change @/b.raw");
    assert_eq!(class, "unsupported", "{message}");
    assert_eq!(served.read(0).expect("reads"), 1);
    let name = served.status()["image"].as_str().map(ToOwned::to_owned);
    assert!(name.is_some_and(|name| name.ends_with("/a.raw")));
    // One of the same size is taken.
    image(served.dir.path(), "c.raw", 3, 64 << 10);
    served.tell("change @/c.raw");
    assert_eq!(served.read(0).expect("reads"), 3);
}

#[test]
fn a_server_that_is_handed_over_ends_with_the_image_closed() {
    let mut served = Served::new(&["@/a.raw"]);
    served.write(9, 7).expect("writes");
    assert_eq!(served.tell("stop --hand-over"), json!({}));
    assert_eq!(served.end(), Ok(Exit::Done));
    assert!(served.server.was_handed_over());
    let bytes = std::fs::read(served.dir.path().join("a.raw")).expect("reads");
    assert_eq!(bytes[8..11], [1, 7, 1]);
}

#[test]
fn a_snapshot_is_not_handed_over() {
    let served = Served::new(&["-s", "@/a.raw"]);
    served.write(9, 7).expect("writes");
    let (class, message) = served.refused("stop --hand-over");
    assert_eq!(class, "unsupported");
    assert!(message.contains("lose its writes"), "{message}");
    assert_eq!(served.read(9).expect("reads"), 7);
    let (class, _) = served.refused("stop --force --hand-over");
    assert_eq!(class, "usage");
}

#[test]
fn an_image_that_something_else_changed_is_opened_again() {
    let served = Served::new(&["@/a.raw"]);
    served.write(0, 9).expect("writes");
    image(served.dir.path(), "a.raw", 5, 8192);
    served.tell("reopen");
    assert_eq!(served.read(0).expect("reads"), 5);
    assert_eq!(served.status()["virtual-size"], 8192);
    std::fs::remove_file(served.dir.path().join("a.raw")).expect("removes");
    let (class, _) = served.refused("reopen");
    assert_eq!(class, "not-found");
    assert_eq!(served.status()["state"], "no-image");
    let (class, _) = served.refused("flush");
    assert_eq!(class, "not-found");
    thread::scope(|scope| {
        let held = scope.spawn(|| served.read(0));
        served.tell("resume");
        assert_eq!(served.status()["state"], "no-image");
        served.tell("change @/b.raw");
        assert_eq!(held.join().expect("ends").expect("reads"), 2);
    });
}

#[test]
fn where_clients_keep_the_size_an_image_of_another_is_not_opened_again() {
    let served = Served::new(&["@/a.raw"]);
    served.server.fix_size();
    served.write(0, 9).expect("writes");
    served.tell("reopen");
    assert_eq!(served.read(0).expect("reads"), 9);
    let next = image(served.dir.path(), "next.raw", 5, 8192);
    std::fs::rename(next, served.dir.path().join("a.raw")).expect("renames");
    let (class, _) = served.refused("reopen");
    assert_eq!(class, "unsupported");
    assert_eq!(served.status()["state"], "running");
    assert_eq!(
        served.read(0).expect("reads"),
        9,
        "the old file is still open"
    );
    std::fs::remove_file(served.dir.path().join("a.raw")).expect("removes");
    let (class, _) = served.refused("reopen");
    assert_eq!(class, "not-found");
    assert_eq!(served.status()["state"], "running");
    assert!(served.server.resized_to().is_empty());
}

/// Has the threads of a test end, also where it fails.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn images_are_changed_under_load_and_every_answer_is_of_one_of_them() {
    let served = Served::new(&["@/a.raw"]);
    let changes = 40;
    let done = &AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = AtEnd(done);
        for queue in 0..4u64 {
            let served = &served;
            scope.spawn(move || {
                let mut seen = [0u32; 3];
                while !done.load(Ordering::SeqCst) {
                    let byte = served.read(queue * 512).expect("reads");
                    seen[usize::from(byte)] += 1;
                }
                assert_eq!(seen[0], 0, "nobody reads what stands where no image is");
            });
        }
        for n in 0..changes {
            served.tell(if n % 2 == 0 {
                "change @/b.raw"
            } else {
                "change @/a.raw"
            });
            served.tell("pause");
            served.tell("reopen");
            served.tell("resume");
        }
    });
    let told = served.server.resized_to().len();
    assert_eq!(told, changes);
}

#[test]
fn a_snapshot_is_dropped_and_cannot_be_opened_again() {
    let mut served = Served::new(&["-s", "@/a.raw"]);
    served.write(0, 9).expect("writes");
    assert_eq!(served.read(0).expect("reads"), 9);
    let (class, _) = served.refused("reopen");
    assert_eq!(class, "unsupported");
    served.tell("stop");
    assert_eq!(served.end(), Ok(Exit::Done));
    let bytes = std::fs::read(served.dir.path().join("a.raw")).expect("reads");
    assert!(bytes.iter().all(|b| *b == 1));
}

#[test]
fn an_overlay_is_made_kept_and_used_again_for_the_same_image_alone() {
    for name in ["o.qcow2", "o.vhd"] {
        let overlay = format!("@/{name}");
        let mut served = Served::new(&["--overlay", &overlay, "@/a.raw"]);
        served.write(0, 9).expect("writes");
        let (class, _) = served.refused("change @/b.raw");
        assert_eq!(class, "unsupported", "{name}");
        served.tell("reopen");
        assert_eq!(served.read(0).expect("reads"), 9);
        assert_eq!(served.read(1).expect("reads"), 1);
        served.tell("stop");
        assert_eq!(served.end(), Ok(Exit::Done), "{name}");
        let home = served.dir.path().to_str().expect("is text").to_owned();
        let bytes = std::fs::read(format!("{home}/a.raw")).expect("reads");
        assert!(bytes.iter().all(|b| *b == 1));
        let path = format!("{home}/{name}");
        let again = Served::new(&["--overlay", &path, &format!("{home}/a.raw")]);
        assert_eq!(again.read(0).expect("reads"), 9);
        again.tell("stop");
    }
}

#[test]
fn limits_are_set_changed_and_lifted() {
    let served = Served::new(&["--limit", "iops-wr=1,iops-wr-burst=5", "@/a.raw"]);
    let limits = served.status()["limits"].clone();
    let expected = json!({ "iops-wr": 1, "iops-wr-burst": 5, "iops-wr-burst-length": 1 });
    assert_eq!(limits, expected);
    thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| served.write(0, 3).expect("writes, in the end"));
        }
        assert_eq!(served.tell("limit none"), json!({}));
    });
    let (class, message) = served.refused("limit bps=5,bps-rd=5");
    assert_eq!(class, "usage");
    assert!(message.contains("bps-rd"), "{message}");
    served.tell("limit bps=1G");
    assert_eq!(served.status()["limits"], json!({ "bps": 1 << 30 }));
}

#[test]
fn several_disks_are_told_apart_and_may_share_limits() {
    let limits = ["--limit", "group=g,iops=7", "--limit", "y:iops=9"];
    let words = [&limits[..], &["x=@/a.raw", "y=@/b.raw"]].concat();
    let served = Served::new(&words);
    let status = served.tell("status")["exports"].clone();
    assert_eq!(status[0]["limits"]["iops"], 7);
    assert_eq!(status[1]["limits"]["iops"], 9);
    let (class, message) = served.refused("resize 1M");
    assert_eq!(class, "usage");
    assert!(message.contains("--export"), "{message}");
    served.tell("resize --export=y 1M");
    assert_eq!(served.server.resized_to(), [("y".to_owned(), 1 << 20)]);
    let (class, _) = served.refused("status --export z");
    assert_eq!(class, "not-found");
    served.tell("pause --export x");
    let status = served.tell("status")["exports"].clone();
    assert_eq!(status[0]["state"], "paused");
    assert_eq!(status[1]["state"], "running");
}

#[test]
fn a_client_that_hangs_or_talks_nonsense_is_in_nobodys_way() {
    let served = Served::new(&["@/a.raw"]);
    let mut silent: Vec<Client> = (0..10).map(|_| served.client()).collect();
    write!(silent[0].0.get_mut(), "sta").expect("is heard");
    served.tell("status");
    let mut client = served.client();
    for line in [
        "nonsense",
        "status 'x",
        "resize",
        "resize x",
        "status --help",
        "\u{1b}[2J",
    ] {
        let answer = client.ask(line);
        assert_eq!(answer["error"]["class"], "usage", "{line}: {answer}");
        assert!(!answer.to_string().contains('\u{1b}'));
    }
    writeln!(client.0.get_mut(), "\n  # a comment").expect("is heard");
    assert_eq!(
        client.ask("status")["return"]["exports"][0]["state"],
        "running"
    );
    // The answer may come before all of it is sent.
    let _ = writeln!(client.0.get_mut(), "{}", "x".repeat(100_000));
    let mut answer = String::new();
    client.0.read_line(&mut answer).expect("answers");
    assert!(answer.contains("usage"), "{answer}");
    let mut silent: Vec<Client> = (0..64).map(|_| served.client()).collect();
    let mut answer = String::new();
    let last = silent.last_mut().expect("has some");
    last.0.read_line(&mut answer).expect("is told");
    assert!(answer.contains("too many"), "{answer}");
}

#[test]
fn what_holds_a_disk_does_not_keep_it_from_ending() {
    let mut served = Served::new(&["--limit", "iops=1", "@/a.raw"]);
    served.tell("pause");
    thread::scope(|scope| {
        let held: Vec<_> = (0..5).map(|_| scope.spawn(|| served.write(0, 3))).collect();
        served.tell("stop");
        for held in held {
            let error = held.join().expect("ends").expect_err("was held");
            assert_eq!(error.errno(), libc::ESHUTDOWN);
        }
    });
    assert_eq!(served.end(), Ok(Exit::Done));
}

#[test]
fn a_server_that_fails_ends_it_with_the_images_closed() {
    let mut served = Served::new(&["@/a.raw"]);
    served.write(0, 3).expect("writes");
    served.server.fail("lost the kernel");
    assert_eq!(served.end(), Err("lost the kernel".to_owned()));
    let again = served.server.request(0, Request::Flush);
    again.expect_err("is over");
}

#[test]
fn a_second_socket_of_that_name_is_refused_and_a_dead_one_replaced() {
    let served = Served::new(&["@/a.raw"]);
    let error = super::control::bind(&served.socket()).expect_err("is in use");
    assert_eq!(error.kind(), crate::ErrorKind::Locked);
    let dead = served.dir.path().join("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("binds"));
    super::control::bind(&dead).expect("nobody listens");
    let error = super::control::bind(&served.dir.path().join("a.raw")).expect_err("is a file");
    assert!(error.to_string().contains("not a socket"), "{error}");
    assert!(served.dir.path().join("a.raw").exists());
    drop(served);
    thread::sleep(Duration::from_millis(1));
}
