//! From the images named on the command line to exports.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::merge::Merge;
use super::{Args, DetectZeroes};
use crate::backend::{self, Backend, Discard, Durability, Listener, Medium, Policy, Settings};
use crate::chain::open::{ChainOptions, Follow, Home};
use crate::chain::{self, Chain};
use crate::cli::backing::clean;
use crate::cli::cache::DiscardMode;
use crate::cli::exit::usage;
use crate::cli::{Globals, create};
use crate::error::Error;
use crate::image::{Driver, Role};
use crate::nbd::uri::is_uri;
use crate::server::Export;
use crate::storage::HostId;
use crate::storage::highwater::HighWater;
use crate::storage::open::{Access, Caching, Sharing};
use crate::util::text::{printable, split_equals};

/// Queues that are counted apart, where the server does not say how many it has.
const QUEUES: u32 = 16;

/// Longest name of an export: what the NBD protocol allows.
const MAX_NAME: usize = 4096;

/// An image, and what clients call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// What clients ask for; empty where nothing was typed.
    pub name: String,
    /// The image.
    pub file: PathBuf,
}

/// An image as it is typed: `[NAME=]FILE`.  A name has no slash, so that any path can be typed.
///
/// # Errors
/// Says what is wrong with it.
pub(super) fn parse_named(text: &OsStr) -> Result<Named, String> {
    let named = split_equals(text).filter(|(name, _)| !name.as_bytes().contains(&b'/'));
    let (name, file) = named.unwrap_or((OsStr::new(""), text));
    if file.is_empty() {
        return Err("the image has no name".to_owned());
    }
    if name.len() > MAX_NAME {
        return Err(format!(
            "the name has {} bytes (allowed: {MAX_NAME})",
            name.len()
        ));
    }
    let name = name
        .to_str()
        .ok_or("the name that clients are to use is not UTF-8")?;
    Ok(Named {
        name: name.to_owned(),
        file: PathBuf::from(file),
    })
}

/// How the image of one export is opened, then and later.
#[derive(Debug)]
pub(super) struct Opener {
    /// The image as it was typed, or its overlay.
    path: PathBuf,
    options: ChainOptions,
    snapshot: bool,
    overlay: bool,
    watermark: Option<u64>,
}

/// One export, and what is needed to open its image again or another instead.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) export: Export,
    pub(super) opener: Opener,
    /// What was opened last, and its format.
    pub(super) image: parking_lot::Mutex<(PathBuf, &'static Driver)>,
    /// Held while a command puts another image or other layers in the place of those there are.
    pub(super) turn: parking_lot::Mutex<()>,
    /// The layers that are merged, or were last.
    pub(super) merge: parking_lot::Mutex<Option<Arc<Merge>>>,
}

impl Opener {
    fn new(args: &Args, path: &Path) -> anyhow::Result<Self> {
        let access = match args.read_only || args.snapshot {
            true => Access::Read,
            false => Access::Write,
        };
        let mut options = args.open.plan(args.format, access)?;
        if args.cache.direct() {
            options.storage.caching = Caching::Direct;
        }
        options.storage.flushing = args.cache.flushing();
        Ok(Self {
            path: path.to_owned(),
            options,
            snapshot: args.snapshot,
            overlay: args.overlay.is_some(),
            watermark: args.watermark,
        })
    }

    /// How an image is opened; `format` stands above what was typed.
    pub(super) fn options(&self, path: &Path, format: Option<&'static Driver>) -> ChainOptions {
        let mut options = ChainOptions {
            format: format.or(self.options.format),
            ..self.options.clone()
        };
        // What was typed lies below what was typed, and below no other image.
        if path != self.path && !same_file(path, &self.path) {
            options.parents.clear();
        }
        options
    }

    /// Opens an image; `format` stands above what was typed.
    ///
    /// # Errors
    /// Those of the chain.
    pub(super) fn open(
        &self,
        path: &Path,
        format: Option<&'static Driver>,
    ) -> crate::Result<Medium> {
        self.open_ours(path, format, &[])
    }

    /// As [`Opener::open`], where this process has the locks of `ours` by a chain that is open still.
    ///
    /// # Errors
    /// Those of the chain.
    pub(super) fn open_ours(
        &self,
        path: &Path,
        format: Option<&'static Driver>,
        ours: &[HostId],
    ) -> crate::Result<Medium> {
        let (options, high_water) = self.watched(path, format, ours);
        let chain = chain::open::open(path, &options)?;
        let chain = match self.snapshot {
            true => chain.with_overlay()?,
            false => chain,
        };
        Ok(Medium {
            chain,
            high_water: Some(high_water),
        })
    }

    /// How an image is opened, and who is told how far it is written.
    pub(super) fn watched(
        &self,
        path: &Path,
        format: Option<&'static Driver>,
        ours: &[HostId],
    ) -> (ChainOptions, Arc<HighWater>) {
        let high_water = Arc::new(HighWater::new(self.watermark));
        let options = ChainOptions {
            high_water: Some(Arc::clone(&high_water)),
            ours: ours.to_vec(),
            ..self.options(path, format)
        };
        (options, high_water)
    }

