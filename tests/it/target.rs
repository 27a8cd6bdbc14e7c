//! Where new images go and what is left when they do not get there: kills, signals, descriptors,
//! images of two files.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::util::{Seeded, killable, peer, requires, scratch, skipped, vdtool};

const BINARY: &str = env!("CARGO_BIN_EXE_vdtool");

fn works(dir: &Path, line: &str) -> String {
    let mut command = vdtool();
    let done = command.current_dir(dir).args(line.split(' ')).assert();
    String::from_utf8(done.success().get_output().stdout.clone()).expect("is text")
}

fn fails(dir: &Path, line: &str, code: i32) -> String {
    let mut command = vdtool();
    let done = command.current_dir(dir).args(line.split(' ')).assert();
    String::from_utf8(done.code(code).get_output().stderr.clone()).expect("is text")
}

/// What a shell prints for a script in which `$0` is the binary.
fn shell(dir: &Path, script: &str) -> String {
    peer("bash", dir, ["-c", script, BINARY])
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("reads");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Names that begin with a dot: those of files on their way.
fn hidden(dir: &Path) -> Vec<String> {
    let all = names(dir).into_iter();
    all.filter(|name| name.starts_with('.')).collect()
}

fn start(dir: &Path, line: &str) -> Child {
    let mut command = killable();
    command.current_dir(dir).args(line.split(' '));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command.stderr(Stdio::piped()).spawn().expect("starts")
}

/// Waits until the new image is there, under a name of its own or without one.
pub(crate) fn wait_until_begun(dir: &Path, child: &mut Child) {
    let open = format!("/proc/{}/fd", child.id());
    let dir = fs::canonicalize(dir).expect("is there");
    let is_new = |link: std::path::PathBuf| {
        let text = link.to_string_lossy().into_owned();
        link.starts_with(&dir) && (text.ends_with(" (deleted)") || text.ends_with(".tmp"))
    };
    let begun = || {
        let entries = fs::read_dir(&open).into_iter().flatten().flatten();
        let mut links = entries.filter_map(|e| fs::read_link(e.path()).ok());
        links.any(is_new)
    };
    let since = Instant::now();
    while !begun() && child.try_wait().expect("waits").is_none() {
        assert!(since.elapsed() < Duration::from_secs(60), "did not begin");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("is there");
}

/// Whether files without names can be made here, as on most local file systems.
fn has_unnamed(dir: &Path) -> bool {
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR;
    let made = rustix::fs::open(dir, flags, 0o600.into());
    if made.is_err() {
        skipped("no files without names here");
    }
    made.is_ok()
}

fn data(dir: &Path, name: &str, seed: &str, len: usize) {
    fs::write(dir.join(name), Seeded::new(seed).bytes(len)).expect("writes");
}

#[test]
fn without_procfs_images_are_made_as_well_and_signals_clean_up() {
    let scratch = scratch();
    let dir = scratch.path();
    if !rustix::process::geteuid().is_root() {
        return skipped("only root changes its root directory");
    }
    fs::create_dir(dir.join("new")).expect("makes");
    fs::copy(BINARY, dir.join("new/vdtool")).expect("copies");
    data(&dir.join("new"), "a.raw", "a", 300_000);
    let script = "cd new; V='chroot . /vdtool'; for i in 1 2; do \
                  $V convert -q a.raw t.raw && $V convert -q -O qcow2 -o data_file=d.raw a.raw i.qcow2 || exit; done; \
                  $V compare a.raw t.raw; $V compare a.raw i.qcow2; \
                  for s in HUP TERM QUIT KILL; do for name in t.raw u.raw; do $V convert -q -r 50k a.raw $name & \
                  n=0; while ! ls -A | grep -q '^[.].*-.*[.]tmp$'; do sleep 0.01; n=$((n+1)); [ $n -lt 3000 ] || exit; done; sleep 0.05; \
                  kill -$s $!; wait $!; echo $s $name $? $(ls -A | grep -c '^[.]'); \
                  $V create -q -f raw $name 1M; done; rm u.raw; done; ls -mA";
    let text = shell(dir, script);
    let same = "Images are identical.\n";
    let signals = [
        ("HUP", 129, 0),
        ("TERM", 143, 0),
        ("QUIT", 131, 0),
        ("KILL", 137, 1),
    ];
    let signals = signals.map(|(name, code, left)| {
        format!("{name} t.raw {code} {left}\n{name} u.raw {code} {left}\n")
    });
    let names = "a.raw, d.raw, i.qcow2, t.raw, vdtool\n";
    assert_eq!(text, format!("{same}{same}{}{names}", signals.concat()));
}

#[test]
fn a_closed_pipe_changes_no_verdict() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 1 << 20);
    data(dir, "b.raw", "b", 1 << 20);
    works(dir, "create -q -f vhd bad.vhd 10M");
    let mut bytes = fs::read(dir.join("bad.vhd")).expect("reads");
    let end = bytes.len() - 512;
    bytes[end..].fill(0x55);
    fs::write(dir.join("bad.vhd"), bytes).expect("writes");
    let script = "io -r -c 'read -P 7 0 512' -c 'read -v 0 64k'";
    for (line, code) in [
        ("check bad.vhd", 2),
        ("check --output json bad.vhd", 2),
        ("compare a.raw b.raw", 1),
        ("compare --output json a.raw b.raw", 1),
        ("compare --output json a.raw a.raw", 0),
        ("compare a.raw nothing.raw", 2),
        (&format!("{script} a.raw"), 1),
        ("io -r -c 'read -v 0 64k' -c 'read -P 7 0 512' a.raw", 1),
        ("io -r -c 'read -v 0 64k' -c 'nonsense' a.raw", 1),
        ("io -r -c 'read -v 0 64k' a.raw", 0),
        ("info a.raw", 0),
        ("map a.raw", 0),
        ("convert -O raw a.raw -", 0),
    ] {
        for closed in ["", ">&- 2>&-", ">&6", ">&6 2>&6"] {
            // The pipe is closed for certain once its reader has gone.
            let script = format!(
                "mkfifo p; exec 5<>p; exec 6>p 7<p; exec 5>&- 7<&-; rm p; \
                 exec \"$0\" {line} {closed}"
            );
            let status = Command::new("bash")
                .args(["-c", &script, BINARY])
                .current_dir(dir)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
            let status = status.expect("runs");
            assert_eq!(status.code(), Some(code), "{line} {closed}");
        }
    }
}

