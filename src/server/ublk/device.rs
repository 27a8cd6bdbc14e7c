//! A device from its start to its end, on a thread that owns it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use libublk::sys;
use parking_lot::{Condvar, Mutex};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::features::{self, Features, Transfer};
use super::pool::{Inbox, Leaving, Pool};
use super::queue::{Queue, Shared};
use super::transfer::Channel;
use super::{Options, control, params, process, ring};
use crate::backend::{Backend, WakeHandle};
use crate::error::{Error, ErrorKind, Result};
use crate::server::Export;

/// How long the driver may take to start a device, and to show it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the driver may take to hold requests back for the next server.
const QUIESCE: Duration = Duration::from_secs(2);
/// Workers of a device with one queue; each further queue brings two.
const WORKERS: usize = 4;
/// Most workers of a device.
const MAX_WORKERS: usize = 16;

/// What a device is and uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InUse {
    /// Its number: N of `/dev/ublkbN`.
    pub id: u32,
    /// Number of queues.
    pub queues: u16,
    /// Requests that a queue may have under way.
    pub depth: u16,
    /// Largest request in bytes.
    pub max_io: u32,
    /// How the bytes of requests are moved.
    pub transfer: Transfer,
    /// What of the driver's features the device has.
    pub features: Features,
    /// Threads for what may wait.
    pub workers: usize,
}

/// Told when a device has ended.
#[derive(Debug, Default)]
pub(super) struct Ends {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Ends {
    /// Returns once `f` is true; it is asked now and whenever a device has ended.
    pub(super) fn wait_until(&self, f: impl Fn() -> bool) {
        let mut count = self.count.lock();
        while !f() {
            self.changed.wait(&mut count);
        }
    }
}

/// How far a device is.
#[derive(Debug, Default)]
struct Progress {
    /// It is to end.
    stopping: bool,
    /// It ends for the next server to take it over.
    leaving: bool,
    /// Queues that have ended, and how the first of them failed.
    ended: u16,
    failed: Option<Error>,
    /// Its thread has ended.
    over: bool,
}

#[derive(Debug, Default)]
struct Life {
    progress: Mutex<Progress>,
    changed: Condvar,
    ends: Arc<Ends>,
}

impl Life {
    fn change(&self, f: impl FnOnce(&mut Progress)) {
        f(&mut self.progress.lock());
        self.changed.notify_all();
    }

    /// The device has ended, and what of it can be seen is gone.
    fn end(&self) {
        self.change(|progress| progress.over = true);
        *self.ends.count.lock() += 1;
        self.ends.changed.notify_all();
    }

    fn queue_ended(&self, result: Result<()>) {
        self.change(|progress| {
            progress.ended += 1;
            if let Err(e) = result {
                progress.failed.get_or_insert(e);
            }
        });
        let _looking = self.ends.count.lock();
        self.ends.changed.notify_all();
    }
}

/// A block device of this machine that serves a disk.
#[derive(Debug)]
pub(super) struct Device {
    in_use: InUse,
    life: Arc<Life>,
    inboxes: Vec<Arc<Inbox>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Held for its drop.
    _wake: WakeHandle,
}

/// What the thread of a device tells once clients may come.
struct Started {
    in_use: InUse,
    inboxes: Vec<Arc<Inbox>>,
}

impl Device {
    /// Starts a device; returns once it can be opened.
    pub(super) fn start(export: &Export, options: &Options, ends: &Arc<Ends>) -> Result<Self> {
        let life = Arc::new(Life {
            ends: Arc::clone(ends),
            ..Life::default()
        });
        let (tell, told) = channel();
        let owner = Owner {
            backend: Arc::clone(&export.backend),
            options: options.clone(),
            life: Arc::clone(&life),
        };
        let thread = std::thread::Builder::new()
            .name("ublk-device".to_owned())
            .spawn(move || owner.run(&tell))
            .map_err(|e| Error::io("start a thread", e))?;
        let started = match told.recv_timeout(PATIENCE) {
            Ok(Ok(started)) => started,
            // Nothing is left behind when this is told.
            Ok(Err(e)) => {
                let _ = thread.join();
                return Err(e);
            }
            Err(_) => {
                let late = std::io::Error::from_raw_os_error(libc::ETIMEDOUT);
                return Err(Error::io("start the ublk device", late));
            }
        };
        let inboxes = started.inboxes.clone();
        let wake = export
            .backend
            .on_wake(move || inboxes.iter().for_each(|i| i.wake()));
        // What was held before the waker was there is offered again.
        started.inboxes.iter().for_each(|inbox| inbox.wake());
        Ok(Self {
            in_use: started.in_use,
            life,
            inboxes: started.inboxes,
            thread: Mutex::new(Some(thread)),
            _wake: wake,
        })
    }

