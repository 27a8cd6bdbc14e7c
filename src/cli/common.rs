//! Arguments that commands share, and what they mean.

use std::ffi::{OsStr, OsString};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use crate::chain::Chain;
use crate::chain::open::{ChainOptions, Changed, References};
use crate::cli::cache::CacheMode;
use crate::cli::{Globals, exit};
use crate::error::Error;
use crate::formats;
use crate::image::Driver;
use crate::nbd::uri::is_uri;
use crate::storage::open::{Access, Caching, Flushing, Sharing, StorageOptions};
use crate::util::size;
use crate::util::text::printable;

/// Human text or JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OutputFormat {
    /// For people.
    #[default]
    Human,
    /// For programs; keys as qemu-img has them.
    Json,
}

/// Where a command reports something.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct OutputArgs {
    /// How to print the result.
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    pub output: OutputFormat,
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ProgressForm {
    /// A bar on a terminal, nothing elsewhere.
    #[default]
    Auto,
    /// A bar; where stderr is no terminal, lines of text.
    Bar,
    /// One JSON object a line on stderr.
    Json,
    /// Nothing.
    None,
}

/// Long jobs.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub struct ProgressArgs {
    /// How to show progress, on stderr.
    #[arg(long, value_enum, default_value_t, value_name = "FORM")]
    pub progress: ProgressForm,
    /// Show a progress bar: the same as --progress bar.
    #[arg(short = 'p', conflicts_with = "progress")]
    pub bar: bool,
}

/// What is done about a parent that was changed since its child was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ParentChanged {
    /// It is refused: the disk may be none that ever was.
    #[default]
    Refuse,
    /// It is read as it is now.
    Accept,
}

/// What lies below images.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct ParentArgs {
    /// What lies below the image, topmost first, whatever images name; repeatable.
    #[arg(long, value_name = "FILE")]
    pub parent: Vec<PathBuf>,
    /// What to do about a parent that was changed since its child was made.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    pub parent_changed: ParentChanged,
}

impl ParentArgs {
    /// The same, of which the first parents are those of the chains that are open.
    #[must_use]
    pub fn after<'a>(&self, chains: impl IntoIterator<Item = &'a Chain>) -> Self {
        let chains = chains.into_iter();
        let below: usize = chains.map(|chain| chain.layers().len() - 1).sum();
        Self {
            parent: self.parent.iter().skip(below).cloned().collect(),
            ..self.clone()
        }
    }

    /// Refuses parents that no image is left for.
    ///
    /// # Errors
    /// A usage error.
    pub fn refuse_any(&self) -> anyhow::Result<()> {
        match self.parent.first() {
            None => Ok(()),
            Some(first) => Err(exit::usage(format!(
                "--parent {}: no image is left that could have it below it",
                printable(first)
            ))),
        }
    }

    /// Takes them over into how a chain is opened.
    pub fn give(&self, options: &mut ChainOptions) {
        options.parents.clone_from(&self.parent);
        options.changed = match self.parent_changed {
            ParentChanged::Refuse => Changed::Refuse,
            ParentChanged::Accept => Changed::Accept,
        };
    }
}

/// How images are opened.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct OpenArgs {
    /// Read even where another process has the image open for writing.
    #[arg(short = 'U', long)]
    pub force_share: bool,
    /// Let images name this file, or any file, or this NBD URI, as backing file, or have parents be
    /// looked for by identity in this directory; repeatable.
    #[arg(long, value_name = "PATH|any|URI")]
    pub allow_ref: Vec<PathBuf>,
    /// What lies below the image.
    #[command(flatten)]
    pub parents: ParentArgs,
    /// Format of a backing file whose format is not recorded.
    #[arg(long, value_name = "FMT", value_parser = parse_driver)]
    pub backing_format: Option<&'static Driver>,
    /// Which disk of a file that holds several, as an OVA: its number, counted from 1, or its name.
    #[arg(long, value_name = "N|NAME")]
    pub member: Option<OsString>,
    /// Options of the image's format for opening it, such as size_rule=chs for vhd.
    #[arg(long, value_name = "K=V,..")]
    pub open_options: Vec<OsString>,
    /// Read by system calls, not through mappings.
    #[arg(long)]
    pub no_mmap: bool,
    /// What QEMU's tools have and vdtool has not.
    #[command(flatten)]
    pub absent: AbsentArgs,
}

/// Options of QEMU's tools that are not supported; named here so that the refusal says so.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct AbsentArgs {
    /// An image by options.
    #[arg(long, hide = true, aliases = ["source-image-opts", "target-image-opts"])]
    pub image_opts: bool,
    /// An object, such as a secret.
    #[arg(long, hide = true, value_name = "OBJECT")]
    pub object: Vec<OsString>,
}

impl AbsentArgs {
    /// Refuses them by name.
    ///
    /// # Errors
    /// A usage error.
    pub fn refuse(&self) -> anyhow::Result<()> {
        if self.image_opts {
            return Err(exit::usage(
                "--image-opts is not supported; use -f and --open-options",
            ));
        }
        match self.object.is_empty() {
            true => Ok(()),
            false => Err(exit::usage("--object is not supported")),
        }
    }
}

