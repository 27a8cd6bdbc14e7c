//! `vdtool bench`.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::backend::{Backend, Durability, QueueId, Request};
use crate::chain;
use crate::cli::cache::{AioMode, CacheMode};
use crate::cli::common::{OpenArgs, parse_driver, parse_size, print};
use crate::cli::exit::{Exit, usage};
use crate::cli::{Globals, interrupt, signal};
use crate::error::{Error, ErrorKind, Result};
use crate::image::Driver;
use crate::storage::open::Access;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::AlignedBuf;

const HELP: &str = "\
EXAMPLES:
  vdtool bench -c 100000 -d 32 -t none disk.qcow2
  vdtool bench -w -s 64k --flush-interval 64 scratch.qcow2

NOTES:
  Requests of --buffer-size bytes, --step-size bytes apart, go round the disk, --depth of them at a
  time, each from a thread of its own. With -w the disk is overwritten. A flush waits until all
  requests before it are done, and those after it wait for it, unless --no-drain says otherwise.

EXIT STATUS:
  0              done
  1              failed, or a request did
  2              wrong usage
  63             the format has no such operation
  129, 130, 143  stopped by SIGHUP, SIGINT, SIGTERM";

/// Most requests at a time: each has a thread.
const MAX_DEPTH: u32 = 1024;
/// Most bytes of a request.
const MAX_BUFFER: u64 = i32::MAX as u64;
/// Most bytes of all requests that are under way.
const MAX_MEMORY: u64 = 4 << 30;
/// Start of the buffers, so that direct I/O needs no bounce.
const BUFFER_ALIGN: usize = 4096;
/// Stack of a thread: requests are not deep.
const STACK: usize = 512 << 10;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = HELP)]
pub struct Args {
    /// Format of the image; without it the content decides.
    #[arg(short, long, value_name = "FMT", value_parser = parse_driver)]
    pub format: Option<&'static Driver>,
    /// How the page cache is used.
    #[arg(short = 't', long, value_enum, default_value_t, value_name = "CACHE")]
    pub cache: CacheMode,
    /// Requests in all.
    #[arg(short, long, default_value_t = 75_000, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(i32::MAX)))]
    pub count: u32,
    /// Requests at a time.
    #[arg(short, long, default_value_t = 64, value_name = "DEPTH",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_DEPTH)))]
    pub depth: u32,
    /// Where the first request starts.
    #[arg(short, long, default_value = "0", value_name = "OFFSET", value_parser = parse_size)]
    pub offset: u64,
    /// Bytes of a request.
    #[arg(short = 's', long, default_value = "4k", value_name = "SIZE", value_parser = parse_buffer)]
    pub buffer_size: u64,
    /// How far one request starts after another [default: their size]
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_step)]
    pub step_size: Option<u64>,
    /// Accepted for qemu-img's sake, without effect.
    #[arg(short = 'i', long, hide = true, value_enum, value_name = "MODE")]
    pub aio: Option<AioMode>,
    /// Accepted for qemu-img's sake, without effect.
    #[arg(short, long, hide = true)]
    pub native: bool,
    /// Write instead of reading.
    #[arg(short, long)]
    pub write: bool,
    /// With -w: the byte that is written, instead of 0.
    #[arg(long, value_name = "BYTE", value_parser = clap::value_parser!(u8), default_value_t)]
    pub pattern: u8,
    /// With -w: flush after so many requests.
    #[arg(long, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(0..=i64::from(i32::MAX)))]
    pub flush_interval: Option<u32>,
    /// Flush without waiting for the requests under way.
    #[arg(long)]
    pub no_drain: bool,
    /// How the image is opened.
    #[command(flatten)]
    pub open: OpenArgs,
    /// The image.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

fn parse_buffer(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text)? {
        size if (1..=MAX_BUFFER).contains(&size) => Ok(size),
        size => Err(format!("{size} bytes (allowed: 1 to {MAX_BUFFER})")),
    }
}

