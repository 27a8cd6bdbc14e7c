//! Checking and repairing the blocks of disks with a table.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::error::{ErrorKind, Result};
use crate::formats::vhd::batmap;
use crate::formats::vhd::footer::Kind;
use crate::formats::vhd::geometry::SECTOR;
use crate::formats::vhd::layout::{Bounds, UNUSED};
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::Wait;
use crate::image::check::{Repair, Report, Severity};
use crate::storage::Zeroing;
use crate::util::align::{clamp_len, len64};
use crate::util::buf::is_zero;
use crate::util::progress::Progress;
use crate::util::range;

/// Blocks looked at for overlaps, 8 bytes each: 8 TiB of disk in blocks of 2 MiB.
const MAX_BLOCKS: usize = 4 << 20;
/// Less than this between blocks is padding: some writers have data at multiples of 4 KiB, and
/// Hyper-V leaves 4 KiB free behind the table.
const PADDING: u64 = 8192;
/// A block is looked through in pieces of this.
const STEP: u64 = 256 << 10;

/// A block that lies inside the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Placed {
    word: u32,
    index: u32,
}

impl Placed {
    fn host(self) -> u64 {
        u64::from(self.word) * SECTOR
    }
}

/// What the walk over the table found.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// End of the last block that lies inside the file, or of the metadata.
    pub(super) end: u64,
    placed: Vec<Placed>,
    /// How many blocks lie past the end of the file, whole.
    absent: u64,
    /// How many lie upon metadata, but for their bitmap.
    misplaced: u64,
    /// How many lie elsewhere where none may be.
    astray: u64,
    /// How many words behind the last block of the disk are in use.
    surplus: u64,
    /// Whether some word names space that is not looked at further.
    unsafe_to_cut: bool,
    too_many: bool,
}

impl Walk {
    /// Whether the table names bytes that the file does not have.
    pub(super) fn has_lost(&self) -> bool {
        self.absent + self.astray > 0
    }
}

impl Sparse {
    /// Checks table, blocks, bitmaps, batmap and unused space.
    pub(super) fn check_blocks(
        &self,
        report: &mut Report,
        shape: &Shape,
        mut walk: Walk,
        repair: Repair,
        progress: &dyn Progress,
    ) -> Result<()> {
        self.repair_surplus(report, shape, &walk, repair)?;
        walk.placed.sort_unstable();
        self.repair_overlaps(report, shape, &mut walk, repair)?;
        self.check_bitmaps(report, shape, &walk.placed, progress)?;
        if walk.too_many {
            report.check_errors += 1;
            report.note(format!(
                "overlaps and unused space were looked for among the first {MAX_BLOCKS} blocks only"
            ));
        }
        walk.unsafe_to_cut |= walk.too_many || walk.misplaced + walk.astray > 0;
        report.image_end_offset = self.check_space(report, shape, &walk, repair)?;
        Ok(())
    }

    /// Looks at every word of the table.
    pub(super) fn walk(
        &self,
        report: &mut Report,
        shape: &Shape,
        progress: &dyn Progress,
    ) -> Result<Walk> {
        let mut walk = Walk {
            end: self.metadata_end(shape),
            ..Walk::default()
        };
        let blocks = self.blocks.count(shape.size);
        report.total_clusters = blocks;
        let bounds = self.bounds(shape);
        let mut last: Option<u64> = None;
        shape.table.each(&*self.storage, |index, word| {
            progress.check()?;
            let start = index.saturating_mul(self.blocks.data);
            progress.advance(shape.size.saturating_sub(start).min(self.blocks.data));
            if word == UNUSED {
                return Ok(());
            }
            if index >= blocks {
                walk.surplus += 1;
                return Ok(());
            }
            report.allocated_clusters += 1;
            let host = u64::from(word) * SECTOR;
            let follows = |l: u64| host >= l && host - l < PADDING;
            report.fragmented_clusters += u64::from(last.is_some_and(|l| !follows(l)));
            last = Some(host + self.blocks.len());
            let found = bounds.locate(index, word);
            if host < bounds.data_end {
                walk.end = walk.end.max(host + self.blocks.len());
            }
            match found {
                Ok(_) if walk.placed.len() < MAX_BLOCKS => {
                    let index = u32::try_from(index).unwrap_or(u32::MAX);
                    walk.placed.push(Placed { word, index });
                }
                Ok(_) => walk.too_many = true,
                Err(e) => {
                    let entry = format!("block {index}: its table entry {word:#x}");
                    let text = match self.misfit(&bounds, host, &mut walk) {
                        Some(what) => format!("{entry} {what}"),
                        None => e.message().to_owned(),
                    };
                    report.corruption(text, None);
                }
            }
            Ok(())
        })?;
        Ok(walk)
    }

