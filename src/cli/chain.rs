//! `vdtool chain`.

use std::path::{Path, PathBuf};

use crate::chain::family::{Family, Member, Remedy, survey};
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, print};
use crate::cli::exit::{Exit, answer};
use crate::cli::{Globals, backing, interrupt, signal};
use crate::image::Driver;
use crate::output::chain::{Commands, human, json};
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool chain top.vhd
  vdtool chain /var/lib/images
  vdtool chain --output json . | jq '.images[] | select(.problems != [])'

NOTES:
  Of a FILE it and all that lies below it are shown, of a DIRECTORY all images in it. No other file
  is opened but what these name and --allow-ref or their own directory allows. Nothing is changed,
  and images that another process has open are shown as well. Under 'own' stands how many bytes of
  the disk an image stores itself. For each link that is wrong the command is told that mends it,
  where there is one; 'if' before it says what only the user can know. No link is known but those
  that the images have recorded: a child that lies elsewhere is not seen.

EXIT STATUS:
  0              no link is wrong
  1              failed: a FILE cannot be read, or wrong usage
  2              a link is wrong, or an image of a DIRECTORY cannot be read
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Arguments of `chain`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the files that are named; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// How to print it.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How to open them.
    #[command(flatten)]
    pub open: OpenArgs,
    /// Images, and directories of images.
    #[arg(value_name = "FILE|DIRECTORY", required = true)]
    pub places: Vec<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    let options = args.open.plan(args.format, Access::Read)?;
    let family = survey(&args.places, &options, &interrupt::check)?;
    let commands: Commands = family
        .members
        .iter()
        .map(|member| {
            member
                .troubles
                .iter()
                .map(|t| mends(&family, member, t.remedy))
                .collect()
        })
        .collect();
    let shown = print(|out| {
        match args.output.output {
            OutputFormat::Human => human(out, &family, &commands)?,
            OutputFormat::Json => json(out, &family, &commands)?,
        }
        Ok(())
    });
    let exit = match family.has_faults() {
        true => Exit::Corrupt,
        false => Exit::Done,
    };
    answer(shown, exit)
}

/// The words of the command that links an image to another anew.
fn mends(family: &Family, member: &Member, remedy: Option<Remedy>) -> Vec<PathBuf> {
    let parent = remedy.and_then(|remedy| family.members.get(remedy.parent));
    let paths = parent.and_then(|parent| {
        let file = member.info.path.as_deref()?;
        Some((file, parent.info.path.as_deref()?, parent.info.format))
    });
    let Some((file, parent, format)) = paths else {
        return Vec::new();
    };
    let home = std::fs::canonicalize(file).ok();
    let name = match (
        home.as_deref().and_then(Path::parent),
        backing::clean(parent),
    ) {
        (Some(home), parent) if parent.is_absolute() => backing::relative(home, &parent),
        (_, parent) => parent,
    };
    let words = ["vdtool", "rebase", "-u", "-F", format, "-b"].map(PathBuf::from);
    let names = [name, dashless(file)];
    words.into_iter().chain(names).collect()
}

/// A path that is not taken for an option.
fn dashless(file: &Path) -> PathBuf {
    match file.as_os_str().as_encoded_bytes().starts_with(b"-") {
        true => Path::new(".").join(file),
        false => file.to_owned(),
    }
}
