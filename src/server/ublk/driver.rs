//! How a queue takes its requests from the driver and answers them: by a command for each tag, or,
//! where the driver has batches, by one command for all that came and one for all that are done.
//!
//! The commands are those of the kernel's `Documentation/block/ublk.rst`.

use std::fs::File;
use std::os::fd::RawFd;

use io_uring::cqueue;
use libublk::helpers::IoBuf;
use libublk::sys::{self, ublk_batch_io, ublk_elem_header, ublksrv_io_cmd, ublksrv_io_desc};

use super::features::Transfer;
use super::ring::{Command, Event, Ring};
use super::shared::{Descriptors, Provided};
use crate::error::{Error, Result};

/// Bytes of an answer in a batch.
const ANSWER: usize = size_of::<ublk_elem_header>();
const _: () = assert!(ANSWER == 8);

/// A queue as the driver knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Number of the queue.
    pub(super) queue: u16,
    /// Its requests.
    pub(super) depth: u16,
    /// How their bytes are moved.
    pub(super) transfer: Transfer,
}

/// The driver's end of a queue, for the thread that made it.
pub(super) struct Driver {
    /// What completes here is seen by [`Driver::wait`].
    pub(super) ring: Ring,
    descriptors: Descriptors,
    place: Place,
    way: Way,
    /// The driver takes no more from this server.
    aborted: bool,
    /// Why the queue cannot go on; told once what had completed before has been handled.
    failed: Option<Error>,
}

enum Way {
    Singly(Singly),
    Batches(Batches),
}

/// A command for each tag: it answers the last request and waits for the next one.
struct Singly {
    /// Where the driver copies the bytes of a tag's requests; empty where it does not.
    addresses: Vec<u64>,
    /// Commands that the driver has.
    waiting: usize,
}

/// A command for many.
struct Batches {
    tags: Provided,
    /// Answers for the next command.
    answers: Vec<ublk_elem_header>,
    /// Those of a command that the kernel may not have taken.
    given: Vec<ublk_elem_header>,
    /// The driver waits to hand requests out.
    fetching: bool,
}

impl Driver {
    /// Makes a queue of the disk behind the character device, and asks for its first requests.
    /// Where the driver copies bytes, it is to or from `copied`, by tag, which stays for as long as
    /// the queue.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(
        device: &File,
        place: Place,
        batches: bool,
        copied: &[IoBuf<u8>],
    ) -> Result<Self> {
        let Place { queue, depth, .. } = place;
        let ring = Ring::new(device, depth)?;
        if place.transfer == Transfer::ZeroCopy {
            ring.prepare_buffers(depth)?;
        }
        let way = match batches {
            true => Way::Batches(Batches {
                tags: Provided::new(depth)?,
                answers: Vec::with_capacity(depth.into()),
                given: Vec::with_capacity(depth.into()),
                fetching: false,
            }),
            false => Way::Singly(Singly {
                addresses: copied.iter().map(|m| m.as_ptr().addr() as u64).collect(),
                waiting: 0,
            }),
        };
        let mut driver = Self {
            ring,
            descriptors: Descriptors::new(device, queue, depth)?,
            place,
            way,
            aborted: false,
            failed: None,
        };
        driver.begin()?;
        Ok(driver)
    }

    fn begin(&mut self) -> Result<()> {
        let Self {
            ring, place, way, ..
        } = self;
        match way {
            Way::Singly(way) => (0..place.depth)
                .try_for_each(|tag| way.command(ring, *place, sys::UBLK_U_IO_FETCH_REQ, tag, -1)),
            Way::Batches(way) => way.begin(ring, *place),
        }
    }

    /// What the driver says of a tag's request, which is with the server.
    pub(super) fn descriptor(&self, tag: u16) -> ublksrv_io_desc {
        self.descriptors.get(tag)
    }

    /// Answers a request and asks for the tag's next one, when the ring is entered next.  Where that
    /// fails, [`Driver::wait`] says so.
    #[inline]
    pub(super) fn answer(&mut self, tag: u16, result: i32) {
        let (ring, place) = (&mut self.ring, self.place);
        match &mut self.way {
            _ if self.aborted => {}
            Way::Singly(way) => {
                let op = sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ;
                let given = way.command(ring, place, op, tag, result);
                keep(given, &mut self.failed);
            }
            Way::Batches(way) => way.answers.push(ublk_elem_header {
                tag,
                buf_index: tag,
                result,
            }),
        }
    }

    /// Has a descriptor watched, as [`Ring::watch`].  Where that fails, [`Driver::wait`] says so.
    pub(super) fn watch(&mut self, fd: RawFd) {
        let watched = self.ring.watch(fd);
        keep(watched, &mut self.failed);
    }

    /// Gives answers and whatever was put into the ring to the kernel, waits until something
    /// happens, and adds that to `events`; false where the driver takes no more.
    ///
    /// # Errors
    /// The host's and the driver's, with which the queue cannot go on.
    pub(super) fn wait(&mut self, events: &mut Vec<(Event, i32)>) -> Result<bool> {
        if let Some(failed) = self.failed.take() {
            return Err(failed);
        }
        let (ring, place, aborted) = (&mut self.ring, self.place, self.aborted);
        let over = match &mut self.way {
            Way::Singly(way) => aborted && way.waiting == 0,
            Way::Batches(way) => {
                way.give(ring, place)?;
                aborted && !way.fetching
            }
        };
        if over {
            ring.submit()?;
            return Ok(false);
        }
        ring.wait()?;
        // An error is kept until then: what completed beside it must not be lost, for the queue ends
        // only when all that the ring moves has been seen.
        let taken = match &mut self.way {
            Way::Singly(way) => way.completed(ring, &mut self.failed, events),
            Way::Batches(way) => way.completed(ring, &mut self.failed, events),
        };
        self.aborted |= taken;
        if let Way::Batches(way) = &mut self.way {
            let turned = way.turn(ring, place, self.aborted);
            keep(turned, &mut self.failed);
        }
        Ok(true)
    }

    /// Gives the kernel the last answers.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn finish(&mut self) -> Result<()> {
        if let Way::Batches(way) = &mut self.way {
            way.give(&mut self.ring, self.place)?;
        }
        self.ring.submit()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Way::Batches(_) = self.way {
            self.ring.forget();
        }
    }
}

