//! `vdtool create`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::chain::{self, Chain};
use crate::cli::Globals;
use crate::cli::backing::{
    clean, directory, locate, modified, refuse_itself, refuse_uri, relative,
};
use crate::cli::common::{OpenArgs, parse_driver, parse_size, print, target_driver};
use crate::cli::exit::{Exit, usage};
use crate::cli::interrupt::{self, Interruptible};
use crate::cli::signal;
use crate::cli::target::{Durable, Target, settle};
use crate::error::{Error, Result};
use crate::image::Driver;
use crate::image::create::{CreateBacking, CreateOptions};
use crate::image::driver::Creator;
use crate::image::options::{OptionKind, OptionValues, split_commas};
use crate::output;
use crate::storage::open::{Access, Caching, StorageOptions, open};
use crate::util::text::printable;

const HELP: &str = "\
EXAMPLES:
  vdtool create disk.vhd 20G
  vdtool create -f raw -o preallocation=falloc disk.img 8G
  vdtool create -f vhd -b base.vhd -F vhd child.vhd
  vdtool create -f vhd -o help

NOTES:
  The new image is written beside its name and renamed into place; an image that was there before is
  replaced, and its owner, mode, access control list and user attributes are kept. The name of a backing image is relative to the directory of the new image.

EXIT STATUS:
  0   done
  1   failed, and nothing is left under the name
  2   wrong usage
  63  the format has no such operation";

/// Arguments of `create`.
#[derive(Debug, clap::Args)]
#[command(
    after_long_help = HELP,
    override_usage = "vdtool create [OPTIONS] FILE [SIZE]\n       vdtool create -f FMT -o help"
)]
pub struct Args {
    /// Format of the new image; without it the extension decides, else it is raw.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Options of the format; "help" lists them.
    #[arg(short = 'o', long, value_name = "K=V,..")]
    pub options: Vec<String>,
    /// Make an image that holds what differs from this one.
    #[arg(short, long, value_name = "BACKING")]
    pub backing: Option<String>,
    /// Format of the backing image; without it the content decides.
    #[arg(short = 'F', long, value_name = "FMT", value_parser = parse_driver)]
    pub backing_format: Option<&'static Driver>,
    /// Do not open the backing image: it need not exist, and SIZE and -F must be given.
    #[arg(short = 'u', long)]
    pub backing_unsafe: bool,
    /// Read the backing image even where another process has it open for writing.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Let the backing image name this file, or any file, as its own; repeatable.
    #[arg(long, value_name = "PATH|any")]
    pub allow_ref: Vec<PathBuf>,
    /// The new image.
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// Size of its disk; without it, that of the backing image.
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
}

/// What is to be made.
struct Plan {
    driver: &'static Driver,
    creator: &'static Creator,
    options: CreateOptions,
}

/// Options that every format takes, so that scripts for qemu-img go on working.
#[derive(Default)]
pub(super) struct Generic {
    pub(super) size: Option<u64>,
    pub(super) backing: Option<String>,
    pub(super) backing_format: Option<&'static Driver>,
    pub(super) others: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done; nothing is then left under the new image's name.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    if args.options.iter().any(|o| o == "help" || o == "?") {
        let file = args.file.as_deref().unwrap_or(Path::new(""));
        let driver = target_driver(args.format, file, globals);
        creator(driver)?;
        print(|out| Ok(output::options::table(out, driver)?))?;
        return Ok(Exit::Done);
    }
    let Some(file) = &args.file else {
        return Err(usage("FILE, the name of the new image, is missing"));
    };
    let plan = plan(args, file, globals)?;
    let asked = plan.options.size;
    let options = (plan.creator.settle)(&plan.options).map_err(|e| e.at(file))?;
    let plan = Plan { options, ..plan };
    if plan.options.size != asked {
        globals.note(&format!(
            "{}: the disk is made with {} bytes, not {asked}: its format or profile has no such size",
            file.display(),
            plan.options.size
        ));
    }
    carry_out(file, &plan, globals)?;
    Ok(Exit::Done)
}