    /// How an image is opened that is only read.
    pub(super) fn reading(&self, path: &Path, ours: &[HostId]) -> ChainOptions {
        let mut options = self.options(path, None);
        options.storage.access = Access::Read;
        options.ours = ours.to_vec();
        options
    }

    /// Virtual size of an image as it is now, in bytes, whoever has it open; what lies below it is
    /// not opened.
    ///
    /// # Errors
    /// Those of opening it for reading.
    pub(super) fn size_of(
        &self,
        path: &Path,
        format: Option<&'static Driver>,
    ) -> crate::Result<u64> {
        let mut options = ChainOptions {
            follow: Follow::No,
            ..self.options(path, format)
        };
        options.storage.access = Access::Read;
        options.storage.sharing = Sharing::Force;
        chain::open::open(path, &options).map(|chain| chain.virtual_size())
    }

    /// Whether writes are lost when the image is closed.
    pub(super) fn is_snapshot(&self) -> bool {
        self.snapshot
    }

    /// Whether writes go to an overlay that is kept.
    pub(super) fn is_overlay(&self) -> bool {
        self.overlay
    }

    /// The format of the image that was opened, under the temporary layer where there is one.
    pub(super) fn format_of(&self, medium: &Medium) -> &'static Driver {
        let layer = medium.chain.layers().get(usize::from(self.snapshot));
        layer.map_or(medium.chain.top().driver(), |l| l.driver())
    }
}

/// Opens all images.
///
/// # Errors
/// Usage errors; those of the images.
pub(super) fn open_all(
    args: &Args,
    globals: &Globals,
    listener: impl Fn(&str) -> Listener,
) -> anyhow::Result<Vec<Disk>> {
    if args.files.len() > 1 && !args.open.parents.parent.is_empty() {
        return Err(usage("--parent is for one image"));
    }
    let mut disks: Vec<Disk> = Vec::new();
    for named in &named(args)? {
        if disks.iter().any(|d| d.export.name == named.name) {
            let name = printable(&named.name);
            return Err(usage(format!(
                "two exports are called '{name}' (NAME=FILE names them)"
            )));
        }
        disks.push(open_one(args, globals, named, listener(&named.name))?);
    }
    Ok(disks)
}

/// The images, and what clients call them; `--name` is for the one that has no name yet.
fn named(args: &Args) -> anyhow::Result<Vec<Named>> {
    let mut files = args.files.clone();
    let name = &args.transport.name;
    if name.is_empty() {
        return Ok(files);
    }
    match files.iter_mut().find(|f| f.name.is_empty()) {
        Some(file) => file.name.clone_from(name),
        None => {
            let text = "--name is for an image without NAME=, and there is none";
            return Err(usage(text));
        }
    }
    Ok(files)
}

fn open_one(
    args: &Args,
    globals: &Globals,
    named: &Named,
    listener: Listener,
) -> anyhow::Result<Disk> {
    let path = args.overlay.as_ref().unwrap_or(&named.file);
    let mut opener = Opener::new(args, path)?;
    let (path, medium) = match &args.overlay {
        None => (named.file.clone(), opener.open(&named.file, None)?),
        Some(overlay) => {
            if args.files.len() > 1 {
                return Err(usage("--overlay is for one image"));
            }
            let medium = open_overlay(args, globals, &mut opener, overlay, &named.file)?;
            (overlay.clone(), medium)
        }
    };
    let format = opener.format_of(&medium);
    let backend = Backend::with_settings(medium, settings(args, listener)?).map_err(usage)?;
    let export = Export {
        name: named.name.clone(),
        description: args.description.clone(),
        backend: Arc::new(backend),
    };
    Ok(Disk {
        export,
        opener,
        image: parking_lot::Mutex::new((path, format)),
        turn: parking_lot::Mutex::default(),
        merge: parking_lot::Mutex::default(),
    })
}

fn settings(args: &Args, listener: Listener) -> anyhow::Result<Settings> {
    let logical = small(args.logical_block_size, 1, "--logical-block-size")?;
    let physical = 4096.max(logical);
    let defaults = Settings::default();
    Ok(Settings {
        queues: QUEUES,
        logical_block_size: logical,
        physical_block_size: small(args.physical_block_size, physical, "--physical-block-size")?,
        max_transfer: small(args.max_io, defaults.max_transfer, "--max-io")?,
        durability: match args.snapshot {
            true => Durability::Never,
            false => args.cache.durability(),
        },
        discard: match args.discard {
            DiscardMode::Unmap => Discard::Unmap,
            DiscardMode::Ignore => Discard::Ignore,
        },
        detect_zeroes: match args.detect_zeroes {
            DetectZeroes::Off => backend::DetectZeroes::Off,
            DetectZeroes::On => backend::DetectZeroes::KeepSpace,
            DetectZeroes::Unmap => backend::DetectZeroes::MayUnmap,
        },
        // Commands may merge them.
        layers_stay: args.control.is_none() || args.snapshot || args.overlay.is_some(),
        policy: Policy {
            on_read: args.on_read_error.into(),
            on_write: args.on_write_error.into(),
        },
        listener,
    })
}

