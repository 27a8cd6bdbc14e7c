//! One entry per format, and the registry.

pub mod qcow2;
pub mod raw;
pub mod refused;
pub mod vhd;

use crate::image::Driver;

/// Every format, best first; `raw` last, because it accepts anything.
pub static DRIVERS: &[&Driver] = &[&qcow2::DRIVER, &vhd::DRIVER, &raw::DRIVER];

/// The driver called `name`, by its name or an alias.
pub fn by_name(name: &str) -> Option<&'static Driver> {
    DRIVERS.iter().copied().find(|d| d.is_called(name))
}

/// The driver that a file name extension stands for.
pub fn by_extension(extension: &str) -> Option<&'static Driver> {
    let extension = extension.to_ascii_lowercase();
    DRIVERS
        .iter()
        .copied()
        .find(|d| d.extensions.contains(&extension.as_str()))
}
