//! What users type: arguments, subcommands, exit codes.
//!
//! Arguments hold what was typed; each command's `run` turns them into a plan, carries it out and
//! says how the process ends.  Data goes to stdout, everything else to stderr.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind as ClapKind;
use clap::{Parser, Subcommand, ValueEnum};

pub mod amend;
pub mod backing;
pub mod bench;
pub mod bitmap;
pub mod cache;
pub mod chain;
pub mod check;
pub mod commit;
pub mod common;
pub mod compact;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod create;
pub mod ctl;
pub mod dd;
pub mod dirty;
pub mod exit;
pub mod fork;
pub mod hints;
pub mod info;
pub mod interrupt;
pub mod io;
pub mod kept;
pub mod lint;
pub mod map;
pub mod measure;
mod patient;
pub mod progress;
mod reach;
pub mod rebase;
pub mod removed;
pub mod resize;
pub mod sealed;
pub mod serve;
pub mod signal;
pub mod snapshot;
pub mod target;

use crate::error::ErrorKind;
use crate::util::text::printable;
use exit::Exit;

const HELP: &str = "\
EXAMPLES:
  vdtool create disk.vhd 20G
  vdtool info disk.vhd
  vdtool convert disk.vhd disk.raw
  vdtool check disk.vhd

SIZES:
  512  4k  1.5G  10MiB  2T    binary units: 1k is 1024 bytes
  8s                          sectors of 512 bytes

FILES NAMED BY IMAGES:
  A backing file that an image names is opened only where it lies in the image's own directory or
  below. --allow-ref widens that.

NAMES:
  Names of files, snapshots and bitmaps are bytes. Where they are printed, control characters are
  shown as \\u{1b}, and bytes that are not UTF-8 as \\xE9; in JSON, which is UTF-8, such bytes
  become U+FFFD, as qemu-img has it. Names of exports are UTF-8.

EXIT STATUS:
  0              done
  1              failed; of check and compare, wrong usage as well
  2              wrong usage; check: corruptions remain; compare: an image could not be opened
  3              check: leaks remain; compare: extents could not be read
  4              compare: data could not be read
  63             the format has no such operation, or is known and not supported
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Virtual disk images: create, inspect, convert, check.
#[derive(Debug, Parser)]
#[command(
    name = "vdtool",
    version,
    about,
    max_term_width = 100,
    // As getopt has it: the last one counts.
    args_override_self = true,
    // As getopt has it: as much of a long option as names one.
    infer_long_args = true,
    after_long_help = HELP
)]
pub struct Cli {
    /// What holds for every command.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What holds for every command.
#[derive(Debug, clap::Args)]
pub struct Globals {
    /// Print errors only.
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

impl Globals {
    /// Tells the user something on stderr that is not an error, unless `--quiet`.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            // Nobody can be told that stderr is closed.
            let _ = writeln!(std::io::stderr(), "vdtool: note: {}", printable(text));
        }
    }

    /// Tells the user on stdout what is done, unless `--quiet`.
    ///
    /// # Errors
    /// The host's; that nobody listens any more is no reason to leave work undone.
    pub fn say(&self, text: &str) -> anyhow::Result<()> {
        if self.quiet {
            return Ok(());
        }
        match common::print(|out| Ok(writeln!(out, "{}", printable(text))?)) {
            Err(e) if exit::nobody_reads(&e) => Ok(()),
            done => done,
        }
    }
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new image.
    Create(create::Args),
    /// Show what an image is.
    Info(info::Args),
    /// Copy disks into a new image.
    Convert(convert::Args),
    /// Check an image's metadata, and repair it.
    Check(check::Args),
    /// Give back the space that an image takes for nothing.
    Compact(compact::Args),
    /// Show which images lie below which, and what is wrong between them.
    Chain(chain::Args),
    /// Tell what of an image another place would refuse.
    Lint(lint::Args),
    /// List the extents of a disk.
    Map(map::Args),
    /// Compare two disks.
    Compare(compare::Args),
    /// Tell how large a converted image will be.
    Measure(measure::Args),
    /// Change the size of a disk.
    Resize(resize::Args),
    /// List, make, apply and delete internal snapshots.
    Snapshot(snapshot::Args),
    /// Make a base of an image, with empty children over it.
    Fork(fork::Args),
    /// Move what an image has into one below it.
    Commit(commit::Args),
    /// Give an image another backing image.
    Rebase(rebase::Args),
    /// Add, remove, clear, merge, enable and disable dirty bitmaps.
    Bitmap(bitmap::Args),
    /// Make, show and change logs of which regions of a disk changed.
    Dirty(dirty::Args),
    /// Change format options of an image in place.
    Amend(amend::Args),
    /// Copy a part of a disk into a new image.
    Dd(dd::Args),
    /// Measure how fast a disk is read or written.
    Bench(bench::Args),
    /// Read and write a disk's bytes by commands.
    Io(io::Args),
    /// Serve disks until told to stop.
    Serve(Box<serve::Args>),
    /// Give commands to a running 'serve --control'.
    Ctl(ctl::Args),
    /// Print completions for a shell.
    Completions(completions::Args),
}

