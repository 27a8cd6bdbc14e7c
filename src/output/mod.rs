//! What users read: human text or JSON, the same data in both.
//!
//! Everything here writes to the writer it is given, so that a closed pipe is an error that the
//! caller sees.  Names that come from images are escaped on their way into human text.

pub mod bar;
pub mod chain;
pub mod check;
pub mod contents;
pub mod info;
pub mod json;
pub mod lint;
pub mod map;
pub mod options;
pub mod serve;
pub mod snapshot;
pub mod table;
pub mod ublk;
