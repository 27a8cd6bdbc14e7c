//! The life of a serving process.

use std::fs::File;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use signal_hook::low_level::pipe;

use super::disk::{self, Disk};
use super::event::Events;
use super::merge::Merge;
use super::{Args, Export, Server, control, limit, ready, report};
use crate::chain::HostFile;
use crate::cli::exit::Exit;
use crate::cli::removed::Removed;
use crate::cli::{Globals, signal};
use crate::error::Error;

/// What is served, and by what: everything that commands act on.
#[derive(Debug)]
pub(super) struct Front {
    pub(super) disks: Vec<Arc<Disk>>,
    pub(super) server: Arc<dyn Server>,
    pub(super) events: Events,
    pub(super) ending: Ending,
    /// What is removed at the end: the control socket, the file with the process id.
    pub(super) files: Mutex<Vec<Removed>>,
}

impl Front {
    /// Lets requests under way end, refuses the others, and has `run` go on to close the images.
    pub(super) fn stop(&self) {
        self.merges().iter().for_each(|merge| merge.stop());
        self.server.stop();
        if !self.server.drains() {
            self.shut();
        }
    }

    /// The merges of layers that there are.
    fn merges(&self) -> Vec<Arc<Merge>> {
        let merges = self.disks.iter().map(|disk| disk.merge.lock().clone());
        merges.flatten().collect()
    }

    /// Closes all images; the first failure is the answer.
    fn close(&self, exports: &[Export]) -> anyhow::Result<()> {
        // Whoever began one meanwhile is told that it is over.
        let merges = self.merges();
        merges.iter().for_each(|merge| merge.end());
        let closed = close(exports);
        let mut merges = merges.iter();
        closed.and(Ok(merges.try_for_each(|merge| merge.close())?))
    }

    /// Refuses all further requests.
    fn shut(&self) {
        for disk in &self.disks {
            disk.export.backend.shut();
        }
    }
}

/// How serving ended, for those who asked for it and want to know.
#[derive(Debug, Default)]
pub(super) struct Ending {
    state: Mutex<EndState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct EndState {
    result: Option<Result<(), String>>,
    waiting: usize,
}

/// Longest that the process stays for those who want to know how it ended.
const FAREWELL: Duration = Duration::from_secs(2);

impl Ending {
    /// Counts somebody who will wait; [`Ending::heard`] takes the count back, once the answer is
    /// on its way.
    pub(super) fn join(&self) {
        self.state.lock().waiting += 1;
    }

    /// Waits until the images are closed.
    ///
    /// # Errors
    /// Why they are not closed cleanly.
    pub(super) fn wait(&self) -> crate::Result<()> {
        let mut state = self.state.lock();
        loop {
            match &state.result {
                Some(Ok(())) => return Ok(()),
                Some(Err(why)) => return Err(Error::invalid(why.clone())),
                None => self.changed.wait(&mut state),
            }
        }
    }