/// Parses the arguments, runs the command, maps the result to an exit code.
pub fn main() -> ExitCode {
    let words = with_bare_progress(std::env::args_os());
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let heard = signal::hear().map_err(anyhow::Error::from);
    exit::finish(heard.and_then(|()| run(&cli.command, &cli.globals)))
}

/// The arguments, with its value for a `--progress` that has none, as qemu-img's users type it.
fn with_bare_progress(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let is_form = |word: &OsString| {
        let forms = common::ProgressForm::value_variants().iter();
        let mut names = forms.filter_map(clap::ValueEnum::to_possible_value);
        word.to_str()
            .is_some_and(|word| names.any(|n| n.matches(word, false)))
    };
    let mut words = words.peekable();
    let mut all = Vec::new();
    while let Some(word) = words.next() {
        // What comes after is names.
        if word == "--" {
            all.push(word);
            all.extend(words);
            break;
        }
        let is_bare = word == "--progress" && !words.peek().is_some_and(is_form);
        all.push(match is_bare {
            true => "--progress=bar".into(),
            false => word,
        });
    }
    all
}

fn run(command: &Command, globals: &Globals) -> anyhow::Result<Exit> {
    match command {
        Command::Create(args) => create::run(args, globals),
        Command::Info(args) => info::run(args, globals),
        Command::Convert(args) => convert::run(args, globals),
        Command::Check(args) => check::run(args, globals),
        Command::Compact(args) => compact::run(args, globals),
        Command::Chain(args) => chain::run(args, globals),
        Command::Lint(args) => lint::run(args, globals),
        Command::Map(args) => map::run(args, globals),
        Command::Compare(args) => compare::run(args, globals),
        Command::Measure(args) => measure::run(args, globals),
        Command::Resize(args) => resize::run(args, globals),
        Command::Snapshot(args) => snapshot::run(args, globals),
        Command::Fork(args) => fork::run(args, globals),
        Command::Commit(args) => commit::run(args, globals),
        Command::Rebase(args) => rebase::run(args, globals),
        Command::Bitmap(args) => bitmap::run(args, globals),
        Command::Dirty(args) => dirty::run(args, globals),
        Command::Amend(args) => amend::run(args, globals),
        Command::Dd(args) => dd::run(args, globals),
        Command::Bench(args) => bench::run(args, globals),
        Command::Io(args) => io::run(args, globals),
        Command::Serve(args) => serve::run(args, globals),
        Command::Ctl(args) => ctl::run(args, globals),
        Command::Completions(args) => completions::run(args, globals),
    }
}

/// Says in one line what is wrong with the arguments, or prints the help that was asked for.
/// `chain`, `check` and `compare` use 2 for findings, so their usage errors are 1.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            let shown = error.print().map_err(exit::output_failed);
            return exit::finish(shown.map(|()| Exit::Done));
        }
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
        }
        _ => exit::complain(&one_line(&error.to_string())),
    }
    if is_unsupported(error) {
        return Exit::NoSuchOperation.into();
    }
    let command = std::env::args_os().skip(1).find(|a| !is_option(a));
    match command.as_deref().and_then(OsStr::to_str) {
        Some("chain" | "check" | "compare") => Exit::Failed.into(),
        _ => Exit::Usage.into(),
    }
}

/// Whether a value names what vdtool knows and does not have, such as a format.
fn is_unsupported(error: &clap::Error) -> bool {
    let source = std::error::Error::source(error);
    let source = source.and_then(|e| e.downcast_ref::<crate::Error>());
    source.is_some_and(|e| e.kind() == ErrorKind::Unsupported)
}

fn is_option(argument: &OsStr) -> bool {
    argument.as_encoded_bytes().starts_with(b"-")
}

/// clap's paragraphs up to the usage, as one line.
fn one_line(text: &str) -> String {
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        .filter(|line| !line.is_empty());
    let line = lines
        .collect::<Vec<_>>()
        .join(" ")
        .replace(" tip: ", "; tip: ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_of_all_arguments_agree() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_form_of_progress_may_be_left_out() {
        for (typed, meant) in [
            ("convert --progress a b", "convert --progress=bar a b"),
            ("convert --progress json a b", "convert --progress json a b"),
            ("convert a b --progress", "convert a b --progress=bar"),
            ("convert -- --progress b", "convert -- --progress b"),
        ] {
            let words = typed.split(' ').map(OsString::from);
            let meant: Vec<OsString> = meant.split(' ').map(OsString::from).collect();
            assert_eq!(with_bare_progress(words), meant);
        }
    }

    #[test]
    fn what_is_wrong_with_the_arguments_fits_one_line() {
        let wrong = |args: &[&str]| {
            let error = Cli::try_parse_from(args).expect_err("is wrong");
            one_line(&error.to_string())
        };
        assert_eq!(
            wrong(&["vdtool", "info"]),
            "the following required arguments were not provided: <FILE>"
        );
        let line = wrong(&["vdtool", "info", "--outptu", "x"]);
        assert!(
            line.starts_with("unexpected argument '--outptu' found; tip: "),
            "{line}"
        );
    }
}
