//! Checking and repairing: footers, headers, locators.  Blocks are in `check_blocks`.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crate::error::Result;
use crate::formats::vhd::batmap;
use crate::formats::vhd::check_blocks::Walk;
use crate::formats::vhd::fixed::Fixed;
use crate::formats::vhd::footer::{self, Creator, Footer, Kind, Strictness};
use crate::formats::vhd::geometry::{Geometry, SECTOR};
use crate::formats::vhd::open::End;
use crate::formats::vhd::sparse::{Shape, Sparse};
use crate::image::Check;
use crate::image::check::{Repair, Report, Severity};
use crate::image::units::Units;
use crate::util::align;
use crate::util::progress::Progress;

/// Clocks may differ by this much before a time lies in the future.
const SLACK: u32 = 86_400;

/// What is odd about a footer that can be read.
fn footer_fields(report: &mut Report, footer: &Footer) {
    let features = footer.features.get();
    if features & 2 == 0 || features & !Footer::known_features() != 0 {
        report.note(format!(
            "the footer's feature bits are {features:#x} (expected: 0x2 or 0x3)"
        ));
    }
    if !footer.reserved_is_zero() {
        report.note("the footer's reserved bytes are not zero");
    }
    if footer.hidden > 2 {
        report.note(format!(
            "the hidden byte is {} (expected: 0 to 2)",
            footer.hidden
        ));
    }
    if footer.saved_state > 1 {
        report.note(format!(
            "the saved state is {} (expected: 0 or 1)",
            footer.saved_state
        ));
    }
    in_future(report, "the footer's time", footer.timestamp.get());
    let (geometry, size) = (footer.geometry(), footer.current_size.get());
    let largest = Geometry::for_size(size).bytes();
    if geometry != Geometry::MAX && geometry.bytes() > largest.max(size) {
        report.note(format!(
            "the geometry describes {} bytes, more than the disk's {size}",
            geometry.bytes()
        ));
    }
}

fn in_future(report: &mut Report, what: &str, timestamp: u32) {
    let now = footer::timestamp(SystemTime::now());
    if timestamp > now.saturating_add(SLACK) {
        report.note(format!("{what} lies in the future"));
    }
}

/// Whether a footer is right once it was written: what it says may be damaged, or not supported.
fn is_taken(footer: &Footer) -> bool {
    Footer::parse(&footer.sealed().to_bytes(), Strictness::Strict).is_ok()
}

impl Check for Fixed {
    fn check(&self, repair: Repair, _progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing {
            self.disk.may_write()?;
        }
        let mut report = Report::default();
        let state = *self.state.lock();
        let mut end = self.end.lock();
        if let End::Damaged(why) = &*end {
            // There is no second footer to tell which of its bytes is wrong.
            report.corruption(why.as_str(), None);
            return Ok(report);
        }
        if *end == End::Short {
            let write = || state.footer.write(&*self.disk.storage, state.data_end);
            let all = repair == Repair::All;
            short(&mut report, all.then(write))?;
            if all {
                *end = End::Whole;
            }
        }
        footer_fields(&mut report, &state.footer);
        let wanted = self.rule.size(&state.footer, state.data_end);
        if wanted > state.data_end {
            report.corruption(
                format!(
                    "the disk has {wanted} bytes, the file only {} before its footer",
                    state.data_end
                ),
                None,
            );
        }
        // Readers that go by the other size must keep what they see.
        let largest = wanted
            .max(state.footer.current_size.get())
            .max(state.footer.geometry().bytes());
        let end = align::up(largest, SECTOR).unwrap_or(u64::MAX);
        report.image_end_offset = state.data_end;
        // All of a device's space is there, used or not.
        if end < state.data_end && !self.disk.storage.has_fixed_len() {
            let text = format!(
                "{} bytes at {end:#x} before the footer belong to nothing",
                state.data_end - end
            );
            let repaired = repair != Repair::Nothing;
            if repaired {
                self.put_footer(state.footer, end)?;
                report.image_end_offset = end;
            }
            let did = repaired.then(|| "the footer was moved and the file cut".to_owned());
            report.add(Severity::Leak, 1, text, did);
        }
        Ok(report)
    }
}

