//! Where the bytes of the disk are.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::formats::vhdx::bat::{Block, Shape, Use};
use crate::formats::vhdx::bytes::MB;
use crate::formats::vhdx::image::Vhdx;
use crate::image::{Run, Source, Wait};
use crate::storage::Storage;

impl Vhdx {
    /// [`crate::image::Image::map`].
    pub(super) fn look_up(&self, at: u64, len: u64, wait: Wait) -> Result<Run<'_>> {
        let shape = self.shape.load();
        let range = at..at + len.min(shape.metadata.size.saturating_sub(at));
        let index = at / self.block;
        let block = self.find(&shape, index, wait)?;
        let source = match block {
            Block::Present(host) => return Ok(self.stored(&shape, index, host, &range)),
            Block::Partial(host) => return self.partial(&shape, index, host, &range, wait),
            Block::Absent => {
                let len = self.absent(&shape, index, &range, wait);
                let source = Source::Below;
                return Ok(Run { len, source });
            }
            _ => Source::Zero,
        };
        let len = self.alike(&shape, index, &range, |_, next| next == block);
        Ok(Run { len, source })
    }

    /// What the table says of a block.
    ///
    /// # Errors
    /// `Corrupt` where that cannot be; the host's; `WouldBlock`.
    pub(super) fn find(&self, shape: &Shape, index: u64, wait: Wait) -> Result<Block> {
        let block = shape.block(&*self.journal, index, wait)?;
        let wrong = |text: String| Err(Error::corrupt(format!("block {index}: {text}")));
        match block {
            Block::Unknown(state) => wrong(format!(
                "its BAT entry has the state {state} (allowed: 0 to 3, 6, 7)"
            )),
            Block::Partial(_) if self.locator.is_none() => {
                wrong("it is partially present in a disk without a parent".to_owned())
            }
            Block::Present(host) | Block::Partial(host) => {
                let size = self.journal.size();
                let log = self.journal.header_log();
                let host = host..host.saturating_add(self.block);
                let meets = |other: &Range<u64>| host.start < other.end && other.start < host.end;
                let regions = [&shape.regions.bat, &shape.regions.metadata, log];
                let taken = host.start < MB || regions.into_iter().any(meets);
                match taken || host.start >= size {
                    false => Ok(block),
                    true => wrong(format!(
                        "its BAT entry puts it at {:#x}..{:#x} (allowed: inside the file of {size:#x} bytes, apart from its metadata)",
                        host.start, host.end
                    )),
                }
            }
            Block::Absent | Block::Zero => Ok(block),
        }
    }

    /// Bytes of `range`, which begins in the absent block `index`, that are all in such: over the ends
    /// of chunks, and where no entry was ever written.
    fn absent(&self, shape: &Shape, index: u64, range: &Range<u64>, wait: Wait) -> u64 {
        let last = range.end.div_ceil(self.block).max(index + 1) - 1;
        let entries = shape.grid.index(index) + 1..shape.grid.index(last) + 1;
        let is_absent = |entry, word| match shape.grid.of(entry) {
            Use::Bitmap(_) => true,
            Use::Block(_) => Block::from_word(word) == Block::Absent,
        };
        let end = shape.table.alike(entries.clone(), is_absent);
        let end = match wait {
            Wait::Yes => shape.table.hole(&*self.journal, end..entries.end),
            // The host may be asked, and it may be far away.
            Wait::No => end,
        };
        range.end.min(shape.grid.block_from(end) * self.block) - range.start
    }

    /// Bytes of `range`, which begins in block `index`, for which blocks go on as `follows` says.
    fn alike(
        &self,
        shape: &Shape,
        index: u64,
        range: &Range<u64>,
        follows: impl Fn(u64, Block) -> bool,
    ) -> u64 {
        let last = range.end.div_ceil(self.block);
        let others = index + 1..last.min(shape.grid.chunk(index).end).max(index + 1);
        let offset = shape.grid.index(index) - index;
        let entries = others.start + offset..others.end + offset;
        let end = shape.table.alike(entries, |next, word| {
            follows(next - offset - index, Block::from_word(word))
        });
        range.end.min((end - offset) * self.block) - range.start
    }

    /// The run of bytes that are stored from `at` on, in block `index` and those that follow it in the
    /// file too.
    fn stored(&self, shape: &Shape, index: u64, data: u64, range: &Range<u64>) -> Run<'_> {
        let host = data + (range.start - index * self.block);
        let len = self.alike(shape, index, range, |n, next| {
            next == Block::Present(data.saturating_add(n * self.block))
        });
        // The first block is apart from metadata; one behind it may not be, and is asked for alone then.
        let fixed = [
            &shape.regions.bat,
            &shape.regions.metadata,
            self.journal.header_log(),
        ];
        let behind = fixed.into_iter().map(|region| region.start);
        let next = behind.filter(|start| *start >= data + self.block).min();
        let len = next.map_or(len, |next| len.min(next - host));
        self.in_file(host, len, true)
    }

    /// `len` bytes at `host`; the file may end before they do, and what it cuts off reads as zeroes.
    fn in_file(&self, host: u64, len: u64, writable: bool) -> Run<'_> {
        let there = self.data.size().saturating_sub(host);
        if there == 0 {
            let source = Source::Zero;
            return Run { len, source };
        }
        let source = Source::Stored {
            storage: &*self.data,
            host,
            // The first change is made by `allocate`, which sees to the headers.
            writable: writable && self.write && self.allocator.has_begun(),
        };
        let len = len.min(there);
        Run { len, source }
    }

    /// The sectors of a partially present block from `within` on, bytes of the block, that are all
    /// here or all the parent's: which, and where that ends.
    pub(super) fn sectors(
        &self,
        shape: &Shape,
        index: u64,
        within: Range<u64>,
        wait: Wait,
    ) -> Result<(bool, u64)> {
        let sector = shape.grid.sector;
        let bitmap = shape.bitmap(&*self.journal, index, wait)?;
        let first = (index - shape.grid.chunk(index).start) * (self.block / sector);
        let (start, end) = (
            first + within.start / sector,
            first + within.end.div_ceil(sector),
        );
        let word = |bit: u64| {
            let host = bitmap + bit / 64 * 8;
            let word = self.bitmaps.get(&*self.journal, host, wait)?;
            Ok::<_, Error>(word >> (bit % 64))
        };
        let here = word(start)? & 1 == 1;
        let mut bit = start;
        while bit < end {
            let rest = word(bit)?;
            let same = if here {
                rest.trailing_ones()
            } else {
                rest.trailing_zeros()
            };
            let left = 64 - bit % 64;
            bit += u64::from(same).min(left);
            if u64::from(same) < left {
                break;
            }
        }
        let end = (bit.min(end) - first) * sector;
        Ok((here, end.min(within.end)))
    }

    /// A run of a partially present block.
    fn partial(
        &self,
        shape: &Shape,
        index: u64,
        data: u64,
        range: &Range<u64>,
        wait: Wait,
    ) -> Result<Run<'_>> {
        let start = index * self.block;
        let within = range.start - start..(range.end - start).min(self.block);
        let (here, end) = self.sectors(shape, index, within.clone(), wait)?;
        let len = end - within.start;
        Ok(match here {
            // All of it moves with the first change: sectors are given space as a whole block.
            true => self.in_file(data + within.start, len, false),
            false => Run {
                len,
                source: Source::Below,
            },
        })
    }
}
