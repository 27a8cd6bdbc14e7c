//! What is written down agrees with the code: man pages, completions, the layers.
//!
//! `VDTOOL_BLESS=1` writes man pages and completions anew.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use vdtool::cli::Cli;
use vdtool::cli::completions::Shell;

use crate::golden;

#[test]
fn man_pages_are_as_the_definitions_say() {
    let pages = pages();
    for (name, text) in &pages {
        golden::assert_file(&root().join("man").join(name), text);
    }
    let mut expected: Vec<&str> = pages.iter().map(|(name, _)| &**name).collect();
    expected.sort_unstable();
    assert_eq!(
        names_in("man"),
        expected,
        "a page too many or too few in man/"
    );
}

#[test]
fn completions_are_as_the_definitions_say() {
    for shell in Shell::ALL {
        let script = String::from_utf8(shell.script()).expect("scripts are text");
        let path = root().join("completions").join(shell.file_name());
        golden::assert_file(&path, &script);
    }
}

#[test]
fn every_long_option_is_in_the_man_page_and_the_completions() {
    let pages = pages();
    let scripts = Shell::ALL.map(|s| String::from_utf8(s.script()).expect("scripts are text"));
    for command in tree() {
        let page = format!("{}.1", name(&command));
        let (_, text) = pages.iter().find(|(n, _)| *n == page).expect("has a page");
        let text = text.replace("\\-", "-");
        for argument in command.get_arguments().filter(|a| !a.is_hide_set()) {
            let Some(long) = argument.get_long() else {
                continue;
            };
            assert!(text.contains(&format!("--{long}")), "--{long} in {page}");
            for (script, spelling) in scripts.iter().zip(["--", "--", "-l "]) {
                let option = format!("{spelling}{long}");
                assert!(script.contains(&option), "{option} of {page}");
            }
        }
    }
}

#[test]
fn the_help_of_every_command_ends_with_examples_and_exit_status() {
    let takes_files = |c: &Command| c.has_subcommands() || c.get_positionals().count() > 0;
    for command in tree().into_iter().filter(takes_files) {
        let help = command.get_after_long_help().map(ToString::to_string);
        let help = help.unwrap_or_default();
        for heading in ["EXAMPLES:\n", "EXIT STATUS:\n"] {
            assert!(help.contains(heading), "{heading} in {}", name(&command));
        }
    }
}

#[test]
fn modules_import_only_what_lies_below_them() {
    // Each line may import itself and the lines before it.
    const LAYERS: [&[&str]; 11] = [
        &["error", "util"],
        &["nbd"],
        &["storage"],
        &["container"],
        &["image"],
        &["formats"],
        &["chain"],
        &["backend"],
        &["copy", "dirty", "server"],
        &["output"],
        &["cli"],
    ];
    let rank = |module: &str| LAYERS.iter().position(|names| names.contains(&module));
    let mut seen = 0;
    for (path, code) in sources() {
        let module = module_of(&path);
        let Some(own) = rank(&module) else {
            assert!(["lib", "main"].contains(&&*module), "{module} has no layer");
            continue;
        };
        for import in imports(&code) {
            // Types re-exported at the root: the error.
            if import.starts_with(char::is_uppercase) {
                continue;
            }
            let other = rank(&import);
            let other = other.unwrap_or_else(|| panic!("{path:?} imports {import}: no layer"));
            assert!(
                other <= own,
                "{path:?} imports {import}, which lies above it"
            );
            let skips = module == "backend" && import == "formats";
            assert!(!skips, "{path:?} imports {import}");
            seen += 1;
        }
    }
    assert!(seen > 100, "the scan saw only {seen} imports");
}

#[test]
fn crates_for_users_are_used_only_where_users_are() {
    for (crates, module) in [
        (&["anyhow", "clap", "clap_complete", "rustyline"][..], "cli"),
        (&["comfy_table", "indicatif"], "output"),
    ] {
        let mut seen = 0;
        for (path, code) in sources() {
            for name in crates.iter().filter(|name| mentions(&code, name)) {
                assert_eq!(module_of(&path), module, "{path:?} uses {name}");
                seen += 1;
            }
        }
        assert!(seen > 0, "the scan saw none of {crates:?}");
    }
}

#[test]
fn nobody_above_the_formats_knows_one_of_them_by_name() {
    let drivers: Vec<&str> = vdtool::formats::DRIVERS.iter().map(|d| d.name).collect();
    let mut seen = 0;
    for (path, code) in sources() {
        if ["formats", "lib"].contains(&&*module_of(&path)) {
            continue;
        }
        seen += 1;
        // A driver's row and `Caps` say what it can.
        assert_eq!(known_by_name(&code, &drivers), [""; 0], "{path:?}");
    }
    assert!(seen > 100, "the scan saw only {seen} sources");
}

