//! vdtool: virtual disk images on the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    vdtool::cli::main()
}
