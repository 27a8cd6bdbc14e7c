//! Memory that a queue shares with the kernel: the descriptors of its requests, and the buffers
//! that the tags of a batch are put into.

#![allow(unsafe_code)]

use std::fs::File;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;
use libublk::sys::{self, ublksrv_io_desc};
use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::{Error, Result};
use crate::util::align::len64;

const DESCRIPTOR: usize = size_of::<ublksrv_io_desc>();
/// Tags that fit in one buffer.
const TAGS: usize = 64;
const ENTRY: usize = size_of::<BufRingEntry>();

/// The descriptors of a queue's requests, which the driver writes.
#[derive(Debug)]
pub(super) struct Descriptors {
    map: Mmap,
    depth: u16,
}

impl Descriptors {
    /// Those of a queue of `depth` requests, from the character device of its disk.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(device: &File, queue: u16, depth: u16) -> Result<Self> {
        let page = rustix::param::page_size();
        let most = usize::try_from(sys::UBLK_MAX_QUEUE_DEPTH).unwrap_or(usize::MAX);
        let each = (most * DESCRIPTOR).next_multiple_of(page);
        let start = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + len64(each) * u64::from(queue);
        let mut options = MmapOptions::new();
        let options = options
            .offset(start)
            .len(usize::from(depth) * DESCRIPTOR)
            .populate();
        // SAFETY: it is memory of the driver, which stays as long as it is mapped; what is in it is
        // only read as bytes that may change.
        let map = unsafe { options.map(device.as_raw_fd()) };
        let map = map.map_err(|e| Error::io("map the descriptors of a queue", e))?;
        Ok(Self { map, depth })
    }

    /// What the driver says of a tag's request, which is with the server.
    ///
    /// # Panics
    /// Where the queue has no such tag.
    pub(super) fn get(&self, tag: u16) -> ublksrv_io_desc {
        assert!(tag < self.depth, "the queue has this tag");
        let at = self
            .map
            .as_ptr()
            .wrapping_add(usize::from(tag) * DESCRIPTOR);
        // SAFETY: it lies inside the mapping, which starts at a page and is made of these; any bytes
        // make one.
        unsafe { at.cast::<ublksrv_io_desc>().read_volatile() }
    }
}

/// Buffers that the kernel puts tags into, and the ring by which it is given them, as
/// `io_uring_register_buf_ring(3)` has it.
#[derive(Debug)]
pub(super) struct Provided {
    /// Entries, then buffers; from when it is registered only looked at by pointers.
    memory: MmapMut,
    base: NonNull<u8>,
    /// Number of buffers, a power of two.
    count: u16,
    /// What the kernel is told next as the end of the ring.
    tail: u16,
}

impl Provided {
    /// Buffers for a queue of `depth` requests.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn new(depth: u16) -> Result<Self> {
        let count = depth.next_power_of_two().clamp(8, 512);
        let len = usize::from(count) * (ENTRY + TAGS * size_of::<u16>());
        let memory = MmapMut::map_anon(len);
        let mut memory = memory.map_err(|e| Error::io("get memory for a queue", e))?;
        let base = NonNull::from(&mut memory[..]).cast();
        let mut new = Self {
            memory,
            base,
            count,
            tail: 0,
        };
        (0..count).for_each(|id| new.put(id));
        new.publish();
        Ok(new)
    }

    /// Where it begins, and how many buffers there are.
    pub(super) fn place(&self) -> (u64, u16) {
        (self.base.as_ptr().addr() as u64, self.count)
    }

    fn buffer(&self, id: u16) -> NonNull<u8> {
        let at = usize::from(self.count) * ENTRY + usize::from(id) * TAGS * size_of::<u16>();
        debug_assert!(id < self.count && at < self.memory.len());
        // SAFETY: inside the memory, as every buffer below the count is.
        unsafe { self.base.add(at) }
    }

    /// Puts a buffer behind those that the kernel may use; [`Provided::publish`] is to follow.
    fn put(&mut self, id: u16) {
        let place = usize::from(self.tail & (self.count - 1));
        let address = self.buffer(id).as_ptr().addr() as u64;
        // SAFETY: entry `place` lies inside the memory, at a multiple of its size from a page's start,
        // and the kernel does not look at it before it is published.
        let entry = unsafe { self.base.cast::<BufRingEntry>().add(place).as_mut() };
        entry.set_addr(address);
        entry.set_len(u32::try_from(TAGS * size_of::<u16>()).unwrap_or_default());
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Lets the kernel have what was put.
    pub(super) fn publish(&mut self) {
        // SAFETY: the first entry is there, and all its bytes are set or zero.
        let tail = unsafe { BufRingEntry::tail(self.base.as_ptr().cast()) };
        // SAFETY: it lies in our memory, aligned, and is only written as this atomic.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Hands out the tags of which the kernel put `bytes` bytes into a buffer, and takes the buffer
    /// back; [`Provided::publish`] is to follow.
    pub(super) fn take(&mut self, id: u16, bytes: usize, mut tag: impl FnMut(u16)) {
        if id >= self.count {
            return;
        }
        let at = self.buffer(id).cast::<u16>();
        for index in 0..(bytes / size_of::<u16>()).min(TAGS) {
            // SAFETY: inside the buffer, aligned; the kernel is done with it.
            tag(unsafe { at.add(index).read_volatile() });
        }
        self.put(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_behind_the_others_and_is_handed_out_once() {
        let mut provided = Provided::new(5).expect("has memory");
        let (address, count) = provided.place();
        assert_eq!((address % 4096, count), (0, 8));
        for turn in 0..20u16 {
            let id = turn % 8;
            // SAFETY: as the kernel does, in memory that nobody else looks at.
            unsafe { provided.buffer(id).cast::<[u16; 2]>().write([turn, 700]) };
            let mut tags = Vec::new();
            provided.take(id, 4, |tag| tags.push(tag));
            assert_eq!(tags, [turn, 700]);
            assert_eq!(provided.tail, 9 + turn);
            provided.publish();
            let place = usize::from((8 + turn) % 8);
            // SAFETY: inside the memory.
            let entry = unsafe { provided.base.cast::<BufRingEntry>().add(place).as_ref() };
            assert_eq!((entry.bid(), entry.len()), (id, 128));
            assert_eq!(entry.addr(), address + 128 + u64::from(id) * 128);
        }
    }

    #[test]
    fn what_the_kernel_cannot_say_is_not_believed() {
        let mut provided = Provided::new(1).expect("has memory");
        let mut tags = 0;
        provided.take(8, 2, |_| tags += 1);
        assert_eq!(tags, 0);
        provided.take(7, 100_000, |_| tags += 1);
        assert_eq!(tags, TAGS);
    }
}
