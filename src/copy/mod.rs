//! Moving whole disks: the engine, and what it is used for.
//!
//! Every job walks the disk in work ranges that its workers take in guest order.  A range is asked
//! for its extents, what is to be done with each is decided by a pure function, and only then bytes
//! move.  Memory is bounded by the number of workers, whatever the size of the disk.

pub mod assemble;
pub mod bitmaps;
pub mod commit;
pub mod compact;
pub mod compare;
pub mod compress;
pub mod convert;
pub mod count;
pub mod delta;
mod differ;
pub mod disc;
mod engine;
mod find;
pub mod joined;
mod merge;
mod pace;
pub mod plan;
pub mod progress;
mod put;
pub mod rebase;
mod room;
mod salvage;
mod scan;
pub mod sequence;
pub mod stream;
mod transfer;
mod units;
mod whole;

pub use commit::{commit, commit_part, part_size};
pub use compare::{Allocation, Failure, Outcome, Step, compare};
pub use compress::compress;
pub use convert::{Convert, Scan, convert};
pub use delta::{delta, work as delta_work};
pub use joined::Joined;
pub use merge::merge;
pub use plan::Before;
pub use rebase::rebase;
pub use salvage::Lost;
pub use sequence::send_image;

/// Most workers a job may have.
pub const MAX_WORKERS: usize = 64;

/// Workers of a job whose user named no number: one per core, but no more than pays.
pub fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(8))
}
