//! The bits of one bitmap: set in memory, merged into the file page by page.

use std::collections::BTreeMap;
use std::ops::Range;

use super::bitmap_dir::{Entry, ONES, cluster, unsound};
use crate::error::{Error, Result};
use crate::image::be64;
use crate::storage::Storage;
use crate::util::align::{clamp_len, len64};

/// Bytes of bitmap in one page in memory.
const PAGE: usize = 512;
/// Guest bits in one page.
const PAGE_BITS: u64 = PAGE as u64 * 8;
/// Pages in memory before they are merged into the file: 4 MiB.
const MAX_PAGES: usize = 8192;
/// Set bits looked through in one go.
const STEP: u64 = 64 << 10;

/// Takes one cluster of the file for a bitmap: where it is.
pub(super) type Take<'t> = dyn FnMut() -> Result<u64> + 't;

/// One bitmap whose bits are being set.
#[derive(Debug)]
pub(super) struct Recorder {
    /// As the directory has it.
    pub(super) entry: Entry,
    /// What this one is a copy of: clusters that both have are not changed in place.
    original: Option<Entry>,
    cluster_bits: u32,
    /// Bits set and not in the file yet.
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
}

impl Recorder {
    /// For the bitmap of `entry`.
    pub(super) fn new(entry: Entry, cluster_bits: u32) -> Self {
        Self {
            entry,
            original: None,
            cluster_bits,
            pages: BTreeMap::new(),
        }
    }

    /// For a copy of the bitmap of `original`, of the same length, that nothing points at yet.
    pub(super) fn of_copy(entry: Entry, original: Entry, cluster_bits: u32) -> Self {
        Self {
            original: Some(original),
            ..Self::new(entry, cluster_bits)
        }
    }

