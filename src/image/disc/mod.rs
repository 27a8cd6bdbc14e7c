//! Compact discs: sectors, their codes, tracks.  What formats of optical discs share.

use std::collections::BTreeSet;

use crate::error::Result;
use crate::image::sector::Sectors;
use crate::storage::Storage;
use crate::util::progress::Progress;

pub mod ecc;
pub mod edc;
mod field;
mod form;
mod mode;
mod msf;
pub mod plan;
mod recode;
mod sector;
pub mod table;

pub use form::Form;
pub use mode::Mode;
pub use msf::Msf;
pub use recode::recode;
pub use sector::{Declared, Faults, Judged, correct, judge, make, make_codes};
pub use table::{Table, Track};

/// Bytes of a sector with everything but subchannels.
pub const RAW: usize = 2352;
/// Bytes of user data of a sector of a disk.
pub const USER: usize = 2048;
/// Bytes of subchannels beside a sector.
pub const SUBCHANNEL: usize = 96;
/// Sectors a second.
pub const FRAMES: u64 = 75;

/// A whole sector.
pub type Raw = [u8; RAW];

/// A disc, as far as its format tells.
pub trait Disc: Sectors {
    /// What it consists of.
    fn table(&self) -> &Table;
    /// What one of its files is called in messages: those that [`table::Stored`] counts.
    fn file(&self, index: usize) -> Option<&dyn Storage>;
    /// The track that is the disk; `None`: there is none.
    fn track(&self) -> Option<&Track>;
    /// Fills `buf`, of [`Sectors::whole_len`] bytes, with a sector as a drive gives it: what its
    /// codes say is wrong is corrected, and noted as [`Damage`].
    ///
    /// # Errors
    /// `Corrupt` where the codes do not tell what was there; those of [`Sectors::fetch`].
    fn corrected(&self, lba: u64, buf: &mut [u8]) -> Result<Form>;
    /// Sectors that were read as parts of the disk so far and whose codes were wrong.
    fn damage(&self) -> Damage;
    /// All sectors of the disk that cannot be read as such: their codes are wrong and do not tell
    /// what was there, or they are of a form that has no 2048 bytes of data.
    ///
    /// # Errors
    /// The host's, and `Cancelled`.
    fn unreadable(&self, progress: &dyn Progress) -> Result<Vec<u64>>;
}

/// Sectors whose codes were wrong when they were read, by address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Damage {
    /// What was read was corrected.
    pub corrected: BTreeSet<u64>,
    /// What was read is what is stored, because the user wanted it so.
    pub as_stored: BTreeSet<u64>,
}

/// What a sector begins with.
pub const SYNC: [u8; 12] = [0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0];
