//! A queue's ring: commands to the driver, and transfers between requests and files.
//!
//! The only place where memory is given to the kernel.  Whoever starts a transfer keeps the memory,
//! or the request, and the file until its completion has been seen; the queue sees to that before
//! it ends, whatever happens.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use libublk::io::UblkDev;

use super::plan::Piece;
use super::shared::Provided;
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
    /// Requests of many tags have come.
    Fetched,
    /// So many answers, or tags that were made ready, were taken.
    Taken(u16),
}

const MOVED: u64 = 1 << 16;
const INBOX: u64 = 2 << 16;
const TIMER: u64 = 3 << 16;
const FETCHED: u64 = 4 << 16;
const TAKEN: u64 = 5 << 16;
const LOW: u64 = 0xffff;

/// The driver asks for requests again and again by one command (`IORING_URING_CMD_MULTISHOT`).
const MULTISHOT: u32 = 1 << 1;
/// Group of the buffers that tags are put into.
const GROUP: u16 = 0;
/// The character device among the files that the ring knows.
const DEVICE: types::Fixed = types::Fixed(0);

impl Event {
    /// What a completion is about.
    pub(super) fn of(data: u64) -> Self {
        let low = u16::try_from(data & LOW).unwrap_or(u16::MAX);
        match data & !LOW {
            0 => Self::Request(low),
            MOVED => Self::Moved(low),
            INBOX => Self::Inbox,
            TIMER => Self::Timer,
            FETCHED => Self::Fetched,
            _ => Self::Taken(low),
        }
    }

    /// What [`Event::of`] knows it by.
    fn data(self) -> u64 {
        match self {
            Self::Request(tag) => u64::from(tag),
            Self::Moved(tag) => MOVED | u64::from(tag),
            Self::Inbox => INBOX,
            Self::Timer => TIMER,
            Self::Fetched => FETCHED,
            Self::Taken(count) => TAKEN | u64::from(count),
        }
    }

    /// The request that it is about; `None` where it is about all, or none.
    pub(super) fn tag(self) -> Option<u16> {
        match self {
            Self::Request(tag) | Self::Moved(tag) => Some(tag),
            _ => None,
        }
    }
}

/// The memory that a piece is moved to or from.
#[derive(Debug)]
pub(super) enum Memory<'a> {
    /// The request's buffer, copied to or from the driver before or after.
    Ours(&'a mut [u8]),
    /// The request's own, registered at this place.
    Registered(u16),
}

/// A command to the driver.
#[derive(Debug, Clone, Copy)]
pub(super) struct Command {
    /// Which of `UBLK_U_IO_*`.
    pub(super) op: u32,
    /// What rides in it.
    pub(super) payload: [u8; 16],
    /// What it is about besides: an address, or a registration.
    pub(super) about: u64,
}

/// The ring of one queue, for the thread that made it.
pub(super) struct Ring(IoUring);