/// What in a source knows one of the drivers by its name: its module, or its name as all of a text.
fn known_by_name(code: &str, drivers: &[&str]) -> Vec<String> {
    let formats = code.match_indices("formats::").map(|(at, path)| {
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => vec![word(rest)],
            Some(list) => top_level(list).iter().map(|item| word(item)).collect(),
        }
    });
    let formats = formats.flatten().filter(|name| drivers.contains(&&**name));
    let mut found: Vec<String> = formats.map(|name| format!("formats::{name}")).collect();
    for name in drivers {
        let text = format!("\"{name}\"");
        found.extend(code.contains(&text).then_some(text));
        let path = format!("{name}::DRIVER");
        found.extend(code.contains(&path).then_some(path));
    }
    if code.contains("DRIVER.name") || code.contains("driver().name ==") {
        found.push("a driver's name is compared".to_owned());
    }
    found
}

#[test]
fn the_scan_for_names_sees_paths_lists_and_texts() {
    let drivers = ["raw", "qcow2"];
    for code in [
        "use crate::formats::raw;",
        "use crate::formats::{self, DRIVERS, qcow2};",
        "let a = &crate::formats::raw::DRIVER;",
        "if driver.name == \"qcow2\" {}",
        "if image.driver().name == other {}",
    ] {
        assert!(!known_by_name(code, &drivers).is_empty(), "{code}");
    }
    let fine = "use crate::formats::{self, PLAIN}; say(\"raw disks\"); formats::names(|d| true);";
    assert_eq!(known_by_name(fine, &drivers), [""; 0]);
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn names_in(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(root().join(directory)).expect("is there");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

/// The program and its commands.
fn tree() -> Vec<Command> {
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let mut commands = vec![top.clone()];
    commands.extend(top.get_subcommands().filter(|c| !c.is_hide_set()).cloned());
    commands
}

fn name(command: &Command) -> String {
    command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned()
}

/// File names and texts of the man pages.
fn pages() -> Vec<(String, String)> {
    tree().iter().map(page).collect()
}

fn page(command: &Command) -> (String, String) {
    let name = name(command);
    let is_top = name == "vdtool";
    let man = clap_mangen::Man::new(command.clone())
        .title(name.to_uppercase())
        .source(format!("vdtool {}", env!("CARGO_PKG_VERSION")))
        .manual("vdtool manual");
    let mut text = Vec::new();
    let rendered = man
        .render_title(&mut text)
        .and_then(|()| man.render_name_section(&mut text))
        .and_then(|()| man.render_synopsis_section(&mut text))
        .and_then(|()| man.render_description_section(&mut text))
        .and_then(|()| man.render_options_section(&mut text))
        .and_then(|()| match is_top {
            true => man.render_subcommands_section(&mut text),
            false => Ok(()),
        });
    rendered.expect("memory has room");
    let mut text = once(&String::from_utf8(text).expect("pages are text"));
    if is_top {
        text.push_str(&formats());
    } else if command.has_subcommands() {
        text.push_str(&nested(command));
    }
    if let Some(help) = command.get_after_long_help() {
        text.push_str(&sections(&help.to_string()));
    }
    if !is_top {
        text.push_str(".SH \"SEE ALSO\"\n.BR vdtool (1)\n");
    }
    (format!("{name}.1"), text)
}

/// The commands of a command, which have no pages of their own, with their options.
fn nested(command: &Command) -> String {
    let mut roff = ".SH COMMANDS\n".to_owned();
    for command in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        let about = command.get_about().map(ToString::to_string);
        let operands = command.get_positionals().flat_map(|a| a.get_value_names());
        let operands = operands
            .flatten()
            .fold(String::new(), |all, o| all + " " + o.as_str());
        let (name, about) = (command.get_name(), about.unwrap_or_default());
        let (operands, about) = (escaped(&operands), escaped(&about));
        let _ = writeln!(roff, ".TP\n\\fB{name}\\fR{operands}\n{about}");
        for argument in command.get_arguments().filter(|a| !a.is_hide_set()) {
            let (Some(long), Some(help)) = (argument.get_long(), argument.get_help()) else {
                continue;
            };
            if !["help", "quiet"].contains(&long) {
                let (long, help) = (escaped(&format!("--{long}")), escaped(&help.to_string()));
                let _ = writeln!(roff, ".br\n\\fB{long}\\fR: {help}");
            }
        }
    }
    roff
}

/// The definition of the apostrophe that stands before every section, once.
fn once(text: &str) -> String {
    let repeated = |line: &str| line.starts_with(".ie \\n(.g") || line.starts_with(".el .ds Aq");
    let (head, rest): (Vec<_>, Vec<_>) = text
        .lines()
        .enumerate()
        .partition(|(at, line)| *at < 2 && repeated(line));
    let rest = rest.into_iter().filter(|(_, line)| !repeated(line));
    head.into_iter()
        .chain(rest)
        .fold(String::new(), |text, (_, line)| text + line + "\n")
}

/// The formats and what they take.
fn formats() -> String {
    let mut roff = ".SH FORMATS\n".to_owned();
    for driver in vdtool::formats::DRIVERS {
        let names = [&[driver.name], driver.aliases].concat().join(", ");
        let _ = writeln!(roff, ".TP\n\\fB{names}\\fR\n{}", escaped(driver.about));
        let creation = driver.creator.as_ref().map_or(&[][..], |c| c.options);
        for (when, specs) in [("\\-o", creation), ("open", driver.open_options)] {
            for spec in specs {
                let default = match spec.default {
                    "" => String::new(),
                    default => format!(" (default: {})", escaped(default)),
                };
                let _ = writeln!(
                    roff,
                    ".br\n{when} \\fB{}\\fR=\\fI{}\\fR: {}{default}",
                    spec.name,
                    escaped(&spec.kind.to_string()),
                    escaped(spec.help)
                );
            }
        }
    }
    roff
}

/// The end of the long help as sections: a line in capitals with a colon is a heading.
fn sections(help: &str) -> String {
    let mut roff = String::new();
    let mut close = "";
    for line in help.lines() {
        match line.strip_suffix(':').filter(|_| !line.starts_with(' ')) {
            Some(heading) => {
                let _ = writeln!(roff, "{close}.SH \"{heading}\"");
                // Examples and tables keep their lines, the rest is prose.
                let lines = ["EXAMPLES", "EXIT STATUS", "SIZES"].contains(&heading);
                roff.push_str(if lines { ".nf\n" } else { "" });
                close = if lines { ".fi\n" } else { "" };
            }
            None if line.is_empty() => {}
            None => {
                let _ = writeln!(roff, "{}", escaped(line.strip_prefix("  ").unwrap_or(line)));
            }
        }
    }
    roff + close
}

/// A line of text in the language of man pages.
fn escaped(line: &str) -> String {
    let line = line.replace('\\', "\\e").replace('-', "\\-");
    if line.starts_with(['.', '\'']) {
        return format!("\\&{line}");
    }
    line
}

/// The modules of the crate, without comments and unit tests.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("is there") {
            let path = entry.expect("reads").path();
            if path.is_dir() {
                folders.push(path);
            } else if !path.ends_with("tests.rs") {
                let text = std::fs::read_to_string(&path).expect("is text");
                found.push((path, code(&text)));
            }
        }
    }
    found
}

