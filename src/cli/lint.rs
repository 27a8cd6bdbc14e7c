//! `vdtool lint`.

use std::path::PathBuf;

use crate::chain;
use crate::chain::open::{ChainOptions, Follow};
use crate::cli::Globals;
use crate::cli::common::{OpenArgs, OutputArgs, OutputFormat, parse_driver, print};
use crate::cli::exit::{Exit, answer};
use crate::formats::profiles::{self, Facts, Profile, Verdict};
use crate::image::Driver;
use crate::image::info::ImageInfo;
use crate::image::open::Purpose;
use crate::output;
use crate::output::lint::Finding;
use crate::storage::open::Access;

const HELP: &str = "\
EXAMPLES:
  vdtool lint --for azure disk.vhd
  vdtool lint --for vsphere-ova --output json appliance.ova | jq '.rules[] | select(.state == \"breaks\")'

PLACES:
  esxi         disks on a datastore of ESXi
  vsphere-ova  packages for vSphere and ESXi
  workstation  disks of VMware Workstation, Player and Fusion
  hyperv-gen1  boot disks of Hyper-V, generation 1
  hyperv-gen2  boot disks of Hyper-V, generation 2
  azure        disks that are uploaded to Azure
  aws          AWS VM Import/Export
  xen          disks for XenServer and XCP-ng
  virtualbox   disks and appliances for VirtualBox

NOTES:
  Each rule says where it is written, and whether that is the text of whoever makes the place. Rules
  that are not about such a file are left out, but for JSON. No data is read. 'convert --for' makes
  what keeps them.

EXIT STATUS:
  0   all rules are kept
  1   some are broken, or it failed
  2   wrong usage
  63  the file is of a format, or has a feature, that is not supported";

/// Arguments of `lint`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Where the image is to go.
    #[arg(long = "for", value_name = "NAME", value_parser = profiles::named)]
    pub place: &'static Profile,
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// How to print the result.
    #[command(flatten)]
    pub output: OutputArgs,
    /// How to open it.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image, or a file that holds disks.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done.
pub fn run(args: &Args, _globals: &Globals) -> anyhow::Result<Exit> {
    let options = ChainOptions {
        follow: Follow::Layers(1),
        purpose: Purpose::Describe,
        ..args.open.plan(args.format, Access::Read)?
    };
    let findings = match chain::open::contents(&args.file, &options)? {
        Some(contents) => judge(args.place, &Facts::of_contents(&contents)),
        None => {
            let chain = chain::open::open(&args.file, &options)?;
            let info = ImageInfo::of(chain.top())?;
            judge(args.place, &Facts::of_image(&info))
        }
    };
    let breaks = |finding: &Finding| matches!(finding.verdict, Verdict::Breaks(_));
    let exit = match findings.iter().any(breaks) {
        true => Exit::Failed,
        false => Exit::Done,
    };
    let shown = print(|out| {
        match args.output.output {
            OutputFormat::Human => output::lint::human(out, &findings)?,
            OutputFormat::Json => output::lint::json(out, args.place, &args.file, &findings)?,
        }
        Ok(())
    });
    answer(shown, exit)
}

fn judge(place: &'static Profile, facts: &Facts<'_>) -> Vec<Finding> {
    let rules = place.rules.iter();
    rules
        .map(|rule| Finding {
            rule,
            verdict: (rule.check)(facts),
        })
        .collect()
}
