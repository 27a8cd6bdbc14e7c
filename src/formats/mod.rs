//! One entry per format, and the registry.

pub mod android_cow;
pub mod cue;
pub mod ova;
pub mod profiles;
pub mod qcow2;
pub mod raw;
pub mod refused;
pub mod vdi;
pub mod vhd;
pub mod vhdx;
pub mod vmdk;
pub mod wav;

use crate::error::{Error, Result};
use crate::image::Driver;
use crate::image::contents::Container;
use crate::image::delta::DeltaMaker;
use crate::image::disc::plan::Maker;

/// Every format, best first; `raw` last, because it accepts anything.
pub static DRIVERS: &[&Driver] = &[
    &qcow2::DRIVER,
    &vhd::DRIVER,
    &vdi::DRIVER,
    &ova::DRIVER,
    &ova::LOOSE,
    &vmdk::DRIVER,
    &vhdx::DRIVER,
    &android_cow::DRIVER,
    &cue::DRIVER,
    &raw::DRIVER,
];

/// Formats whose files are made of discs, or of disks that become one.
static MAKERS: &[(&Driver, &Maker)] = &[
    (&cue::DRIVER, &cue::create::MAKER),
    (&wav::DRIVER, &wav::MAKER),
];

/// Formats whose files are made of two disks, by what makes one of the other.
static DELTAS: &[(&Driver, &DeltaMaker)] = &[(&android_cow::DRIVER, &android_cow::write::MAKER)];

/// How files of a format are made of two disks, where they are.
pub fn delta_maker(driver: &Driver) -> Option<&'static DeltaMaker> {
    let mut makers = DELTAS.iter();
    makers
        .find(|(of, _)| *of == driver)
        .map(|(_, maker)| *maker)
}

/// How files of a format are made of discs, where they are.
pub fn disc_maker(driver: &Driver) -> Option<&'static Maker> {
    let mut makers = MAKERS.iter();
    makers
        .find(|(of, _)| *of == driver)
        .map(|(_, maker)| *maker)
}

/// The format of a target, by its name or an alias: those that are only made, too.
///
/// # Errors
/// Those of [`named`].
pub fn target_named(name: &str) -> Result<&'static Driver> {
    match MAKERS.iter().find(|(driver, _)| driver.is_called(name)) {
        Some((driver, _)) => Ok(driver),
        None => named(name),
    }
}

/// The format that is only made that a file name extension stands for.
pub fn made_by_extension(extension: &str) -> Option<&'static Driver> {
    let extension = extension.to_ascii_lowercase();
    let mut makers = MAKERS.iter();
    let found = makers.find(|(driver, _)| driver.extensions.contains(&extension.as_str()));
    found.map(|(driver, _)| *driver)
}

/// The format of what nothing says it has another.
pub static PLAIN: &Driver = &raw::DRIVER;

/// How the disks in files of `driver`'s format are listed; `None` for a format of disks.
pub fn container(driver: &Driver) -> Option<&'static Container> {
    let mut containers = ova::CONTAINERS.iter();
    containers.find(|container| container.driver == driver)
}

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

/// The names of the drivers that can do something, for messages.
pub fn names(can: impl Fn(&Driver) -> bool) -> String {
    let drivers = DRIVERS.iter().filter(|driver| can(driver));
    let names: Vec<&str> = drivers.map(|driver| driver.name).collect();
    names.join(", ")
}

/// The driver called `name`, by its name or an alias.
///
/// # Errors
/// `Unsupported` for a format that vdtool knows and does not have, by that name; `Invalid` for one
/// that it does not know, naming those it has.
pub fn named(name: &str) -> Result<&'static Driver> {
    if let Some(driver) = by_name(name) {
        return Ok(driver);
    }
    if let Some(format) = refused::by_name(name) {
        return Err(format.error());
    }
    Err(Error::invalid(format!(
        "unknown format (allowed: {})",
        names(|_| true)
    )))
}
