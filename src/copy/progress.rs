//! How a long job tells of its progress and is told to stop.

pub use crate::util::progress::{Progress, Silent};
