//! `vdtool check`.

mod layers;

use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::chain;
use crate::chain::open::{ChainOptions, Follow};
use crate::cli::cache::CacheMode;
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, ProgressArgs, parse_driver, print};
use crate::cli::exit::{self, Exit, coded, complain};
use crate::cli::{Globals, progress, signal};
use crate::error::{Error, ErrorKind};
use crate::image::check::{Finding, Repair, Report, Severity, joined};
use crate::image::open::Purpose;
use crate::image::{Backing, Driver};
use crate::output;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool check disk.vhd
  vdtool check -r leaks disk.vhd
  vdtool check --chain disk.vhd
  vdtool check --output json disk.vhd | jq .corruptions

FINDINGS:
  A leak is space in the file that nothing refers to: it is wasted, and no data is at risk. A
  corruption is metadata that is wrong. Findings that are called notes are neither. What a repair
  did stands beside the finding. Where the image has a backing image, that one is opened to see
  that it is there and that it is the right one; its own metadata is not checked.

  With --chain that of all images below FILE is checked too, and whether each is there and the right
  one. They are only read: what -r says is done to FILE alone, because others may have them below
  them as well. JSON then has one object for each image, FILE first, in the list 'images'.

EXIT STATUS:
  0              clean, or everything found was repaired
  1              failed: the check could not be done, or wrong usage
  2              corruptions remain
  3              leaks remain, but no corruptions
  63             the format has nothing to check
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM; a repair is then done in part, and can be run again";

/// What to repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RepairArg {
    /// Leaks only: metadata that data depends on is not touched.
    Leaks,
    /// Everything that can be repaired without losing data.
    All,
}

/// Arguments of `check`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Repair what is found.
    #[arg(short, long, value_enum, value_name = "WHAT")]
    pub repair: Option<RepairArg>,
    /// Check all images below FILE too.
    #[arg(long)]
    pub chain: bool,
    /// How the page cache is used.
    #[arg(
        short = 'T',
        long,
        value_enum,
        value_name = "CACHE",
        default_value = "writeback"
    )]
    pub cache: CacheMode,
    /// How to print it.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How progress is shown.
    #[command(flatten)]
    pub progress: ProgressArgs,
    /// How to open it.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// What became of one image.
struct Checked {
    report: Report,
    format: &'static str,
    has_backing: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done; findings are not errors.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    // 2 stands for corruption here.
    let plan = |access| {
        let plan = args.open.plan_cached(args.format, access, Some(args.cache));
        plan.map_err(|e| coded(Exit::Failed, e))
    };
    let (repair, access) = match args.repair {
        None => (Repair::Nothing, Access::Read),
        Some(RepairArg::Leaks) => (Repair::Leaks, Access::Write),
        Some(RepairArg::All) => (Repair::All, Access::Write),
    };
    let options = ChainOptions {
        follow: Follow::Layers(1),
        purpose: Purpose::Check,
        ..plan(access)?
    };
    signal::catch()?;
    let mut checked = check(args, &args.file, &options, repair, globals)?;
    if args.chain {
        return layers::run(args, globals, &options, checked);
    }
    if checked.has_backing {
        let options = ChainOptions {
            follow: Follow::Yes,
            ..options
        };
        look_below(&args.file, options, &mut checked.report);
    }
    exit::answer(show(args, globals, &checked), verdict(&checked.report))
}

