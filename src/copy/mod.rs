//! Moving whole disks: the engine, and what it is used for.

pub mod progress;
