//! Any bytes as an image: no panic, no hang, no heap of memory.
//!
//! `cargo +nightly fuzz run image -- -rss_limit_mb=512 -timeout=20`; samples to begin with come from
//! `VDTOOL_CORPUS=DIR cargo test --test it fuzz::`.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/it/exercise.rs"]
mod exercise;

fuzz_target!(|bytes: &[u8]| exercise::exercise(bytes));