fn short(report: &mut Report, written: Option<Result<()>>) -> Result<()> {
    let did = written.transpose()?.map(|()| "the byte was added".into());
    let text = "the footer lacks its last byte, as old versions of Virtual PC wrote it";
    report.add(Severity::Note, 1, text.into(), did);
    Ok(())
}

impl Check for Sparse {
    fn check(&self, repair: Repair, progress: &dyn Progress) -> Result<Report> {
        if repair != Repair::Nothing {
            self.allocator()?;
        }
        let mut report = Report::default();
        let shape = self.shape.load_full();
        footer_fields(&mut report, &shape.footer);
        let sound = self.check_header(&mut report, &shape);
        // What is repaired by what a wrong header says is destroyed.
        let repair = if sound { repair } else { Repair::Nothing };
        self.check_locators(&mut report, &shape);
        let walk = self.walk(&mut report, &shape, progress)?;
        // Each repair needs those before it: blocks are moved and space is cut off only where
        // there is a footer, and what a batmap took is free once that was dropped.
        self.check_end(&mut report, &shape, &walk, repair)?;
        self.check_copy(&mut report, &shape, repair)?;
        self.check_batmap_header(&mut report, &shape, repair)?;
        let shape = self.shape.load_full();
        self.check_blocks(&mut report, &shape, walk, repair, progress)?;
        if repair != Repair::Nothing {
            self.storage.sync()?;
        }
        Ok(report)
    }

    fn work(&self) -> u64 {
        self.shape.load().size
    }
}

impl Sparse {
    /// Whether the header and the place of the table may be relied on.
    fn check_header(&self, report: &mut Report, shape: &Shape) -> bool {
        let header = &shape.header;
        let mut sound = true;
        if !header.checksum_is_right() {
            // There is no second header to tell which of its bytes is wrong.
            sound = false;
            report.corruption("the dynamic header's checksum is wrong", None);
        }
        let (end, size) = (
            shape.table.host() + shape.table.len() * 4,
            self.storage.size(),
        );
        if end > size {
            sound = false;
            let text = format!("the table ends at {end:#x}, the file at {size:#x}");
            report.corruption(text, None);
        }
        if !header.reserved_is_zero() {
            report.note("the dynamic header's reserved bytes are not zero");
        }
        let room = header.max_entries() * header.block_size();
        if shape.size > room {
            report.corruption(
                format!(
                    "the disk has {} bytes, its table has room for {room}",
                    shape.size
                ),
                None,
            );
        }
        let (uuid, name) = (header.parent_uuid(), header.parent_name());
        match self.kind {
            Kind::Differencing => {
                in_future(report, "the parent's time", header.parent_timestamp());
            }
            _ if !uuid.is_nil() || name.as_deref() != Some("") || !header.locators().is_empty() => {
                report.note("a disk without a parent names one");
            }
            _ => {}
        }
        sound
    }

    fn check_locators(&self, report: &mut Report, shape: &Shape) {
        let locators = shape.header.locators();
        for (i, locator) in locators.iter().enumerate() {
            let word = locator.code.word();
            if !locator.code.is_defined() {
                report.note(format!("locator {i} is of unknown kind '{word}'"));
            }
            if locators[..i].iter().any(|l| l.code == locator.code) {
                report.note(format!("locator {i} is the second of kind '{word}'"));
            }
            let end = locator.offset.checked_add(u64::from(locator.len));
            if end.is_none_or(|end| end > self.storage.size()) {
                let text = format!(
                    "locator {i} ('{word}') has {} bytes at {:#x}, past the end of the file",
                    locator.len, locator.offset
                );
                report.corruption(text, None);
            }
        }
    }