/// Largest block, and longest transfer, that can be asked for.
const MAX_SIZE: u64 = 64 << 20;

fn small(typed: Option<u64>, default: u32, option: &str) -> anyhow::Result<u32> {
    let Some(typed) = typed else {
        return Ok(default);
    };
    let inside = (1..=MAX_SIZE).contains(&typed);
    match u32::try_from(typed) {
        Ok(size) if inside => Ok(size),
        _ => Err(usage(format!(
            "{option} is {typed} (allowed: 1 to {MAX_SIZE})"
        ))),
    }
}

/// Opens the overlay, which is made where it is not there.
fn open_overlay(
    args: &Args,
    globals: &Globals,
    opener: &mut Opener,
    overlay: &Path,
    base: &Path,
) -> anyhow::Result<Medium> {
    let base = match is_uri(base) {
        true => base.to_owned(),
        false => clean(
            &Home::of_new(base)?
                .path()
                .join(base.file_name().unwrap_or_default()),
        ),
    };
    if !overlay.exists() {
        make_overlay(args, globals, overlay, &base)?;
    }
    // `-f` names the format of the image; the overlay was made by its extension.
    opener.options.format = None;
    // What was typed lies below the image.
    opener.options.followed = 1;
    opener.options.references.allow([base.clone()]);
    if is_uri(&base) {
        opener
            .options
            .remotes
            .extend(base.to_str().map(str::to_owned));
    }
    // Opening for writing may change what it finds, and what is there may be anything.
    let mut look = ChainOptions {
        follow: Follow::Layers(2),
        ..opener.options(overlay, None)
    };
    look.storage.access = Access::Read;
    refuse_other(&chain::open::open(overlay, &look)?, overlay, &base)?;
    let medium = opener.open(overlay, None)?;
    refuse_other(&medium.chain, overlay, &base)?;
    Ok(medium)
}

/// Refuses an overlay of anything but `base`.
fn refuse_other(chain: &Chain, overlay: &Path, base: &Path) -> crate::Result<()> {
    let id = HostId::named(base);
    let files = chain.files();
    let mut below = files
        .iter()
        .filter(|f| f.layer == 1 && f.role == Role::Header);
    match below.any(|f| f.is_same(id, base)) {
        true => Ok(()),
        false => {
            let text = format!(
                "is there already, and is not an overlay of {}",
                printable(base)
            );
            Err(Error::invalid(text).at(overlay))
        }
    }
}

fn make_overlay(args: &Args, globals: &Globals, overlay: &Path, base: &Path) -> anyhow::Result<()> {
    let format = match args.format {
        Some(format) => format,
        None => {
            let options = args.open.plan(None, Access::Read)?;
            chain::open::open_top(base, &options)?.top().driver()
        }
    };
    let quiet = Globals { quiet: true };
    let wanted = create::Args {
        format: None,
        options: Vec::new(),
        backing: Some(base.as_os_str().to_owned()),
        backing_format: Some(format),
        backing_unsafe: false,
        force_share: false,
        allow_ref: args.open.allow_ref.clone(),
        parents: args.open.parents.clone(),
        absent: crate::cli::common::AbsentArgs::default(),
        file: Some(overlay.to_owned()),
        size: None,
    };
    create::run(&wanted, &quiet)?;
    globals.note(&format!(
        "{}: made, with {} below it",
        printable(overlay),
        printable(base)
    ));
    Ok(())
}

/// Whether two names lead to one file.
pub(super) fn same_file(a: &Path, b: &Path) -> bool {
    let id = HostId::named(a);
    id.is_some() && id == HostId::named(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_before_the_first_equals_sign_and_has_no_slash() {
        for (text, name, file) in [
            ("a.img", "", "a.img"),
            ("a=b.img", "a", "b.img"),
            ("a=b=c", "a", "b=c"),
            ("./a=b.img", "", "./a=b.img"),
            ("=b.img", "", "b.img"),
        ] {
            let named = parse_named(OsStr::new(text)).expect(text);
            assert_eq!((&*named.name, named.file.to_str()), (name, Some(file)));
        }
        assert!(parse_named(OsStr::new("a=")).is_err());
        assert!(parse_named(OsStr::new(&format!("{}=b", "x".repeat(5000)))).is_err());
        let bytes = |bytes: &[u8]| parse_named(OsStr::from_bytes(bytes));
        let named = bytes(b"a=caf\xe9").expect("a file's name is bytes");
        assert_eq!(named.file.as_os_str().as_bytes(), b"caf\xe9");
        assert!(bytes(b"caf\xe9=a").is_err());
    }
}