fn code(text: &str) -> String {
    let tests = [
        "#[cfg(test)]\nmod tests {",
        "#[cfg(test)]\npub(super) mod tests {",
    ];
    let end = tests.iter().filter_map(|tests| text.find(tests)).min();
    let text = text.get(..end.unwrap_or(text.len()));
    let lines = text.into_iter().flat_map(str::lines);
    lines
        .filter(|line| !line.trim_start().starts_with("//"))
        .fold(String::new(), |code, line| code + line + "\n")
}

/// The first part of a file's path below src, without extension.
fn module_of(path: &Path) -> String {
    let below = path.strip_prefix(root().join("src")).expect("is there");
    let first = below.components().next().expect("has a name");
    Path::new(first.as_os_str())
        .with_extension("")
        .to_string_lossy()
        .into_owned()
}

/// The modules of this crate that a source names.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(list) => found.extend(top_level(list).iter().map(|item| word(item))),
        }
    }
    found
}

/// The items of a list in braces, up to the brace that closes it.
fn top_level(list: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut depth = 0;
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(c == '{') - i32::from(c == '}');
                items.last_mut().expect("has one").push(c);
            }
        }
    }
    items.retain(|item| !item.trim().is_empty());
    items
}

fn word(text: &str) -> String {
    let text = text.trim_start();
    text.chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect()
}

/// Whether a source uses the crate `name`.
fn mentions(code: &str, name: &str) -> bool {
    let path = format!("{name}::");
    code.match_indices(&path).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
    })
}

#[test]
fn the_scan_for_imports_sees_lists_and_paths() {
    let code = code(
        "use crate::image::{Driver, Image};\n// crate::cli\nuse crate::{\n    error::{Error, Result},\n    util,\n};\nfn f() { crate::chain::open(); }\n#[cfg(test)]\nmod tests {\n use crate::copy;\n}\n",
    );
    assert_eq!(imports(&code), ["image", "error", "util", "chain"]);
    assert!(mentions("let x = anyhow::Error::new(e);", "anyhow"));
    assert!(!mentions("let x = my_anyhow::Error::new(e);", "anyhow"));
}
