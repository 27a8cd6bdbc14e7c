//! One queue: takes requests from the driver, has them carried out, and answers them.
//!
//! It never waits for a disk.  What is stored as it is goes to the kernel as a transfer on the
//! queue's own ring, zeroes are answered at once, and everything else is a worker's.

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use libublk::helpers::IoBuf;
use libublk::io::UblkDev;

use super::buffers::{Buffer, Buffers};
use super::driver::{self, Driver};
use super::features::Transfer;
use super::kept::Waiting;
use super::plan::{self, Piece, Place};
use super::pool::{Done, Inbox, Job, Leaving, Pool};
use super::request::Command;
use super::ring::{self, Event, Memory};
use super::transfer::Channel;
use crate::backend::{Admission, Backend, Kind, Moment, Moving, Owner, QueueId, Verdict};
use crate::chain::Chain;
use crate::error::Result;
use crate::util::grace;

/// What the queues of a device share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) backend: Arc<Backend>,
    pub(super) pool: Pool,
    pub(super) channel: Channel,
    pub(super) transfer: Transfer,
    /// Whether requests are taken and answered by many at once.
    pub(super) batches: bool,
}

/// A request whose bytes are being moved by the ring.
#[derive(Debug)]
struct Transit {
    command: Command,
    begun: Moment,
    /// Keeps what the pieces point at from being used for anything else.
    grace: Rc<grace::Ticket>,
    /// Pieces that have not ended.
    left: u32,
    /// Bytes that were moved.
    moved: usize,
    /// Bytes that are to be moved.
    expected: usize,
    /// Where a write ends in the image's file.
    end: u64,
}

/// One queue, on the thread that made it.
pub(super) struct Queue {
    driver: Driver,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    owner: Owner,
    /// By tag, what the ring moves; `None`: its next request has not come, or a worker or a list has
    /// it.
    slots: Vec<Option<Transit>>,
    /// By tag, the bytes of what the ring moves, where it does not move them to the driver.
    buffers: Vec<Option<Buffer>>,
    /// By tag, when a request was let in that is neither the ring's nor a worker's.
    begun: Vec<Option<Moment>>,
    /// Held by what came together.
    grace: Option<Rc<grace::Ticket>>,
    waiting: Waiting,
    alarm: ring::Alarm,
    spare: Buffers,
    /// Requests start and end at multiples of this.
    block: u64,
    /// The memory that the driver was told, where it copies; by tag.
    copied: Vec<IoBuf<u8>>,
    /// When the ring was last looked at: one look at the clock for all that had come.
    now: Moment,
    /// Used again for each request.
    pieces: Vec<Piece>,
}