impl OpenArgs {
    /// The NBD URIs among what images may name.
    fn remotes(&self) -> Vec<String> {
        let uris = self.allow_ref.iter().filter(|path| is_uri(path));
        uris.filter_map(|path| Some(path.to_str()?.to_owned()))
            .collect()
    }

    /// As [`OpenArgs::plan`], with the page cache used as `cache` says.
    ///
    /// # Errors
    /// Those of [`OpenArgs::plan`].
    pub fn plan_cached(
        &self,
        format: Option<&'static Driver>,
        access: Access,
        cache: Option<CacheMode>,
    ) -> anyhow::Result<ChainOptions> {
        let mut options = self.plan(format, access)?;
        if let Some(caching) = cache.and_then(CacheMode::caching) {
            options.storage.caching = caching;
        }
        if let Some(cache) = cache {
            options.storage.flushing = cache.flushing();
        }
        Ok(options)
    }

    /// What they mean for an image of `format` (`None`: probed).
    ///
    /// # Errors
    /// A usage error for what vdtool does not have.
    pub fn plan(
        &self,
        format: Option<&'static Driver>,
        access: Access,
    ) -> anyhow::Result<ChainOptions> {
        self.absent.refuse()?;
        if self.force_share && access == Access::Write {
            return Err(exit::usage("-U/--force-share is for reading only"));
        }
        let (any, allowed): (Vec<_>, Vec<_>) = self
            .allow_ref
            .iter()
            .cloned()
            .partition(|path| path == Path::new("any"));
        let references = match any.is_empty() {
            false => References::Any { allowed },
            true => References::Confined { allowed },
        };
        let storage = StorageOptions {
            access,
            sharing: if self.force_share {
                Sharing::Force
            } else {
                Sharing::Locked
            },
            caching: if self.no_mmap {
                Caching::Buffered
            } else {
                Caching::Mapped
            },
            flushing: Flushing::Needed,
        };
        let mut options = ChainOptions {
            storage,
            format,
            backing_format: self.backing_format,
            references,
            remotes: self.remotes(),
            values: self.open_options.clone(),
            member: self.member.clone(),
            watcher: crate::cli::progress::watcher("open"),
            ..ChainOptions::default()
        };
        self.parents.give(&mut options);
        Ok(options)
    }
}

/// Hands `write` stdout, buffered, and flushes it.
///
/// # Errors
/// Those of `write`; the host's; [`exit::NobodyReads`] where the pipe is closed.
pub fn print(write: impl FnOnce(&mut dyn Write) -> anyhow::Result<()>) -> anyhow::Result<()> {
    // Much at a time: standard output itself writes line by line.
    let mut out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let done = write(&mut out).and_then(|()| Ok(out.flush()?));
    done.map_err(|e| match e.downcast::<io::Error>() {
        Ok(e) => exit::output_failed(e),
        Err(e) => e,
    })
}

/// The format of a new image: the one named, else that of the file name's extension, else raw,
/// and then the user is told.
///
/// # Errors
/// `Unsupported` where the extension stands for a format that vdtool knows and does not have.
pub fn target_driver(
    format: Option<&'static Driver>,
    file: &Path,
    globals: &Globals,
) -> Result<&'static Driver, Error> {
    let extension = match is_uri(file) {
        true => None,
        false => file.extension().and_then(OsStr::to_str),
    };
    if let Some(driver) = format.or_else(|| extension.and_then(formats::by_extension)) {
        return Ok(driver);
    }
    if let Some(refused) = extension.and_then(formats::refused::by_extension) {
        let text = format!(
            "the extension stands for format '{}' ({}), which is not supported (a format named by \
             an option, such as raw, is written under any name)",
            refused.name, refused.about
        );
        return Err(Error::unsupported(text).at(file));
    }
    globals.note(&format!(
        "{}: neither an option nor the extension names a format, so it is {}",
        printable(file),
        formats::PLAIN.name
    ));
    Ok(formats::PLAIN)
}

/// The format whose options are to be listed: that of a new image, and raw where none is named.
///
/// # Errors
/// Those of [`target_driver`].
pub fn helped_driver(
    format: Option<&'static Driver>,
    file: Option<&Path>,
    globals: &Globals,
) -> Result<&'static Driver, Error> {
    match (format, file) {
        (None, None) => Ok(formats::PLAIN),
        (_, file) => target_driver(format, file.unwrap_or(Path::new("")), globals),
    }
}

/// A format by its name, for clap.
///
/// # Errors
/// Those of [`formats::named`].
pub fn parse_driver(name: &str) -> Result<&'static Driver, Error> {
    formats::named(name)
}

/// A size in bytes, for clap.
///
/// # Errors
/// Says why it is not one.
pub fn parse_size(text: &str) -> Result<u64, String> {
    size::parse(text).map_err(|e| e.to_string())
}
