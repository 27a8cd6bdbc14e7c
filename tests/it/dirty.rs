//! Logs of changes: made, shown, changed, merged, copied by.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::util::{Seeded, peer, requires, scratch, vdtool};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Runs it; what it printed on both streams, after its exit code was as expected.
fn run(dir: &Path, line: &str, code: i32) -> String {
    let done = vdtool().current_dir(dir).args(line.split(' ')).assert();
    let output = done.get_output().clone();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!(output.status.code(), Some(code), "{line}: {text}");
    text
}

fn json(dir: &Path, line: &str) -> Value {
    serde_json::from_str(&run(dir, line, 0)).expect("is JSON")
}

/// The ranges that are marked.
fn dirty(dir: &Path, log: &str) -> Vec<(u64, u64)> {
    let dump = json(dir, &format!("dirty dump --output json {log}"));
    let ranges = dump["dirty"].as_array().expect("a list").iter();
    let number = |value: &Value| value.as_u64().expect("a number");
    ranges
        .map(|r| (number(&r["start"]), number(&r["length"])))
        .collect()
}

#[test]
fn logs_of_all_formats_are_made_shown_and_changed() {
    let scratch = scratch();
    let dir = scratch.path();
    for (format, more) in [("vdtool", ""), ("cbt", ""), ("mirr", " --size 10486272")] {
        let log = format!("{format}.log");
        run(
            dir,
            &format!("dirty create -f {format} --size 10486272 {log}"),
            0,
        );
        let known = format!("{more} {log}");
        let info = json(dir, &format!("dirty info --output json{known}"));
        assert_eq!(info["format"], format);
        assert_eq!(
            (&info["regions"], &info["dirty-regions"]),
            (&161.into(), &0.into())
        );
        run(dir, &format!("dirty set -s 100000 -l 1{known}"), 0);
        run(dir, &format!("dirty set -s 10m -l 4k{known}"), 0);
        run(dir, &format!("dirty set -s 2M -l 1M{known}"), 0);
        run(dir, &format!("dirty clear -s 2M -l 65537{known}"), 0);
        let wanted = [
            (64 * KIB, 64 * KIB),
            (2 * MIB + 64 * KIB, MIB - 64 * KIB),
            (10 * MIB, 512),
        ];
        assert_eq!(dirty(dir, &known[1..]), wanted, "{format}");
        let info = json(dir, &format!("dirty info --output json{known}"));
        let bytes = wanted.iter().map(|(_, len)| len).sum::<u64>();
        assert_eq!(info["dirty-bytes"], bytes, "{format}");
        assert_eq!(info["state"], "closed");
        run(dir, &format!("dirty clear --all{known}"), 0);
        assert_eq!(dirty(dir, &known[1..]), []);
        // What is there stays.
        let before = fs::read(dir.join(&log)).expect("reads");
        let text = run(dir, &format!("dirty create --size 1M {log}"), 1);
        assert!(text.contains("is there already"), "{text}");
        assert_eq!(fs::read(dir.join(&log)).expect("reads"), before);
    }
    // A mirror's log does not say how large its regions are.
    let text = run(dir, "dirty dump mirr.log", 2);
    assert!(text.contains("--granularity"), "{text}");
    let info = json(dir, "dirty info --output json mirr.log");
    assert!(info["granularity"].is_null() && info["regions"] == 161);
    assert_eq!(dirty(dir, "--granularity 64k mirr.log"), []);
    let text = run(dir, "dirty dump --size 99M mirr.log", 1);
    assert!(text.contains("161"), "{text}");
}

