//! `convert`: content, sparseness, streams, targets, signals.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::target::wait_until_begun;
use crate::util::{Seeded, assert_same, killable, peer, requires, scratch, vdtool};

const MIB: usize = 1 << 20;

/// A disk with data at the start, in the middle, over the seam of two work ranges, and zeroes that
/// are written as well as holes; its length is odd.
fn disk(path: &Path) -> Vec<u8> {
    let mut random = Seeded::new("convert");
    let mut bytes = vec![0; 70 * MIB + 512];
    let file = fs::File::create(path).expect("creates");
    file.set_len(bytes.len() as u64).expect("grows");
    for (at, len) in [
        (0, 3 * MIB),
        (32 * MIB - 5000, 10_000),
        (50 * MIB, MIB),
        (70 * MIB, 512),
    ] {
        bytes[at..at + len].copy_from_slice(&random.bytes(len));
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..at + len], at as u64)
            .expect("writes");
    }
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 8 * MIB], 10 << 20).expect("writes");
    bytes
}

fn works(directory: &Path, arguments: &[&str]) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let output = done.success().get_output().stdout.clone();
    String::from_utf8(output).expect("is text")
}

fn fails(directory: &Path, arguments: &[&str], code: i32) -> String {
    let done = vdtool().current_dir(directory).args(arguments).assert();
    let error = done.code(code).get_output().stderr.clone();
    String::from_utf8(error).expect("is text")
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("reads");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn space(path: &Path) -> u64 {
    fs::metadata(path).expect("is there").blocks() * 512
}

#[test]
fn every_way_from_raw_to_vhd_and_back_keeps_the_content() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    for options in ["subformat=dynamic", "subformat=fixed", "block_size=512k"] {
        for jobs in ["1", "4"] {
            works(
                dir,
                &[
                    "convert", "--verify", "-j", jobs, "-o", options, "a.raw", "b.vhd",
                ],
            );
            works(dir, &["convert", "--verify", "-j", jobs, "b.vhd", "c.raw"]);
            assert_same(
                &fs::read(dir.join("c.raw")).expect("reads"),
                &bytes,
                0,
                options,
            );
        }
    }
    assert_eq!(names(dir), ["a.raw", "b.vhd", "c.raw"]);
}

#[test]
fn zero_runs_become_holes_and_with_s_0_everything_takes_space() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    works(dir, &["convert", "a.raw", "b.raw"]);
    assert!(space(&dir.join("b.raw")) < 5 << 20);
    works(dir, &["convert", "-S", "0", "a.raw", "full.raw"]);
    assert!(space(&dir.join("full.raw")) >= 70 << 20);
    assert_same(
        &fs::read(dir.join("full.raw")).expect("reads"),
        &bytes,
        0,
        "-S 0",
    );
    works(dir, &["convert", "a.raw", "b.vhd"]);
    assert!(space(&dir.join("b.vhd")) < 8 << 20);
    let error = fails(dir, &["convert", "-S", "100", "a.raw", "c.raw"], 2);
    assert!(error.contains("multiples of 512"), "{error}");
}

#[test]
fn the_layout_does_not_depend_on_the_number_of_threads() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(&dir.join("a.raw"));
    let maps: Vec<String> = ["1", "2", "7"]
        .map(|jobs| {
            works(dir, &["convert", "-W", "-m", jobs, "a.raw", "b.vhd"]);
            works(dir, &["map", "--output", "json", "b.vhd"])
        })
        .into();
    assert!(maps[0].contains("offset"));
    assert_eq!(maps[0], maps[1]);
    assert_eq!(maps[0], maps[2]);
}

#[test]
fn qemu_reads_what_was_joined() {
    if !requires("qemu-img") {
        return;
    }
    let scratch = scratch();
    let dir = scratch.path();
    let mut bytes = disk(&dir.join("a.raw"));
    fs::write(dir.join("b.raw"), [7; 1024]).expect("writes");
    works(dir, &["convert", "a.raw", "b.raw", "a.raw", "all.vhd"]);
    peer(
        "qemu-img",
        dir,
        ["convert", "-f", "vpc", "-O", "raw", "all.vhd", "all.raw"],
    );
    let first = bytes.clone();
    bytes.extend([7; 1024]);
    bytes.extend(first);
    let found = fs::read(dir.join("all.raw")).expect("reads");
    assert_same(&found[..bytes.len()], &bytes, 0, "joined");
}