    /// What it is and uses.
    pub(super) fn in_use(&self) -> &InUse {
        &self.in_use
    }

    /// Where clients find it.
    pub(super) fn path(&self) -> String {
        control::block_device(self.in_use.id)
    }

    /// Whether it has ended.
    pub(super) fn is_over(&self) -> bool {
        self.life.progress.lock().over
    }

    /// Whether it cannot go on.
    pub(super) fn has_failed(&self) -> bool {
        self.life.progress.lock().failed.is_some()
    }

    /// Why it could not go on; once.
    pub(super) fn failure(&self) -> Option<Error> {
        self.life.progress.lock().failed.take()
    }

    /// Has it end; returns at once.
    pub(super) fn stop(&self) {
        let mut leaving = false;
        self.life.change(|progress| {
            progress.stopping = true;
            leaving = progress.leaving;
        });
        // What is held is the next server's.
        if !leaving {
            self.inboxes.iter().for_each(|inbox| inbox.stop());
        }
    }

    /// Refuses where the device does not wait for another server.
    pub(super) fn may_hand_over(&self) -> Result<()> {
        match self.in_use.features.has(features::RECOVERY) {
            true => Ok(()),
            false => Err(Error::unsupported(format!(
                "{} does not outlive its server (it was made with --no-recovery or --unprivileged)",
                self.path()
            ))),
        }
    }

    /// Has it end with the device left for the next server; returns at once.  False where it ends
    /// already in another way.
    pub(super) fn hand_over(&self) -> bool {
        let mut done = false;
        self.life.change(|progress| {
            progress.leaving |= !progress.stopping;
            progress.stopping = true;
            done = progress.leaving;
        });
        done
    }

    /// Refuses where the driver cannot be told of another size.
    pub(super) fn may_resize(&self) -> Result<()> {
        match self.in_use.features.has(sys::UBLK_F_UPDATE_SIZE) {
            true => Ok(()),
            false => Err(Error::unsupported(format!(
                "the ublk driver of this kernel cannot change the size of {} (Linux 6.16 is the \
                 first that can); serve the disk anew",
                self.path()
            ))),
        }
    }

    /// Tells the driver that the size of the disk has changed.
    pub(super) fn resized(&self, export: &Export) -> Result<()> {
        self.may_resize()?;
        let size = params::sectors(&export.backend.geometry())? * super::request::SECTOR;
        let id = i32::try_from(self.in_use.id).unwrap_or(i32::MAX);
        let doing = "change the size of the ublk device";
        // Of this thread: a control object works only where it was made.
        let control = UblkCtrl::new_simple(id).map_err(control::error(doing))?;
        let updated = control.update_size(size).map(drop);
        updated.map_err(control::error(doing))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.lock().take() {
            // Its end was told through `life`.
            let _ = thread.join();
        }
    }
}

/// What the thread of a device has.
struct Owner {
    backend: Arc<Backend>,
    options: Options,
    life: Arc<Life>,
}

impl Owner {
    fn run(self, tell: &Sender<Result<Started>>) {
        process::block_signals();
        process::mark_io_flusher();
        if let Err(e) = self.serve(tell)
            && let Err(unheard) = tell.send(Err(e))
            && let Err(e) = unheard.0
        {
            self.life.change(|progress| {
                progress.failed.get_or_insert(e);
            });
        }
        self.life.end();
    }

    /// Makes or takes over the device, serves it, and removes it.
    fn serve(&self, tell: &Sender<Result<Started>>) -> Result<()> {
        let options = &self.options;
        let geometry = self.backend.geometry();
        let size = params::sectors(&geometry)?;
        let control = match (options.recover, options.dev_id) {
            (true, Some(id)) => {
                self.check_same(id, size)?;
                control::recover(id)?
            }
            (true, None) => return Err(Error::invalid("--recover needs --dev-id")),
            (false, _) => control::add(options)?,
        };
        let running = self.start(&control, &geometry)?;
        let id = running.in_use.id;
        let started = Started {
            in_use: running.in_use.clone(),
            inboxes: running.inboxes.clone(),
        };
        let heard = control::wait_until_open(id).map(|()| started);
        let failed = heard.is_err();
        if tell.send(heard).is_err() || failed {
            self.life.change(|progress| progress.stopping = true);
        }
        self.wait_for_the_end(running.in_use.queues);
        if self.is_leaving() {
            self.leave(&control, running);
            return Ok(());
        }
        self.end(&control, running)
    }

