//! Another backing file, and an image without data of its own.

use super::Qcow2;
use super::rewrite::Needs;
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
        let name = backing.map(|b| &*b.name);
        let format = backing.map(|b| recorded_format(b.format));
        self.change_header(|header| header.set_backing(name, format))
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
        let old = self.active_l1()?;
        let needs = Needs {
            runs: &[len64(old.len()) * 8],
            ..Needs::default()
        };
        self.rewrite(&needs, |rewrite| {
            rewrite.drop_tables(&old)?;
            rewrite.replace_l1(&vec![0; old.len()])
        })
    }
}