    pub(super) fn heard(&self) {
        let mut state = self.state.lock();
        state.waiting = state.waiting.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Tells all who wait, and gives them time to pass it on.
    fn tell(&self, result: &anyhow::Result<()>) {
        let until = Instant::now() + FAREWELL;
        let mut state = self.state.lock();
        let why = result.as_ref().map_err(|e| format!("{e:#}"));
        state.result = Some(why.copied());
        self.changed.notify_all();
        while state.waiting > 0 && !self.changed.wait_until(&mut state, until).timed_out() {}
    }
}

impl Front {
    /// Ends the process at once.
    pub(super) fn abandon(&self) -> ! {
        self.files.lock().clear();
        std::process::exit(i32::from(Exit::Failed.code()))
    }
}

/// Serves until told to stop.
///
/// # Errors
/// Whatever keeps the disks from being served or from being closed cleanly.
pub(super) fn run(
    args: &Args,
    globals: &Globals,
    start: impl FnOnce(Vec<Export>) -> anyhow::Result<Arc<dyn Server>>,
) -> anyhow::Result<Exit> {
    signal::catch()?;
    let signals = Signals::new()?;
    // Before other files get the number.
    let descriptor = args.ready_fd.map(ready::descriptor).transpose()?;
    let events = Events::new(args.output.output, globals.quiet);
    let disks = disk::open_all(args, globals, |name| events.listener(name))?;
    let exports: Vec<Export> = disks.iter().map(|d| d.export.clone()).collect();
    let served = check_names(args, &exports, descriptor.as_ref())
        .and_then(|()| limit::apply(&args.limit, &exports))
        .and_then(|()| Ok(args.control.as_deref().map(control::bind).transpose()?))
        .and_then(|socket| Ok((socket, start(exports.clone())?)));
    let (socket, server) = match served {
        Ok(served) => served,
        Err(error) => return close(&exports).and(Err(error)),
    };
    let front = Arc::new(Front {
        disks: disks.into_iter().map(Arc::new).collect(),
        server,
        events,
        ending: Ending::default(),
        files: Mutex::default(),
    });
    let ended = attend(args, &front, &signals, socket, descriptor);
    ready::notify("STOPPING=1");
    let closed = front.close(&exports);
    front.files.lock().clear();
    let result = ended.and(closed);
    front.ending.tell(&result);
    result.map(|()| Exit::Done)
}

/// Refuses to write anything else to files of the disks.
fn check_names(args: &Args, exports: &[Export], descriptor: Option<&File>) -> anyhow::Result<()> {
    let files: Vec<HostFile> = exports
        .iter()
        .flat_map(|e| e.backend.chain().files())
        .collect();
    if let Some(path) = &args.pid_file {
        ready::check_pid_file(path, &files)?;
    }
    if let Some(descriptor) = descriptor {
        ready::check_descriptor(descriptor, &files)?;
    }
    Ok(())
}

/// From when clients may come until the server has ended.
fn attend(
    args: &Args,
    front: &Arc<Front>,
    signals: &Signals,
    socket: Option<control::Socket>,
    descriptor: Option<File>,
) -> anyhow::Result<()> {
    announce(args, front, socket, descriptor).inspect_err(|_| front.stop())?;
    let (ended, end) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(|| signals.wait_then(|| front.stop()));
        if let Some(seconds) = args.stats_interval {
            let interval = Duration::from_secs(seconds);
            scope.spawn(move || {
                // The channel is only ever closed.
                while end.recv_timeout(interval) == Err(mpsc::RecvTimeoutError::Timeout) {
                    report::print_stats(front);
                }
            });
        }
        let result = front.server.wait();
        front.stop();
        front.shut();
        drop(ended);
        signals.end();
        Ok(result?)
    })
}

/// Lets commands and clients know that they may come.
fn announce(
    args: &Args,
    front: &Arc<Front>,
    socket: Option<control::Socket>,
    descriptor: Option<File>,
) -> anyhow::Result<()> {
    if let Some(socket) = socket {
        let file = control::listen(socket, front)?;
        front.files.lock().push(file);
    }
    if let Some(path) = &args.pid_file {
        front.files.lock().push(ready::pid_file(path)?);
    }
    ready::announce(&front.server.addresses(), descriptor)
}

/// Closes all images; the first failure is the answer.
fn close(exports: &[Export]) -> anyhow::Result<()> {
    let mut result: Result<(), Error> = Ok(());
    for export in exports {
        result = result.and(export.backend.finish());
    }
    Ok(result?)
}

/// The signals that stop a job, as bytes in a socket, so that a thread can wait for them.
#[derive(Debug)]
struct Signals {
    bytes: UnixStream,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        let (bytes, written) = UnixStream::pair()?;
        for signal in signal::stopping() {
            pipe::register(signal, written.try_clone()?)?;
        }
        Ok(Self { bytes })
    }

    /// Calls `f` if a signal comes before `end` is called.
    fn wait_then(&self, f: impl FnOnce()) {
        if matches!((&self.bytes).read(&mut [0]), Ok(1)) {
            f();
        }
    }

    fn end(&self) {
        // Fails only where it was done before.
        let _ = self.bytes.shutdown(Shutdown::Read);
    }
}
