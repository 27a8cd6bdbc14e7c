//! What else keeps an image from being written: a check that finds nothing says that writers take
//! the image.

use super::Checker;
use crate::error::{ErrorKind, Result};
use crate::formats::qcow2::header::Header;
use crate::formats::qcow2::metadata::judge;
use crate::formats::qcow2::switch::switch;
use crate::image::check::{Repair, Severity};

impl Checker<'_> {
    /// Reports what is wrong with the header alone.  Where all else is sound, a repair writes it
    /// anew without that.
    pub(super) fn header_faults(&mut self) -> Result<()> {
        let sound = self.is_sound();
        if let Some(text) = self.header.unnamed_data_file() {
            self.report.add(Severity::Corruption, 1, text, None);
        }
        let faults = self.header.faults();
        if faults.is_empty() {
            return Ok(());
        }
        let mut left = faults.clone();
        if self.repair == Repair::All && sound {
            let header = Header::read(self.file)?.without_faults();
            let after = header.faults();
            match after == faults {
                true => {}
                false => match switch(self.file, &header) {
                    Ok(()) => left = after,
                    // It has no room to change; nothing was written.
                    Err(e) if e.kind() == ErrorKind::Unsupported => {}
                    Err(e) => return Err(e),
                },
            }
        }
        for fault in faults {
            let done = (!left.contains(&fault)).then(|| "taken away".to_owned());
            self.report.add(Severity::Corruption, 1, fault, done);
        }
        Ok(())
    }

    /// Asks what a writer asks before its first change.
    pub(super) fn writable(&mut self) -> Result<()> {
        if self.report.corruptions > 0 || self.report.check_errors > 0 {
            return Ok(());
        }
        match judge(self.file) {
            Err(e) if e.kind() == ErrorKind::Corrupt => self.corrupt(e.message().to_owned()),
            other => return other,
        }
        Ok(())
    }
}