fn plan(args: &Args, file: &Path, globals: &Globals) -> anyhow::Result<Plan> {
    // Before the user is told anything about a file that cannot be.
    directory(file)?;
    let driver = target_driver(args.format, file, globals);
    let creator = creator(driver)?;
    let wanted = wanted(args)?;
    let texts = wanted.others.iter().map(String::as_str);
    let values =
        OptionValues::parse(creator.options, driver.name, texts).map_err(|e| usage(e.at(file)))?;
    let backing = match &wanted.backing {
        None => None,
        Some(name) => {
            refuse_uri(driver, name).map_err(|e| e.at(file))?;
            Some(backing(args, file, name, &wanted, globals)?)
        }
    };
    let Some(size) = wanted.size.or(backing.as_ref().map(|b| b.virtual_size)) else {
        return Err(usage(format!(
            "{}: a new image needs a SIZE",
            file.display()
        )));
    };
    Ok(Plan {
        driver,
        creator,
        options: CreateOptions {
            size,
            backing,
            values,
            data_file: None,
        },
    })
}

pub(super) fn creator(driver: &'static Driver) -> Result<&'static Creator> {
    driver.creator.as_ref().ok_or_else(|| {
        Error::unsupported(format!("images of format '{}' cannot be made", driver.name))
    })
}

impl Generic {
    /// Whether anything was given.
    pub(super) fn is_given(&self) -> bool {
        self.size.is_some()
            || self.backing.is_some()
            || self.backing_format.is_some()
            || !self.others.is_empty()
    }

    /// Takes them out of what was given with `-o`.
    pub(super) fn take(options: &[String]) -> anyhow::Result<Self> {
        let mut generic = Self::default();
        let wrong = |key: &str, why: String| usage(format!("option '{key}': {why}"));
        for pair in options.iter().flat_map(|text| split_commas(text)) {
            match pair.split_once('=') {
                Some(("size", text)) => {
                    let size = parse_size(text).map_err(|e| wrong("size", e))?;
                    generic.size.get_or_insert(size);
                }
                Some(("backing_file", text)) => {
                    generic.backing.get_or_insert(text.to_owned());
                }
                Some(("backing_fmt", text)) => {
                    let driver = parse_driver(text).map_err(|e| wrong("backing_fmt", e))?;
                    generic.backing_format.get_or_insert(driver);
                }
                _ => generic.others.push(pair.replace(',', ",,")),
            }
        }
        Ok(generic)
    }
}

/// What was typed, by arguments of their own or, as scripts for qemu-img do, with `-o`.
fn wanted(args: &Args) -> anyhow::Result<Generic> {
    let mut wanted = Generic::take(&args.options)?;
    wanted.size = args.size.or(wanted.size);
    wanted.backing = args.backing.clone().or(wanted.backing);
    wanted.backing_format = args.backing_format.or(wanted.backing_format);
    Ok(wanted)
}

/// What there is to know about the image below.
fn backing(
    args: &Args,
    file: &Path,
    name: &str,
    wanted: &Generic,
    globals: &Globals,
) -> anyhow::Result<CreateBacking> {
    let home = directory(file)?;
    let absolute = locate(&home, name);
    refuse_itself(file, &absolute)?;
    let modified = modified(&absolute);
    let relative = relative(&home, &absolute);
    let name = name.to_owned();
    if args.backing_unsafe {
        let (Some(format), Some(virtual_size)) = (wanted.backing_format, wanted.size) else {
            return Err(usage(
                "-u does not open the backing image, so -F and SIZE must be given",
            ));
        };
        return Ok(CreateBacking {
            name,
            relative,
            format: format.name,
            identity: None,
            modified: modified.unwrap_or(SystemTime::UNIX_EPOCH),
            virtual_size,
            absolute,
        });
    }
    let chain = open_backing(args, file, &absolute, wanted.backing_format, globals)?;
    let top = chain.top();
    Ok(CreateBacking {
        name,
        relative,
        format: top.driver().name,
        identity: top.identity(),
        modified: modified.map_err(|e| Error::io("read its time", e).at(&absolute))?,
        virtual_size: chain.virtual_size(),
        absolute,
    })
}

/// Opens the image below with all that lies below it in turn, so that a chain that cannot be read
/// is not made longer.
fn open_backing(
    args: &Args,
    file: &Path,
    path: &Path,
    format: Option<&'static Driver>,
    globals: &Globals,
) -> anyhow::Result<Chain> {
    let how = OpenArgs {
        force_share: args.force_share,
        allow_ref: args.allow_ref.clone(),
        ..OpenArgs::default()
    };
    let chain = chain::open::open(path, &how.plan(format, Access::Read)?)?;
    for layer in chain.layers().iter().filter_map(|l| l.storage().path()) {
        refuse_itself(file, layer)?;
    }
    if format.is_none() {
        globals.note(&format!(
            "{}: the content decided that its format is {} (-F names it)",
            path.display(),
            chain.top().driver().name
        ));
    }
    Ok(chain)
}

/// What is about to be done, in qemu-img's words.
fn announcement(file: &Path, plan: &Plan) -> String {
    let mut text = format!(
        "Formatting '{}', fmt={} size={}",
        file.display(),
        plan.driver.name,
        plan.options.size
    );
    if let Some(backing) = &plan.options.backing {
        let _ = write!(
            text,
            " backing_file={} backing_fmt={}",
            backing.name, backing.format
        );
    }
    for spec in plan.creator.options {
        let values = &plan.options.values;
        let given = match spec.kind {
            OptionKind::Size | OptionKind::Number => {
                values.number(spec.name).map(|n| n.to_string())
            }
            OptionKind::Bool => values
                .bool(spec.name)
                .map(|b| if b { "on" } else { "off" }.to_owned()),
            OptionKind::Choice(_) | OptionKind::Text => {
                values.text(spec.name).map(ToOwned::to_owned)
            }
        };
        let default = || Some(spec.default.to_owned()).filter(|d| !d.is_empty());
        if let Some(value) = given.or_else(default) {
            let _ = write!(text, " {}={}", spec.name, printable(&value));
        }
    }
    text
}

fn carry_out(file: &Path, plan: &Plan, globals: &Globals) -> anyhow::Result<()> {
    signal::catch()?;
    let target = Target::begin(file)?;
    target.note_links(globals);
    globals.say(&announcement(file, plan))?;
    let options = StorageOptions {
        access: Access::Write,
        // It is written once, and hardly read.
        caching: Caching::Buffered,
        ..StorageOptions::default()
    };
    let named = |e: Error| target.name(e.at(target.path()));
    let storage = Interruptible::new(open(target.path(), &options).map_err(named)?);
    let data = data_target(file, &plan.options)?;
    let mut create = plan.options.clone();
    if let Some(data) = &data {
        let object = open(data.path(), &options).map_err(|e| data.name(e.at(data.path())))?;
        create.data_file = Some(Arc::new(Interruptible::new(object)));
    }
    (plan.creator.create)(&storage, &create).map_err(named)?;
    interrupt::check()?;
    settle(&storage).map_err(named)?;
    if let Some(object) = create.data_file.as_deref() {
        settle(object)?;
    }
    drop((storage, create));
    // An image that names a data file never stands without it.
    data.map_or(Ok(()), |data| data.commit(Durable::Yes))?;
    target.commit(Durable::Yes)?;
    Ok(())
}

/// The second file of an image that keeps its data elsewhere, on its way to its name.
pub(super) fn data_target(file: &Path, options: &CreateOptions) -> anyhow::Result<Option<Target>> {
    let Some(name) = options.values.text("data_file") else {
        return Ok(None);
    };
    let path = clean(&directory(file)?.join(name));
    let image = directory(file)?.join(file.file_name().unwrap_or_default());
    if path == image {
        let why = "the data file would be the image itself";
        return Err(Error::invalid(why).at(file).into());
    }
    let backing = options.backing.as_ref();
    if backing.is_some_and(|b| clean(&b.absolute) == path) {
        let why = "the data file would replace the backing image";
        return Err(Error::invalid(why).at(file).into());
    }
    Ok(Some(Target::begin(&path)?))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn typed(line: &[&str]) -> anyhow::Result<Generic> {
        let words = ["vdtool", "create"].iter().chain(line);
        let cli = Cli::try_parse_from(words)?;
        let Command::Create(args) = cli.command else {
            panic!("create was typed");
        };
        wanted(&args)
    }

    #[test]
    fn options_in_the_words_of_qemu_img_stand_for_arguments() {
        let options = "size=4k,preallocation=off,backing_file=b,,c,backing_fmt=raw";
        let found = typed(&["-o", options, "x"]).expect("are right");
        assert_eq!(found.size, Some(4096));
        assert_eq!(found.backing.as_deref(), Some("b,c"));
        assert_eq!(found.backing_format.map(|d| d.name), Some("raw"));
        assert_eq!(found.others, ["preallocation=off"]);
        let found = typed(&["-o", "size=4k", "x", "8k"]).expect("are right");
        assert_eq!(found.size, Some(8192));
        assert!(typed(&["-o", "size=x", "x"]).is_err());
    }
}
