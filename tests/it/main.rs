//! Tests of the library and of the binary, as one program.

mod check;
mod create;
mod docs;
mod golden;
mod info;
mod map;
mod resize;
mod util;