#[test]
fn raw_streams_in_and_out() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    works(dir, &["convert", "a.raw", "a.vhd"]);
    let sent = vdtool()
        .current_dir(dir)
        .args(["convert", "a.vhd", "-"])
        .assert();
    assert_same(&sent.success().get_output().stdout, &bytes, 0, "stdout");
    for target in ["b.raw", "b.vhd"] {
        let taken = vdtool()
            .current_dir(dir)
            .args(["convert", "-", target])
            .write_stdin(&bytes[..])
            .assert();
        taken.success();
        works(dir, &["compare", "a.raw", target]);
    }
    assert!(space(&dir.join("b.raw")) < 5 << 20);
    assert_eq!(names(dir), ["a.raw", "a.vhd", "b.raw", "b.vhd"]);
    let error = fails(dir, &["convert", "-O", "vhd", "a.raw", "-"], 63);
    assert!(error.contains("vhd"), "{error}");
    let error = fails(dir, &["convert", "-f", "vhd", "-", "c.raw"], 63);
    assert!(error.contains("vhd"), "{error}");
}

#[test]
fn an_image_on_stdin_is_not_taken_for_the_disk_that_it_holds() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![7; MIB]).expect("writes");
    works(dir, &["convert", "a.raw", "a.qcow2"]);
    works(dir, &["convert", "a.raw", "a.vhd"]);
    works(
        dir,
        &["convert", "-o", "subformat=fixed", "a.raw", "fixed.vhd"],
    );
    fs::write(dir.join("a.vmdk"), "KDMV and more").expect("writes");
    let before = names(dir);
    for (image, format) in [
        ("a.qcow2", "qcow2"),
        ("a.vhd", "vhd"),
        ("fixed.vhd", "vhd"),
        ("a.vmdk", "vmdk"),
    ] {
        for target in ["b.raw", "b.vhd"] {
            let bytes = fs::read(dir.join(image)).expect("reads");
            let convert = |arguments: &[&str]| {
                let mut command = vdtool();
                command.current_dir(dir).arg("convert").args(arguments);
                command.args(["-", target]).write_stdin(bytes.clone());
                command.assert()
            };
            let refused = convert(&[]).code(63).get_output().stderr.clone();
            let text = String::from_utf8(refused).expect("is text");
            assert!(text.starts_with("vdtool: -: "), "{text}");
            assert!(text.contains(&format!("'{format}'")), "{text}");
            assert_eq!(names(dir), before, "{image}");
            convert(&["-f", "raw"]).success();
            let kind = &target[2..];
            works(dir, &["compare", "-f", "raw", "-F", kind, image, target]);
            fs::remove_file(dir.join(target)).expect("was made");
        }
    }
}