#[test]
fn commands_that_nobody_listens_to_are_carried_out_all_the_same() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![0; 65536]).expect("writes");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let status = Command::new(BINARY)
        .current_dir(dir)
        .args([
            "io",
            "-c",
            "read -v 0 64k",
            "-c",
            "write -P 5 0 512",
            "a.raw",
        ])
        .stdout(writer)
        .status();
    assert_eq!(status.expect("runs").code(), Some(0));
    assert_eq!(fs::read(dir.join("a.raw")).expect("reads")[..512], [5; 512]);
    // What is said before and after the work.
    for line in [
        "create -f qcow2 -b a.raw -F raw b.qcow2",
        "resize b.qcow2 +1M",
        "create c.raw 1M",
        "commit b.qcow2",
    ] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(BINARY);
        let command = command.current_dir(dir).args(line.split(' '));
        let status = command.stdout(writer).status().expect("runs");
        assert_eq!(status.code(), Some(0), "{line}");
    }
    assert_eq!(names(dir), ["a.raw", "b.qcow2", "c.raw"]);
    let text = works(dir, "info --output json b.qcow2");
    assert!(
        text.contains(&format!(": {},", 65536 + (1 << 20))),
        "{text}"
    );
}

#[test]
fn a_connection_that_breaks_is_no_closed_pipe() {
    let scratch = scratch();
    let dir = scratch.path();
    let socket = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("binds");
    std::thread::spawn(move || {
        // Whoever connects is hung up on before it has said a word.
        socket.incoming().for_each(drop);
    });
    fails(dir, "ctl s status", 1);
    fails(dir, "convert -O raw nbd+unix:///?socket=s out.raw", 1);
    assert_eq!(names(dir), ["s"]);
}

