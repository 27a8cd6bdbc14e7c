//! `vdtool io`: commands on a disk's bytes, from arguments, a script or a prompt.
//!
//! One row of `command::COMMANDS` per command.  What is read or measured goes to stdout, in the
//! words of `qemu-io`, because scripts look for them; errors go to stderr.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::cli::Globals;
use crate::cli::common::{OpenArgs, parse_driver};
use crate::cli::exit::{self, Exit};
use crate::cli::signal;
use crate::image::Driver;
use crate::storage::open::Access;

mod args;
mod command;
mod control;
mod disk;
mod layout;
mod lines;
mod open;
mod pattern;
mod prompt;
mod read;
mod report;
mod sectors;
mod session;
pub(in crate::cli) mod words;
mod write;

use crate::cli::cache::{AioMode, CacheMode, DiscardMode};
use crate::util::text::printable;
use command::Outcome;
use disk::Target;
use lines::Lines;
use prompt::Prompt;
use report::OutputLost;
use session::Session;

/// Reads and writes a disk's bytes by commands.
#[derive(Debug, clap::Args)]
#[command(
    long_about = "Reads and writes a disk's bytes by commands.\n\n\
        The commands come from -c, then from --script; without either, from a prompt with history \
        and completion on a terminal, else from the lines of standard input.  They are those of \
        qemu-io, with its options and, on standard output, its words.\n\n\
        A command that fails does not keep the next one from running.  SIGINT and SIGTERM end the \
        session after the request under way, and the image is closed properly then too.",
    after_long_help = HELP
)]
pub struct Args {
    /// Format of FILE; left out: probed by content.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// Open for reading only.
    #[arg(short, long)]
    pub read_only: bool,
    /// Write to a temporary layer above the image, which is dropped at the end.
    #[arg(short, long)]
    pub snapshot: bool,
    /// Bypass the host's page cache: the same as -t none.
    #[arg(short, long, conflicts_with = "cache")]
    pub nocache: bool,
    /// Which caches are used.
    #[arg(short = 't', long, value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,
    /// What becomes of discards.
    #[arg(short, long, value_enum, default_value_t, value_name = "MODE")]
    pub discard: DiscardMode,
    /// A command to run; repeatable.
    #[arg(short, long = "cmd", value_name = "CMD")]
    pub commands: Vec<OsString>,
    /// A file with a command on each line, blank lines and # comments; '-' is standard input.
    #[arg(long, value_name = "FILE")]
    pub script: Option<PathBuf>,
    /// How files are opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// Write into the image what is read from those below it.
    #[arg(short = 'C', long, conflicts_with = "read_only")]
    pub copy_on_read: bool,
    /// Accepted for qemu-io's sake, without effect.
    #[arg(short = 'm', long, hide = true)]
    pub misalign: bool,
    /// Accepted for qemu-io's sake, without effect.
    #[arg(short = 'k', long, hide = true)]
    pub native_aio: bool,
    /// Accepted for qemu-io's sake, without effect.
    #[arg(short = 'i', long, hide = true, value_enum, value_name = "MODE")]
    pub aio: Option<AioMode>,
    /// The image to open first.
    #[arg(value_name = "FILE")]
    pub file: Option<PathBuf>,
}

const HELP: &str = "\
EXAMPLES:
  vdtool io -c 'write -P 0xaa 1M 64k' -c 'read -P 0xaa 1M 64k' disk.vhd
  vdtool io -r -U -c 'read -v 0 512' disk.vhd
  vdtool io -s --script steps.txt disk.vhd
  echo 'zero -u 0 1G' | vdtool io disk.raw

COMMANDS:
  read, write, readv, writev, zero, discard, flush, map, alloc, length, truncate, info, open, close,
  reopen, sleep, help, quit.  'vdtool io -c help' lists them with their options,
  'vdtool io -c \"help read\"' explains one.

EXIT STATUS:
  0    every command was done
  1    a command failed, a pattern differed, or the image cannot be opened or closed
  2    wrong usage
  63   the format has no such operation
  129  stopped by SIGHUP
  130  stopped by SIGINT
  143  stopped by SIGTERM";

