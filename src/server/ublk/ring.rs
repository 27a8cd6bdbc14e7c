//! Transfers between requests and files on a queue's ring.
//!
//! The only place where memory is given to the kernel.  Whoever starts a transfer keeps the memory,
//! or the request, and the file until its completion has been seen; the queue sees to that before
//! it ends, whatever happens.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};
use libublk::UblkError;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue, ublk_init_task_ring, with_task_io_ring_mut};

use super::plan::Piece;
use crate::backend::Kind;
use crate::error::{Error, Result};

/// What a completion on the ring is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// A command of a tag: its next request has come.
    Request(u16),
    /// A piece of a tag's request.
    Moved(u16),
    /// The inbox has something.
    Inbox,
    /// A moment has come.
    Timer,
}

const MOVED: u32 = 1;
const INBOX: u32 = 2;
const TIMER: u32 = 3;

/// What [`Event::of`] knows a completion of ours by.
fn data(tag: u16, op: u32) -> u64 {
    UblkIOCtx::build_user_data(tag, op, 0, true)
}

impl Event {
    /// What a completion is about.
    pub(super) fn of(data: u64) -> Self {
        let tag = u16::try_from(UblkIOCtx::user_data_to_tag(data)).unwrap_or(u16::MAX);
        if data & libublk::UblkUringData::Target as u64 == 0 {
            return Self::Request(tag);
        }
        match UblkIOCtx::user_data_to_op(data) {
            MOVED => Self::Moved(tag),
            INBOX => Self::Inbox,
            _ => Self::Timer,
        }
    }

    /// The request that it is about; `None` where it is about all, or none.
    pub(super) fn tag(self) -> Option<u16> {
        match self {
            Self::Request(tag) | Self::Moved(tag) => Some(tag),
            Self::Inbox | Self::Timer => None,
        }
    }
}

/// Gives the calling thread a ring for a queue of `depth` requests.
///
/// # Errors
/// The host's.
pub(super) fn prepare(depth: u16) -> Result<()> {
    let entries = u32::from(depth)
        .saturating_mul(2)
        .next_power_of_two()
        .clamp(64, 16384);
    let build = |alone: bool| {
        let mut builder = IoUring::<squeue::Entry>::builder();
        // Room for the pieces of every request, so that completions never overflow.
        builder.setup_cqsize(entries * 4);
        match alone {
            true => builder.setup_single_issuer().setup_defer_taskrun(),
            false => builder.setup_coop_taskrun(),
        };
        builder.build(entries)
    };
    // Older kernels do not know the better way.
    let ring = build(true).or_else(|_| build(false));
    let ring = ring.map_err(|e| Error::io("make an io_uring", e))?;
    ublk_init_task_ring(|cell| {
        cell.set(RefCell::new(ring))
            .map_err(|_| UblkError::OtherError(-libc::EEXIST))
    })
    .map_err(super::control::error("make an io_uring"))
}

/// The memory that a piece is moved to or from.
#[derive(Debug)]
pub(super) enum Memory<'a> {
    /// The request's buffer, copied to or from the driver before or after.
    Ours(&'a mut [u8]),
    /// The request's own, registered at this place.
    Registered(u16),
}

/// Starts moving a piece of a tag's request between memory and the file at `host`.
pub(super) fn start(
    queue: &UblkQueue<'_>,
    tag: u16,
    kind: Kind,
    piece: &Piece,
    (fd, host): (RawFd, u64),
    memory: Memory<'_>,
) -> Result<()> {
    let len = u32::try_from(piece.len).unwrap_or(u32::MAX);
    let fd = types::Fd(fd);
    let entry = match (kind, memory) {
        (Kind::Write, Memory::Ours(buffer)) => {
            let from = buffer[piece.at..piece.at + piece.len].as_ptr();
            opcode::Write::new(fd, from, len).offset(host).build()
        }
        (_, Memory::Ours(buffer)) => {
            let to = buffer[piece.at..piece.at + piece.len].as_mut_ptr();
            opcode::Read::new(fd, to, len).offset(host).build()
        }
        // Addresses of registered requests count from 0.
        (Kind::Write, Memory::Registered(index)) => {
            let from = std::ptr::without_provenance(piece.at);
            opcode::WriteFixed::new(fd, from, len, index)
                .offset(host)
                .build()
        }
        (_, Memory::Registered(index)) => {
            let to = std::ptr::without_provenance_mut(piece.at);
            opcode::ReadFixed::new(fd, to, len, index)
                .offset(host)
                .build()
        }
    };
    submit(queue, entry.user_data(data(tag, MOVED)))
}

/// Has the inbox's descriptor watched, once.
pub(super) fn watch(queue: &UblkQueue<'_>, fd: RawFd) -> Result<()> {
    let flags = u32::try_from(libc::POLLIN).unwrap_or_default();
    let entry = opcode::PollAdd::new(types::Fd(fd), flags).build();
    submit(queue, entry.user_data(data(0, INBOX)))
}

/// A moment to be announced; kept for as long as the ring may look at it.
#[derive(Debug, Default)]
pub(super) struct Alarm(Box<types::Timespec>);

impl Alarm {
    /// Has a moment announced.  Set again before the ring has taken it, only the later one counts.
    pub(super) fn set(&mut self, queue: &UblkQueue<'_>, after: std::time::Duration) -> Result<()> {
        *self.0 = types::Timespec::from(after);
        let entry = opcode::Timeout::new(&raw const *self.0).build();
        submit(queue, entry.user_data(data(0, TIMER)))
    }
}

fn submit(queue: &UblkQueue<'_>, entry: squeue::Entry) -> Result<()> {
    queue
        .ublk_submit_sqe_sync(entry)
        .map_err(super::control::error("submit to the ring"))
}

/// Hands what was put into the ring to the kernel, without waiting for anything.
///
/// # Errors
/// The host's.
pub(super) fn submit_all() -> Result<()> {
    with_task_io_ring_mut(|ring| ring.submit())
        .map(drop)
        .map_err(|e| Error::io("submit to the ring", e))
}

/// Waits until `count` transfers have ended, whatever else completes meanwhile.
///
/// # Errors
/// The host's.
pub(super) fn wait_for(count: usize) -> Result<()> {
    let mut left = count;
    while left > 0 {
        left -= with_task_io_ring_mut(|ring| {
            match ring.submit_and_wait(1) {
                Err(e) if e.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(Error::io("wait for the ring", e));
                }
                _ => {}
            }
            let moved = |data| matches!(Event::of(data), Event::Moved(_));
            let ended = ring.completion().filter(|e| moved(e.user_data())).count();
            Ok(ended.min(left))
        })?;
    }
    Ok(())
}

/// The character device of `device`, as a file of its own.
///
/// # Errors
/// The host's.
pub(super) fn channel(device: &UblkDev) -> Result<File> {
    // SAFETY: `device` has it open for as long as it lives, which is past this call.
    let fd = unsafe { BorrowedFd::borrow_raw(device.tgt.fds[0]) };
    let own: OwnedFd = fd
        .try_clone_to_owned()
        .map_err(|e| Error::io("duplicate the character device", e))?;
    Ok(File::from(own))
}