#[test]
fn a_kill_leaves_no_name_of_a_new_image_and_the_next_run_removes_that_of_a_replaced_one() {
    let scratch = scratch();
    let dir = scratch.path();
    if !has_unnamed(dir) {
        return;
    }
    data(dir, "a.raw", "a", 1 << 20);
    fs::write(dir.join("old.raw"), "old").expect("writes");
    for name in ["new.raw", "new.qcow2", "old.raw"] {
        let line = format!("convert -r 50k a.raw {name}");
        let mut child = start(dir, &line);
        wait_until_begun(dir, &mut child);
        send(&child, Signal::KILL);
        child.wait().expect("ends");
        assert_eq!(names(dir), ["a.raw", "old.raw"], "{name}");
    }
    assert_eq!(fs::read(dir.join("old.raw")).expect("reads"), b"old");
    if !requires("strace") {
        return;
    }
    let killed = |calls: &str, line: &str| {
        let inject = format!("inject={calls}:signal=SIGKILL:when=1");
        let mut traced = Command::new("strace");
        traced.args([
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            "trace=linkat,renameat,renameat2",
        ]);
        traced.args(["-e", &inject, BINARY]).args(line.split(' '));
        let status = traced.current_dir(dir).stderr(Stdio::null()).status();
        assert!(!status.expect("runs").success(), "{calls} was not called");
    };
    killed("renameat", "convert -q a.raw old.raw");
    assert_eq!(hidden(dir).len(), 1, "between the link and the rename");
    // Of another name it is left alone.
    works(dir, "convert a.raw other.raw");
    assert_eq!(hidden(dir).len(), 1);
    works(dir, "convert a.raw old.raw");
    assert_eq!(names(dir), ["a.raw", "old.raw", "other.raw"]);
}

#[test]
fn what_another_run_is_making_is_left_alone() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 300_000);
    let line = "convert -r 200k a.raw b.raw";
    let mut children = [start(dir, line), start(dir, line), start(dir, line)];
    for child in &mut children {
        wait_until_begun(dir, child);
    }
    works(dir, "create -q -f raw c.raw 1M");
    let ends = children.map(|child| child.wait_with_output().expect("ends"));
    let done = ends.iter().filter(|e| e.status.success()).count();
    assert_eq!(done, 1, "{ends:?}");
    assert_eq!(names(dir), ["a.raw", "b.raw", "c.raw"]);
    works(dir, "compare a.raw b.raw");
}

#[test]
fn every_signal_that_ends_a_job_cleans_up_however_often_it_comes() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 1 << 20);
    fs::write(dir.join("old.raw"), "old").expect("writes");
    for signal in [
        Signal::INT,
        Signal::TERM,
        Signal::HUP,
        Signal::QUIT,
        Signal::USR2,
        Signal::ALARM,
        Signal::XCPU,
    ] {
        for name in ["new.raw", "old.raw"] {
            let mut child = start(dir, &format!("convert -r 50k a.raw {name}"));
            wait_until_begun(dir, &mut child);
            for _ in 0..3 {
                send(&child, signal);
            }
            let status = child.wait().expect("ends");
            assert_eq!(status.code(), Some(128 + signal.as_raw()), "{signal:?}");
            assert_eq!(names(dir), ["a.raw", "old.raw"], "{signal:?}");
        }
    }
    assert_eq!(fs::read(dir.join("old.raw")).expect("reads"), b"old");
}

#[test]
fn a_job_that_is_stuck_ends_at_a_signal_a_second_after_the_first() {
    let scratch = scratch();
    let dir = scratch.path();
    // Whoever connects waits for ever.
    let socket = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("binds");
    for line in [
        "convert -O raw nbd+unix:///?socket=s out.raw",
        "serve --nbd unix:t nbd+unix:///?socket=s",
    ] {
        let mut child = start(dir, line);
        let (_connection, _) = socket.accept().expect("comes");
        std::thread::sleep(Duration::from_millis(100));
        for wait in [0, 50, 1100] {
            std::thread::sleep(Duration::from_millis(wait));
            assert!(child.try_wait().expect("waits").is_none(), "ended too soon");
            send(&child, Signal::TERM);
        }
        assert_eq!(child.wait().expect("ends").code(), Some(143), "{line}");
    }
    assert_eq!(names(dir), ["s"]);
}

