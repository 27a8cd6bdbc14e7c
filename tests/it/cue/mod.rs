//! Optical discs: sheets, sectors, their codes.

mod bad;
mod check;
mod damage;
mod made;
mod parts;
mod peers;
mod read;
mod write;
