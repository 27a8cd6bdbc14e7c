//! One refcount block: a cluster of counters of 1 to 64 bits.
//!
//! Counters narrower than a byte fill it from its least significant bit; wider ones are
//! big-endian.

/// A counter's width: 1 << order bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Width(u32);

impl Width {
    /// From the header's `refcount_order`, which is at most 6.
    pub(super) fn new(order: u32) -> Self {
        debug_assert!(order <= 6);
        Self(order)
    }

    /// Bits of a counter.
    pub(super) fn bits(self) -> u32 {
        1 << self.0
    }

    /// The largest count.
    pub(super) fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// log2 of the counters in a block of `1 << cluster_bits` bytes.
    pub(super) fn block_bits(self, cluster_bits: u32) -> u32 {
        cluster_bits + 3 - self.0
    }

    /// Counter `index` of a block.
    pub(super) fn get(self, block: &[u8], index: usize) -> u64 {
        if self.0 < 3 {
            let per_byte = 8 >> self.0;
            let shift = (index % per_byte) << self.0;
            return u64::from(block[index / per_byte] >> shift) & self.max();
        }
        let len = 1 << (self.0 - 3);
        let bytes = &block[index * len..(index + 1) * len];
        bytes
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Sets counter `index` of a block to `value`, at most [`Width::max`].
    pub(super) fn set(self, block: &mut [u8], index: usize, value: u64) {
        debug_assert!(value <= self.max());
        if self.0 < 3 {
            let per_byte = 8 >> self.0;
            let shift = (index % per_byte) << self.0;
            let mask = u8::try_from(self.max()).unwrap_or(u8::MAX) << shift;
            let byte = &mut block[index / per_byte];
            *byte = *byte & !mask | (u8::try_from(value).unwrap_or(u8::MAX) << shift) & mask;
            return;
        }
        let len = 1usize << (self.0 - 3);
        let bytes = value.to_be_bytes();
        block[index * len..(index + 1) * len].copy_from_slice(&bytes[8 - len..]);
    }

    /// The bytes of a block that hold the counters from `first` to before `end`.
    pub(super) fn bytes(self, first: usize, end: usize) -> std::ops::Range<usize> {
        let bit = |index: usize| index << self.0;
        bit(first) / 8..bit(end).div_ceil(8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_every_width_keep_their_neighbours() {
        for order in 0..=6 {
            let width = Width::new(order);
            let count = (512 * 8) >> order;
            let mut block = vec![0; 512];
            let value = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & width.max();
            (0..count).for_each(|i| width.set(&mut block, i, value(i)));
            (0..count).for_each(|i| assert_eq!(width.get(&block, i), value(i), "{order} {i}"));
            width.set(&mut block, 3, 0);
            assert_eq!(width.get(&block, 2), value(2));
            assert_eq!(width.get(&block, 3), 0);
            assert_eq!(width.get(&block, 4), value(4));
        }
    }

    #[test]
    fn narrow_counters_fill_a_byte_from_its_low_end() {
        let mut block = vec![0; 512];
        Width::new(0).set(&mut block, 1, 1);
        assert_eq!(block[0], 2);
        Width::new(4).set(&mut block, 1, 0x102);
        assert_eq!(block[2..4], [1, 2]);
    }

    #[test]
    fn the_bytes_of_a_run_cover_it() {
        assert_eq!(Width::new(0).bytes(3, 9), 0..2);
        assert_eq!(Width::new(4).bytes(1, 3), 2..6);
    }
}
