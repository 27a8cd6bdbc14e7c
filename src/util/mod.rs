//! Small pieces with no knowledge of disks.

pub mod align;
pub mod buf;
pub mod cached;
pub mod digest;
pub mod grace;
pub mod moment;
pub mod parallel;
pub mod progress;
pub mod random;
pub mod range;
pub mod size;
#[cfg(test)]
pub(crate) mod skipped;
pub mod text;
