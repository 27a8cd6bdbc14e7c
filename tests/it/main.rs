//! Tests of the library and of the binary, as one program.

mod util;
mod vhd;
