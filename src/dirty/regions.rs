//! One bit for each region of a disk.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::util::align::{clamp_len, len64};

/// Smallest and largest region in bytes, but for logs of others.
pub const MIN_GRANULARITY: u64 = 4 << 10;
/// See [`MIN_GRANULARITY`].
pub const MAX_GRANULARITY: u64 = 64 << 20;
/// Most regions of a disk: 256 MiB of memory, 16 TiB in regions of 8 KiB.
pub const MAX_REGIONS: u64 = 1 << 31;
/// Bits of a word.
const BITS: u64 = 64;

/// How a disk is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    size: u64,
    granularity: u64,
}

impl Geometry {
    /// A disk of `size` bytes in regions of `granularity`, a power of two; the last may be shorter.
    ///
    /// # Errors
    /// `Invalid` for another granularity, `OutOfRange` for more than [`MAX_REGIONS`].
    pub fn new(size: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() || granularity < 512 {
            return Err(Error::invalid(format!(
                "a granularity of {granularity} bytes (allowed: a power of two, 512 at least)"
            )));
        }
        let this = Self { size, granularity };
        if this.regions() <= MAX_REGIONS && i64::try_from(size).is_ok() {
            return Ok(this);
        }
        Err(Error::invalid(format!(
            "{} regions of {granularity} bytes (allowed: {MAX_REGIONS}; larger regions are fewer)",
            this.regions()
        )))
    }

    /// Bytes of the disk.
    pub fn size(self) -> u64 {
        self.size
    }

    /// Bytes of a region.
    pub fn granularity(self) -> u64 {
        self.granularity
    }

    /// How many regions there are.
    pub fn regions(self) -> u64 {
        self.size.div_ceil(self.granularity)
    }

    /// The regions that a range of bytes touches, none behind the end.
    pub fn touched(self, range: &Range<u64>) -> Range<u64> {
        match range.start < range.end.min(self.size) {
            true => {
                let end = range.end.min(self.size).div_ceil(self.granularity);
                range.start / self.granularity..end
            }
            false => 0..0,
        }
    }

    /// The regions that lie wholly in a range of bytes; of the last its part of the disk counts.
    pub fn covered(self, range: &Range<u64>) -> Range<u64> {
        let first = range.start.div_ceil(self.granularity);
        let end = match range.end >= self.size {
            true => self.regions(),
            false => range.end / self.granularity,
        };
        first.min(end)..end
    }

    /// The bytes of regions.
    fn bytes(self, regions: Range<u64>) -> Range<u64> {
        let end = regions.end.saturating_mul(self.granularity);
        regions.start * self.granularity..end.min(self.size)
    }
}

/// The regions of a disk: dirty, or clean.
///
/// Threads mark and clear at once; each bit is changed as a whole.
#[derive(Debug)]
pub struct Regions {
    geometry: Geometry,
    /// Bit 0 of the first is region 0; behind the last region all are 0.
    words: Box<[AtomicU64]>,
}