    /// Counts a block that `locate` refused by what can be done about it; what that is.
    ///
    /// Its word stays as it is: who reads it is told, where zeroes or what lies there now would pass for
    /// its content.
    fn misfit(&self, bounds: &Bounds<'_>, host: u64, walk: &mut Walk) -> Option<&'static str> {
        let bitmap = host..host + self.blocks.bitmap;
        let upon = |r: &Range<u64>| range::intersect(r, &bitmap).is_some();
        if host >= bounds.data_end {
            walk.absent += 1;
            return Some("lies past the end of the data: its content is lost");
        }
        if host + self.blocks.len() <= bounds.data_end && !bounds.reserved.iter().any(upon) {
            walk.misplaced += 1;
            return Some("puts it upon metadata");
        }
        walk.astray += 1;
        None
    }

    /// Words behind the disk's last block: nothing reads them.
    fn repair_surplus(
        &self,
        report: &mut Report,
        shape: &Shape,
        walk: &Walk,
        repair: Repair,
    ) -> Result<()> {
        if walk.surplus == 0 {
            return Ok(());
        }
        // Where blocks lie upon metadata, these words may be somebody's data.
        let apart = walk.misplaced + walk.astray == 0;
        let fix = repair != Repair::Nothing && apart;
        let blocks = self.blocks.count(shape.size);
        shape.table.each(&*self.storage, |index, word| {
            if index < blocks || word == UNUSED {
                return Ok(());
            }
            if fix {
                shape.table.publish(&*self.storage, index, &[UNUSED])?;
            }
            let text = format!("table entry {index} is past the last block of the disk and in use");
            let did = fix.then(|| "it was set to unused".to_owned());
            report.add(Severity::Leak, 1, text, did);
            Ok(())
        })
    }

    /// Blocks that share bytes with the block before them in the file.
    fn overlaps(&self, placed: &[Placed]) -> Vec<Placed> {
        let mut end = 0;
        let mut twice = Vec::new();
        for block in placed {
            if block.host() < end {
                twice.push(*block);
            }
            end = end.max(block.host() + self.blocks.len());
        }
        twice
    }

    /// Gives blocks that lie upon others a copy of their own: each goes on reading as it did.
    fn repair_overlaps(
        &self,
        report: &mut Report,
        shape: &Shape,
        walk: &mut Walk,
        repair: Repair,
    ) -> Result<()> {
        let twice = self.overlaps(&walk.placed);
        let fixed = !twice.is_empty() && repair == Repair::All && self.part(&twice)?;
        for block in &twice {
            let text = format!(
                "block {}: its table entry {:#x} puts it upon another block",
                block.index, block.word
            );
            report.corruption(text, fixed.then_some("it was given a copy of its own"));
        }
        walk.unsafe_to_cut |= !fixed && !twice.is_empty();
        if fixed {
            let gone: HashSet<u32> = twice.iter().map(|block| block.index).collect();
            for block in walk.placed.iter_mut().filter(|b| gone.contains(&b.index)) {
                let index = u64::from(block.index);
                block.word = shape.table.get(&*self.storage, index, Wait::Yes)?;
            }
            walk.placed.sort_unstable();
            // What was made ready for more blocks is no leak.
            self.trim(&mut self.space.lock(), shape)?;
        }
        Ok(())
    }

    /// Gives blocks space of their own; false where none may be taken.
    fn part(&self, blocks: &[Placed]) -> Result<bool> {
        if self.space.lock().footer.is_none() {
            return Ok(false);
        }
        let indices: Vec<u64> = blocks.iter().map(|b| u64::from(b.index)).collect();
        let moved = self.allocator.move_away(self, &indices);
        self.bitmaps.forget();
        match moved {
            Err(e) if e.kind() == ErrorKind::Corrupt => Ok(false),
            moved => moved.map(|()| true),
        }
    }

    /// The bitmaps of blocks: those that the batmap calls full, and those that hide data.
    fn check_bitmaps(
        &self,
        report: &mut Report,
        shape: &Shape,
        placed: &[Placed],
        progress: &dyn Progress,
    ) -> Result<()> {
        self.check_batmap(report, shape, placed, progress)?;
        if self.kind != Kind::Dynamic {
            // Under a bit that is 0 there may be anything.
            return Ok(());
        }
        let full = |index| shape.batmap().is_some_and(|map| map.is_full(index));
        let mut bitmap = vec![0; clamp_len(self.blocks.bitmap, usize::MAX)];
        for block in placed.iter().filter(|b| !full(u64::from(b.index))) {
            progress.check()?;
            self.storage.read_at(&mut bitmap, block.host())?;
            if is_zero(&bitmap)
                && let Some(at) = self.first_data(*block)?
            {
                let text = format!(
                    "block {}: its bitmap at {:#x} has no sector, and there is data at {at:#x}: it reads as zeroes here, and as that data where bitmaps are not read (QEMU)",
                    block.index,
                    block.host()
                );
                report.note(text);
            }
        }
        Ok(())
    }

    /// Where in the file the first byte of a block's data that is not zero is, more or less.
    fn first_data(&self, block: Placed) -> Result<Option<u64>> {
        let start = block.host() + self.blocks.bitmap;
        let end = (start + self.blocks.data).min(self.data_end.load(Ordering::Acquire));
        let mut buf = vec![0; clamp_len(STEP.min(self.blocks.data), usize::MAX)];
        let mut at = start;
        while at < end {
            let run = self.storage.run(at, end - at)?;
            let step = match run.data {
                true => clamp_len(run.len, buf.len()),
                false => {
                    at += run.len;
                    continue;
                }
            };
            self.storage.read_at(&mut buf[..step], at)?;
            if let Some(first) = buf[..step].iter().position(|byte| *byte != 0) {
                return Ok(Some(at + len64(first)));
            }
            at += len64(step);
        }
        Ok(None)
    }

    /// The batmap against the bitmaps of the blocks it calls full.
    fn check_batmap(
        &self,
        report: &mut Report,
        shape: &Shape,
        placed: &[Placed],
        progress: &dyn Progress,
    ) -> Result<()> {
        let Some(map) = shape.batmap() else {
            return Ok(());
        };
        for block in placed.iter().filter(|b| map.is_full(u64::from(b.index))) {
            progress.check()?;
            let mut at = 0;
            while at < self.blocks.sectors() {
                let sectors = at..self.blocks.sectors();
                let run = self
                    .bitmaps
                    .run(&*self.storage, block.host(), sectors, Wait::Yes)?;
                if !run.present {
                    let text = format!(
                        "block {}: the batmap calls it full, its bitmap at {:#x} lacks sector {at}",
                        block.index,
                        block.host()
                    );
                    // Which of the two is right cannot be told.
                    report.corruption(text, None);
                    break;
                }
                at += run.count;
            }
        }
        Ok(())
    }

    /// Space that nothing refers to; where that which is in use ends.
    fn check_space(
        &self,
        report: &mut Report,
        shape: &Shape,
        walk: &Walk,
        repair: Repair,
    ) -> Result<u64> {
        let data_end = self.data_end.load(Ordering::Acquire);
        let fix = repair != Repair::Nothing && !walk.unsafe_to_cut;
        let mut used = 0;
        for part in self.in_order(shape, walk.placed.iter().map(|block| block.host())) {
            // A batmap that cannot be trusted may still be somebody's.
            let guarded = matches!(shape.batmap, batmap::Found::Damaged(_))
                && used <= shape.table.host() + shape.table.len() * 4;
            // All of a device's space is there, used or not.
            let leaks = !guarded && !self.storage.has_fixed_len();
            if part.start > used && part.start - used >= PADDING && leaks {
                self.check_gap(report, used..part.start, fix)?;
            }
            used = used.max(part.end);
        }
        let used = used.next_multiple_of(SECTOR);
        // The last block may lack what the disk does not show.
        let padding = data_end < used || data_end - used < PADDING;
        if padding || walk.unsafe_to_cut || self.storage.has_fixed_len() {
            return Ok(used);
        }
        let unused = data_end - used;
        let text = format!("{unused} bytes at {used:#x} before the footer belong to nothing");
        let mut did = None;
        let mut space = self.space.lock();
        if fix && walk.absent == 0 && space.footer.is_some() {
            self.cut(&mut space, shape, used)?;
            did = Some("the footer was moved and the file cut".to_owned());
        }
        let count = unused.div_ceil(self.blocks.len());
        report.add(Severity::Leak, count, text, did);
        Ok(used)
    }

    /// Space between two parts: lost where the host keeps data for it.
    fn check_gap(&self, report: &mut Report, gap: Range<u64>, fix: bool) -> Result<()> {
        let run = self.storage.run(gap.start, gap.end - gap.start)?;
        let mut data = run.data;
        if !run.data && run.len < gap.end - gap.start {
            let rest = gap.end - gap.start - run.len;
            // Holes end at pages of the host, gaps do not.
            data = rest >= PADDING && self.storage.run(gap.start + run.len, rest)?.data;
        } else if run.data && run.len < PADDING && run.len < gap.end - gap.start {
            let at = gap.start + run.len;
            let next = self.storage.run(at, gap.end - at)?;
            data = next.data || next.len + PADDING < gap.end - at;
        }
        if !data {
            return Ok(());
        }
        let mut did = None;
        if fix {
            match self.storage.zero(gap.clone(), Zeroing::MayUnmap) {
                Ok(()) => did = Some("its space was given back".to_owned()),
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                Err(e) => return Err(e),
            }
        }
        let len = gap.end - gap.start;
        let text = format!(
            "{len} bytes at {:#x} between blocks belong to nothing",
            gap.start
        );
        report.add(Severity::Leak, len.div_ceil(self.blocks.len()), text, did);
        Ok(())
    }
}
