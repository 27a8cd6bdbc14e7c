//! What a file that holds disks has in it.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::image::Driver;
use crate::image::assemble::Assembler;
use crate::image::info::{Detail, HostInfo};
use crate::image::open::OpenOptions;
use crate::storage::Storage;
use crate::util::progress::Progress;
use crate::util::text::printable;

/// A format whose files hold disks.  Opened as an image, a file is the one of them that
/// [`OpenOptions::member`] says.
#[derive(Debug)]
pub struct Container {
    /// Its row among the formats.
    pub driver: &'static Driver,
    /// Lists what is in a file.
    ///
    /// # Errors
    /// As opening it; a disk that cannot be opened is listed, and says why.
    pub contents: fn(Arc<dyn Storage>, &OpenOptions) -> Result<Contents>,
    /// Makes new files, where vdtool can.
    pub assembler: Option<&'static Assembler>,
}

/// What is in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Contents {
    /// The path it was opened from.
    pub path: Option<PathBuf>,
    /// Its format's name.
    pub format: &'static str,
    /// The host object.
    pub host: HostInfo,
    /// What it has beside disks, in order.
    pub details: Vec<Detail>,
    /// The disks, in order.
    pub disks: Vec<Held>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Held {
    /// Its name there.
    pub name: String,
    /// The file that it is in; `None`: it is empty.
    pub file: Option<OsString>,
    /// The format of that file, where it was looked at.
    pub format: Option<&'static str>,
    /// Size of the disk in bytes, where the file was looked at.
    pub virtual_size: Option<u64>,
    /// What else is said of it, in order.
    pub details: Vec<Detail>,
    /// What only the format of its file has, where that was looked at.
    pub image: Vec<Detail>,
    /// Why it cannot be read.
    pub problem: Option<String>,
}

/// A place in a list of disks that the user named: by its number, counted from 1, or by one of its
/// `names`.  `None`: the only one there is.
///
/// # Errors
/// Says what there is, where none or more than one is meant.
pub fn choose(pick: Option<&OsStr>, disks: &[Vec<OsString>]) -> Result<usize, String> {
    let list = || match disks.len() {
        0 => "there are no disks".to_owned(),
        count => {
            let named = disks.iter().enumerate().take(MAX_TOLD);
            let named = named.map(|(place, names)| {
                let name = names.first().map(printable);
                format!("{} ({})", place + 1, name.unwrap_or_default())
            });
            let rest = match count.saturating_sub(MAX_TOLD) {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            format!("there are {}{rest}", named.collect::<Vec<_>>().join(", "))
        }
    };
    let Some(pick) = pick else {
        return match disks.len() {
            1 => Ok(0),
            0 => Err("has no disks in it".to_owned()),
            count => Err(format!(
                "has {count} disks in it, and --member N|NAME says which is meant ({})",
                list()
            )),
        };
    };
    let found: Vec<usize> = (0..disks.len())
        .filter(|place| disks[*place].iter().any(|name| name == pick))
        .collect();
    let shown = printable(pick);
    match *found {
        [place] => return Ok(place),
        [] => {}
        _ => return Err(format!("has more than one disk '{shown}' ({})", list())),
    }
    let number = pick.to_str().and_then(|text| text.parse::<usize>().ok());
    match number.and_then(|number| number.checked_sub(1)) {
        Some(place) if place < disks.len() => Ok(place),
        _ => Err(format!("has no disk '{shown}' in it ({})", list())),
    }
}

/// Disks that are told by name at most.
const MAX_TOLD: usize = 8;

/// What was recorded of the bytes that an image is kept in, for whoever reads all of it.
pub trait Sealed: Send + Sync {
    /// Bytes that [`Sealed::verify`] reads.
    fn bytes(&self) -> u64;
    /// Reads them and compares them with what was recorded; what of it could not be compared, because
    /// it was recorded in a way that nobody knows.
    ///
    /// # Errors
    /// `Corrupt` where they are others; `Cancelled`; the host's.
    fn verify(&self, progress: &dyn Progress) -> Result<Vec<String>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_chosen_by_its_names_and_else_by_its_number() {
        let disks = [
            vec!["a".into(), "x".into()],
            vec!["b".into(), "x".into()],
            vec!["1".into()],
        ];
        let choose = |pick: &str| choose(Some(OsStr::new(pick)), &disks);
        assert_eq!(choose("a"), Ok(0));
        assert_eq!(choose("2"), Ok(1));
        // Its name, and not the first.
        assert_eq!(choose("1"), Ok(2));
        for wrong in ["x", "0", "4", "", "-1", "c"] {
            choose(wrong).expect_err(wrong);
        }
        assert!(
            super::choose(None, &disks)
                .expect_err("three")
                .contains("--member")
        );
        assert_eq!(super::choose(None, &disks[..1]), Ok(0));
        super::choose(None, &[]).expect_err("none");
    }
}