/// What a command says to SIGUSR1, which it hears over and over from when it listens.
fn asked_all_the_time(dir: &Path, line: &str) -> String {
    let mut child = start(dir, line);
    let status = format!("/proc/{}/status", child.id());
    let listens = || {
        let status = fs::read_to_string(&status).unwrap_or_default();
        let mask = status.lines().find_map(|l| l.strip_prefix("SigCgt:"));
        let mask = mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> (Signal::USR1.as_raw() - 1) & 1 == 1)
    };
    let mut stderr = child.stderr.take().expect("is piped");
    let told = std::thread::spawn(move || {
        // As it comes: a pipe that is full would stop the job.
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    while child.try_wait().expect("waits").is_none() {
        if listens() {
            send(&child, Signal::USR1);
        }
    }
    let code = child.wait().expect("ends").code();
    assert_eq!(code, Some(0), "{line}");
    told.join().expect("ends").expect("is text")
}

#[test]
fn how_far_a_job_is_is_told_when_sigusr1_asks() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 400_000);
    for (line, asked) in [
        ("convert -r 50k a.raw c.raw", "/100%)\n"),
        ("convert -q -r 50k a.raw c.raw", "/100%)\n"),
        (
            "convert --progress json -r 50k a.raw c.raw",
            "{\"job\":\"convert\"",
        ),
        (
            "create -q -f raw -o preallocation=full d.raw 8G",
            "/100%)\n",
        ),
    ] {
        let mut child = start(dir, line);
        wait_until_begun(dir, &mut child);
        let mut stderr = child.stderr.take().expect("is piped");
        let mut text = String::new();
        while !text.contains(asked) {
            assert!(child.try_wait().expect("waits").is_none(), "{line}: {text}");
            send(&child, Signal::USR1);
            let mut buf = [0; 1000];
            let len = stderr.read(&mut buf).expect("reads");
            text.push_str(&String::from_utf8_lossy(&buf[..len]));
        }
        send(&child, Signal::TERM);
        assert_eq!(
            child.wait().expect("ends").code(),
            Some(143),
            "{line}: {text}"
        );
    }
    // Changes of an image's metadata, which end by themselves.
    works(
        dir,
        "create -q -o cluster_size=512,preallocation=metadata,refcount_bits=64 m.qcow2 64M",
    );
    for line in [
        "snapshot -c a m.qcow2",
        "snapshot -a a m.qcow2",
        "snapshot -d a m.qcow2",
        "amend -o refcount_bits=32 m.qcow2",
        "resize --shrink m.qcow2 1M",
        "measure -O qcow2 -f raw m.qcow2",
    ] {
        let mut text = String::new();
        let job = line.split(' ').next().expect("is there");
        for _ in 0..50 {
            fs::copy(dir.join("m.qcow2"), dir.join("before")).expect("copies");
            text = asked_all_the_time(dir, line);
            if text.contains(job) || text.contains("/100%)") {
                break;
            }
            fs::rename(dir.join("before"), dir.join("m.qcow2")).expect("renames");
        }
        let told = text.starts_with(job) || text.starts_with("    (");
        assert!(told, "{line}: {text}");
    }
    // Those that have nothing to tell go on all the same.
    let mut child = Command::new(BINARY);
    child
        .current_dir(dir)
        .args(["io", "-r", "-c", "sleep 300", "a.raw"]);
    let mut child = child.stdout(Stdio::null()).spawn().expect("starts");
    std::thread::sleep(Duration::from_millis(150));
    send(&child, Signal::USR1);
    assert_eq!(child.wait().expect("ends").code(), Some(0));
}