#[test]
fn a_reader_that_leaves_early_is_a_clean_end() {
    let scratch = scratch();
    disk(&scratch.path().join("a.raw"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_vdtool"))
        .current_dir(scratch.path())
        .args(["convert", "a.raw", "-"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
}

#[test]
fn no_source_is_overwritten() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    fs::hard_link(dir.join("a.raw"), dir.join("same.raw")).expect("links");
    for arguments in [
        &["convert", "a.raw", "a.raw"][..],
        &["convert", "a.raw", "same.raw"],
        &["convert", "-n", "a.raw", "same.raw"],
    ] {
        let error = fails(dir, arguments, 1);
        assert!(error.contains("would replace"), "{error}");
    }
    assert_same(
        &fs::read(dir.join("a.raw")).expect("reads"),
        &bytes,
        0,
        "source",
    );
    works(dir, &["convert", "a.raw", "base.vhd"]);
    works(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "vhd",
            "-b",
            "base.vhd",
            "-F",
            "vhd",
            "child.vhd",
        ],
    );
    let error = fails(dir, &["convert", "child.vhd", "base.vhd"], 1);
    assert!(error.contains("would replace"), "{error}");
    works(dir, &["compare", "a.raw", "child.vhd"]);
}

#[test]
fn a_replaced_target_keeps_its_mode_and_links_stay_links() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(&dir.join("a.raw"));
    fs::write(dir.join("old.raw"), "old").expect("writes");
    fs::set_permissions(dir.join("old.raw"), fs::Permissions::from_mode(0o604)).expect("sets");
    std::os::unix::fs::symlink("old.raw", dir.join("link.raw")).expect("links");
    works(dir, &["convert", "a.raw", "link.raw"]);
    let found = fs::metadata(dir.join("old.raw")).expect("is there");
    assert_eq!(found.mode() & 0o777, 0o604);
    works(dir, &["compare", "a.raw", "old.raw"]);
    assert_eq!(names(dir), ["a.raw", "link.raw", "old.raw"]);
}

#[test]
fn an_existing_image_is_written_in_place_zeroes_too() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    let longer = bytes.len() + 4096;
    fs::write(dir.join("old.raw"), vec![9; longer]).expect("writes");
    let inode = fs::metadata(dir.join("old.raw")).expect("is there").ino();
    works(dir, &["convert", "-n", "--verify", "a.raw", "old.raw"]);
    let found = fs::read(dir.join("old.raw")).expect("reads");
    assert_same(&found[..bytes.len()], &bytes, 0, "-n");
    assert!(found[bytes.len()..].iter().all(|&b| b == 9));
    assert_eq!(
        fs::metadata(dir.join("old.raw")).expect("is there").ino(),
        inode
    );
    works(dir, &["create", "-q", "full.vhd", "80M"]);
    works(dir, &["convert", "-n", "old.raw", "full.vhd"]);
    works(dir, &["convert", "-n", "a.raw", "full.vhd"]);
    works(dir, &["check", "full.vhd"]);
    fs::write(dir.join("small.raw"), [9; 512]).expect("writes");
    let error = fails(dir, &["convert", "-n", "a.raw", "small.raw"], 1);
    assert!(error.contains("512 bytes"), "{error}");
    assert_eq!(fs::read(dir.join("small.raw")).expect("reads"), [9; 512]);
    fails(dir, &["convert", "--target-is-zero", "a.raw", "b.raw"], 2);
    fails(dir, &["convert", "-n", "a.raw", "missing.raw"], 1);
}

#[test]
fn a_child_holds_only_what_differs_from_its_backing_image() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(&dir.join("a.raw"));
    works(dir, &["convert", "a.raw", "base.vhd"]);
    works(
        dir,
        &[
            "create", "-q", "-f", "vhd", "-b", "base.vhd", "-F", "vhd", "mid.vhd",
        ],
    );
    works(
        dir,
        &[
            "io",
            "-c",
            "write -P 5 1M 64k",
            "-c",
            "write -z 50M 1M",
            "-c",
            "write -P 6 60M 4k",
            "mid.vhd",
        ],
    );
    // Once from a chain that shares the base, once from a flat copy that must be compared.
    works(dir, &["convert", "mid.vhd", "flat.raw"]);
    for source in ["mid.vhd", "flat.raw"] {
        for jobs in ["1", "3"] {
            works(
                dir,
                &[
                    "convert", "--verify", "-j", jobs, "-O", "vhd", "-B", "base.vhd", "-F", "vhd",
                    source, "out.vhd",
                ],
            );
            works(dir, &["compare", "flat.raw", "out.vhd"]);
            works(dir, &["check", "out.vhd"]);
            assert!(space(&dir.join("out.vhd")) < 4 << 20, "{source}");
        }
    }
    let error = fails(
        dir,
        &[
            "convert", "-O", "raw", "-B", "base.vhd", "flat.raw", "x.raw",
        ],
        63,
    );
    assert!(error.contains("raw"), "{error}");
    let error = fails(dir, &["convert", "-F", "vhd", "flat.raw", "x.vhd"], 2);
    assert!(error.contains("-B"), "{error}");
    let error = fails(
        dir,
        &[
            "convert", "-O", "vhd", "-B", "base.vhd", "flat.raw", "base.vhd",
        ],
        1,
    );
    assert!(error.contains("would replace"), "{error}");
}

#[test]
fn what_no_format_has_is_refused_by_name() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), [1; 512]).expect("writes");
    for (option, part) in [
        (&["-c"][..], "compressed"),
        (&["-l", "name"], "snapshots"),
        (&["--bitmaps"], "bitmaps"),
    ] {
        let arguments = [&["convert"], option, &["a.raw", "b.vhd"]].concat();
        let error = fails(dir, &arguments, 63);
        assert!(error.contains(part), "{error}");
    }
    fails(dir, &["convert", "a.raw"], 2);
    fails(dir, &["convert", "-o", "nothing=1", "a.raw", "b.vhd"], 2);
    assert!(works(dir, &["convert", "-O", "vhd", "-o", "help"]).contains("subformat"));
    assert_eq!(names(dir), ["a.raw"]);
}

