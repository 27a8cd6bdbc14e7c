//! Buffers: the scan for zeroes, and aligned memory for direct I/O.

use std::ops::Range;
use std::sync::OnceLock;

/// Whether every byte of `buf` is zero.  Looks at 128 bytes at a time.
pub fn is_zero(buf: &[u8]) -> bool {
    let mut chunks = buf.chunks_exact(128);
    for chunk in &mut chunks {
        if chunk.iter().fold(0u8, |acc, b| acc | b) != 0 {
            return false;
        }
    }
    chunks.remainder().iter().all(|b| *b == 0)
}

/// The parts of `buf` that hold a non-zero byte, in whole units (not 0), neighbours merged.
pub fn nonzero(buf: &[u8], unit: usize) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for chunk in buf.chunks(unit) {
        let end = at + chunk.len();
        if !is_zero(chunk) {
            match parts.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => parts.push(at..end),
            }
        }
        at = end;
    }
    parts
}

/// Bytes that are zero, to be written where nothing cheaper makes zeroes.  Not in the binary.
pub fn zeroes() -> &'static [u8] {
    static ZEROES: OnceLock<Box<[u8]>> = OnceLock::new();
    ZEROES.get_or_init(|| vec![0; 256 << 10].into())
}

/// Heap memory whose address is a multiple of an alignment, zeroed at first.
#[derive(Debug)]
pub struct AlignedBuf {
    memory: Vec<u8>,
    skip: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes at a multiple of `align`, a power of two.
    pub fn new(len: usize, align: usize) -> Self {
        let memory = vec![0u8; len + align];
        let skip = memory.as_ptr().align_offset(align).min(align);
        Self { memory, skip, len }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.memory[self.skip..self.skip + self.len]
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.skip..self.skip + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_set_byte_anywhere_is_seen() {
        let mut buf = vec![0u8; 300];
        assert!(is_zero(&buf));
        for i in 0..buf.len() {
            buf[i] = 1;
            assert!(!is_zero(&buf), "{i}");
            buf[i] = 0;
        }
    }

    #[test]
    fn non_zero_parts_of_a_buffer_are_whole_units() {
        let mut buf = [0; 21];
        buf[9] = 1;
        buf[20] = 1;
        assert_eq!(nonzero(&buf, 4), [8..12, 20..21]);
        buf[12] = 1;
        assert_eq!(nonzero(&buf, 4), [8..16, 20..21]);
    }

    #[test]
    fn an_aligned_buffer_is_aligned() {
        for align in [1, 512, 4096] {
            let buf = AlignedBuf::new(1000, align);
            assert_eq!(buf.as_ptr() as usize % align, 0);
            assert_eq!(buf.len(), 1000);
        }
    }
}
