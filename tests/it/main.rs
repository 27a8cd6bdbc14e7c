//! Tests of the library and of the binary, as one program.

mod check;
mod compare;
mod convert;
mod corpus;
mod crash;
mod create;
mod docs;
mod golden;
mod info;
mod io;
mod layers;
mod map;
mod model;
mod mutate;
mod oracle;
mod qcow2_check;
mod qcow2_create;
mod rebase;
mod refuse;
mod regress;
mod resize;
mod snapshot;
mod storage;
mod threads;
mod util;
mod vhd;
