//! Where images go: what each place takes, and how an image is made for it.
//!
//! A rule says where it is written.  Not all of them are in the words of whoever makes the place:
//! some were learnt by others, and those say so.

use crate::image::contents::{Contents, Held};
use crate::image::info::{Detail, ImageInfo};

mod microsoft;
mod others;
mod rules;
mod vmware;

/// A place where images go.
#[derive(Debug)]
pub struct Profile {
    /// The name that users type, such as `azure`.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// The format that is made for it.
    pub format: &'static str,
    /// With these options (`K=V`), which others follow.
    pub options: &'static [&'static str],
    /// What it takes.
    pub rules: &'static [Rule],
}

/// One thing that a place asks of an image.
#[derive(Debug)]
pub struct Rule {
    /// A short name, unique in its profile.
    pub name: &'static str,
    /// What is asked for.
    pub text: &'static str,
    /// Where that is written.
    pub source: &'static str,
    /// Whether that is the text of whoever makes the place.
    pub is_makers_own: bool,
    /// Whether an image keeps it.
    pub check: fn(&Facts<'_>) -> Verdict,
}

/// What becomes of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept.
    Keeps,
    /// It is broken, by this.
    Breaks(String),
    /// It is not about such an image.
    Silent,
}

/// What rules look at.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The format's name.
    pub format: &'a str,
    /// Size of the disk in bytes; `None`: of several disks.
    pub virtual_size: Option<u64>,
    /// Bytes of the file.
    pub file_len: u64,
    /// It has something below it.
    pub has_backing: bool,
    /// Its data is encrypted.
    pub is_encrypted: bool,
    /// It was not closed cleanly.
    pub is_dirty: bool,
    /// What only its format has.
    pub details: &'a [Detail],
    /// The disks in it, where it holds disks.
    pub disks: Option<&'a [Held]>,
}

impl<'a> Facts<'a> {
    /// Of an image.
    pub fn of_image(info: &'a ImageInfo) -> Self {
        Self {
            format: info.format,
            virtual_size: Some(info.virtual_size),
            file_len: info.host.len,
            has_backing: info.backing.is_some(),
            is_encrypted: info.encrypted,
            is_dirty: info.dirty,
            details: &info.details,
            disks: None,
        }
    }

    /// Of a file that holds disks.
    pub fn of_contents(contents: &'a Contents) -> Self {
        Self {
            format: contents.format,
            virtual_size: None,
            file_len: contents.host.len,
            has_backing: false,
            is_encrypted: false,
            is_dirty: false,
            details: &contents.details,
            disks: Some(&contents.disks),
        }
    }
}

/// Every profile.
pub static PROFILES: &[&Profile] = &[
    &vmware::ESXI,
    &vmware::VSPHERE_OVA,
    &vmware::WORKSTATION,
    &microsoft::HYPERV_GEN1,
    &microsoft::HYPERV_GEN2,
    &microsoft::AZURE,
    &others::AWS,
    &others::XEN,
    &others::VIRTUALBOX,
];

/// The profile called `name`.
///
/// # Errors
/// Names those that there are.
pub fn named(name: &str) -> Result<&'static Profile, String> {
    let found = PROFILES.iter().copied().find(|p| p.name == name);
    found.ok_or_else(|| {
        let names: Vec<&str> = PROFILES.iter().map(|p| p.name).collect();
        format!("unknown (allowed: {})", names.join(", "))
    })
}

#[cfg(test)]
mod tests;