impl Singly {
    /// Adds what has completed to `events`; whether the driver takes no more.
    fn completed(
        &mut self,
        ring: &mut Ring,
        failed: &mut Option<Error>,
        events: &mut Vec<(Event, i32)>,
    ) -> bool {
        let mut aborted = false;
        for entry in ring.completed() {
            let event = Event::of(entry.user_data());
            if let Event::Request(_) = event {
                self.waiting -= 1;
                if entry.result() != 0 {
                    aborted |= keep(is_abort(entry.result()), failed);
                    continue;
                }
            }
            events.push((event, entry.result()));
        }
        aborted
    }

    fn command(
        &mut self,
        ring: &mut Ring,
        place: Place,
        op: u32,
        tag: u16,
        result: i32,
    ) -> Result<()> {
        let payload = ublksrv_io_cmd {
            q_id: place.queue,
            tag,
            result,
            addr: *self.addresses.get(usize::from(tag)).unwrap_or(&0),
        };
        let about = match place.transfer {
            Transfer::ZeroCopy => registration(tag),
            _ => 0,
        };
        let command = Command {
            op,
            payload: payload.to_bytes(),
            about,
        };
        ring.command(&command, Event::Request(tag))?;
        self.waiting += 1;
        Ok(())
    }
}

impl Batches {
    /// As [`Singly::completed`].
    fn completed(
        &mut self,
        ring: &mut Ring,
        failed: &mut Option<Error>,
        events: &mut Vec<(Event, i32)>,
    ) -> bool {
        let mut aborted = false;
        if ring.is_taken() {
            // The driver copied them when it was given the command.
            self.given.clear();
        }
        for entry in ring.completed() {
            match Event::of(entry.user_data()) {
                Event::Fetched => aborted |= keep(self.fetched(&entry, events), failed),
                Event::Taken(count) => keep(self.taken(count, entry.result()), failed),
                event => events.push((event, entry.result())),
            }
        }
        aborted
    }

    /// Tells the driver of every tag, and asks for requests.
    fn begin(&mut self, ring: &mut Ring, place: Place) -> Result<()> {
        ring.provide(&self.tags)?;
        self.given
            .extend((0..place.depth).map(|tag| ublk_elem_header {
                tag,
                buf_index: tag,
                result: 0,
            }));
        self.command(ring, place, sys::UBLK_U_IO_PREP_IO_CMDS)?;
        let result = loop {
            ring.wait()?;
            if let Some(entry) = ring.completed().next() {
                break entry.result();
            }
        };
        self.given.clear();
        match result {
            0.. => self.fetch(ring, place),
            error => Err(refused("make a queue ready", error)),
        }
    }

