//! Alignment of offsets and lengths, checked.

/// Whether `value` is a multiple of `unit`, which must not be 0.
pub fn is_aligned(value: u64, unit: u64) -> bool {
    value.is_multiple_of(unit)
}

/// `value` rounded down to a multiple of `unit`, which must not be 0.
pub fn down(value: u64, unit: u64) -> u64 {
    value - value % unit
}

/// `value` rounded up to a multiple of `unit`, which must not be 0; `None` past 2^64.
pub fn up(value: u64, unit: u64) -> Option<u64> {
    value.checked_next_multiple_of(unit)
}

/// `u64` from a length in memory; lossless on every platform we build for.
pub fn len64(len: usize) -> u64 {
    len as u64
}

/// A length in memory from `value`, at most `cap`.
pub fn clamp_len(value: u64, cap: usize) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX).min(cap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_up_past_the_end_of_numbers_is_none() {
        assert_eq!(up(u64::MAX, 512), None);
        assert_eq!(up(513, 512), Some(1024));
        assert_eq!(down(513, 512), 512);
    }
}
