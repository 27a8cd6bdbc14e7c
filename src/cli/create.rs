//! `vdtool create`.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::chain::open::{ChainOptions, Follow, Home};
use crate::chain::{self, Chain, HostFile};
use crate::cli::backing::{clean, describe, home_of_new, locate, modified, refuse_uri, relative};
use crate::cli::common::{
    AbsentArgs, OpenArgs, ParentArgs, helped_driver, parse_driver, parse_size, print, target_driver,
};
use crate::cli::exit::{Exit, usage};
use crate::cli::hints::{self, Hints};
use crate::cli::interrupt::{self, Interruptible};
use crate::cli::target::{Durable, Existing, Target, look, refuse_open, settle};
use crate::cli::{Globals, kept, progress, signal};
use crate::copy::progress::Progress;
use crate::error::{Error, ErrorKind, Result};
use crate::image::Driver;
use crate::image::create::{CreateBacking, CreateOptions, Preallocation};
use crate::image::driver::Creator;
use crate::image::options::{OptionKind, OptionValues, double_commas, split_commas};
use crate::nbd::uri::is_uri;
use crate::output;
use crate::storage::open::{Access, Caching, Sharing, StorageOptions, open};
use crate::storage::{HostId, Storage};
use crate::util::text::{printable, split_equals};

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
    pub options: Vec<OsString>,
    /// Make an image that holds what differs from this one.
    #[arg(short, long, value_name = "BACKING")]
    pub backing: Option<OsString>,
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
    /// What lies below the backing image.
    #[command(flatten)]
    pub parents: ParentArgs,
    /// What QEMU's tools have and vdtool has not.
    #[command(flatten)]
    pub absent: AbsentArgs,
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
    /// What may not be replaced.
    kept: Vec<HostFile>,
    hints: Hints,
}

