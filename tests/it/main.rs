//! Tests of the library and of the binary, as one program.

mod layers;
mod model;
mod util;