    /// The footer at the end.
    fn check_end(
        &self,
        report: &mut Report,
        shape: &Shape,
        walk: &Walk,
        repair: Repair,
    ) -> Result<()> {
        // With a footer behind it, a block that was cut off would pass for whole.
        let all = repair == Repair::All && !walk.has_lost() && is_taken(&shape.footer);
        let used = walk.end;
        let size = self.storage.size();
        let found = self.space.lock().footer;
        let mut end = self.end.lock();
        let write = |host| {
            shape.footer.write(&*self.storage, host)?;
            self.storage.sync()
        };
        match &*end {
            End::Whole => return Ok(()),
            End::Short => short(report, all.then(|| write(found.unwrap_or(size))))?,
            End::Killed | End::Damaged(_) => {
                let text = match &*end {
                    End::Damaged(why) => format!("the footer at the end is damaged: {why}"),
                    _ => "the footer at the end is all 0xc7: tapdisk has the image open, or did not close it".to_owned(),
                };
                // In its place where nothing else is there, else behind all that is in use.
                let last = size.saturating_sub(footer::LEN64);
                let host = match last >= used && last.is_multiple_of(SECTOR) {
                    true => last,
                    false => align::up(size.max(used), SECTOR).unwrap_or(size),
                };
                if host > last && self.storage.has_fixed_len() {
                    let text = format!("{text}; there is no room for it behind what is in use");
                    report.corruption(text, None);
                    return Ok(());
                }
                if all {
                    write(host)?;
                    self.space.lock().footer_is_at(host);
                    self.data_end.store(host, Ordering::Release);
                }
                let did = all.then_some("it was written anew");
                report.corruption(text, did);
            }
        }
        if all {
            *end = End::Whole;
        }
        Ok(())
    }

    /// The copy at the start against the footer in use.
    fn check_copy(&self, report: &mut Report, shape: &Shape, repair: Repair) -> Result<()> {
        let mut bytes = [0; footer::LEN];
        self.storage.read_at(&mut bytes, 0)?;
        let footer = &shape.footer;
        let copy = "the copy of the footer at 0x0";
        // A change was interrupted between the two footers; the one at the end counts.
        let (severity, text) = match Footer::parse(&bytes, Strictness::Strict) {
            Ok(found) if found == *footer => return Ok(()),
            Ok(found) if footer.differs_in_size_only(&found) => (
                Severity::Note,
                format!(
                    "{copy} has another size than the footer at the end, {}: a resize was interrupted",
                    footer.current_size.get()
                ),
            ),
            Ok(found) if footer.differs_in_header_only(&found) => (
                Severity::Note,
                format!(
                    "{copy} has its header elsewhere than the footer at the end, at {:#x}: a change of the parent was interrupted",
                    footer.header_offset()
                ),
            ),
            Ok(found) if batmap::is_due(&found) && !batmap::is_due(footer) => (
                Severity::Corruption,
                format!(
                    "{copy} names a creator that keeps a batmap, the footer at the end one that keeps none: XenServer's batmap is lost"
                ),
            ),
            Ok(_) => (
                Severity::Corruption,
                format!("{copy} differs from the footer at the end"),
            ),
            Err(e) => (
                Severity::Corruption,
                format!("{copy} is damaged: {}", e.message()),
            ),
        };
        let fix = match severity {
            Severity::Note => repair != Repair::Nothing,
            _ => repair == Repair::All && is_taken(footer),
        };
        if fix {
            footer.write(&*self.storage, 0)?;
        }
        let did = fix.then(|| "it was written anew from the footer at the end".to_owned());
        report.add(severity, 1, text, did);
        Ok(())
    }

    fn check_batmap_header(
        &self,
        report: &mut Report,
        shape: &Shape,
        repair: Repair,
    ) -> Result<()> {
        if let batmap::Found::Damaged(why) = &shape.batmap {
            // Both footers are written for it.
            let all = repair == Repair::All && self.space.lock().footer.is_some();
            if all {
                // XenServer refuses its own images without a batmap; others need none.
                let footer = shape.footer.created_by(Creator::Win);
                self.replace_footers(&self.space.lock(), shape, footer)?;
            }
            let did = all.then_some("it was dropped: the creator is now 'win '");
            report.corruption(format!("XenServer's batmap: {why}"), did);
        }
        Ok(())
    }
}
