//! Another backing file, and an image without data of its own.

use super::Qcow2;
use super::header::Header;
use super::rewrite::Needs;
use super::snapshot::replace_l1;
use super::switch::switch;
use crate::error::{Error, Result};
use crate::image::create::CreateBacking;
use crate::image::relink::{Empty, Relink};
use crate::util::align::len64;

/// What other tools call a format, where that is not our name for it.
pub(super) fn recorded_format(name: &str) -> &str {
    match name {
        "vhd" => "vpc",
        name => name,
    }
}

impl Relink for Qcow2 {
    fn relink(&mut self, backing: Option<&CreateBacking>) -> Result<()> {
        self.start_writing()?;
        if self.has_data_file() && self.header.data_file_is_raw() && backing.is_some() {
            return Err(Error::unsupported(
                "an image whose data file is raw has no backing file",
            ));
        }
        let mut header = Header::read(&*self.file)?;
        let name = backing.map(|b| &*b.name);
        header.set_backing(name, backing.map(|b| recorded_format(b.format)));
        switch(&*self.file, &header)?;
        self.reload()
    }
}

impl Empty for Qcow2 {
    fn empty(&mut self) -> Result<()> {
        self.writer()?;
        self.release_assigned()?;
        self.reload()?;
        if self.has_data_file() {
            return Err(Error::unsupported(
                "an image with an external data file cannot be emptied",
            ));
        }
        let old = self.read_l1(self.header.l1_offset, self.header.l1_len)?;
        let needs = Needs {
            tables: 0,
            runs: &[len64(old.len()) * 8],
            refcount_order: self.header.refcount_order,
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.drop_tables(&old)?;
            replace_l1(rewrite, &vec![0; old.len()])
        })
    }
}