impl Queue {
    /// Makes the queue and asks for its first requests; [`Queue::run`] is to follow.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(device: &UblkDev, inbox: Arc<Inbox>, shared: Arc<Shared>) -> Result<Self> {
        let place = driver::Place {
            queue: inbox.queue,
            depth: device.dev_info.queue_depth,
            transfer: shared.transfer,
        };
        let copied = match shared.transfer {
            Transfer::Copied => device.alloc_queue_io_bufs(),
            _ => Vec::new(),
        };
        let mut driver = Driver::new(shared.channel.file(), place, shared.batches, &copied)?;
        if shared.transfer == Transfer::Copied {
            // The library starts no device before it has heard of its memory.
            device.notify_buffer_registration_complete(false);
        }
        let block = shared.backend.settings().logical_block_size;
        let block = u64::from(block).max(super::request::SECTOR);
        driver.ring.watch(inbox.fd())?;
        let depth = usize::from(place.depth);
        Ok(Self {
            driver,
            now: shared.backend.moment(),
            owner: Owner::new(Arc::clone(&shared.backend), QueueId(inbox.queue.into())),
            shared,
            inbox,
            slots: (0..depth).map(|_| None).collect(),
            buffers: (0..depth).map(|_| None).collect(),
            begun: vec![None; depth],
            grace: None,
            waiting: Waiting::default(),
            alarm: ring::Alarm::default(),
            spare: Buffers::default(),
            block,
            copied,
            pieces: Vec::new(),
        })
    }

    /// Serves until the device is stopped.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub(super) fn run(mut self) -> Result<()> {
        let ended = self.serve();
        // The kernel must be done with the buffers and the image before they go.
        let left = self.slots.iter().flatten();
        let left = left.map(|transit| usize::try_from(transit.left).unwrap_or_default());
        if let Err(e) = self.driver.ring.wait_for(left.sum()) {
            std::mem::forget(self);
            return ended.and(Err(e));
        }
        ended
    }

    fn serve(&mut self) -> Result<()> {
        let mut events = Vec::new();
        while self.driver.wait(&mut events)? {
            self.now = self.shared.backend.moment();
            self.events(&events);
            events.clear();
            self.grace = None;
            self.owner.settle();
            if self.inbox.leaving() == Some(Leaving::End) {
                return self.driver.finish();
            }
        }
        Ok(())
    }

    /// Handles completions.  A panic over a request is the end of that one, not of the queue.
    fn events(&mut self, events: &[(Event, i32)]) {
        let mut rest = events.iter();
        let mut event = Event::Timer;
        loop {
            let handle = || {
                for (next, result) in rest.by_ref() {
                    event = *next;
                    self.event(event, *result);
                }
            };
            match (catch_unwind(AssertUnwindSafe(handle)), event.tag()) {
                (Ok(()), _) => return,
                (Err(_), Some(tag)) => self.give_up(tag),
                (Err(panic), None) => resume_unwind(panic),
            }
        }
    }

    /// Handles one completion.
    fn event(&mut self, event: Event, result: i32) {
        match event {
            Event::Request(tag) => self.request(tag),
            Event::Moved(tag) => self.moved(tag, result),
            Event::Timer => {
                self.waiting.disarm();
                self.retry();
            }
            // The driver keeps these to itself.
            Event::Fetched | Event::Taken(_) => {}
            Event::Inbox => {
                let (done, woken) = self.inbox.take();
                self.driver.watch(self.inbox.fd());
                for done in done {
                    self.guarded(done.tag, |queue| queue.worked(done));
                }
                if woken {
                    self.retry();
                }
            }
        }
    }

    fn guarded(&mut self, tag: u16, run: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| run(self))).is_err() {
            self.give_up(tag);
        }
    }

    /// Answers a request that met a bug, unless the ring has it.
    fn give_up(&mut self, tag: u16) {
        if let Some(None) = self.slots.get(usize::from(tag)) {
            if self.begun[usize::from(tag)].take().is_some() {
                self.owner.give_up();
            }
            self.driver.answer(tag, -libc::EIO);
        }
    }

    /// A request has come.
    fn request(&mut self, tag: u16) {
        match Command::parse(&self.driver.descriptor(tag)) {
            _ if self.inbox.leaving().is_some() => {}
            Err(errno) => self.driver.answer(tag, -errno),
            // Those that wait already are older.
            Ok(command) if self.waiting.has(command.shape.kind) => self.waiting.delay(tag, command),
            Ok(command) => self.offer(tag, command),
        }
    }

    /// Asks for a request to be let in, and begins it or keeps it.
    fn offer(&mut self, tag: u16, command: Command) {
        match self.owner.admit(&command.shape, self.now) {
            Admission::Admitted(()) => {
                self.begun[usize::from(tag)] = Some(self.now);
                self.begin(tag, command);
            }
            Admission::Refused(error) => {
                if let Some(result) = self.inbox.refusal(&error) {
                    self.driver.answer(tag, result);
                }
            }
            Admission::Held => self.hold(tag, command),
            Admission::NotBefore(at) => {
                self.waiting.delay(tag, command);
                if self.waiting.must_arm(at) {
                    let after = at.saturating_duration_since(Instant::now());
                    if self.alarm.set(&mut self.driver.ring, after).is_err() {
                        // Without an alarm the next request or wake looks again.
                        self.waiting.disarm();
                    }
                }
            }
        }
    }

    fn hold(&mut self, tag: u16, command: Command) {
        match self.inbox.is_stopping() {
            true => self.driver.answer(tag, -libc::EIO),
            false => self.waiting.hold(tag, command),
        }
    }

    /// Offers again what is kept.
    fn retry(&mut self) {
        if self.inbox.leaving().is_some() {
            return;
        }
        for (tag, command) in self.waiting.take() {
            self.guarded(tag, |queue| match queue.waiting.has(command.shape.kind) {
                true => queue.waiting.delay(tag, command),
                false => queue.offer(tag, command),
            });
        }
    }

    /// Has the ring carry out a request that was let in, or a worker.
    fn begin(&mut self, tag: u16, command: Command) {
        let plain = matches!(command.shape.kind, Kind::Read | Kind::Write);
        if plain && self.owner.moving(&command.shape) == Moving::Anyone {
            self.pieces.clear();
            if let Some(grace) = self.plan(&command) {
                return self.move_bytes(tag, command, grace);
            }
        }
        self.hand_over(tag, command);
    }

    /// Finds the pieces of a request; `None` where more has to be done than to move bytes.
    fn plan(&mut self, command: &Command) -> Option<Rc<grace::Ticket>> {
        let chain = self.owner.chain()?;
        let grace = self.grace.get_or_insert_with(|| Rc::new(chain.enter()));
        let grace = Rc::clone(grace);
        plan::plan(chain, &command.shape, self.block, &mut self.pieces)?;
        Some(grace)
    }

    /// Has a worker carry a request out that was let in.
    fn hand_over(&mut self, tag: u16, command: Command) {
        let buffer = self.copied.get(usize::from(tag)).map(|memory| {
            let len = command.buffer_len().min(memory.len());
            memory.as_slice()[..len].to_vec()
        });
        let begun = self.begun[usize::from(tag)].take().unwrap_or(self.now);
        let Some(ticket) = self.owner.hand_over(&command.shape, begun) else {
            return self.driver.answer(tag, -libc::EIO);
        };
        self.shared.pool.give(Job {
            tag,
            command,
            ticket,
            buffer,
            inbox: Arc::clone(&self.inbox),
        });
    }

    /// A worker is done with a request.
    fn worked(&mut self, done: Done) {
        if let Some(buffer) = &done.buffer
            && done.command.shape.kind == Kind::Read
            && let Some(memory) = self.copied.get_mut(usize::from(done.tag))
        {
            memory.as_mut_slice()[..buffer.len()].copy_from_slice(buffer);
        }
        let verdict = self
            .shared
            .backend
            .complete_at(done.ticket, done.result, self.now);
        self.answer(done.tag, done.command, verdict);
    }

    /// Has the ring move the bytes of a request, as planned.
    fn move_bytes(&mut self, tag: u16, command: Command, grace: Rc<grace::Ticket>) {
        let kind = command.shape.kind;
        let end = match kind == Kind::Write && self.owner.is_watched() {
            true => self.end(),
            false => 0,
        };
        let registered = self.shared.transfer == Transfer::ZeroCopy && !command.unregistered;
        if !registered && self.copied.is_empty() {
            self.buffers[usize::from(tag)] = Some(self.spare.take(command.buffer_len()));
        }
        if let Err(error) = self.prepare(tag, kind, registered) {
            self.buffers[usize::from(tag)] = None;
            return self.finish(tag, command, Err(error));
        }
        let (mut left, mut expected) = (0, 0);
        for piece in &self.pieces {
            let Place::File(fd, host) = piece.place else {
                continue;
            };
            expected += piece.len;
            let memory = match registered {
                true => Memory::Registered(tag),
                false => Memory::Ours(memory(&mut self.copied, &mut self.buffers, tag)),
            };
            let ring = &mut self.driver.ring;
            if ring.start(tag, kind, piece, (fd, host), memory).is_ok() {
                left += 1;
            }
        }
        let transit = Transit {
            command,
            begun: self.begun[usize::from(tag)].take().unwrap_or(self.now),
            grace,
            left,
            moved: 0,
            expected,
            end,
        };
        match left {
            0 => self.ended(tag, transit),
            _ => self.slots[usize::from(tag)] = Some(transit),
        }
    }

    /// Where in the image's file the pieces of a write end; 0 where they do not go there.
    fn end(&self) -> u64 {
        // An empty range: which descriptor it is, not what may be moved.
        let file = |chain: &Chain| {
            let file = chain.top().storage().fd_for(&(0..0), self.block)?;
            Some(plan::end_in(&self.pieces, file.as_raw_fd()))
        };
        self.owner.chain().and_then(file).unwrap_or(0)
    }

    /// Before the ring moves anything: the bytes of a write, and the zeroes of a read.
    fn prepare(&mut self, tag: u16, kind: Kind, registered: bool) -> Result<()> {
        let driver = self.shared.channel.place(self.inbox.queue, tag);
        if kind == Kind::Write {
            return match &mut self.buffers[usize::from(tag)] {
                Some(buffer) => driver.fetch(0, buffer),
                None => Ok(()),
            };
        }
        for piece in self.pieces.iter().filter(|p| p.place == Place::Zero) {
            match registered {
                true => driver.clear(piece.at, piece.len)?,
                false => {
                    let memory = memory(&mut self.copied, &mut self.buffers, tag);
                    memory[piece.at..piece.at + piece.len].fill(0);
                }
            }
        }
        Ok(())
    }

    /// A piece of a request has ended.
    fn moved(&mut self, tag: u16, result: i32) {
        let Some(slot) = self.slots.get_mut(usize::from(tag)) else {
            return;
        };
        let Some(transit) = slot else { return };
        transit.left -= 1;
        transit.moved += usize::try_from(result).unwrap_or(0);
        if transit.left == 0
            && let Some(transit) = slot.take()
        {
            self.ended(tag, transit);
        }
    }

    /// The ring has done what it could for a request.
    fn ended(&mut self, tag: u16, transit: Transit) {
        let Transit { command, grace, .. } = transit;
        self.begun[usize::from(tag)] = Some(transit.begun);
        drop(grace);
        let buffer = self.buffers[usize::from(tag)].take();
        // What failed or came short is done again by a worker, whose error says what is wrong.
        if transit.moved != transit.expected {
            return self.hand_over(tag, command);
        }
        self.owner.wrote(transit.end);
        let result = match &buffer {
            Some(buffer) if command.shape.kind == Kind::Read => {
                let driver = self.shared.channel.place(self.inbox.queue, tag);
                driver.store(0, buffer)
            }
            _ => Ok(()),
        };
        if let Some(buffer) = buffer {
            self.spare.give(buffer);
        }
        self.finish(tag, command, result);
    }

    /// A request that the ring was to carry out has ended.
    fn finish(&mut self, tag: u16, command: Command, result: Result<()>) {
        let begun = self.begun[usize::from(tag)].take().unwrap_or(self.now);
        let verdict = self.owner.complete(&command.shape, begun, result, self.now);
        self.answer(tag, command, verdict);
    }

    #[inline]
    fn answer(&mut self, tag: u16, command: Command, verdict: Verdict) {
        match verdict {
            Verdict::Answer(Ok(())) => self.driver.answer(tag, command.done()),
            Verdict::Answer(Err(error)) => self.driver.answer(tag, -error.errno()),
            Verdict::Hold => self.hold(tag, command),
        }
    }
}

/// The memory of a request's bytes, where the ring does not move them to the driver.
fn memory<'a>(
    copied: &'a mut [IoBuf<u8>],
    buffers: &'a mut [Option<Buffer>],
    tag: u16,
) -> &'a mut [u8] {
    let tag = usize::from(tag);
    match (&mut buffers[tag], copied.get_mut(tag)) {
        (Some(buffer), _) => buffer,
        (None, Some(memory)) => memory.as_mut_slice(),
        (None, None) => &mut [],
    }
}