/// Runs the command.
///
/// # Errors
/// FILE or the script cannot be opened; standard output is gone.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    signal::catch()?;
    let source = Source::of(args)?;
    let mut session = Session::new(&args.open, globals.quiet);
    if let Some(file) = &args.file {
        open_first(&mut session, args, file)?;
    }
    let mut runner = Runner {
        session,
        failed: false,
    };
    let fed = runner.feed(&args.commands, source);
    if let Err(error) = runner.session.close() {
        runner.report("", &error);
    }
    let flushed = runner.session.out.flush().map_err(anyhow::Error::from);
    match (runner.failed, signal::caught()) {
        (_, true) => Ok(signal::exit()),
        (true, false) => Ok(Exit::Failed),
        (false, false) => fed.and(flushed).map(|()| Exit::Done),
    }
}

fn open_first(session: &mut Session, args: &Args, file: &Path) -> anyhow::Result<()> {
    let mut spec = session.spec(file.to_owned());
    spec.format = args.format;
    spec.cache = match args.nocache {
        true => CacheMode::None,
        false => args.cache,
    };
    spec.discard = args.discard;
    spec.values.clone_from(&args.open.open_options);
    if args.read_only {
        spec.access = Access::Read;
    }
    if args.snapshot {
        spec.target = Target::Overlay;
    }
    spec.copies = args.copy_on_read;
    session.open(spec)
}

/// Where the lines come from once those of `-c` are done.
#[derive(Debug)]
enum Source {
    /// From nowhere.
    None,
    /// From a file, which messages call by this name.
    File(File, String),
    /// From standard input.
    Stdin,
    /// From the terminal.
    Prompt,
}

impl Source {
    fn of(args: &Args) -> anyhow::Result<Self> {
        Ok(match &args.script {
            Some(path) if path == Path::new("-") => Self::Stdin,
            Some(path) => {
                let file = File::open(path).map_err(|e| crate::Error::io("open", e).at(path))?;
                Self::File(file, printable(path))
            }
            None if !args.commands.is_empty() => Self::None,
            None if io::stdin().is_terminal() && io::stdout().is_terminal() => Self::Prompt,
            None => Self::Stdin,
        })
    }
}

/// Whether there is more to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Go,
    Stop,
}

/// Feeds lines to a session and remembers whether any of them failed.
#[derive(Debug)]
struct Runner {
    session: Session,
    failed: bool,
}

impl Runner {
    fn feed(&mut self, commands: &[OsString], source: Source) -> anyhow::Result<()> {
        for line in commands {
            if self.step("", line.as_bytes())? == Next::Stop {
                return Ok(());
            }
        }
        match source {
            Source::None => Ok(()),
            Source::File(file, name) => self.script(&name, file),
            Source::Stdin => self.script("stdin", io::stdin().as_fd()),
            Source::Prompt => self.prompt(),
        }
    }

    fn script(&mut self, name: &str, file: impl AsFd) -> anyhow::Result<()> {
        let mut lines = Lines::new(file);
        let mut number = 0u64;
        loop {
            number += 1;
            let place = format!("{name}:{number}: ");
            match lines.next() {
                Ok(Some(line)) if self.step(&place, &line)? == Next::Go => {}
                Ok(_) => return Ok(()),
                Err(error) => {
                    self.report(&place, &error);
                    return Ok(());
                }
            }
        }
    }

    fn prompt(&mut self) -> anyhow::Result<()> {
        let mut prompt = Prompt::new()?;
        let result = loop {
            match prompt.next() {
                Ok(Some(line)) => match self.step("", line.as_bytes()) {
                    Ok(Next::Go) => {}
                    Ok(Next::Stop) => break Ok(()),
                    Err(error) => break Err(error),
                },
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        prompt.save(&self.session.files());
        result
    }

    /// Carries out one line; only the loss of standard output is an error here.
    fn step(&mut self, place: &str, line: &[u8]) -> anyhow::Result<Next> {
        let mut next = Next::Go;
        match command::execute(&mut self.session, line) {
            Ok(Outcome::Done) => {}
            Ok(Outcome::Differs) => self.failed = true,
            Ok(Outcome::Quit) => next = Next::Stop,
            Err(error) if error.is::<OutputLost>() => return Err(error),
            Err(error) => {
                // What went before the error is to be read before it.
                self.session.out.flush()?;
                self.report(place, &error);
            }
        }
        self.session.out.flush()?;
        match signal::caught() {
            true => Ok(Next::Stop),
            false => Ok(next),
        }
    }

    fn report(&mut self, place: &str, error: &anyhow::Error) {
        self.failed = true;
        exit::complain(&format!("{place}{error:#}"));
    }
}