    fn is_leaving(&self) -> bool {
        let progress = self.life.progress.lock();
        progress.leaving && progress.failed.is_none()
    }

    /// Answers what is under way, and leaves the device to the next server, with the requests that
    /// come meanwhile or are held.
    fn leave(&self, control: &UblkCtrl, running: Running) {
        self.backend.pause();
        let quiesces = running.in_use.features.has(sys::UBLK_F_QUIESCE);
        let patience = QUIESCE.as_millis().try_into().unwrap_or(u64::MAX);
        // From here on the driver keeps what comes.  One that does not, since it is older, or a queue
        // is full of held requests, keeps it when this process has ended, as it does for one that is
        // killed: until then its queues must be there, and answer nothing.
        let quiesced = quiesces && control.quiesce_dev(patience).is_ok();
        let how = match quiesced {
            true => Leaving::End,
            false => Leaving::Keep,
        };
        running.inboxes.iter().for_each(|inbox| inbox.leave(how));
        if quiesced {
            for thread in running.threads {
                // A panic there was counted as its end.
                let _ = thread.join();
            }
        }
        control.disown();
    }

    /// Refuses to take over a device of another disk.
    fn check_same(&self, id: u32, sectors: u64) -> Result<()> {
        control::check()?;
        let found = control::find(id)?;
        let image = self.image();
        if let (Some(was), Some(is)) = (&found.image, &image)
            && was != is
        {
            return Err(Error::invalid(format!(
                "ublk device {id} was a disk of {} (allowed to take it over: the same image)",
                was.display()
            )));
        }
        let size = sectors * super::request::SECTOR;
        match found.size == size {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "ublk device {id} has {} bytes, and the disk has {size}: it is not the same disk",
                found.size
            ))),
        }
    }

    /// The path by which the driver's records name the image.
    fn image(&self) -> Option<PathBuf> {
        let chain = self.backend.chain();
        let storage = chain.layers().iter().find_map(|l| l.storage().path());
        let path = storage?;
        Some(std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()))
    }

    fn start(&self, control: &UblkCtrl, geometry: &crate::backend::Geometry) -> Result<Running> {
        let failed = control::error("start the ublk device");
        let info = control.dev_info();
        let features = Features::from_bits(info.flags);
        let transfer = Transfer::of(features);
        let params = params::of(geometry, info.max_io_buf_bytes)?;
        let image = self.image();
        let device = UblkDev::new(
            control.get_name(),
            |device| {
                device.tgt.dev_size = params.basic.dev_sectors * super::request::SECTOR;
                device.tgt.params = params;
                if let Some(image) = image {
                    device.set_target_json(serde_json::json!({ "image": image }));
                }
                Ok(())
            },
            control,
        );
        let withheld = |e| control::not_given(info.dev_id).unwrap_or_else(|| failed(e));
        let device = Arc::new(device.map_err(withheld)?);
        let channel = Channel::new(ring::channel(&device)?);
        let queues = info.nr_hw_queues;
        let workers = (WORKERS + 2 * usize::from(queues - 1)).min(MAX_WORKERS);
        let pool = Pool::start(workers, Arc::clone(&self.backend), channel.clone())?;
        let shared = Arc::new(Shared {
            backend: Arc::clone(&self.backend),
            pool,
            channel,
            transfer,
            batches: features.has(sys::UBLK_F_BATCH_IO),
        });
        let mut running = Running {
            in_use: InUse {
                id: info.dev_id,
                queues,
                depth: info.queue_depth,
                max_io: info.max_io_buf_bytes,
                transfer,
                features,
                workers,
            },
            inboxes: Vec::new(),
            threads: Vec::new(),
        };
        let started = self
            .start_queues(control, &device, &shared, &mut running)
            .and_then(|()| control.start_dev(&device).map(drop).map_err(&failed));
        match started {
            Ok(()) => Ok(running),
            Err(e) => {
                self.give_up(control, running);
                Err(e)
            }
        }
    }

    /// Ends the queues of a device that did not start.
    fn give_up(&self, control: &UblkCtrl, running: Running) {
        if self.options.recover {
            // It stays for the next server, which this process must make way for by ending.
            control.disown();
            return;
        }
        // Without their end the driver would wait for them when it removes the device.
        if control.kill_dev().is_ok() {
            for thread in running.threads {
                let _ = thread.join();
            }
        }
    }

    fn start_queues(
        &self,
        control: &UblkCtrl,
        device: &Arc<UblkDev>,
        shared: &Arc<Shared>,
        running: &mut Running,
    ) -> Result<()> {
        let (tell, told) = channel();
        for number in 0..running.in_use.queues {
            let inbox = Arc::new(Inbox::new(number)?);
            running.inboxes.push(Arc::clone(&inbox));
            let processors = control::processors(control, number);
            // Devices with few queues each do not all meet on the first processor.
            let id = usize::try_from(running.in_use.id).unwrap_or_default();
            let place = id + usize::from(number);
            let (device, shared) = (Arc::clone(device), Arc::clone(shared));
            let (life, tell) = (Arc::clone(&self.life), tell.clone());
            let thread = std::thread::Builder::new()
                .name(format!("ublk-queue-{number}"))
                .spawn(move || {
                    stay_on(&processors, place);
                    life.queue_ended(serve_queue(&device, inbox, shared, &tell));
                })
                .map_err(|e| Error::io("start a thread", e))?;
            running.threads.push(thread);
        }
        drop(tell);
        for _ in 0..running.in_use.queues {
            let (number, thread) = told.recv().map_err(|_| {
                let failed = self.life.progress.lock().failed.take();
                failed.unwrap_or_else(|| Error::new(ErrorKind::Io, "a queue ended before it began"))
            })?;
            if !self.options.unprivileged {
                control
                    .configure_queue(device, number, thread)
                    .map_err(control::error("record the ublk device"))?;
            }
        }
        Ok(())
    }

    /// Waits until the device is to end, or has ended by itself.
    fn wait_for_the_end(&self, queues: u16) {
        let mut progress = self.life.progress.lock();
        while !progress.stopping && progress.failed.is_none() && progress.ended < queues {
            self.life.changed.wait(&mut progress);
        }
    }

    /// Drains, flushes and removes the device.
    fn end(&self, control: &UblkCtrl, running: Running) -> Result<()> {
        let doing = "remove the ublk device";
        if self.life.progress.lock().failed.is_some() {
            // A queue that no longer serves cannot drain.  The process ends; the driver then keeps
            // the device for the next server, or removes it.
            control.disown();
            return Ok(());
        }
        running.inboxes.iter().for_each(|inbox| inbox.stop());
        // Drivers differ in whether they do that while requests are still served.  What cannot be
        // written is known to who wrote it; the device goes in any case.
        if let Ok(device) = std::fs::File::open(control::block_device(running.in_use.id)) {
            let _ = process::write_back(&device);
        }
        let stopped = control.kill_dev().map_err(control::error(doing));
        if let Err(e) = stopped
            && ![libc::ENODEV, libc::ENOENT].contains(&e.errno())
        {
            control.disown();
            return Err(e);
        }
        for thread in running.threads {
            // A panic there was counted as its end.
            let _ = thread.join();
        }
        let chain = self.backend.chain();
        let flushed = match chain.top().caps().write {
            true => chain.flush(),
            false => Ok(()),
        };
        control::remove(control).map_err(control::error(doing))?;
        flushed
    }
}

/// A device that has started.
struct Running {
    in_use: InUse,
    inboxes: Vec<Arc<Inbox>>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.in_use.fmt(f)
    }
}

/// Serves one queue on the calling thread; tells its number and thread once it is set up.
fn serve_queue(
    device: &UblkDev,
    inbox: Arc<Inbox>,
    shared: Arc<Shared>,
    tell: &Sender<(u16, i32)>,
) -> Result<()> {
    process::mark_io_flusher();
    let number = inbox.queue;
    let queue = Queue::new(device, inbox, shared)?;
    let thread = rustix::thread::gettid().as_raw_nonzero().get();
    let _ = tell.send((number, thread));
    queue.run()
}

/// Keeps the calling thread on one of the processors that send requests to its queue: it, and what
/// of the kernel works for it, would else follow each other from one to the next and wake up for
/// each request alone, which halves what one queue does.
fn stay_on(processors: &[usize], place: usize) {
    let cpu = processors.get(place % processors.len().max(1));
    if let Some(cpu) = cpu.filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        let mut set = CpuSet::new();
        set.set(*cpu);
        // A processor that is not ours to use makes it slower, not wrong.
        let _ = sched_setaffinity(None, &set);
    }
}
