//! Which regions of a disk may differ from something else: from what it was at a backup, from the
//! other leg of a mirror.
//!
//! A log never knows of less than what changed: a mark is on stable media before the write that it
//! stands for, and only clearing may be lost.

mod cbt;
pub mod file;
mod layout;
mod mirror;
mod own;
pub mod regions;

pub use file::{Assumed, DirtyLog, New};
pub use layout::{Kind, Usage};
pub use regions::{Geometry, Regions};