    /// Puts a command about all that is in `given` into the ring.
    fn command(&self, ring: &mut Ring, place: Place, op: u32) -> Result<()> {
        let count = u16::try_from(self.given.len()).unwrap_or(u16::MAX);
        let flags = match place.transfer {
            Transfer::ZeroCopy => sys::UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK,
            _ => 0,
        };
        let payload = ublk_batch_io {
            q_id: place.queue,
            flags: u16::try_from(flags).unwrap_or_default(),
            nr_elem: count,
            elem_bytes: u8::try_from(ANSWER).unwrap_or_default(),
            ..ublk_batch_io::default()
        };
        let command = Command {
            op,
            payload: payload.to_bytes(),
            about: self.given.as_ptr().addr() as u64,
        };
        ring.command(&command, Event::Taken(count))
    }

    /// Asks for requests.
    fn fetch(&mut self, ring: &mut Ring, place: Place) -> Result<()> {
        let payload = ublk_batch_io {
            q_id: place.queue,
            elem_bytes: u8::try_from(size_of::<u16>()).unwrap_or_default(),
            ..ublk_batch_io::default()
        };
        ring.fetch(sys::UBLK_U_IO_FETCH_IO_CMDS, payload.to_bytes())?;
        self.fetching = true;
        Ok(())
    }

    /// Puts the answers into the ring.
    fn give(&mut self, ring: &mut Ring, place: Place) -> Result<()> {
        if self.answers.is_empty() {
            return Ok(());
        }
        if !self.given.is_empty() {
            // The ring was entered in vain.
            ring.submit()?;
            if !ring.is_taken() {
                return Err(refused("answer requests", -libc::EBUSY));
            }
            self.given.clear();
        }
        std::mem::swap(&mut self.given, &mut self.answers);
        self.command(ring, place, sys::UBLK_U_IO_COMMIT_IO_CMDS)
    }

    /// Requests have come, or no more will; whether the driver takes no more.
    fn fetched(&mut self, entry: &cqueue::Entry, events: &mut Vec<(Event, i32)>) -> Result<bool> {
        self.fetching &= cqueue::more(entry.flags());
        match (usize::try_from(entry.result()), entry.result()) {
            (Ok(bytes), _) => {
                if let Some(id) = cqueue::buffer_select(entry.flags()) {
                    let tags = |tag| events.push((Event::Request(tag), 0));
                    self.tags.take(id, bytes, tags);
                }
                Ok(false)
            }
            // There was no buffer left; it is asked again.
            (_, result) if result == -libc::ENOBUFS => Ok(false),
            (_, result) => is_abort(result),
        }
    }

    /// Answers were taken.
    fn taken(&self, count: u16, result: i32) -> Result<()> {
        match usize::try_from(result) {
            Ok(bytes) if bytes == usize::from(count) * ANSWER => Ok(()),
            Ok(_) => Err(refused("answer requests", -libc::EBUSY)),
            Err(_) => is_abort(result).map(drop),
        }
    }

    /// Gives the kernel its buffers back, and asks for requests where it has stopped to hand them out.
    fn turn(&mut self, ring: &mut Ring, place: Place, aborted: bool) -> Result<()> {
        self.tags.publish();
        match self.fetching || aborted {
            true => Ok(()),
            false => self.fetch(ring, place),
        }
    }
}

/// Where the requests of a tag are registered: at its own number.
fn registration(tag: u16) -> u64 {
    sys::ublk_auto_buf_reg_to_sqe_addr(&sys::ublk_auto_buf_reg {
        index: tag,
        flags: u8::try_from(sys::UBLK_AUTO_BUF_REG_FALLBACK).unwrap_or_default(),
        ..Default::default()
    })
}

/// Whether a command failed since the driver takes no more of this server.
///
/// # Errors
/// Where it failed for another reason.
fn is_abort(result: i32) -> Result<bool> {
    match result {
        sys::UBLK_IO_RES_ABORT => Ok(true),
        result => Err(refused("take a request from the driver", result)),
    }
}

/// What a step gave, or nothing where it failed, with the first error kept for later.
fn keep<T: Default>(done: Result<T>, failed: &mut Option<Error>) -> T {
    done.unwrap_or_else(|e| {
        failed.get_or_insert(e);
        T::default()
    })
}

fn refused(doing: &'static str, result: i32) -> Error {
    Error::io(doing, std::io::Error::from_raw_os_error(-result))
}
