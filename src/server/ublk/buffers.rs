//! Memory for the bytes of requests that the ring does not move to the driver, used again and again.

use std::ops::{Deref, DerefMut};

use crate::util::buf::AlignedBuf;

/// Alignment that any direct I/O is content with.
pub(super) const ALIGN: u32 = 4096;
/// Memory that most requests fit in; larger ones get what the largest request needs.
const SMALL: usize = 64 << 10;
/// How many large ones are kept.
const KEPT_LARGE: usize = 8;

/// The bytes of one request; what they are at first is not defined.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: AlignedBuf,
    len: usize,
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

/// What is not in use.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    small: Vec<AlignedBuf>,
    large: Vec<AlignedBuf>,
}

impl Buffers {
    /// Memory for `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> Buffer {
        let (kept, size) = match len {
            0..=SMALL => (&mut self.small, SMALL),
            _ => (&mut self.large, len),
        };
        let memory = kept.pop().filter(|memory| memory.len() >= len);
        Buffer {
            memory: memory.unwrap_or_else(|| AlignedBuf::new(size, ALIGN as usize)),
            len,
        }
    }

    /// Takes it back.
    pub(super) fn give(&mut self, buffer: Buffer) {
        match buffer.memory.len() {
            // There are no more than requests under way.
            0..=SMALL => self.small.push(buffer.memory),
            _ if self.large.len() < KEPT_LARGE => self.large.push(buffer.memory),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_of_the_length_asked_for_and_used_again() {
        let mut buffers = Buffers::default();
        let addresses: Vec<usize> = [512, SMALL, SMALL + 1, 1 << 20]
            .into_iter()
            .map(|len| {
                let mut buffer = buffers.take(len);
                assert_eq!(buffer.len(), len);
                buffer.fill(7);
                let address = buffer.as_ptr() as usize;
                assert!(address.is_multiple_of(ALIGN as usize));
                buffers.give(buffer);
                address
            })
            .collect();
        assert_eq!(addresses[0], addresses[1]);
        // The last was longer than what was there, which went.
        assert_eq!((buffers.small.len(), buffers.large.len()), (1, 1));
        assert_eq!(buffers.take(1 << 20).as_ptr() as usize, addresses[3]);
    }

    #[test]
    fn few_large_ones_are_kept() {
        let mut buffers = Buffers::default();
        let taken: Vec<Buffer> = (0..20).map(|_| buffers.take(1 << 20)).collect();
        taken.into_iter().for_each(|buffer| buffers.give(buffer));
        assert_eq!(buffers.large.len(), KEPT_LARGE);
    }
}
