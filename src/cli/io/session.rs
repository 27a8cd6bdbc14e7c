//! What is open, and where output goes: the state between commands.

use std::path::PathBuf;

use crate::chain::HostFile;
use crate::cli::cache::{CacheMode, DiscardMode};
use crate::cli::common::OpenArgs;
use crate::cli::io::args::Parsed;
use crate::cli::io::disk::{Disk, Spec, Target};
use crate::cli::io::report::{Form, Output};
use crate::storage::open::Access;
use crate::util::text::printable;

/// What commands act on.
#[derive(Debug)]
pub(super) struct Session {
    /// The open image.
    disk: Option<Disk>,
    /// Standard output.
    pub(super) out: Output,
    /// Whether reports are left out everywhere.
    quiet: bool,
    /// What holds for every image that is opened, and which parents the next one has.
    args: OpenArgs,
}

impl Session {
    /// A session with nothing open; images are opened as `args` say, with no format options.
    pub(super) fn new(args: &OpenArgs, quiet: bool) -> Self {
        Self {
            disk: None,
            out: Output::new(),
            quiet,
            args: OpenArgs {
                open_options: Vec::new(),
                ..args.clone()
            },
        }
    }

    /// The open image.
    ///
    /// # Errors
    /// Says that there is none.
    pub(super) fn disk(&self) -> anyhow::Result<&Disk> {
        self.disk.as_ref().ok_or_else(no_file)
    }

    /// All files of the open image, where one is open.
    pub(super) fn files(&self) -> Vec<HostFile> {
        self.disk.as_ref().map(Disk::files).unwrap_or_default()
    }

    /// The open image, and where to print.
    ///
    /// # Errors
    /// Says that there is none.
    pub(super) fn parts(&mut self) -> anyhow::Result<(&Disk, &mut Output)> {
        let disk = self.disk.as_ref().ok_or_else(no_file)?;
        Ok((disk, &mut self.out))
    }

    /// How a command with these options reports.
    pub(super) fn form(&self, parsed: &Parsed) -> Form {
        match (self.quiet || parsed.has('q'), parsed.has('C')) {
            (true, _) => Form::Quiet,
            (false, true) => Form::Machine,
            (false, false) => Form::Human,
        }
    }

    /// A specification with the session's defaults.
    pub(super) fn spec(&self, path: PathBuf) -> Spec {
        Spec {
            path,
            format: None,
            access: Access::Write,
            target: Target::default(),
            cache: CacheMode::default(),
            discard: DiscardMode::default(),
            copies: false,
            values: Vec::new(),
            args: self.args.clone(),
        }
    }

    /// Opens an image.
    ///
    /// # Errors
    /// One is open already; those of [`Spec::open`].
    pub(super) fn open(&mut self, spec: Spec) -> anyhow::Result<()> {
        if let Some(disk) = &self.disk {
            let open = printable(&disk.spec.path);
            anyhow::bail!("{open}: file open already, try 'help close'");
        }
        self.disk = Some(spec.open()?);
        // Those that were typed are below the image that was opened first.
        self.args.parents.parent.clear();
        Ok(())
    }

    /// Closes the image, if one is open.
    ///
    /// # Errors
    /// The host's, from writing out what a clean close writes; the image is no longer open then.
    pub(super) fn close(&mut self) -> anyhow::Result<()> {
        self.disk.take().map_or(Ok(()), Disk::close)
    }
}

fn no_file() -> anyhow::Error {
    anyhow::anyhow!("no file open, try 'help open'")
}