#[test]
fn a_descriptor_is_written_through_and_not_to_a_name_of_its_file() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "s.raw", "s", 1 << 20);
    works(dir, "convert s.raw expected.qcow2");
    for at in ["/proc/self/fd/3", "/dev/fd/3", "link"] {
        let script = format!(
            "ln -s /dev/fd/3 link; set -e; \
             exec 3<>x; echo longer than nothing >x; mv x moved; \"$0\" convert -q -O raw s.raw {at}; cmp s.raw moved; ls -A; rm moved; \
             exec 3<>x; rm x; \"$0\" convert -q -O raw s.raw {at}; cmp s.raw /proc/self/fd/3; \
             exec 3<>x; rm x; \"$0\" convert -q -O qcow2 s.raw {at}; \"$0\" compare /proc/self/fd/3 s.raw; \
             exec 3<>x; rm x; \"$0\" create -q -f raw {at} 2M; stat -Lc %s /proc/self/fd/3; ls -A; rm link"
        );
        let text = shell(dir, &script);
        let lines: Vec<&str> = text.lines().collect();
        let first = ["expected.qcow2", "link", "moved", "s.raw"];
        let last = [
            "Images are identical.",
            "2097152",
            "expected.qcow2",
            "link",
            "s.raw",
        ];
        assert_eq!(lines, [&first[..], &last[..]].concat(), "{at}");
    }
    // Files in memory have no name at all.
    let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::empty());
    let memory = fs::File::from(memory.expect("is made"));
    let mut command = Command::new(BINARY);
    command
        .current_dir(dir)
        .args(["convert", "-q", "-O", "raw", "s.raw"]);
    let own = format!("/proc/{}/fd/{}", std::process::id(), {
        use std::os::fd::AsRawFd;
        memory.as_fd().as_raw_fd()
    });
    let status = command.arg(own).status().expect("runs");
    assert!(status.success());
    assert_eq!(memory.metadata().expect("is there").len(), 1 << 20);
    assert_eq!(names(dir), ["expected.qcow2", "s.raw"]);
}

#[test]
fn a_pipe_behind_a_descriptor_is_a_stream() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "s.raw", "s", 1 << 20);
    let script = "\"$0\" convert -O raw s.raw /dev/stdout | cmp s.raw -; echo ${PIPESTATUS[*]}; \
                  \"$0\" convert -O raw s.raw /proc/self/fd/1 | wc -c; \
                  \"$0\" convert -O raw s.raw >(wc -c >count); while [ ! -s count ]; do sleep 0.01; done; cat count; rm count; \
                  \"$0\" convert -O qcow2 s.raw /dev/stdout | cat >t.qcow2; \"$0\" compare s.raw t.qcow2; \
                  \"$0\" convert -O vhd s.raw /dev/stdout 2>&1 | cat; \
                  \"$0\" create -f raw /dev/stdout 1M 2>&1 | cat";
    let text = shell(dir, script);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..4],
        ["0 0", "1048576", "1048576", "Images are identical."]
    );
    assert!(
        lines[4].contains("vhd") && lines[4].contains("stream"),
        "{text}"
    );
    assert!(lines[5].contains("is a pipe"), "{text}");
    assert_eq!(names(dir), ["s.raw", "t.qcow2"]);
}

#[test]
fn what_a_descriptor_would_not_write_from_the_start_is_refused_with_nothing_lost() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "s.raw", "s", 4096);
    for (open, why) in [
        ("exec 3>>log", "appending"),
        ("exec 3<log", "reading only"),
        ("exec 3<>log; read -u 3 line", "read or written already"),
        ("exec 3>/dev/null", "character device"),
    ] {
        let script = format!(
            "echo precious >log; {open}; for verb in 'convert -O raw s.raw' 'create -f raw'; do \
             \"$0\" $verb /dev/fd/3 $([ \"$verb\" = 'create -f raw' ] && echo 1M) 2>&1 && echo done; done; cat log"
        );
        let text = shell(dir, &script);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines.len() == 3 && lines[2] == "precious", "{text}");
        assert!(lines[..2].iter().all(|line| line.contains(why)), "{text}");
    }
    works(dir, "create -q -f raw base.raw 1M");
    for options in ["-b base.raw -F raw", "-o data_file=d.raw"] {
        let script =
            format!("exec 3<>x; \"$0\" create -f qcow2 {options} /dev/fd/3 1M 2>&1; stat -c %s x");
        let text = shell(dir, &script);
        assert!(
            text.contains("no directory") && text.ends_with("\n0\n"),
            "{text}"
        );
    }
    works(dir, "create -q -f raw v.raw 1M");
    let script =
        "exec 3<>x; timeout 5 \"$0\" serve --nbd unix:sock --pid-file /dev/fd/3 v.raw 2>&1; ls -A";
    let text = shell(dir, script);
    assert!(text.contains("no place for a process id"), "{text}");
    assert!(!text.contains("sock\n"), "{text}");
}