/// Starts a convert that takes long, and stops it once it has begun to write.
fn stopped(dir: &Path, arguments: &[&str], signal: &str) -> Option<i32> {
    let mut child = killable()
        .current_dir(dir)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    // Kept open: waiting for a child closes the end that it still has.
    let mut stdin = child.stdin.take().expect("is piped");
    stdin.write_all(&[1; 5000]).expect("the pipe takes it");
    wait_until_begun(dir, &mut child);
    peer("kill", dir, [signal, &child.id().to_string()]);
    let status = child.wait().expect("ends");
    drop(stdin);
    status.code()
}

#[test]
fn a_signal_leaves_nothing_behind_and_the_old_target_alone() {
    let scratch = scratch();
    let dir = scratch.path();
    disk(&dir.join("a.raw"));
    fs::write(dir.join("old.raw"), "old").expect("writes");
    let slow = ["convert", "-r", "100k", "a.raw"];
    assert_eq!(
        stopped(dir, &[&slow[..], &["new.vhd"]].concat(), "-INT"),
        Some(130)
    );
    assert_eq!(
        stopped(dir, &[&slow[..], &["old.raw"]].concat(), "-TERM"),
        Some(143)
    );
    // A terminal that is closed.
    assert_eq!(
        stopped(dir, &[&slow[..], &["new.raw"]].concat(), "-HUP"),
        Some(129)
    );
    // A pipe from which nothing comes any more.
    assert_eq!(
        stopped(dir, &["convert", "-", "new.raw"], "-INT"),
        Some(130)
    );
    assert_eq!(names(dir), ["a.raw", "old.raw"]);
    assert_eq!(fs::read(dir.join("old.raw")).expect("reads"), b"old");
}

#[test]
fn options_spelt_as_qemu_img_does_are_understood_and_the_last_one_counts() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![1; MIB]).expect("writes");
    let line = "convert --source-format vhd --source-format raw --source-cache none \
                --target-cache writeback --target-options cluster_size=4k --parallel 2 -m 3 \
                --oob-writes --copy-range-offloading --rate 1G -O raw -O qcow2 a.raw b.qcow2";
    works(dir, &line.split_whitespace().collect::<Vec<_>>());
    works(
        dir,
        &[
            "compare",
            "--a-format",
            "raw",
            "--b-format",
            "qcow2",
            "a.raw",
            "b.qcow2",
        ],
    );
    let info = works(dir, &["info", "-b", "--output", "json", "b.qcow2"]);
    assert!(info.contains("\"cluster-size\": 4096"), "{info}");
    assert!(works(dir, &["measure", "-s", "1M"]).contains("1048576"));
    works(dir, &["check", "--cache", "none", "b.qcow2"]);
    let error = fails(
        dir,
        &["convert", "--target-image-opts", "a.raw", "driver=raw"],
        2,
    );
    assert!(error.contains("--image-opts is not supported"), "{error}");
}

#[test]
fn a_bar_that_is_asked_for_is_lines_of_text_where_there_is_no_terminal() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![1; MIB]).expect("writes");
    let stderr = |arguments: &[&str]| {
        let done = vdtool().current_dir(dir).args(arguments).assert().success();
        String::from_utf8(done.get_output().stderr.clone()).expect("is text")
    };
    let text = stderr(&["convert", "-p", "a.raw", "b.raw"]);
    let last = text.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("convert 100.0 % 1.00 MiB/1.00 MiB "),
        "{text}"
    );
    assert_eq!(stderr(&["convert", "-q", "-p", "a.raw", "b.raw"]), "");
    assert_eq!(stderr(&["convert", "a.raw", "b.raw"]), "");
}

#[test]
fn other_names_of_a_replaced_file_keep_the_old_content_and_the_user_hears_of_it() {
    let scratch = scratch();
    let dir = scratch.path();
    for name in ["a.raw", "old.raw"] {
        fs::write(dir.join(name), name).expect("writes");
    }
    fs::hard_link(dir.join("old.raw"), dir.join("other.raw")).expect("links");
    let done = vdtool()
        .current_dir(dir)
        .args(["convert", "a.raw", "old.raw"])
        .assert();
    let text = String::from_utf8_lossy(&done.success().get_output().stderr).into_owned();
    assert!(
        text.starts_with("vdtool: note: old.raw: ") && text.contains("hard links"),
        "{text}"
    );
    assert_eq!(fs::read(dir.join("old.raw")).expect("reads"), b"a.raw");
    assert_eq!(fs::read(dir.join("other.raw")).expect("reads"), b"old.raw");
}

