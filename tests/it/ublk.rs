//! Block devices by ublk, in a virtual machine: the kernels that tests run on need not have it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use crate::util::{requires, scratch, skipped};

/// One machine at a time: each uses all processors.
static MACHINE: Mutex<()> = Mutex::new(());

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm")
}

/// The emulator, the kernel and the guest's programs; `None`, saying why, where they are not to
/// be had.
fn set_up(kernel: &str) -> Option<PathBuf> {
    if std::env::var_os("VDTOOL_NO_VM").is_some() {
        skipped("VDTOOL_NO_VM is set");
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        skipped("fetching a kernel and an emulator needs root");
        return None;
    }
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    let output = Command::new("bash")
        .arg(scripts().join("setup"))
        .arg(&cache)
        .arg(kernel)
        .stdin(Stdio::null())
        .output()
        .expect("bash starts");
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().last().unwrap_or("no message");
        skipped(&format!("no kernel and emulator could be fetched: {last}"));
        return None;
    }
    Some(cache)
}

/// Boots a kernel, runs scenarios of `tests/vm/guest`, and panics with the guest's console where
/// one of them fails.
fn run(kernel: &str, scenarios: &[&str]) {
    run_with(kernel, scenarios, |_| None);
}

/// The same; `prepare` adds to the guest's directory, and names an archive that the guest gets too.
fn run_with(kernel: &str, scenarios: &[&str], prepare: impl FnOnce(&Path) -> Option<PathBuf>) {
    let _alone = MACHINE.lock();
    let Some(cache) = set_up(kernel) else { return };
    let dir = scratch();
    let guest = dir.path();
    std::fs::create_dir(guest.join("bin")).expect("makes a directory");
    std::fs::create_dir(guest.join("scenarios")).expect("makes a directory");
    let copy = |name: &str| {
        let from = scripts().join("guest").join(name);
        std::fs::copy(from, guest.join(name)).expect("copies");
    };
    copy("run");
    copy("lib");
    scenarios
        .iter()
        .for_each(|name| copy(&format!("scenarios/{name}")));
    std::fs::write(guest.join(kernel), "").expect("writes");
    strip(
        Path::new(env!("CARGO_BIN_EXE_vdtool")),
        &guest.join("bin/vdtool"),
    );
    let extra = prepare(guest).unwrap_or_default();
    let output = Command::new("bash")
        .arg(scripts().join("boot"))
        .arg(&cache)
        .arg(kernel)
        .arg(guest)
        .args(scenarios)
        .env("EXTRA", extra)
        .stdin(Stdio::null())
        .output()
        .expect("bash starts");
    let console = String::from_utf8_lossy(&output.stdout);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{} with the {kernel} kernel:\n{console}\n{stderr}",
        output.status
    );
    for name in scenarios {
        let passed = format!("PASS {name} ");
        assert!(console.contains(&passed), "{name} was not run:\n{console}");
    }
}

/// A copy without what only debuggers need: the guest has it in memory.
fn strip(from: &Path, to: &Path) {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).status();
    if !stripped.is_ok_and(|status| status.success()) {
        std::fs::copy(from, to).expect("copies");
    }
}

#[test]
fn a_disk_of_any_format_is_a_block_device_of_an_older_kernel() {
    let scenarios = [
        "verify",
        "recovery",
        "handover",
        "control",
        "options",
        "unprivileged",
        "ends",
    ];
    run("old", &scenarios);
}

#[test]
fn a_disk_of_any_format_is_a_block_device_of_a_newer_kernel() {
    let scenarios = [
        "formats",
        "chains",
        "verify",
        "recovery",
        "control",
        "options",
        "unprivileged",
        "geometry",
        "ends",
        "rounds",
    ];
    run("new", &scenarios);
}

#[test]
fn servers_make_way_layers_and_space_are_kept_apart_and_the_kernel_is_an_nbd_client() {
    let scenarios = ["handover", "overlay", "merges", "space", "throttle", "nbd"];
    run("new", &scenarios);
}

