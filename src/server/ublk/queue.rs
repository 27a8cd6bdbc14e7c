//! One queue: takes requests from the driver, has them carried out, and answers them.
//!
//! It never waits for a disk.  What is stored as it is goes to the kernel as a transfer on the
//! queue's own ring, zeroes are answered at once, and everything else is a worker's.

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
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
use crate::backend::{Admission, Backend, Kind, Moment, Moving, QueueId, Ticket, Verdict};
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
    ticket: Ticket,
    /// Keeps what the pieces point at from being used for anything else.
    grace: grace::Ticket,
    /// Pieces that have not ended.
    left: usize,
    /// Bytes that were moved.
    moved: usize,
    /// Bytes that are to be moved.
    expected: usize,
    /// Where a write ends in the image's file.
    end: u64,
    /// The request's bytes, where the ring does not move them to the driver.
    buffer: Option<Buffer>,
}

/// One queue, on the thread that made it.
pub(super) struct Queue {
    driver: Driver,
    id: QueueId,
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    /// By tag, what the ring moves; `None`: its next request has not come, or a worker or a list has
    /// it.
    slots: Vec<Option<Transit>>,
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
        let now = shared.backend.moment();
        Ok(Self {
            driver,
            id: QueueId(u32::from(inbox.queue)),
            shared,
            inbox,
            slots: (0..place.depth).map(|_| None).collect(),
            waiting: Waiting::default(),
            alarm: ring::Alarm::default(),
            spare: Buffers::default(),
            block,
            copied,
            now,
            pieces: Vec::new(),
        })
    }

    /// Serves until the device is stopped.
    ///
    /// # Errors
    /// Why it cannot go on.
    pub(super) fn run(mut self) -> Result<()> {
        let ended = self.serve();
        // The kernel must be done with the buffers before they go.
        let left = self
            .slots
            .iter()
            .flatten()
            .map(|transit| transit.left)
            .sum();
        if let Err(e) = self.driver.ring.wait_for(left) {
            std::mem::forget(std::mem::take(&mut self.slots));
            return ended.and(Err(e));
        }
        ended
    }

    fn serve(&mut self) -> Result<()> {
        let mut events = Vec::new();
        while self.driver.wait(&mut events)? {
            self.now = self.shared.backend.moment();
            self.events(&events)?;
            events.clear();
            if self.inbox.leaving() == Some(Leaving::End) {
                return self.driver.finish();
            }
        }
        Ok(())
    }

    /// Handles completions.  A panic over a request is the end of that one, not of the queue.
    fn events(&mut self, events: &[(Event, i32)]) -> Result<()> {
        let mut rest = events.iter();
        let mut event = Event::Timer;
        loop {
            let handle = || {
                for (next, result) in rest.by_ref() {
                    event = *next;
                    self.event(event, *result)?;
                }
                Ok(())
            };
            match (catch_unwind(AssertUnwindSafe(handle)), event.tag()) {
                (Ok(done), _) => return done,
                (Err(_), Some(tag)) => self.give_up(tag),
                (Err(panic), None) => resume_unwind(panic),
            }
        }
    }

    /// Handles one completion.
    fn event(&mut self, event: Event, result: i32) -> Result<()> {
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
                self.driver.ring.watch(self.inbox.fd())?;
                for done in done {
                    self.guarded(done.tag, |queue| queue.worked(done));
                }
                if woken {
                    self.retry();
                }
            }
        }
        Ok(())
    }

    fn guarded(&mut self, tag: u16, run: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| run(self))).is_err() {
            self.give_up(tag);
        }
    }

    /// Answers a request that met a bug, unless the ring has it.
    fn give_up(&mut self, tag: u16) {
        if let Some(None) = self.slots.get(usize::from(tag)) {
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
        match self
            .shared
            .backend
            .admit_at(self.id, &command.shape, self.now)
        {
            Admission::Admitted(ticket) => self.begin(tag, command, ticket),
            Admission::Refused(error) => self.driver.answer(tag, -error.errno()),
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

    fn begin(&mut self, tag: u16, command: Command, ticket: Ticket) {
        let plain = matches!(command.shape.kind, Kind::Read | Kind::Write);
        if plain && ticket.moving() == Moving::Anyone {
            let grace = ticket.chain().enter();
            let mut pieces = std::mem::take(&mut self.pieces);
            pieces.clear();
            let planned = plan::plan(ticket.chain(), &command.shape, self.block, &mut pieces);
            match planned {
                Some(()) => self.move_bytes(tag, command, ticket, grace, &pieces),
                None => {
                    drop(grace);
                    self.hand_over(tag, command, ticket);
                }
            }
            self.pieces = pieces;
            return;
        }
        self.hand_over(tag, command, ticket);
    }

    /// Has a worker carry a request out.
    fn hand_over(&mut self, tag: u16, command: Command, ticket: Ticket) {
        let buffer = self.copied.get(usize::from(tag)).map(|memory| {
            let len = command.buffer_len().min(memory.len());
            memory.as_slice()[..len].to_vec()
        });
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
        self.finish(done.tag, done.command, done.ticket, done.result);
    }

    /// Has the ring move the bytes of a request.
    fn move_bytes(
        &mut self,
        tag: u16,
        command: Command,
        ticket: Ticket,
        grace: grace::Ticket,
        pieces: &[Piece],
    ) {
        let kind = command.shape.kind;
        let end = match kind == Kind::Write && ticket.is_watched() {
            true => self.end_of(&ticket, pieces),
            false => 0,
        };
        let registered = self.shared.transfer == Transfer::ZeroCopy && !command.unregistered;
        let mut transit = Transit {
            buffer: match registered || !self.copied.is_empty() {
                true => None,
                false => Some(self.spare.take(command.buffer_len())),
            },
            command,
            ticket,
            grace,
            left: 0,
            moved: 0,
            expected: 0,
            end,
        };
        if let Err(error) = self.prepare(tag, &mut transit, registered, pieces) {
            return self.finish(tag, transit.command, transit.ticket, Err(error));
        }
        for piece in pieces {
            let Place::File(fd, host) = piece.place else {
                continue;
            };
            transit.expected += piece.len;
            let memory = match registered {
                true => Memory::Registered(tag),
                false => Memory::Ours(memory(&mut self.copied, tag, &mut transit.buffer)),
            };
            let place = (fd, host);
            let ring = &mut self.driver.ring;
            if ring.start(tag, kind, piece, place, memory).is_ok() {
                transit.left += 1;
            }
        }
        match transit.left {
            0 => self.ended(tag, transit),
            _ => self.slots[usize::from(tag)] = Some(transit),
        }
    }

    /// Where in the image's file a write ends; 0 where it does not go there.
    fn end_of(&self, ticket: &Ticket, pieces: &[Piece]) -> u64 {
        // An empty range: which descriptor it is, not what may be moved.
        let file = ticket.chain().top().storage().fd_for(&(0..0), self.block);
        file.map_or(0, |fd| plan::end_in(pieces, fd.as_raw_fd()))
    }

    /// Before the ring moves anything: the bytes of a write, and the zeroes of a read.
    fn prepare(
        &mut self,
        tag: u16,
        transit: &mut Transit,
        registered: bool,
        pieces: &[Piece],
    ) -> Result<()> {
        let driver = self.shared.channel.place(self.inbox.queue, tag);
        if transit.command.shape.kind == Kind::Write {
            return match &mut transit.buffer {
                Some(buffer) => driver.fetch(0, buffer),
                None => Ok(()),
            };
        }
        for piece in pieces.iter().filter(|p| p.place == Place::Zero) {
            match registered {
                true => driver.clear(piece.at, piece.len)?,
                false => {
                    let memory = memory(&mut self.copied, tag, &mut transit.buffer);
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
        let Transit {
            command,
            ticket,
            grace,
            moved,
            expected,
            end,
            buffer,
            ..
        } = transit;
        // What failed or came short is done again by a worker, whose error says what is wrong.
        if moved != expected {
            drop(grace);
            return self.hand_over(tag, command, ticket);
        }
        ticket.wrote(end);
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
        drop(grace);
        self.finish(tag, command, ticket, result);
    }

    fn finish(&mut self, tag: u16, command: Command, ticket: Ticket, result: Result<()>) {
        match self.shared.backend.complete_at(ticket, result, self.now) {
            Verdict::Answer(Ok(())) => self.driver.answer(tag, command.done()),
            Verdict::Answer(Err(error)) => self.driver.answer(tag, -error.errno()),
            Verdict::Hold => self.hold(tag, command),
        }
    }
}

/// The memory of a request's bytes, where the ring does not move them to the driver.
fn memory<'a>(
    copied: &'a mut [IoBuf<u8>],
    tag: u16,
    buffer: &'a mut Option<Buffer>,
) -> &'a mut [u8] {
    match (buffer, copied.get_mut(usize::from(tag))) {
        (Some(buffer), _) => buffer,
        (None, Some(memory)) => memory.as_mut_slice(),
        (None, None) => &mut [],
    }
}
