//! The kernel's interface for block devices served by programs, as plain Rust.
//!
//! libublk takes these items from a crate of this name that is generated from the kernel's header
//! when it is built, which needs libclang.  This one is written by hand from the facts of the
//! interface instead, under the same names, so that a C compiler is all the build asks for.  Every
//! size and every offset is checked when it is compiled.  Nothing here is unsafe.

#![allow(non_camel_case_types)]

pub mod command;
pub mod feature;
pub mod io;
pub mod params;

pub use command::*;
pub use feature::*;
pub use io::*;
pub use params::*;