impl Ring {
    /// A ring for a queue of `depth` requests of the disk behind the character device.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(device: &File, depth: u16) -> Result<Self> {
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
        let known = ring.submitter().register_files(&[device.as_raw_fd()]);
        known.map_err(|e| Error::io("register the character device", e))?;
        Ok(Self(ring))
    }

    /// Makes room for `count` registered requests.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn prepare_buffers(&self, count: u16) -> Result<()> {
        let made = self.0.submitter().register_buffers_sparse(count.into());
        made.map_err(|e| Error::io("make room for registered buffers", e))
    }

    /// Lets the kernel put tags into buffers, which are to stay until [`Ring::forget`], or for as
    /// long as the ring.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn provide(&self, buffers: &Provided) -> Result<()> {
        let (address, count) = buffers.place();
        let submitter = self.0.submitter();
        // SAFETY: the entries and what they point at are there as long as the caller promises.
        let provided = unsafe { submitter.register_buf_ring_with_flags(address, count, GROUP, 0) };
        provided.map_err(|e| Error::io("register buffers", e))
    }

    /// Takes back what [`Ring::provide`] gave.
    pub(super) fn forget(&self) {
        // Where it fails there is nothing to take back.
        let _ = self.0.submitter().unregister_buf_ring(GROUP);
    }

    /// Puts a command to the driver into the ring.  What `about` points at is to stay until the
    /// ring has been entered.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn command(&mut self, command: &Command, event: Event) -> Result<()> {
        let entry = opcode::UringCmd16::new(DEVICE, command.op)
            .cmd(command.payload)
            .addr(Some(command.about))
            .build();
        self.push(entry, event)
    }

    /// Asks for requests, as their tags, into the buffers that were provided, again and again.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn fetch(&mut self, op: u32, payload: [u8; 16]) -> Result<()> {
        let entry = opcode::UringCmd16::new(DEVICE, op).cmd(payload).build();
        let mut entry = entry.flags(squeue::Flags::BUFFER_SELECT);
        libublk::override_sqe!(&mut entry, rw_flags, |=, MULTISHOT);
        libublk::override_sqe!(&mut entry, buf_index, GROUP);
        self.push(entry, Event::Fetched)
    }

    /// Starts moving a piece of a tag's request between memory and the file at `host`.
    ///
    /// # Errors
    /// The host's; then nothing is moved.
    pub(super) fn start(
        &mut self,
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
        self.push(entry, Event::Moved(tag))
    }

    /// Has a descriptor watched, once, until it can be read.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn watch(&mut self, fd: RawFd) -> Result<()> {
        let flags = u32::try_from(libc::POLLIN).unwrap_or_default();
        let entry = opcode::PollAdd::new(types::Fd(fd), flags).build();
        self.push(entry, Event::Inbox)
    }

    fn push(&mut self, entry: squeue::Entry, event: Event) -> Result<()> {
        let entry = entry.user_data(event.data());
        loop {
            // SAFETY: what the entry points at stays, as the callers promise.
            if unsafe { self.0.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            // It is full.
            self.submit()?;
        }
    }

    /// Whether the kernel has taken all that was put into the ring.
    pub(super) fn is_taken(&mut self) -> bool {
        self.0.submission().is_empty()
    }

    /// Hands what was put into the ring to the kernel, without waiting for anything.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn submit(&self) -> Result<()> {
        let submitted = self.0.submit().map(drop);
        submitted.map_err(|e| Error::io("submit to the ring", e))
    }

    /// Hands what was put into the ring to the kernel, and waits until something has completed, or
    /// it is worth looking again.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn wait(&self) -> Result<()> {
        match self.0.submit_and_wait(1) {
            Err(e) if !is_passing(&e) => Err(Error::io("wait for the ring", e)),
            _ => Ok(()),
        }
    }

    /// What has completed.
    pub(super) fn completed(&mut self) -> cqueue::CompletionQueue<'_> {
        self.0.completion()
    }

    /// Waits until `count` transfers have ended, whatever else completes meanwhile.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn wait_for(&mut self, count: usize) -> Result<()> {
        let mut left = count;
        while left > 0 {
            self.wait()?;
            let moved = |data| matches!(Event::of(data), Event::Moved(_));
            let ended = self.completed().filter(|e| moved(e.user_data())).count();
            left -= ended.min(left);
        }
        Ok(())
    }
}

/// A moment to be announced; kept for as long as the ring may look at it.
#[derive(Debug, Default)]
pub(super) struct Alarm(Box<types::Timespec>);

impl Alarm {
    /// Has a moment announced.  Set again before the ring has taken it, only the later one counts.
    pub(super) fn set(&mut self, ring: &mut Ring, after: std::time::Duration) -> Result<()> {
        *self.0 = types::Timespec::from(after);
        let entry = opcode::Timeout::new(&raw const *self.0).build();
        ring.push(entry, Event::Timer)
    }
}

/// Whether to try again at once.
fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
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
