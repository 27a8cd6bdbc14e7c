//! VHD.

use crate::error::Error;
use crate::image::Driver;

/// The registry row.
pub static DRIVER: Driver = Driver {
    name: "vhd",
    aliases: &["vpc"],
    extensions: &["vhd", "vpc"],
    about: "Virtual PC, Hyper-V and XenServer disks: fixed, dynamic and differencing",
    probe: |_| 0,
    open: |_, _| Err(Error::unsupported("vhd")),
    open_options: &[],
    creator: None,
};