/// Where Debian has it: it is in no search path.
const SYSTEMD: &str = "/lib/systemd/systemd";

#[test]
fn the_units_of_the_readme_do_under_systemd_what_is_said_of_them() {
    if !Path::new(SYSTEMD).exists() || !requires("systemctl") {
        return skipped("systemd is not installed");
    }
    let archive = scratch();
    let packed = archive.path().join("systemd.cpio");
    run_with("new", &["systemd"], |guest| {
        let units = guest.join("units");
        std::fs::create_dir(&units).expect("makes a directory");
        for (name, text) in units_of_the_readme() {
            std::fs::write(units.join(name), text).expect("writes");
        }
        let pack = Command::new("bash")
            .arg(scripts().join("pack"))
            .arg("programs")
            .arg(&packed)
            .args([SYSTEMD, "systemctl"])
            .output()
            .expect("bash starts");
        assert!(pack.status.success(), "{pack:?}");
        Some(packed.clone())
    });
}

#[test]
fn the_units_of_the_readme_have_no_mistakes_that_systemd_finds() {
    if !requires("systemd-analyze") {
        return;
    }
    let dir = scratch();
    let units = units_of_the_readme();
    for (name, text) in &units {
        let text = text.replace("/usr/bin/vdtool", env!("CARGO_BIN_EXE_vdtool"));
        std::fs::write(dir.path().join(name), text).expect("writes");
    }
    let verify = |names: &[&str]| {
        let output = Command::new("systemd-analyze")
            .args(["verify", "--man=no", "--recursive-errors=no"])
            .args(names.iter().map(|name| dir.path().join(name)))
            .output()
            .expect("starts");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), told)
    };
    let names: Vec<&str> = units.iter().map(|(name, _)| &**name).collect();
    assert_eq!(verify(&names), (true, String::new()));
    let wrong = "[Service]\nExecStart=/nonexistent\nRestrat=always\n";
    std::fs::write(dir.path().join("wrong.service"), wrong).expect("writes");
    let (passed, told) = verify(&["wrong.service"]);
    assert!(!passed && told.contains("Restrat"), "{told}");
}

/// Name and text of each unit in the README: a comment with the name, and what follows it.
fn units_of_the_readme() -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(path).expect("reads");
    let start = readme.find("# disk.socket\n").expect("has units");
    let block = readme[start..].split("```").next().unwrap_or_default();
    let mut units: Vec<(String, String)> = Vec::new();
    for line in block.lines() {
        match line.strip_prefix("# ") {
            Some(words) => {
                let name = words.split(':').next().unwrap_or_default();
                units.push((name.to_owned(), String::new()));
            }
            None => {
                let (_, text) = units.last_mut().expect("begins with a name");
                *text += line;
                text.push('\n');
            }
        }
    }
    let names: Vec<&str> = units.iter().map(|(name, _)| &**name).collect();
    assert_eq!(names, ["disk.socket", "disk.service", "blockdisk.service"]);
    units
}

#[test]
fn a_kernel_without_the_driver_is_told_what_to_do_and_nothing_is_changed() {
    if Path::new("/dev/ublk-control").exists() {
        return skipped("this kernel has ublk");
    }
    let dir = scratch();
    let path = dir.path().join("a.raw");
    std::fs::write(&path, [7; 4096]).expect("writes");
    let serve = |words: &[&str]| {
        let output = crate::util::vdtool().arg("serve").args(words).output();
        let output = output.expect("runs");
        assert_eq!(output.status.code(), Some(63), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
        let text = String::from_utf8(output.stderr).expect("is text");
        assert_eq!(text.lines().count(), 1, "{text}");
        for word in ["modprobe ublk_drv", "--nbd"] {
            assert!(text.contains(word), "{text}");
        }
    };
    serve(&["--ublk", "-f", "raw", path.to_str().expect("is text")]);
    serve(&["--list"]);
    serve(&["--delete", "0"]);
    assert_eq!(std::fs::read(&path).expect("reads"), [7; 4096]);
}