#[test]
fn a_file_that_nothing_can_be_renamed_over_is_refused_before_any_work() {
    let scratch = scratch();
    let dir = scratch.path();
    if !rustix::process::geteuid().is_root() {
        return skipped("only root mounts");
    }
    data(dir, "s.raw", "s", 1 << 20);
    // In a namespace of its own, so that nothing stays mounted.
    let script = "touch a b; mount --bind a b || exit 7; \
                  \"$0\" convert -O qcow2 s.raw b; echo $?; \"$0\" create -f raw b 1M; echo $?; \
                  cat b | wc -c; \"$0\" create -q -f raw b.raw 1M; \
                  mount --bind b.raw b; \"$0\" convert -n -O raw s.raw b && cmp s.raw b.raw; ls -A | grep -c '^[.]'";
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", script, BINARY])
        .current_dir(dir)
        .output();
    let output = match output {
        Ok(output) if output.status.code() != Some(7) => output,
        _ => return skipped("nothing can be mounted here"),
    };
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert_eq!(text, "63\n63\n0\n0\n", "{errors}");
    let named = errors.lines().filter(|line| line.contains("convert -n"));
    assert_eq!(named.count(), 2, "{errors}");
}

#[test]
fn an_image_of_two_files_that_is_replaced_is_the_old_one_or_the_new_one_whenever_it_is_killed() {
    let scratch = scratch();
    let dir = scratch.path();
    if !requires("strace") {
        return;
    }
    // Each has clusters where the other has none, so that a map of one over data of the other shows.
    let mut old = Seeded::new("old").bytes(1 << 20);
    let mut new = Seeded::new("new").bytes(1 << 20);
    for at in 0..16 {
        let zeroed = if at % 2 == 0 { &mut old } else { &mut new };
        zeroed[at << 16..(at + 1) << 16].fill(0);
    }
    fs::write(dir.join("old.raw"), old).expect("writes");
    fs::write(dir.join("new.raw"), new).expect("writes");
    let is = |source: &str| {
        let mut command = vdtool();
        command
            .current_dir(dir)
            .args(["compare", "-q", source, "i.qcow2"]);
        command.output().expect("runs").status.success()
    };
    let convert = "convert -q -O qcow2 -o data_file=d.raw";
    let calls = "linkat,renameat,renameat2,unlinkat,pwrite64,fsync,fdatasync";
    works(dir, &format!("{convert} old.raw i.qcow2"));
    fs::create_dir(dir.join("kept")).expect("makes");
    for name in ["i.qcow2", "d.raw"] {
        fs::rename(dir.join(name), dir.join("kept").join(name)).expect("renames");
    }
    let mut states = Vec::new();
    for (taken, label) in [("both", "d"), ("data alone", "-")] {
        let mut when = 1;
        loop {
            names(dir)
                .iter()
                .filter(|name| ["i.qcow2", "d.raw"].contains(&&***name) || name.starts_with('.'))
                .for_each(|name| fs::remove_file(dir.join(name)).expect("removes"));
            for name in ["i.qcow2", "d.raw"]
                .iter()
                .skip(usize::from(taken != "both"))
            {
                fs::copy(dir.join("kept").join(name), dir.join(name)).expect("copies");
            }
            let mut traced = Command::new("strace");
            traced.args([
                "-f",
                "-qq",
                "-o",
                "/dev/null",
                "-e",
                &format!("trace={calls}"),
            ]);
            traced.args(["-e", &format!("inject={calls}:signal=SIGKILL:when={when}")]);
            traced
                .arg(BINARY)
                .args(convert.split(' '))
                .args(["-j", "1", "new.raw", "i.qcow2"]);
            let ended = traced.current_dir(dir).stderr(Stdio::null()).status();
            let there = dir.join("i.qcow2").exists();
            let old = there && is("old.raw");
            let new = there && !old && is("new.raw");
            let none = taken != "both" && !there;
            assert!(
                old || new || none,
                "{taken}, killed at call {when}: {:?}",
                names(dir)
            );
            states.push(format!("{label}{}{}", u8::from(old), hidden(dir).len()));
            if ended.expect("runs").success() {
                assert!(new && hidden(dir).is_empty());
                break;
            }
            if new || when % 8 == 0 {
                // The next run cleans up, and finds its way from there.
                works(dir, &format!("{convert} old.raw i.qcow2"));
                assert!(is("old.raw"));
                assert_eq!(hidden(dir), [""; 0], "{taken}, killed at call {when}");
                works(dir, "check -q i.qcow2");
            }
            when += 1;
        }
    }
    // It was killed before, between and after.
    assert!(
        states.iter().any(|s| s == "d10") && states.iter().any(|s| s == "d01"),
        "{states:?}"
    );
}