/// Options that every format takes, so that scripts for qemu-img go on working.
#[derive(Default)]
pub(super) struct Generic {
    pub(super) size: Option<u64>,
    pub(super) backing: Option<OsString>,
    pub(super) backing_format: Option<&'static Driver>,
    pub(super) others: Vec<OsString>,
    /// What the host is told about the file.
    pub(super) hints: Hints,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from being done; nothing is then left under the new image's name.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    args.absent.refuse()?;
    if OptionValues::ask_for_help(&args.options) {
        let driver = helped_driver(args.format, args.file.as_deref(), globals)?;
        creator(driver)?;
        print(|out| Ok(output::options::table(out, driver, None, hints::OPTIONS)?))?;
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
    let home = home_of_new(file)?;
    let driver = target_driver(args.format, file, globals)?;
    let creator = creator(driver)?;
    let wanted = wanted(args)?;
    let values = OptionValues::parse(creator.options, driver.name, &wanted.others)
        .map_err(|e| usage(e.at(file)))?;
    let (backing, kept) = match &wanted.backing {
        None => {
            args.parents.refuse_any()?;
            (None, Vec::new())
        }
        Some(name) => {
            refuse_open(file, "a backing image")?;
            refuse_uri(driver, name).map_err(|e| e.at(file))?;
            let (backing, mut files) = backing(args, &home, name, &wanted, globals)?;
            let replaces = HostId::named(file).is_some() || values.files().next().is_some();
            if args.backing_unsafe && replaces {
                files.extend(unopened(&home, name, &backing, wanted.backing_format));
            }
            (Some(backing), files)
        }
    };
    kept::refuse(file, &kept)?;
    if backing.is_none() && wanted.backing_format.is_some() {
        return Err(usage(format!(
            "{}: -F names the format of -b, which is missing",
            printable(file)
        )));
    }
    let Some(size) = wanted.size.or(backing.as_ref().map(|b| b.virtual_size)) else {
        return Err(usage(format!(
            "{}: a new image needs a SIZE",
            printable(file)
        )));
    };
    Ok(Plan {
        driver,
        creator,
        hints: wanted.hints,
        options: CreateOptions {
            size,
            backing,
            values,
            name: file.file_name().unwrap_or_default().to_owned(),
            ..CreateOptions::default()
        },
        kept,
    })
}

pub(super) fn creator(driver: &'static Driver) -> Result<&'static Creator> {
    driver.creator.as_ref().ok_or_else(|| {
        let name = driver.name;
        Error::unsupported(match crate::formats::disc_maker(driver) {
            Some(_) => format!("images of format '{name}' are made by \"convert -O {name}\" alone"),
            None => format!("images of format '{name}' cannot be made"),
        })
    })
}

impl Generic {
    /// Whether anything was given.
    pub(super) fn is_given(&self) -> bool {
        self.size.is_some()
            || self.backing.is_some()
            || self.backing_format.is_some()
            || self.hints.are_given()
            || !self.others.is_empty()
    }

    /// Takes them out of what was given with `-o`.
    pub(super) fn take(options: &[OsString]) -> anyhow::Result<Self> {
        let mut generic = Self::default();
        let wrong = |key: &str, why: String| usage(format!("option '{key}': {why}"));
        let text = |value: &OsStr| {
            let text = value.to_str().map(str::to_owned);
            text.ok_or_else(|| format!("'{}' is not UTF-8", printable(value)))
        };
        for pair in options.iter().flat_map(|text| split_commas(text)) {
            let (key, value) = split_equals(&pair).unwrap_or((&pair, OsStr::new("")));
            match key.to_str().filter(|key| pair.len() > key.len()) {
                Some("size") => {
                    let size = text(value).and_then(|text| parse_size(&text));
                    let size = size.map_err(|e| wrong("size", e))?;
                    generic.size.get_or_insert(size);
                }
                Some("backing_file") => {
                    generic.backing.get_or_insert(value.to_owned());
                }
                Some("backing_fmt") => {
                    let text = text(value).map_err(|e| wrong("backing_fmt", e))?;
                    let driver = parse_driver(&text).map_err(|e| option("backing_fmt", &e))?;
                    generic.backing_format.get_or_insert(driver);
                }
                Some("encryption")
                    if ["off", "no", "false", "n"].iter().any(|off| value == *off) => {}
                _ if key.to_str().is_some_and(is_about_encryption) => {
                    let text = format!(
                        "option '{}': encrypted images are not supported",
                        printable(&pair)
                    );
                    return Err(Error::unsupported(text).into());
                }
                _ if generic.hints.take(&pair)? => {}
                _ => generic.others.push(double_commas(&pair)),
            }
        }
        Ok(generic)
    }
}

fn is_about_encryption(key: &str) -> bool {
    key == "encryption" || key.starts_with("encrypt.")
}

/// An error about the value of an option; what vdtool does not have is no wrong usage.
pub(super) fn option(key: &str, error: &Error) -> anyhow::Error {
    let text = format!("option '{key}': {error}");
    match error.kind() {
        ErrorKind::Unsupported => Error::unsupported(text).into(),
        _ => usage(text),
    }
}

/// What was typed, by arguments of their own or, as scripts for qemu-img do, with `-o`.
fn wanted(args: &Args) -> anyhow::Result<Generic> {
    let mut wanted = Generic::take(&args.options)?;
    if let (Some(size), Some(other)) = (args.size, wanted.size)
        && size != other
    {
        return Err(usage(format!(
            "SIZE is {size} and option 'size' is {other} (allowed: one of them, or the same twice)"
        )));
    }
    wanted.size = args.size.or(wanted.size);
    wanted.backing = args.backing.clone().or(wanted.backing);
    wanted.backing_format = args.backing_format.or(wanted.backing_format);
    Ok(wanted)
}

/// What there is to know about the image below, and all files that it is made of.
fn backing(
    args: &Args,
    home: &Home,
    name: &OsStr,
    wanted: &Generic,
    globals: &Globals,
) -> anyhow::Result<(CreateBacking, Vec<HostFile>)> {
    let absolute = locate(home, name);
    if args.backing_unsafe {
        let (Some(format), Some(virtual_size)) = (wanted.backing_format, wanted.size) else {
            return Err(usage(
                "-u does not open the backing image, so -F and SIZE must be given",
            ));
        };
        let files = vec![HostFile::named(&absolute)];
        let backing = CreateBacking {
            name: name.to_owned(),
            relative: relative(home.path(), &absolute),
            format: format.name,
            identity: None,
            state: None,
            modified: modified(&absolute).unwrap_or(SystemTime::UNIX_EPOCH),
            virtual_size,
            cluster_size: None,
            sector_size: None,
            physical_sector_size: None,
            absolute,
        };
        return Ok((backing, files));
    }
    let chain = open_backing(args, home, name, &absolute, wanted.backing_format, globals)?;
    let described = describe(name, home.path(), &absolute, chain.top())?;
    Ok((described, chain.files()))
}

/// The files of an image below that need not be there: as many as can be learnt.
fn unopened(
    home: &Home,
    name: &OsStr,
    backing: &CreateBacking,
    format: Option<&'static Driver>,
) -> Vec<HostFile> {
    let mut options = ChainOptions {
        format,
        ..ChainOptions::read()
    };
    options.storage.sharing = Sharing::Force;
    if is_uri(Path::new(name)) {
        return Vec::new();
    }
    // All of them, or those of the image itself.
    for follow in [Follow::Yes, Follow::Layers(1)] {
        options.follow = follow;
        if let Ok(chain) = chain::open::open_from(home, name, &backing.absolute, &options) {
            return chain.files();
        }
    }
    Vec::new()
}

/// Opens the image below with all that lies below it in turn, so that a chain that cannot be read
/// is not made longer.
fn open_backing(
    args: &Args,
    home: &Home,
    name: &OsStr,
    path: &Path,
    format: Option<&'static Driver>,
    globals: &Globals,
) -> anyhow::Result<Chain> {
    let how = OpenArgs {
        force_share: args.force_share,
        allow_ref: args.allow_ref.clone(),
        parents: args.parents.clone(),
        ..OpenArgs::default()
    };
    let chain = chain::open::open_from(home, name, path, &how.plan(format, Access::Read)?)?;
    if format.is_none() {
        globals.note(&format!(
            "{}: the content decided that its format is {} (-F names it)",
            printable(path),
            chain.top().driver().name
        ));
    }
    Ok(chain)
}

/// What is about to be done, in qemu-img's words.
fn announcement(file: &Path, plan: &Plan) -> String {
    let mut text = format!(
        "Formatting '{}', fmt={} size={}",
        printable(file),
        plan.driver.name,
        plan.options.size
    );
    if let Some(backing) = &plan.options.backing {
        let _ = write!(
            text,
            " backing_file={} backing_fmt={}",
            printable(&backing.name),
            backing.format
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
            OptionKind::Name | OptionKind::File => values.name(spec.name).map(printable),
        };
        let default = || Some(spec.default.to_owned()).filter(|d| !d.is_empty());
        if let Some(value) = given.or_else(default) {
            let _ = write!(text, " {}={}", spec.name, printable(&value));
        }
    }
    let _ = write!(text, "{}", plan.hints);
    text
}

fn carry_out(file: &Path, plan: &Plan, globals: &Globals) -> anyhow::Result<()> {
    signal::catch()?;
    let target = target(file, &plan.options, &plan.kept)?;
    target.note_replaced(globals);
    globals.say(&announcement(file, plan))?;
    format(&target, plan.creator, &plan.options, &|storage| {
        plan.hints.give(storage, file);
    })?;
    commit(target, Durable::Yes, plan.driver, &plan.options)?;
    Ok(())
}

/// Makes an empty image where a target is written; `hint` is told of its file first.
pub(super) fn format(
    target: &Target,
    creator: &Creator,
    options: &CreateOptions,
    hint: &dyn Fn(&dyn Storage),
) -> Result<()> {
    let named = |e: Error| target.name(e.at(target.path()));
    let bar = Arc::new(progress::hidden("create", options.size));
    let watched = |path: &Path| -> Result<Arc<dyn Storage>> {
        let options = StorageOptions {
            access: Access::Write,
            // It is written once, and hardly read.
            caching: Caching::Buffered,
            ..StorageOptions::default()
        };
        let storage = open(path, &options).map_err(|e| target.name(e.at(path)))?;
        if path == target.path() {
            hint(&*storage);
        }
        let bar: Arc<dyn Progress> = bar.clone();
        Ok(Arc::new(Interruptible::new(storage, Some(bar))))
    };
    let storage = watched(target.path())?;
    let mut create = options.clone();
    create.files = target.others().map(watched).collect::<Result<_>>()?;
    (creator.create)(&*storage, &create).map_err(named)?;
    interrupt::check()?;
    settle(&*storage).map_err(named)?;
    create.files.iter().try_for_each(|file| settle(&**file))
}

/// A new image with the files that it is made of, on their way to their names; `files` may not be
/// replaced.
pub(super) fn target(file: &Path, options: &CreateOptions, files: &[HostFile]) -> Result<Target> {
    let further = further(file, options, files)?;
    if !further.is_empty() {
        refuse_open(file, "a data file")?;
    }
    if options.preallocation() == Preallocation::Falloc {
        refuse_falloc(file)?;
    }
    if options.in_order && matches!(look(file)?.1, Existing::Device(_)) {
        let text = "an image that is written in order ends where its file does (allowed: a file, not a device)";
        return Err(Error::unsupported(text).at(file));
    }
    let mut target = Target::begin(file)?;
    for (path, (_, name)) in further.iter().zip(options.further()) {
        target.add(path, Path::new(name))?;
    }
    Ok(target)
}

/// Puts the new image into place, with its further files.
pub(super) fn commit(
    target: Target,
    durable: Durable,
    driver: &'static Driver,
    options: &CreateOptions,
) -> Result<()> {
    target.commit_named(durable, &|path, names| {
        let keys = options.further().map(|(key, _)| key);
        rename_files(path, driver, keys.zip(names.iter().map(PathBuf::as_path)))
    })
}

/// Where the further files of `file` are to be made; `files` may not be replaced.
fn further(file: &Path, options: &CreateOptions, files: &[HostFile]) -> Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = Vec::new();
    let given = options.further().count() - options.named.len();
    for (number, (key, name)) in options.further().enumerate() {
        let path = clean(&home_of_new(file)?.path().join(name));
        if kept::is_same_place(&path, file)? {
            return Err(itself(key).at(file));
        }
        for other in &paths {
            if kept::is_same_place(&path, other)? {
                let text = format!("option '{key}' names a file that another option names too");
                return Err(Error::invalid(text).at(file));
            }
        }
        kept::refuse(&path, files)?;
        if number >= given {
            refuse_others(&path, file)?;
        }
        paths.push(path);
    }
    Ok(paths)
}

/// Refuses to replace a file that nobody named, unless it is one of the image that is replaced with
/// it.
fn refuse_others(path: &Path, file: &Path) -> Result<()> {
    if matches!(look(path)?.1, Existing::Nothing) {
        return Ok(());
    }
    let mut options = ChainOptions {
        follow: Follow::Layers(1),
        ..ChainOptions::read()
    };
    options.storage.sharing = Sharing::Force;
    let old = chain::open::open(file, &options).map(|old| old.files());
    let id = HostId::named(path);
    let is_own = |own: &HostFile| own.is_same(id, path);
    match old.is_ok_and(|files| files.iter().any(is_own)) {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "would replace {}, which is there and is no file of the image that is replaced (allowed: another name, or without that file)",
            printable(path)
        ))
        .at(file)),
    }
}