fn parse_step(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text)? {
        size if size <= MAX_BUFFER => Ok(size),
        size => Err(format!("{size} bytes (allowed: up to {MAX_BUFFER})")),
    }
}

impl Args {
    /// Requests between flushes; `None`: nothing is flushed.
    fn interval(&self) -> Option<u64> {
        self.flush_interval.filter(|&n| n > 0).map(u64::from)
    }

    fn step(&self) -> u64 {
        match self.step_size {
            None | Some(0) => self.buffer_size,
            Some(step) => step,
        }
    }

    /// Refuses what contradicts itself.
    fn check(&self) -> anyhow::Result<()> {
        let depth = u64::from(self.depth);
        match self.interval() {
            Some(_) if !self.write => {
                return Err(usage("--flush-interval is only available in write tests"));
            }
            Some(interval) if interval < depth => {
                return Err(usage(format!(
                    "--flush-interval is {interval}, smaller than --depth (allowed: {depth} and more)"
                )));
            }
            _ => {}
        }
        match depth * self.buffer_size {
            all if all > MAX_MEMORY => Err(usage(format!(
                "--depth times --buffer-size is {all} bytes (allowed: {MAX_MEMORY})"
            ))),
            _ => Ok(()),
        }
    }

    fn announce(&self) -> anyhow::Result<()> {
        let kind = if self.write { "write" } else { "read" };
        let (count, size, depth) = (self.count, self.buffer_size, self.depth);
        let (offset, step) = (self.offset, self.step());
        print(|out| {
            writeln!(
                out,
                "Sending {count} {kind} requests, {size} bytes each, {depth} in parallel \
                 (starting at offset {offset}, step size {step})"
            )?;
            if let Some(interval) = self.interval() {
                let how = if self.no_drain { "asynchronous " } else { "" };
                writeln!(out, "Sending {how}flush every {interval} requests")?;
            }
            Ok(())
        })
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the requests from being carried out.
pub fn run(args: &Args, globals: &Globals) -> anyhow::Result<Exit> {
    args.check()?;
    let access = match args.write {
        true => Access::Write,
        false => Access::Read,
    };
    let options = args
        .open
        .plan_cached(args.format, access, Some(args.cache))?;
    let chain = chain::open::open(&args.file, &options)?;
    signal::catch()?;
    if !globals.quiet {
        args.announce()?;
    }
    let backend = Backend::new(chain);
    let time = Bench::new(args, &backend).measure()?;
    let chain = backend.chain();
    if args.write {
        chain.close()?;
    }
    if !globals.quiet {
        let seconds = time.as_secs_f64();
        print(|out| Ok(writeln!(out, "Run completed in {seconds:.3} seconds.")?))?;
    }
    Ok(Exit::Done)
}

/// Requests on their way.
struct Bench<'a> {
    args: &'a Args,
    backend: &'a Backend,
    size: u64,
    /// The number of the next request.
    next: AtomicU64,
    turn: Mutex<Turn>,
    turned: Condvar,
}

/// How far it went.
#[derive(Default)]
struct Turn {
    /// Requests that are done.
    done: u64,
    /// Those among them that a flush came after.
    flushed: u64,
    /// The first error: no request is begun after it.
    error: Option<Error>,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args, backend: &'a Backend) -> Self {
        Self {
            args,
            backend,
            size: backend.geometry().virtual_size,
            next: AtomicU64::new(0),
            turn: Mutex::default(),
            turned: Condvar::new(),
        }
    }

