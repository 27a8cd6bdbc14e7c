//! Consistency check: the map, the count of blocks, the end of the file.

use crate::error::{Error, Result};
use crate::formats::vdi::allocate::Used;
use crate::formats::vdi::header::{FREE, Header, Kind, ZERO};
use crate::formats::vdi::image::{Shape, Vdi};
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::util::align::{clamp_len, len64};
use crate::util::progress::Progress;

/// Most blocks of a file that are looked at for overlaps: a bit each.
const MAX_BLOCKS: u64 = 1 << 32;
/// Bytes copied at a time.
const STEP: u64 = 1 << 20;

impl Vdi {
    fn pass(&self, repair: Repair) -> Result<Report> {
        let shape = self.shape.load();
        let header = &shape.header;
        let all = repair == Repair::All;
        let mut report = Report {
            total_clusters: header.size().div_ceil(self.block),
            ..Report::default()
        };
        let mut used = Used::default();
        let (mut twice, mut lost) = (Vec::new(), Vec::new());
        let mut previous = None;
        shape.map.each(&*self.storage, |index, number| {
            if number >= ZERO {
                return Ok(());
            }
            let number = u64::from(number);
            match self.locate(header, index, u32::try_from(number).unwrap_or(FREE)) {
                _ if number >= MAX_BLOCKS => lost.push((index, number)),
                Err(_) => lost.push((index, number)),
                Ok(_) => {
                    report.allocated_clusters += 1;
                    let follows = previous.is_none_or(|before| before + 1 == number);
                    report.fragmented_clusters += u64::from(!follows);
                    previous = Some(number);
                    if !used.add(number) {
                        twice.push((index, number));
                    }
                }
            }
            match twice.len() + lost.len() > Report::MAX_FINDINGS {
                true => Err(Error::corrupt("the map has too many wrong entries")),
                false => Ok(()),
            }
        })?;
        for (index, number) in lost {
            let text = format!(
                "block {index}: its map entry {number:#x} is past the end of the file; its data is lost"
            );
            let did = self.replace(all && !self.has_parent(), &shape, index)?;
            report.add(Severity::Corruption, 1, text, did);
        }
        let mut end = used.end;
        for (index, number) in twice {
            let text = format!("block {index}: its map entry {number:#x} names another's block");
            let did = match all {
                false => None,
                true => {
                    self.copy_away(&shape, index, number, end)?;
                    end += 1;
                    Some("it was given a copy of its own".to_owned())
                }
            };
            report.add(Severity::Corruption, 1, text, did);
        }
        self.check_count(&mut report, header, &used, end, repair)?;
        self.check_end(&mut report, header, end, repair)?;
        report.image_end_offset = header.host(end).start;
        Ok(report)
    }

    fn has_parent(&self) -> bool {
        matches!(self.kind, Kind::Undo | Kind::Differencing)
    }

    /// Has a block whose data is lost read as zeroes, where that is asked for.
    fn replace(&self, wanted: bool, shape: &Shape, index: u64) -> Result<Option<String>> {
        if !wanted {
            return Ok(None);
        }
        shape.map.publish(&*self.storage, index, &[ZERO])?;
        Ok(Some("it reads as zeroes now".to_owned()))
    }

    /// Gives a block a copy of the data that it shares, behind all that is in use.
    fn copy_away(&self, shape: &Shape, index: u64, from: u64, to: u64) -> Result<()> {
        let header = &shape.header;
        let (source, target) = (header.host(from), header.host(to));
        let mut bytes = vec![0; clamp_len(STEP.min(header.total()), usize::MAX)];
        let order = &self.allocator.order;
        let since = order.now();
        self.set_count(to + 1)?;
        let mut done = 0;
        while done < header.total() {
            let step = clamp_len(header.total() - done, bytes.len());
            self.storage
                .read_at(&mut bytes[..step], source.start + done)?;
            self.storage.write_at(&bytes[..step], target.start + done)?;
            done += len64(step);
        }
        order.settle(since)?;
        let number = u32::try_from(to).unwrap_or(FREE);
        shape.map.publish(&*self.storage, index, &[number])
    }

    /// Writes how many blocks the file has, for all who read it.
    fn set_count(&self, count: u64) -> Result<()> {
        let mut slots = self.slots.lock();
        slots.end = count;
        slots.counted = u64::MAX;
        self.write_count(&mut slots)
    }

    fn check_count(
        &self,
        report: &mut Report,
        header: &Header,
        used: &Used,
        end: u64,
        repair: Repair,
    ) -> Result<()> {
        let count = header.count();
        if count < used.end {
            let text = format!(
                "{count} blocks are counted, block {:#x} is in use: other programs would write over it",
                used.end - 1
            );
            let did = match repair {
                Repair::Nothing => None,
                Repair::Leaks | Repair::All => {
                    self.set_count(end)?;
                    Some(format!("{end} are counted now"))
                }
            };
            report.add(Severity::Corruption, 1, text, did);
        }
        let unused = count.max(used.end) - used.count;
        if unused > 0 {
            let text = format!("{unused} blocks of the file are in use by nothing");
            let did = match repair != Repair::Nothing && count > end {
                true => {
                    self.allocator.order.settle_all()?;
                    self.set_count(end)?;
                    (end == used.count).then(|| "they are not counted any more".to_owned())
                }
                false => None,
            };
            report.add(Severity::Leak, unused, text, did);
        }
        Ok(())
    }

    fn check_end(
        &self,
        report: &mut Report,
        header: &Header,
        end: u64,
        repair: Repair,
    ) -> Result<()> {
        let last = header.host(end.max(header.count())).start;
        let size = self.storage.size();
        if size < header.host(end).start && end > 0 {
            let text = format!("the file ends at {size:#x}, within a block that is in use");
            let did = match repair {
                Repair::All => {
                    self.storage.set_len(header.host(end).start)?;
                    Some("what is missing reads as zeroes".to_owned())
                }
                _ => None,
            };
            report.add(Severity::Corruption, 1, text, did);
        }
        if size > last && !self.storage.has_fixed_len() {
            let text = format!("{} bytes at {last:#x} belong to nothing", size - last);
            let did = match repair {
                Repair::Nothing => None,
                Repair::Leaks | Repair::All => {
                    self.storage.set_len(header.host(end).start)?;
                    Some("the file was cut".to_owned())
                }
            };
            let count = (size - last).div_ceil(header.total());
            report.add(Severity::Leak, count, text, did);
        }
        Ok(())
    }
}

impl Check for Vdi {
    fn check(&self, repair: Repair, _progress: &dyn Progress) -> Result<Report> {
        let report = settle(repair, |repair| {
            let report = self.pass(repair)?;
            if report.corruptions_fixed + report.leaks_fixed > 0 {
                self.storage.sync()?;
                let header = Header::read(&*self.storage)?;
                self.shape.store(std::sync::Arc::new(Shape::new(header)));
            }
            Ok(report)
        });
        report
    }
}