#[test]
fn an_image_whose_header_has_no_room_for_another_name_is_not_replaced_with_its_data_file() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 1 << 20);
    data(dir, "b.raw", "b", 1 << 20);
    let line = "convert -q -O qcow2 -o cluster_size=512,data_file=d.raw";
    works(dir, &format!("{line} a.raw i.qcow2"));
    let error = fails(dir, &format!("{line} b.raw i.qcow2"), 1);
    assert!(error.contains("remove that first"), "{error}");
    works(dir, "compare a.raw i.qcow2");
    assert_eq!(names(dir), ["a.raw", "b.raw", "d.raw", "i.qcow2"]);
    fs::remove_file(dir.join("d.raw")).expect("removes");
    works(dir, &format!("{line} b.raw i.qcow2"));
    works(dir, "compare b.raw i.qcow2");
}

#[test]
fn the_files_of_an_image_keep_what_the_replaced_ones_had() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "a.raw", "a", 1 << 20);
    for line in [
        "create -q -f qcow2 -o data_file=d.raw,data_file_raw=on i.qcow2 1M",
        "convert -q -O qcow2 -o data_file=d.raw a.raw i.qcow2",
    ] {
        works(dir, line);
        let info = works(dir, "info --output json i.qcow2");
        assert!(info.contains("\"d.raw\""), "{info}");
        let set = |name: &str, mode| {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(dir.join(name), mode).expect("sets");
        };
        set("i.qcow2", 0o640);
        set("d.raw", 0o600);
    }
    works(dir, "convert -q -O qcow2 -o data_file=d.raw a.raw i.qcow2");
    let mode = |name: &str| dir.join(name).metadata().expect("is there").mode() & 0o7777;
    assert_eq!((mode("i.qcow2"), mode("d.raw")), (0o640, 0o600));
    works(dir, "compare i.qcow2 a.raw");
    works(dir, "check i.qcow2");
    assert_eq!(names(dir), ["a.raw", "d.raw", "i.qcow2"]);
}

