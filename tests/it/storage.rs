//! Locks beside QEMU's, and what a process is not to die of.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use vdtool::ErrorKind;
use vdtool::chain::Chain;
use vdtool::chain::open::{ChainOptions, open};
use vdtool::storage::open::{Access, Sharing, StorageOptions};

use crate::util::{peer, requires, scratch, vdtool};

const FORMATS: [(&str, &str); 2] = [("raw", "raw"), ("vhd", "vpc")];

/// An image of each format, full of data, with QEMU's name for the format.
fn images(directory: &Path) -> Vec<(PathBuf, &'static str)> {
    std::fs::write(directory.join("data"), vec![7; 4 << 20]).expect("writes");
    let make = |(format, qemu): (&str, &'static str)| {
        let path = directory.join(format);
        let arguments = ["convert", "-f", "raw", "-O", qemu, "data", format];
        peer("qemu-img", directory, arguments);
        (path, qemu)
    };
    FORMATS.into_iter().map(make).collect()
}

fn try_open(path: &Path, format: &str, access: Access, sharing: Sharing) -> vdtool::Result<Chain> {
    let options = ChainOptions {
        format: vdtool::formats::by_name(format),
        storage: StorageOptions {
            access,
            sharing,
            ..StorageOptions::default()
        },
        ..ChainOptions::default()
    };
    open(path, &options)
}

/// How long QEMU is to use an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Time {
    Short,
    Long,
}

/// A QEMU tool that uses an image as its other tools and its machines do.  (qemu-io and the reading
/// `bench` let others write to raw images meanwhile.)
fn qemu(path: &Path, format: &str, access: Access, time: Time) -> Command {
    let mut command = Command::new("qemu-img");
    match access {
        Access::Read => {
            command.args(["convert", "-f", format, "-O", "raw"]);
            if time == Time::Long {
                command.args(["-r", "100k"]);
            }
            command.arg(path).arg(path.with_extension("copy"));
        }
        Access::Write => {
            let requests = if time == Time::Long {
                "2000000000"
            } else {
                "1"
            };
            command.args(["bench", "-w", "-s", "512", "-c", requests]);
            command.args(["-f", format]).arg(path);
        }
    }
    command.stdout(Stdio::null());
    command
}

/// QEMU having an image open until this is dropped.
struct Holder {
    process: Child,
}

impl Holder {
    fn new(path: &Path, format: &str, access: Access) -> Self {
        let mut command = qemu(path, format, access, Time::Long);
        let holder = Self {
            process: command.spawn().expect("qemu-img starts"),
        };
        let inode = std::fs::metadata(path).expect("is there").ino();
        let bytes = match access {
            Access::Read => format!(":{inode} 201 201"),
            Access::Write => format!(":{inode} 100 101"),
        };
        for _ in 0..1000 {
            let locks = std::fs::read_to_string("/proc/locks").expect("is on Linux");
            if locks.contains(&bytes) {
                return holder;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("qemu-img took no locks");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Whether QEMU opens the image and reads or writes it; what it says otherwise.
fn qemu_opens(path: &Path, format: &str, access: Access) -> Result<(), String> {
    let mut command = qemu(path, format, access, Time::Short);
    let output = command.output().expect("qemu-img starts");
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

#[test]
fn what_qemu_writes_to_is_not_opened_but_with_force_share() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let _holder = Holder::new(&path, format, Access::Write);
        for access in [Access::Read, Access::Write] {
            let error = try_open(&path, format, access, Sharing::Locked).expect_err("is in use");
            assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
            assert_eq!(error.path(), Some(&*path));
        }
        try_open(&path, format, Access::Read, Sharing::Force).expect("reads all the same");
        let failed = vdtool().arg("info").arg(&path).assert().code(1);
        let stderr = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
        assert!(stderr.contains("-U"), "{stderr}");
        vdtool().args(["info", "-U"]).arg(&path).assert().success();
    }
}

#[test]
fn what_qemu_reads_is_read_and_not_written() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let _holder = Holder::new(&path, format, Access::Read);
        try_open(&path, format, Access::Read, Sharing::Locked).expect("readers share");
        let error = try_open(&path, format, Access::Write, Sharing::Locked).map(|_| ());
        let error = error.expect_err("in use");
        assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    }
}

#[test]
fn qemu_does_not_open_what_we_write_to() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let holder = try_open(&path, format, Access::Write, Sharing::Locked).expect("opens");
        for access in [Access::Read, Access::Write] {
            let why = qemu_opens(&path, format, access).expect_err("we have it");
            assert!(why.contains("lock"), "{why}");
        }
        drop(holder);
        qemu_opens(&path, format, Access::Write).expect("nobody has it");
    }
}

#[test]
fn qemu_reads_what_we_read_and_does_not_write_it() {
    if !requires("qemu-img") {
        return;
    }
    let dir = scratch();
    for (path, format) in images(dir.path()) {
        let _holder = try_open(&path, format, Access::Read, Sharing::Locked).expect("opens");
        qemu_opens(&path, format, Access::Read).expect("readers share");
        let why = qemu_opens(&path, format, Access::Write).expect_err("we read it");
        assert!(why.contains("lock"), "{why}");
    }
}

#[test]
fn the_process_limit_on_file_lengths_is_an_error_and_no_signal() {
    let dir = scratch();
    let script = format!(
        "ulimit -f 1024; exec '{}' create -f raw big.img 10M",
        env!("CARGO_BIN_EXE_vdtool")
    );
    let output = Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir.path())
        .output()
        .expect("a shell");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("ulimit -f"), "{stderr}");
    assert!(!dir.path().join("big.img").exists());
}
