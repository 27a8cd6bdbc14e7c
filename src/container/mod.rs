//! Files that hold files: archives, and what is compressed as a whole.
//!
//! What is in them is read where it is, through [`Storage`](crate::storage::Storage) of a part of
//! the file; nothing is unpacked.

pub mod gzip;
pub mod tar;