/// Checks the image at `file` itself, and opens no other.
fn check(
    args: &Args,
    file: &Path,
    options: &ChainOptions,
    repair: Repair,
    globals: &Globals,
) -> crate::Result<Checked> {
    let chain = chain::open::open(file, options)?;
    let image = chain.top();
    let format = image.driver().name;
    let Some(check) = image.as_check() else {
        let why = format!("format '{format}' has nothing to check");
        return Err(Error::unsupported(why).at(file));
    };
    let run = |repair: Repair| {
        let bar = progress::start("check", check.work(), &args.progress, globals);
        let report = check.check(repair, &bar).map_err(|e| e.at(file))?;
        bar.finish();
        crate::Result::Ok(report)
    };
    let mut report = run(repair)?;
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        chain.flush()?;
        report = joined(report, run(Repair::Nothing)?);
        chain.close()?;
    }
    // Of a parent that is recorded nowhere nothing is wrong.
    let says_which = |b: &Backing| b.identity.is_some() || b.state.is_some() || !b.names.is_empty();
    let given = !options.parents.is_empty();
    let has_backing = image.backing().is_some_and(|b| given || says_which(&b));
    Ok(Checked {
        report,
        format,
        has_backing,
    })
}

/// Opens the image once more with all that lies below it: a backing image that is missing or
/// wrong is a corruption, one that may not be opened has not been checked.
fn look_below(file: &Path, mut options: ChainOptions, report: &mut Report) {
    options.storage.access = Access::Read;
    if let Err(error) = chain::open::open(file, &options) {
        add_below(error, report);
    }
}

/// Adds what keeps the image below from being read.
fn add_below(error: Error, report: &mut Report) {
    match error.kind() {
        ErrorKind::NotFound
        | ErrorKind::WrongFormat
        | ErrorKind::Corrupt
        | ErrorKind::Invalid
        | ErrorKind::OutOfRange => {
            let text = format!("the backing image is missing or wrong: {}", whole(error));
            report.add(Severity::Corruption, 1, text, None);
        }
        _ => {
            let text = format!("the backing image was not checked: {}", whole(error));
            report.add(Severity::Note, 1, text, None);
            report.check_errors += 1;
        }
    }
}

/// An error with its causes.
fn whole(error: Error) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

fn show(args: &Args, globals: &Globals, checked: &Checked) -> anyhow::Result<()> {
    let report = &checked.report;
    match args.output.output {
        OutputFormat::Json => print(|out| {
            Ok(output::check::json(
                out,
                &args.file,
                checked.format,
                report,
            )?)
        }),
        OutputFormat::Human if globals.quiet => {
            // Nothing but errors: what is still wrong is one.
            let standing = |f: &&Finding| f.repaired.is_none() && f.severity != Severity::Note;
            for finding in report.findings.iter().filter(standing) {
                complain(&output::check::line(finding));
            }
            Ok(())
        }
        OutputFormat::Human => print(|out| Ok(output::check::human(out, report)?)),
    }
}

fn verdict(report: &Report) -> Exit {
    if report.check_errors > 0 {
        Exit::Failed
    } else if report.corruptions > 0 {
        Exit::Corrupt
    } else if report.leaks > 0 {
        Exit::Leaks
    } else {
        Exit::Done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_tells_the_worst_that_remains() {
        let report = |corruptions, leaks, check_errors| Report {
            corruptions,
            leaks,
            check_errors,
            corruptions_fixed: 1,
            ..Report::default()
        };
        let cases = [
            (report(0, 0, 0), 0),
            (report(1, 1, 1), 1),
            (report(1, 1, 0), 2),
            (report(0, 1, 0), 3),
        ];
        for (report, code) in cases {
            assert_eq!(verdict(&report).code(), code, "{report:?}");
        }
    }

    #[test]
    fn after_a_repair_the_second_look_decides_what_remains() {
        let mut first = Report::default();
        first.add(
            Severity::Leak,
            3,
            "lost".to_owned(),
            Some("freed".to_owned()),
        );
        first.add(Severity::Corruption, 1, "bad".to_owned(), None);
        let mut second = Report::default();
        second.add(Severity::Corruption, 2, "still bad".to_owned(), None);
        let report = joined(first, second);
        assert_eq!(
            (report.leaks, report.leaks_fixed, report.corruptions),
            (0, 3, 2)
        );
        let texts: Vec<&str> = report.findings.iter().map(|f| &*f.text).collect();
        assert_eq!(texts, ["lost", "still bad"]);
    }
}