    fn granularity_bits(&self) -> u8 {
        self.entry.granularity_bits()
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The bits that stand for a range of guest bytes.
    fn bits(&self, range: &Range<u64>) -> Range<u64> {
        let bits = self.granularity_bits();
        range.start >> bits..range.end.div_ceil(1 << bits)
    }

    /// How many bytes from the start of a range, which is not empty, have their bits set in
    /// memory; 0: not even the first.
    pub(super) fn known(&self, range: &Range<u64>) -> u64 {
        let bits = self.bits(range);
        let mut bit = bits.start;
        while bit < bits.end {
            let Some(page) = self.pages.get(&(bit / PAGE_BITS)) else {
                break;
            };
            let within = clamp_len(bit % PAGE_BITS, usize::MAX);
            if within.is_multiple_of(8) && page[within / 8] == 0xff {
                bit += 8;
            } else if page[within / 8] & (1 << (within % 8)) != 0 {
                bit += 1;
            } else {
                break;
            }
        }
        let end = bit.saturating_mul(1 << self.granularity_bits());
        end.min(range.end).saturating_sub(range.start)
    }

    /// Sets the bits of a range of guest bytes in memory; whether there are now so many pages
    /// that they should be stored.
    pub(super) fn set(&mut self, range: &Range<u64>) -> bool {
        let bits = self.bits(range);
        let mut bit = bits.start;
        while bit < bits.end {
            let page = self.pages.entry(bit / PAGE_BITS);
            let page = page.or_insert_with(|| Box::new([0; PAGE]));
            let end = bits.end.min((bit / PAGE_BITS + 1) * PAGE_BITS);
            while bit < end {
                let within = clamp_len(bit % PAGE_BITS, usize::MAX);
                if within.is_multiple_of(8) && end - bit >= 8 {
                    page[within / 8] = 0xff;
                    bit += 8;
                } else {
                    page[within / 8] |= 1 << (within % 8);
                    bit += 1;
                }
            }
        }
        self.pages.len() > MAX_PAGES
    }

    /// Merges the pages into the file.  The bitmap is marked as in use there, or is a copy.
    pub(super) fn store(&mut self, file: &dyn Storage, take: &mut Take<'_>) -> Result<()> {
        let cluster = self.cluster_size();
        while let Some((index, page)) = self.pages.first_key_value() {
            let index = *index;
            let at = index * len64(PAGE);
            let entry = self.entry(file, at / cluster)?;
            match entry {
                ONES => {}
                0 => self.new_cluster(file, take, at, &**page, None)?,
                host if self.is_shared(file, at / cluster, host)? => {
                    self.new_cluster(file, take, at, &**page, Some(host))?;
                }
                host => merge(file, host + at % cluster, &**page)?,
            }
            self.pages.remove(&index);
        }
        Ok(())
    }

    /// Word `index` of the table, validated.
    fn entry(&self, file: &dyn Storage, index: u64) -> Result<u64> {
        let len = self.entry.table_len();
        if index >= len {
            return Err(Error::corrupt(format!(
                "entry {index} of a bitmap's table is needed (it has {len})"
            )));
        }
        let word = be64::read_one(file, self.entry.table() + index * 8)?;
        match cluster(word, self.cluster_size()) {
            Ok(host) if host.is_none_or(|host| host < file.size()) => Ok(word),
            _ => Err(unsound(index, word, self.cluster_size())),
        }
    }

    /// Whether the table that this one is a copy of points at the same cluster.
    fn is_shared(&self, file: &dyn Storage, index: u64, host: u64) -> Result<bool> {
        match &self.original {
            Some(original) => Ok(be64::read_one(file, original.table() + index * 8)? == host),
            None => Ok(false),
        }
    }

    /// Gives the bitmap a cluster for its byte `at`, as the one at `old` or all zeroes, with `page`
    /// there.
    fn new_cluster(
        &self,
        file: &dyn Storage,
        take: &mut Take<'_>,
        at: u64,
        page: &[u8],
        old: Option<u64>,
    ) -> Result<()> {
        let cluster = self.cluster_size();
        let mut bytes = vec![0; clamp_len(cluster, usize::MAX)];
        if let Some(old) = old {
            file.read_at(&mut bytes, old)?;
        }
        let within = clamp_len(at % cluster, usize::MAX);
        let part = &mut bytes[within..within + PAGE];
        part.iter_mut().zip(page).for_each(|(b, new)| *b |= new);
        let host = take()?;
        file.write_at(&bytes, host)?;
        if self.original.is_none() {
            // Should a power cut lose the count and keep this word, a check would find more than
            // a leak.
            file.sync()?;
        }
        self.set_entry(file, at / cluster, host)
    }

    fn set_entry(&self, file: &dyn Storage, index: u64, word: u64) -> Result<()> {
        file.write_at(&word.to_be_bytes(), self.entry.table() + index * 8)
    }

    /// Clears all bits from those of guest offset `end` on in the cluster that has the first of
    /// them.  The bitmap is a copy.
    pub(super) fn cut(&self, file: &dyn Storage, end: u64, take: &mut Take<'_>) -> Result<()> {
        let per_cluster = 8u64 << self.cluster_bits;
        let bit = end.div_ceil(1 << self.granularity_bits());
        let (index, within) = (bit / per_cluster, bit % per_cluster);
        if within == 0 || index >= self.entry.table_len() {
            return Ok(());
        }
        let word = self.entry(file, index)?;
        let mut bytes = vec![0xff; clamp_len(1 << self.cluster_bits, usize::MAX)];
        match word {
            0 => return Ok(()),
            ONES => {}
            host => file.read_at(&mut bytes, host)?,
        }
        let first = clamp_len(within / 8, usize::MAX);
        let rest = &mut bytes[first..];
        let kept = rest[0] & !(0xffu8 << (within % 8));
        if word != ONES && rest[0] == kept && rest[1..].iter().all(|b| *b == 0) {
            return Ok(());
        }
        rest.fill(0);
        rest[0] = kept;
        let host = take()?;
        file.write_at(&bytes, host)?;
        self.set_entry(file, index, host)
    }

    /// At most `most` ranges of guest bytes below `size` from `at` on whose bits are set, in the
    /// file or in memory.
    pub(super) fn dirty(
        &self,
        file: &dyn Storage,
        size: u64,
        at: u64,
        most: usize,
    ) -> Result<Vec<Range<u64>>> {
        let mut found = Found {
            ranges: Vec::new(),
            most,
        };
        let end = size.div_ceil(1 << self.granularity_bits());
        let per_cluster = 8u64 << self.cluster_bits;
        let mut bit = at >> self.granularity_bits();
        while bit < end && !found.is_full() {
            let stop = ((bit / per_cluster + 1) * per_cluster).min(end);
            match self.entry(file, bit / per_cluster)? {
                0 if self.pages_of(&(bit..stop)).next().is_none() => {}
                ONES => found.push(bit..stop),
                host => {
                    let stop = stop.min((bit / STEP + 1) * STEP);
                    let first = bit % per_cluster / 8;
                    let len = (stop - bit / 8 * 8).div_ceil(8);
                    let mut bytes = vec![0; clamp_len(len, usize::MAX)];
                    if host != 0 {
                        file.read_at(&mut bytes, host + first)?;
                    }
                    self.add_pages(&mut bytes, &(bit..stop));
                    found.scan(&bytes, bit / 8 * 8, bit..stop);
                    bit = stop;
                    continue;
                }
            }
            bit = stop;
        }
        let guest = |bits: &Range<u64>| {
            let start = (bits.start << self.granularity_bits()).max(at);
            start..(bits.end << self.granularity_bits()).min(size)
        };
        let ranges = found.ranges.iter().take(most);
        Ok(ranges.map(guest).collect())
    }

    /// Pages in memory that have some of these bits.
    fn pages_of(&self, bits: &Range<u64>) -> impl Iterator<Item = (&u64, &Box<[u8; PAGE]>)> {
        self.pages
            .range(bits.start / PAGE_BITS..bits.end.div_ceil(PAGE_BITS))
    }

    /// Sets in `bytes`, which begin with the byte of the first of these bits, what is set in
    /// memory.
    fn add_pages(&self, bytes: &mut [u8], bits: &Range<u64>) {
        let first = clamp_len(bits.start / 8, usize::MAX);
        for (index, page) in self.pages_of(bits) {
            let start = clamp_len(*index, usize::MAX).saturating_mul(PAGE);
            let to = bytes.iter_mut().skip(start.saturating_sub(first));
            let from = page.iter().skip(first.saturating_sub(start));
            to.zip(from).for_each(|(byte, set)| *byte |= set);
        }
    }
}

/// Sets bits in the file.
fn merge(file: &dyn Storage, host: u64, page: &[u8]) -> Result<()> {
    let mut bytes = [0; PAGE];
    file.read_at(&mut bytes, host)?;
    bytes.iter_mut().zip(page).for_each(|(b, new)| *b |= new);
    file.write_at(&bytes, host)
}

/// Ranges of set bits, ascending.
struct Found {
    ranges: Vec<Range<u64>>,
    most: usize,
}

impl Found {
    /// One more than asked for has begun, so all that were asked for have ended.
    fn is_full(&self) -> bool {
        self.ranges.len() > self.most
    }

    fn push(&mut self, bits: Range<u64>) {
        match self.ranges.last_mut() {
            Some(last) if last.end == bits.start => last.end = bits.end,
            _ => self.ranges.push(bits),
        }
    }

    /// Adds the set bits of `within`; `bytes` begins with bit `first`.
    fn scan(&mut self, bytes: &[u8], first: u64, within: Range<u64>) {
        for (index, byte) in bytes.iter().enumerate().filter(|(_, b)| **b != 0) {
            for shift in 0..8u64 {
                let bit = first + len64(index) * 8 + shift;
                if byte & (1 << shift) != 0 && within.contains(&bit) {
                    self.push(bit..bit + 1);
                }
            }
        }
    }
}
