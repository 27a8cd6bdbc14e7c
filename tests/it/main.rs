//! Tests of the library and of the binary, as one program.

mod corpus;
mod crash;
mod layers;
mod model;
mod mutate;
mod oracle;
mod threads;
mod util;