    /// Carries all of them out, and says how long that took.
    fn measure(&self) -> Result<Duration> {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for number in 1..self.args.depth {
                let thread = std::thread::Builder::new().stack_size(STACK);
                if let Err(e) = thread.spawn_scoped(scope, move || self.work(QueueId(number))) {
                    self.note(Err(Error::io("start a thread for each request", e)));
                    break;
                }
            }
            self.work(QueueId(0));
        });
        let time = start.elapsed();
        match self.turn.lock().error.take() {
            Some(error) => Err(error),
            None => Ok(time),
        }
    }

    /// What one thread does: requests, until there are no more or one failed.
    fn work(&self, queue: QueueId) {
        let mut buf = AlignedBuf::new(clamp_len(self.args.buffer_size, usize::MAX), BUFFER_ALIGN);
        buf.fill(self.args.pattern);
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= u64::from(self.args.count) || !self.may_begin(number) {
                return;
            }
            self.note(self.one(queue, number, &mut buf));
            self.note(self.finish(queue));
        }
    }

    /// Requests between flushes that all wait for.
    fn drains(&self) -> Option<u64> {
        self.args.interval().filter(|_| !self.args.no_drain)
    }

    /// Waits for the flush that comes before a request; whether it is to be made at all.
    fn may_begin(&self, number: u64) -> bool {
        let mut turn = self.turn.lock();
        if let Some(interval) = self.drains() {
            while number >= turn.flushed + interval && turn.error.is_none() {
                self.turned.wait(&mut turn);
            }
        }
        turn.error.is_none()
    }

    /// Notes that a request is done, and flushes where it was the last before a flush.
    fn finish(&self, queue: QueueId) -> Result<()> {
        let mut turn = self.turn.lock();
        turn.done += 1;
        let done = turn.done;
        if self.drains().is_none_or(|n| !done.is_multiple_of(n)) {
            return Ok(());
        }
        // Nobody begins another request before this is over.
        drop(turn);
        let flushed = self.backend.submit(queue, Request::Flush);
        self.turn.lock().flushed = done;
        self.turned.notify_all();
        flushed
    }

    fn one(&self, queue: QueueId, number: u64, buf: &mut [u8]) -> Result<()> {
        interrupt::check()?;
        let at = self.place(number);
        if at
            .checked_add(len64(buf.len()))
            .is_none_or(|end| end > self.size)
        {
            let text = format!(
                "request {number}: {} bytes at {at:#x} reach past the end of the disk at {:#x}",
                buf.len(),
                self.size
            );
            return Err(Error::new(ErrorKind::OutOfRange, text).at(&self.args.file));
        }
        if !self.args.write {
            return self.backend.submit(queue, Request::Read { at, buf });
        }
        let fua = self.args.cache.durability() == Durability::EveryWrite;
        self.backend
            .submit(queue, Request::Write { at, buf, fua })?;
        match self.args.interval() {
            Some(n) if self.args.no_drain && (number + 1).is_multiple_of(n) => {
                self.backend.submit(queue, Request::Flush)
            }
            _ => Ok(()),
        }
    }

    /// Where a request starts: so many steps on, round the places where one fits.
    fn place(&self, number: u64) -> u64 {
        let Self { args, size, .. } = self;
        place(
            args.offset,
            number,
            args.step(),
            size.saturating_sub(args.buffer_size),
        )
    }

    /// Remembers the first error.
    fn note(&self, done: Result<()>) {
        if let Err(error) = done {
            self.turn.lock().error.get_or_insert(error);
            self.turned.notify_all();
        }
    }
}

/// Where the request of this number starts.  The first starts at `offset`, wherever that is; each
/// further one `step` on, and past `last` from the beginning again.
fn place(offset: u64, number: u64, step: u64, last: u64) -> u64 {
    let ahead = u128::from(number) * u128::from(step) + u128::from(offset);
    match (number, last) {
        (0, _) => offset,
        (_, 0) => 0,
        _ => u64::try_from(ahead % u128::from(last)).unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_go_round_the_disk_and_the_first_starts_where_it_was_told_to() {
        assert_eq!(place(5000, 0, 4096, 4096), 5000);
        assert_eq!(place(0, 0, 4096, 0), 0);
        assert_eq!(place(0, 3, 4096, 0), 0);
        assert_eq!(place(1024, 2, 4096, 10_240), 9216);
        assert_eq!(place(1024, 3, 4096, 10_240), 3072);
        assert_eq!(place(u64::MAX, u64::MAX, u64::MAX, 512), 0);
    }
}