#[test]
fn logs_take_what_others_have_and_lists_and_bitmaps_too() {
    let scratch = scratch();
    let dir = scratch.path();
    run(dir, "create -q -f qcow2 disk.qcow2 8M", 0);
    run(dir, "bitmap --add -g 4k disk.qcow2 bits", 0);
    let line = [
        "io",
        "-c",
        "write 5M 512",
        "-c",
        "write 7340032 8k",
        "disk.qcow2",
    ];
    vdtool().current_dir(dir).args(line).assert().success();
    run(dir, "dirty create --image disk.qcow2 a.log", 0);
    run(dir, "dirty create -g 4k --size 8M b.log", 0);
    run(dir, "dirty set -s 70k -l 1k b.log", 0);
    fs::write(dir.join("list"), r#" [{"start": 4096, "length": 4097}]"#).expect("writes");
    run(dir, "dirty merge b.log list", 0);
    assert_eq!(dirty(dir, "b.log"), [(4096, 8192), (68 << 10, 4096)]);
    run(dir, "dirty merge a.log b.log", 0);
    assert_eq!(dirty(dir, "a.log"), [(0, 128 << 10)]);
    run(dir, "dirty merge --bitmap bits b.log disk.qcow2", 0);
    let wanted = [
        (4096, 8192),
        (68 << 10, 4096),
        (5 << 20, 4096),
        (7 << 20, 8192),
    ];
    assert_eq!(dirty(dir, "b.log"), wanted);
    // And back.
    run(
        dir,
        "bitmap --add --merge-log b.log --disable -g 4k disk.qcow2 back",
        0,
    );
    run(dir, "dirty create -g 4k --size 8M c.log", 0);
    run(dir, "dirty merge --bitmap back c.log disk.qcow2", 0);
    assert_eq!(dirty(dir, "c.log"), wanted);
    // What a dump prints is read again.
    let dump = run(dir, "dirty dump --output json c.log", 0);
    fs::write(dir.join("dump.json"), dump).expect("writes");
    run(dir, "dirty create -g 4k --size 8M d.log", 0);
    run(dir, "dirty merge d.log dump.json", 0);
    assert_eq!(dirty(dir, "d.log"), wanted);
    for (text, part) in [
        (r#"{"size": 9, "dirty": []}"#, "9 bytes"),
        (r#"{"dirty": [{"start": 8388608, "length": 1}]}"#, "inside"),
        (
            r#"[{"start": 18446744073709551615, "length": 2}]"#,
            "inside",
        ),
        ("[1]", "list of ranges"),
        ("nonsense", "no log"),
        ("", "no log"),
    ] {
        fs::write(dir.join("list"), text).expect("writes");
        let told = run(dir, "dirty merge d.log list", 1);
        assert!(told.contains("list: ") && told.contains(part), "{told}");
    }
    run(dir, "dirty create --size 9M e.log", 0);
    let told = run(dir, "dirty merge d.log e.log", 1);
    assert!(told.contains("9437184"), "{told}");
    assert_eq!(dirty(dir, "d.log"), wanted, "nothing of it was taken");
}

#[test]
fn only_what_a_log_or_a_bitmap_names_is_copied() {
    let scratch = scratch();
    let dir = scratch.path();
    let mut rng = Seeded::new("dirty-copy");
    for (source, target) in [
        ("raw", "raw"),
        ("qcow2", "raw"),
        ("raw", "qcow2"),
        ("vhd", "vdi"),
    ] {
        let mut bytes = rng.bytes(5 << 20);
        bytes[1 << 20..2 << 20].fill(0);
        fs::write(dir.join("plain"), &bytes).expect("writes");
        let old = rng.bytes(5 << 20);
        fs::write(dir.join("old"), &old).expect("writes");
        run(dir, &format!("convert -q -O {source} plain s.{source}"), 0);
        let _ = fs::remove_file(dir.join("log"));
        run(dir, "dirty create -g 4k --size 5M log", 0);
        let mut wanted = old.clone();
        for _ in 0..12 {
            let (at, len) = (rng.usize(0..1279), rng.usize(1..90));
            let part = at << 12..((at + len) << 12).min(5 << 20);
            wanted[part.clone()].copy_from_slice(&bytes[part.clone()]);
            let (start, len) = (part.start, part.len());
            run(dir, &format!("dirty set -s {start} -l {len} log"), 0);
        }
        run(dir, &format!("convert -q -O {target} old t.{target}"), 0);
        let line = format!("convert -q -n --dirty log -O {target} s.{source} t.{target}");
        run(dir, &line, 0);
        run(dir, &format!("convert -q -O raw t.{target} found"), 0);
        let found = fs::read(dir.join("found")).expect("reads");
        assert!(found == wanted, "{source} to {target}");
    }
    run(dir, "convert -q -O qcow2 plain now.qcow2", 0);
    run(dir, "bitmap --add now.qcow2 since", 0);
    run(dir, "convert -q plain backup.raw", 0);
    let line = [
        "io",
        "-c",
        "write -P 7 200k 100k",
        "-c",
        "write -z 4M 64k",
        "now.qcow2",
    ];
    vdtool().current_dir(dir).args(line).assert().success();
    run(
        dir,
        "convert -q -n --dirty-bitmap since --verify -O raw now.qcow2 backup.raw",
        0,
    );
    run(dir, "compare now.qcow2 backup.raw", 0);
}

#[test]
fn a_log_that_does_not_fit_is_refused_and_the_target_untouched() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a"), vec![1; 1 << 20]).expect("writes");
    fs::write(dir.join("b"), vec![2; 1 << 20]).expect("writes");
    run(dir, "dirty create --size 2M large.log", 0);
    run(dir, "dirty create -f cbt --size 1M cbt.log", 0);
    run(dir, "dirty set --all cbt.log", 0);
    let mut bytes = fs::read(dir.join("cbt.log")).expect("reads");
    bytes[32] = 0;
    fs::write(dir.join("lost.log"), bytes).expect("writes");
    for (line, code, part) in [
        ("convert --dirty cbt.log a b", 2, "--no-create"),
        (
            "convert -n -c --dirty cbt.log -O qcow2 a b",
            2,
            "--compress",
        ),
        (
            "convert -n --target-is-zero --dirty cbt.log a b",
            2,
            "--target-is-zero",
        ),
        ("convert -n --dirty large.log -O raw a b", 1, "2097152"),
        (
            "convert -n --dirty lost.log -O raw a b",
            1,
            "may lack marks",
        ),
        ("convert -n --dirty a -O raw a b", 1, "no log"),
        ("convert -n --dirty missing -O raw a b", 1, "missing"),
        ("convert -n --dirty cbt.log -O raw a a b", 2, "one source"),
        ("convert -n --dirty-bitmap x -O raw a b", 63, "bitmaps"),
    ] {
        let told = run(dir, line, code);
        assert!(told.contains(part), "{line}: {told}");
        assert!(
            fs::read(dir.join("b")).expect("reads") == vec![2; 1 << 20],
            "{line}"
        );
    }
    run(dir, "convert -q -n --dirty cbt.log -O raw a b", 0);
    run(dir, "compare a b", 0);
}

#[test]
fn a_dirty_bitmap_of_qemu_is_copied_by() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    peer(
        "qemu-img",
        dir,
        ["create", "-q", "-f", "qcow2", "a.qcow2", "64M"],
    );
    peer("qemu-img", dir, ["bitmap", "--add", "a.qcow2", "b0"]);
    run(dir, "convert -q -O raw a.qcow2 backup", 0);
    let write = [
        "-f",
        "qcow2",
        "-c",
        "write -P 9 1M 3M",
        "-c",
        "write -z 60M 1M",
        "a.qcow2",
    ];
    peer("qemu-io", dir, write);
    run(
        dir,
        "convert -q -n --dirty-bitmap b0 -O raw a.qcow2 backup",
        0,
    );
    peer(
        "qemu-img",
        dir,
        ["compare", "-F", "raw", "a.qcow2", "backup"],
    );
}

#[test]
fn what_a_servers_bitmap_names_is_copied_from_the_server() {
    let scratch = scratch();
    let dir = scratch.path();
    run(dir, "create -q -f qcow2 a.qcow2 64M", 0);
    run(dir, "bitmap --add a.qcow2 b0", 0);
    run(dir, "convert -q -O raw a.qcow2 backup", 0);
    let line = [
        "io",
        "-c",
        "write -P 9 1M 3M",
        "-c",
        "write -z 60M 1M",
        "a.qcow2",
    ];
    vdtool().current_dir(dir).args(line).assert().success();
    let socket = dir.join("s").display().to_string();
    let servers = [
        (
            "vdtool",
            vec!["serve", "-r", "--persistent", "--bitmap", "b0", "--nbd"],
            format!("unix:{socket}"),
        ),
        (
            "qemu-nbd",
            vec!["-r", "-t", "-e", "4", "-f", "qcow2", "-B", "b0", "-k"],
            socket.clone(),
        ),
    ];
    for (server, words, address) in servers {
        if server != "vdtool" && !requires(server) {
            continue;
        }
        let mut command = match server {
            "vdtool" => crate::util::killable(),
            _ => std::process::Command::new(server),
        };
        let command = command
            .current_dir(dir)
            .args(words)
            .arg(address)
            .arg("a.qcow2");
        let mut child = command
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("starts");
        for _ in 0..500 {
            if Path::new(&socket).exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        fs::copy(dir.join("backup"), dir.join("copy")).expect("copies");
        let uri = format!("nbd+unix:///?socket={socket}");
        let line = format!("convert -q -n --dirty-bitmap b0 -f raw -O raw {uri} copy");
        run(dir, &line, 0);
        let told = run(dir, &line.replace("b0", "b1"), 1);
        assert!(told.contains("no dirty bitmap 'b1'"), "{told}");
        let _ = fs::remove_file(dir.join("log"));
        run(dir, "dirty create --size 64M log", 0);
        run(dir, &format!("dirty merge --bitmap b0 log {uri}"), 0);
        assert_eq!(
            dirty(dir, "log"),
            [(MIB, 3 * MIB), (60 * MIB, MIB)],
            "{server}"
        );
        child.kill().expect("is there");
        child.wait().expect("ends");
        let _ = fs::remove_file(&socket);
        run(dir, "compare -F raw a.qcow2 copy", 0);
    }
}