/// The error for an image that names itself as a further file.
pub(super) fn itself(key: &str) -> Error {
    let what = key.replace('_', " ");
    Error::invalid(format!("the {what} would be the image itself"))
}

/// Refuses to give a block device's bytes space, which nobody can say without writing them: it may
/// be thin.
pub(super) fn refuse_falloc(file: &Path) -> Result<()> {
    match look(file)?.1 {
        Existing::Device(_) => {
            let text = "preallocation=falloc is for files: what space a block device has is not \
                        known (allowed: off, metadata, full)";
            Err(Error::unsupported(text).at(file))
        }
        _ => Ok(()),
    }
}

/// Has an image name its further files so.
fn rename_files<'a>(
    path: &Path,
    driver: &'static Driver,
    names: impl Iterator<Item = (&'a str, &'a Path)>,
) -> Result<()> {
    let options = ChainOptions {
        format: Some(driver),
        follow: Follow::No,
        ..ChainOptions::write()
    };
    let mut chain = chain::open::open(path, &options)?;
    if let Some(image) = chain.top_mut().as_rename() {
        let names: Vec<&OsStr> = names.map(|(_, name)| name.as_os_str()).collect();
        return image.rename(&names);
    }
    let image = chain.top_mut().as_amend();
    let image = image.ok_or_else(|| Error::unsupported("its files cannot be renamed"))?;
    let pairs = names.map(|(key, name)| {
        let mut pair = OsString::from(format!("{key}="));
        pair.push(double_commas(name.as_os_str()));
        pair
    });
    let pairs: Vec<OsString> = pairs.collect();
    image.amend(&OptionValues::parse(image.options(), driver.name, &pairs)?)?;
    chain.close()
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
        assert_eq!(found.backing.as_deref(), Some(OsStr::new("b,c")));
        assert_eq!(found.backing_format.map(|d| d.name), Some("raw"));
        assert_eq!(found.others, ["preallocation=off"]);
        let found = typed(&["-o", "size=8k", "x", "8192"]).expect("are right");
        assert_eq!(found.size, Some(8192));
        let error = typed(&["-o", "size=4k", "x", "8k"]).map(drop);
        let error = error.expect_err("two sizes").to_string();
        assert!(error.contains("8192") && error.contains("4096"), "{error}");
        assert!(typed(&["-o", "size=x", "x"]).is_err());
    }
}