#[test]
fn space_that_was_asked_for_is_taken_on_file_systems_that_cannot_reserve_it() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = vec![0; 8 << 20];
    bytes[..1 << 20].copy_from_slice(&Seeded::new("s").bytes(1 << 20));
    bytes[5 << 20..6 << 20].copy_from_slice(&Seeded::new("t").bytes(1 << 20));
    fs::write(dir.join("s.raw"), &bytes).expect("writes");
    let space = |name: &str| fs::metadata(dir.join(name)).expect("is there").blocks() * 512;
    for (word, traced) in [
        ("falloc", false),
        ("full", false),
        ("falloc", true),
        ("full", true),
    ] {
        if traced && !requires("strace") {
            continue;
        }
        let run = |line: &str| {
            let line = line.replace("MODE", word);
            if !traced {
                works(dir, &line);
                return;
            }
            let mut command = Command::new("strace");
            command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fallocate"]);
            command.args(["-e", "inject=fallocate:error=EOPNOTSUPP", BINARY]);
            let status = command.current_dir(dir).args(line.split(' ')).status();
            assert!(status.expect("runs").success(), "{line}");
        };
        for (line, name) in [
            ("create -q -f raw -o preallocation=MODE a.raw 8M", "a.raw"),
            (
                "create -q -f vhd -o subformat=fixed,preallocation=MODE a.vhd 8M",
                "a.vhd",
            ),
            (
                "create -q -f qcow2 -o preallocation=MODE a.qcow2 8M",
                "a.qcow2",
            ),
            (
                "create -q -f qcow2 -o data_file=d.raw,preallocation=MODE x.qcow2 8M",
                "d.raw",
            ),
            ("convert -O raw -o preallocation=MODE s.raw b.raw", "b.raw"),
            (
                "convert -O vhd -o subformat=fixed,preallocation=MODE s.raw b.vhd",
                "b.vhd",
            ),
            (
                "convert -O qcow2 -o preallocation=MODE s.raw b.qcow2",
                "b.qcow2",
            ),
        ] {
            run(line);
            assert!(space(name) >= 8 << 20, "{line} {word}: {}", space(name));
            if line.starts_with("convert") {
                works(dir, &format!("compare {name} s.raw"));
            }
        }
        works(dir, "create -q -f raw c.raw 1M");
        works(dir, "create -q -f vhd -o subformat=fixed c.vhd 1M");
        run("resize -q --preallocation=MODE c.raw 9M");
        assert!(space("c.raw") >= 8 << 20, "{word}");
        run("resize -q --preallocation=MODE c.vhd 9M");
        assert!(space("c.vhd") >= 8 << 20, "{word}");
        for name in names(dir).iter().filter(|name| *name != "s.raw") {
            fs::remove_file(dir.join(name)).expect("removes");
        }
    }
}

#[test]
fn space_that_a_device_has_or_has_not_is_not_promised() {
    let scratch = scratch();
    let dir = scratch.path();
    data(dir, "s.raw", "s", 1 << 20);
    fs::File::create(dir.join("dev"))
        .and_then(|f| f.set_len(64 << 20))
        .expect("grows");
    let script = "L=$(losetup -f --show dev 2>/dev/null) || exit 0; \
                  for line in 'convert -O raw -o preallocation=full s.raw' 'convert -O raw -o preallocation=falloc s.raw' \
                  'convert -O qcow2 -o preallocation=falloc s.raw'; do \"$0\" $line $L 2>&1; echo $?; done; \
                  \"$0\" create -q -f raw -o preallocation=full $L 1M 2>&1; echo $?; losetup -d $L; du -k dev";
    let text = shell(dir, script);
    if text.is_empty() {
        return skipped("no loop device here");
    }
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 9, "{text}");
    assert!(lines[8].starts_with("0"), "nothing is written: {text}");
    for pair in lines[..8].chunks(2) {
        assert!(
            pair[0].contains("preallocation") && pair[1] == "63",
            "{text}"
        );
    }
}

#[test]
fn no_room_for_the_old_file_and_the_new_one_is_found_out_first() {
    let scratch = scratch();
    let dir = scratch.path();
    if !rustix::process::geteuid().is_root() {
        return skipped("only root mounts");
    }
    data(dir, "s.raw", "s", 1 << 20);
    let script = "mkdir m && mount -t tmpfs -o size=5M none m || exit 7; \
                  head -c 3M /dev/urandom >m/t.raw; cp m/t.raw old.raw; truncate -s 3M s.raw; \
                  for o in '-o preallocation=full' '-o preallocation=falloc' '-S 0'; do \
                  \"$0\" convert $o s.raw m/t.raw; echo $?; done; \
                  head -c 3M /dev/urandom >r.raw; \"$0\" convert r.raw m/t.raw; echo $?; \
                  cmp m/t.raw old.raw; ls -A m; \"$0\" convert -n -O raw s.raw m/t.raw && cmp s.raw m/t.raw";
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", script, BINARY])
        .current_dir(dir)
        .output();
    let output = match output {
        Ok(output) if output.status.code() != Some(7) => output,
        _ => return skipped("nothing can be mounted here"),
    };
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1\n1\n1\n1\nt.raw\n",
        "{errors}"
    );
    let named = errors.lines().filter(|line| line.contains("convert -n"));
    assert_eq!(named.count(), 4, "{errors}");
}
