//! Consistency check: the descriptor, each extent, and what of a sparse file nothing names.

use crate::error::Result;
use crate::formats::vmdk::extent::{Data, Extent};
use crate::formats::vmdk::image::Vmdk;
use crate::formats::vmdk::line::Access;
use crate::formats::vmdk::sesparse::SeSparse;
use crate::image::check::{Check, Repair, Report, Severity, settle};
use crate::image::{Image, Wait};
use crate::util::progress::Progress;

/// Wrong runs that are told of in one pass.
const MAX_RUNS: u64 = 1 << 16;

impl Check for Vmdk {
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing {
            self.may_mend()?;
        }
        settle(repair, |repair| {
            let mut report = Report::default();
            self.check_descriptor(&mut report);
            for (index, extent) in self.extents.iter().enumerate() {
                progress.check()?;
                let checked = self.check_extent(&mut report, index, extent, repair, progress);
                checked.map_err(|e| e.at_opt(extent.path()))?;
            }
            if repair != Repair::Nothing {
                Image::flush(self)?;
            }
            Ok(report)
        })
    }

    fn work(&self) -> u64 {
        self.extents.iter().map(Extent::tables_len).sum()
    }
}

impl Extent {
    /// Bytes of the tables that a check reads.
    fn tables_len(&self) -> u64 {
        match &self.data {
            Data::Sparse(sparse) => sparse.geometry().grains().saturating_mul(4),
            _ => 0,
        }
    }
}

impl Vmdk {
    /// Refuses to mend what is not changed at all.
    fn may_mend(&self) -> Result<()> {
        match &*self.extents {
            // The end of a stream can be mended, and of a part alone nothing depends on others.
            [only] if matches!(&only.data, Data::Sparse(_)) && self.session.is_some() => Ok(()),
            _ => self.may_change(),
        }
    }

    fn check_descriptor(&self, report: &mut Report) {
        let Some(descriptor) = self.descriptor() else {
            report.note("no descriptor says anything about this extent");
            return;
        };
        for (key, name) in [("createtype", "createType"), ("cid", "CID")] {
            if descriptor.get(key).is_none() {
                report.note(format!("the descriptor has no {name}"));
            }
        }
    }

    fn check_extent(
        &self,
        report: &mut Report,
        index: usize,
        extent: &Extent,
        repair: Repair,
        progress: &dyn Progress,
    ) -> Result<()> {
        // What is only read is not mended, but for streams, which are not written to anyhow.
        let given = repair;
        let repair = match extent.line.access {
            Access::ReadWrite => repair,
            _ => Repair::Nothing,
        };
        match &extent.data {
            Data::Zero => {}
            Data::Missing(why) => {
                let why = why
                    .as_ref()
                    .map_or("it was not opened".to_owned(), ToString::to_string);
                report.corruption(format!("extent {index} is missing: {why}"), None);
            }
            Data::Flat(start) => check_flat(report, index, extent, *start, repair)?,
            Data::SeSparse(sparse) => check_runs(report, sparse)?,
            Data::Sparse(sparse) => {
                let (line, geometry) = (extent.end() - extent.start, sparse.geometry());
                if line != geometry.capacity {
                    report.note(format!(
                        "extent {index} has {line} bytes, and the header of its file says {}",
                        geometry.capacity
                    ));
                }
                match sparse.packed.is_some() {
                    true => sparse.check_stream(report, self.write, given, progress)?,
                    false => sparse.check(report, repair, progress)?,
                }
            }
        }
        Ok(())
    }
}

fn check_flat(
    report: &mut Report,
    index: usize,
    extent: &Extent,
    start: u64,
    repair: Repair,
) -> Result<()> {
    let Some(storage) = &extent.storage else {
        return Ok(());
    };
    let end = start + (extent.end() - extent.start);
    report.image_end_offset = report.image_end_offset.max(end);
    let size = storage.size();
    if size >= end {
        return Ok(());
    }
    let did = match repair == Repair::All && !storage.has_fixed_len() {
        true => {
            storage.set_len(end)?;
            Some("what is missing reads as zeroes")
        }
        false => None,
    };
    let text = format!("extent {index} ends at {end:#x} of its file, which has {size:#x} bytes");
    report.corruption(text, did);
    Ok(())
}

/// Looks all of a file up that is only read.
fn check_runs(report: &mut Report, sparse: &SeSparse) -> Result<()> {
    let grain = SeSparse::grain();
    let (mut at, mut wrong) = (0, 0);
    report.total_clusters += sparse.capacity().div_ceil(grain);
    while at < sparse.capacity() {
        match sparse.map(at, sparse.capacity() - at, Wait::Yes) {
            Ok(run) => {
                if let crate::image::Source::Stored { .. } = run.source {
                    report.allocated_clusters += run.len.div_ceil(grain);
                }
                at += run.len;
            }
            Err(e) if wrong < MAX_RUNS && e.kind() == crate::error::ErrorKind::Corrupt => {
                report.corruption(e.message().to_owned(), None);
                wrong += 1;
                at = (at / grain + 1) * grain;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Adds a leak of so many grains.
pub(super) fn leak(report: &mut Report, grains: u64, text: String, did: Option<&str>) {
    report.add(Severity::Leak, grains, text, did.map(str::to_owned));
}