#[test]
fn a_hangup_that_is_ignored_does_not_stop_a_job() {
    let scratch = scratch();
    let dir = scratch.path();
    fs::write(dir.join("a.raw"), vec![1; 300_000]).expect("writes");
    let script = "trap '' HUP; \"$0\" convert -r 200k a.raw b.raw & \
                  while ! ls -l /proc/$!/fd | grep -Eq '(deleted)|tmp'; do sleep 0.01; done; kill -HUP $!; wait $!";
    peer("sh", dir, ["-c", script, env!("CARGO_BIN_EXE_vdtool")]);
    assert_eq!(names(dir), ["a.raw", "b.raw"]);
}

#[test]
fn progress_is_one_object_a_line_and_ends_with_the_total() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    let done = vdtool()
        .current_dir(dir)
        .args(["convert", "--progress", "json", "a.raw", "b.raw"])
        .assert()
        .success();
    let text = String::from_utf8(done.get_output().stderr.clone()).expect("is text");
    let lines: Vec<serde_json::Value> = text
        .lines()
        .map(|l| serde_json::from_str(l).expect("is JSON"))
        .collect();
    let last = lines.last().expect("one line at least");
    assert_eq!(last["job"], "convert");
    assert_eq!(last["done"], bytes.len());
    assert_eq!(last["total"], bytes.len());
    assert_eq!(last["eta-seconds"], 0);
    let quiet = vdtool()
        .current_dir(dir)
        .args(["convert", "a.raw", "b.raw"])
        .assert()
        .success();
    assert!(quiet.get_output().stderr.is_empty());
}

#[test]
fn a_disk_of_nothing_is_converted_without_looking_at_all_of_it() {
    let scratch = scratch();
    let dir = scratch.path();
    let big = fs::File::create(dir.join("big.raw")).expect("creates");
    if big.set_len(2 << 40).is_err() {
        crate::util::skipped("the file system has no files of 2 TiB");
        return;
    }
    let begun = Instant::now();
    works(dir, &["convert", "big.raw", "copy.raw"]);
    // A tenth of a second when nothing else runs; walking it range by range takes far longer.
    assert!(begun.elapsed() < Duration::from_secs(10));
    let found = fs::metadata(dir.join("copy.raw")).expect("is there");
    assert_eq!((found.len(), found.blocks()), (2 << 40, 0));
}

#[test]
fn measured_sizes_are_those_of_the_files_that_are_made() {
    let scratch = scratch();
    let dir = scratch.path();
    let bytes = disk(&dir.join("a.raw"));
    let measure = |arguments: &[&str]| -> (u64, u64) {
        let all = [&["measure", "--output", "json"], arguments].concat();
        let value: serde_json::Value = serde_json::from_str(&works(dir, &all)).expect("is JSON");
        let number = |key: &str| value[key].as_u64().expect("a number");
        (number("required"), number("fully-allocated"))
    };
    let size = |name: &str| {
        fs::metadata(PathBuf::from(dir).join(name))
            .expect("is there")
            .len()
    };
    let (raw, full) = measure(&["a.raw"]);
    assert_eq!((raw, full), (bytes.len() as u64, bytes.len() as u64));
    // Written zeroes count: measuring reads no data.
    works(dir, &["convert", "-S", "0", "a.raw", "full.vhd"]);
    let (required, full) = measure(&["-O", "vhd", "a.raw"]);
    assert_eq!(full, size("full.vhd"));
    assert!(required < full);
    works(
        dir,
        &["convert", "-o", "subformat=fixed", "a.raw", "fixed.vhd"],
    );
    let fixed = measure(&["-O", "vhd", "-o", "subformat=fixed", "a.raw"]);
    assert_eq!(fixed, (size("fixed.vhd"), size("fixed.vhd")));
    works(dir, &["create", "-q", "empty.vhd", "1G"]);
    assert_eq!(measure(&["-O", "vhd", "--size", "1G"]).0, size("empty.vhd"));
    let text = works(dir, &["measure", "--size", "1G"]);
    assert_eq!(
        text,
        "required size: 1073741824\nfully allocated size: 1073741824\n"
    );
    fails(dir, &["measure", "-O", "vhd"], 2);
}