impl Regions {
    /// All clean.
    pub fn new(geometry: Geometry) -> Self {
        let words = geometry.regions().div_ceil(BITS);
        Self {
            geometry,
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// How the disk is divided.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Marks all regions that `bytes` touch.
    pub fn mark(&self, bytes: &Range<u64>) {
        self.change(self.geometry.touched(bytes), |word, mask| {
            word.fetch_or(mask, Ordering::AcqRel);
        });
    }

    /// Clears all regions that lie wholly in `bytes`.
    pub fn clear(&self, bytes: &Range<u64>) {
        self.change(self.geometry.covered(bytes), |word, mask| {
            word.fetch_and(!mask, Ordering::AcqRel);
        });
    }

    fn change(&self, regions: Range<u64>, change: impl Fn(&AtomicU64, u64)) {
        let mut at = regions.start;
        while at < regions.end {
            let count = (BITS - at % BITS).min(regions.end - at);
            let mask = (u64::MAX >> (BITS - count)) << (at % BITS);
            change(self.word(at / BITS), mask);
            at += count;
        }
    }

    fn word(&self, number: u64) -> &AtomicU64 {
        &self.words[clamp_len(number, usize::MAX)]
    }

    /// Whether any region that `bytes` touch is clean.
    pub fn any_clean(&self, bytes: &Range<u64>) -> bool {
        let regions = self.geometry.touched(bytes);
        self.find(regions.clone(), false) < regions.end
    }

    /// Marks what is marked in `other`, a disk of the same size.
    ///
    /// # Errors
    /// `Invalid` for one of another size.
    pub fn merge(&self, other: &Self) -> Result<()> {
        let (mine, theirs) = (self.geometry.size, other.geometry.size);
        if mine != theirs {
            return Err(Error::invalid(format!(
                "is of a disk of {theirs} bytes (allowed: {mine}, that of the log that takes it)"
            )));
        }
        other.dirty(0).for_each(|range| self.mark(&range));
        Ok(())
    }

    /// Ranges of bytes whose regions are dirty, from `at` on: ascending, not touching.  What changes
    /// meanwhile is seen or not.
    pub fn dirty(&self, at: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = at;
        std::iter::from_fn(move || {
            let next = self.next(at..self.geometry.size)?;
            at = next.end;
            Some(next)
        })
    }

    /// The first dirty bytes in a range: as far as the range and the dirty regions go.
    pub fn next(&self, range: Range<u64>) -> Option<Range<u64>> {
        let regions = self.geometry.touched(&range);
        let first = self.find(regions.clone(), true);
        if first >= regions.end {
            return None;
        }
        let end = self.find(first..regions.end, false);
        let bytes = self.geometry.bytes(first..end);
        Some(bytes.start.max(range.start)..bytes.end.min(range.end))
    }

    /// The first region of a range that is dirty, or clean; the end of the range where none is.
    fn find(&self, regions: Range<u64>, dirty: bool) -> u64 {
        let mut at = regions.start;
        while at < regions.end {
            let word = self.word(at / BITS).load(Ordering::Acquire);
            let word = if dirty { word } else { !word };
            let rest = word >> (at % BITS);
            if rest != 0 {
                return (at + u64::from(rest.trailing_zeros())).min(regions.end);
            }
            at += BITS - at % BITS;
        }
        regions.end
    }

    /// How many regions are dirty.
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Acquire).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// Bytes of the dirty regions.
    pub fn dirty_bytes(&self) -> u64 {
        let all = self.count() * self.geometry.granularity;
        let last = self.geometry.regions().saturating_sub(1);
        let cut = self.geometry.regions() * self.geometry.granularity - self.geometry.size;
        let cut = match self.find(last..self.geometry.regions(), true) == last && cut > 0 {
            true => cut,
            false => 0,
        };
        all - cut
    }

    /// Bytes of a bitmap of all regions.
    pub fn bitmap_len(&self) -> u64 {
        len64(self.words.len()) * 8
    }

    /// The bitmap from byte `at` on, a multiple of 8: bit 0 of byte 0 is region 0, a set bit is dirty.
    pub fn encode(&self, at: u64, out: &mut [u8]) {
        let words = &self.words[clamp_len(at / 8, self.words.len())..];
        for (bytes, word) in out.chunks_mut(8).zip(words) {
            let word = word.load(Ordering::Acquire).to_le_bytes();
            bytes.copy_from_slice(&word[..bytes.len()]);
        }
    }

    /// Marks what is set in `bytes` of a bitmap, which are those from byte `at` on, a multiple of 8.
    pub fn decode(&self, at: u64, bytes: &[u8]) {
        let regions = self.geometry.regions();
        for (number, bytes) in (at / 8..).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            let left = regions.saturating_sub(number * BITS);
            let mask = match left {
                0 => return,
                1..BITS => u64::MAX >> (BITS - left),
                _ => u64::MAX,
            };
            let bits = u64::from_le_bytes(word) & mask;
            self.word(number).fetch_or(bits, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(size: u64, granularity: u64) -> Regions {
        Regions::new(Geometry::new(size, granularity).expect("is allowed"))
    }

    #[test]
    fn marks_are_of_all_that_is_touched_and_clearing_of_what_lies_wholly_within() {
        let log = regions(1000 * 4096 + 5, 4096);
        log.mark(&(4095..4097));
        log.mark(&(1000 * 4096 + 4..1000 * 4096 + 5));
        log.mark(&(70 * 4096..200 * 4096));
        log.mark(&(u64::MAX - 1..u64::MAX));
        log.mark(&(500..500));
        let found: Vec<_> = log.dirty(0).collect();
        assert_eq!(
            found,
            [0..8192, 70 * 4096..200 * 4096, 1000 * 4096..1000 * 4096 + 5]
        );
        assert_eq!(log.count(), 133);
        assert_eq!(log.dirty_bytes(), 132 * 4096 + 5);
        log.clear(&(1..8192));
        assert_eq!(log.next(0..u64::MAX), Some(0..4096));
        log.clear(&(0..4096));
        log.clear(&(1000 * 4096..1000 * 4096 + 5));
        assert_eq!(log.next(5..u64::MAX), Some(70 * 4096..200 * 4096));
        assert_eq!(
            log.next(71 * 4096 + 7..72 * 4096 - 7),
            Some(71 * 4096 + 7..72 * 4096 - 7)
        );
        assert!(log.any_clean(&(69 * 4096..71 * 4096)) && !log.any_clean(&(70 * 4096..90 * 4096)));
        log.clear(&(0..u64::MAX));
        assert_eq!((log.count(), log.next(0..u64::MAX)), (0, None));
    }

    #[test]
    fn random_marks_are_what_a_plain_vector_says() {
        let mut rng = fastrand::Rng::with_seed(5);
        let log = regions(333_000, 512);
        let mut model = vec![false; 651];
        for _ in 0..3000 {
            let start = rng.u64(0..334_000);
            let range = start..start + rng.u64(0..40_000);
            let is_mark = rng.bool();
            match is_mark {
                true => log.mark(&range),
                false => log.clear(&range),
            }
            for (bit, dirty) in (0_u64..).zip(&mut model) {
                let bytes = bit * 512..(bit * 512 + 512).min(333_000);
                let touched =
                    bytes.start < range.end && range.start < bytes.end && !range.is_empty();
                let within = range.start <= bytes.start && bytes.end <= range.end;
                if (is_mark && touched) || (!is_mark && within) {
                    *dirty = is_mark;
                }
            }
            let mut bitmap = vec![0; clamp_len(log.bitmap_len(), usize::MAX)];
            log.encode(0, &mut bitmap);
            let again = regions(333_000, 512);
            again.decode(0, &bitmap);
            for (bit, dirty) in model.iter().enumerate() {
                assert_eq!(bitmap[bit / 8] >> (bit % 8) & 1 == 1, *dirty);
            }
            assert!(again.dirty(0).eq(log.dirty(0)));
            assert_eq!(log.count(), model.iter().filter(|d| **d).count() as u64);
        }
    }

    #[test]
    fn bits_behind_the_last_region_count_for_nothing() {
        let log = regions(65 * 4096, 4096);
        log.decode(0, &[0xff; 40]);
        assert_eq!((log.count(), log.dirty_bytes()), (65, 65 * 4096));
        assert!(Geometry::new(1 << 62, 4096).is_err() && Geometry::new(1, 4095).is_err());
        let none = regions(0, 4096);
        none.mark(&(0..1));
        assert_eq!(
            (none.count(), none.dirty_bytes(), none.next(0..9)),
            (0, 0, None)
        );
    }

    #[test]
    fn a_log_takes_what_another_has_whatever_its_regions_are() {
        let (coarse, fine) = (regions(1 << 20, 64 << 10), regions(1 << 20, 4096));
        fine.mark(&(70_000..70_001));
        coarse.merge(&fine).expect("same size");
        let same = |log: &Regions| log.dirty(0).eq(std::iter::once(65_536..131_072));
        assert!(same(&coarse));
        fine.merge(&coarse).expect("same size");
        assert!(same(&fine));
        assert!(coarse.merge(&regions(1 << 21, 4096)).is_err());
    }
}
