//! Optical discs: sheets, sectors, their codes.

mod bad;
mod check;
mod damage;
pub(crate) mod made;
mod parts;
mod peers;
mod read;
mod write;
