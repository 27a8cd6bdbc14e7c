//! Sectors of discs whose codes are wrong: what became of them, and which they are.

use std::fmt::Write as _;
use std::path::Path;

use crate::cli::exit::complain;
use crate::copy::Joined;
use crate::error::{Error, ErrorKind};
use crate::image::Image;
use crate::image::disc::Disc;
use crate::util::progress::Silent;
use crate::util::text::printable;

/// Runs of addresses that are told.
const MAX_TOLD: usize = 100;

/// The images that are discs.
fn discs(sources: &Joined) -> impl Iterator<Item = (&dyn Image, &dyn Disc)> {
    let tops = sources.chains().map(|chain| chain.top());
    tops.filter_map(|image| Some((image, image.as_disc()?)))
}

/// Tells the user which sectors were corrected, and which are as they were stored.
pub(super) fn tell(sources: &Joined) {
    for (image, disc) in discs(sources) {
        let damage = disc.damage();
        let all = [
            (
                &damage.corrected,
                "were damaged and are corrected by their codes",
            ),
            (
                &damage.as_stored,
                "are damaged and taken as they are stored",
            ),
        ];
        for (sectors, what) in all.iter().filter(|(sectors, _)| !sectors.is_empty()) {
            let path = image.storage().path().unwrap_or(Path::new(""));
            complain(&format!(
                "warning: {}: {} sectors {what}: {}",
                printable(path),
                sectors.len(),
                listed(sectors.iter().copied())
            ));
        }
    }
}

/// The same error; where it is about a sector of a disc, one about all that cannot be read.
pub(super) fn explained(error: Error, sources: &Joined) -> Error {
    if error.kind() != ErrorKind::Corrupt {
        return error;
    }
    for (image, disc) in discs(sources) {
        let Ok(sectors) = disc.unreadable(&Silent) else {
            continue;
        };
        if sectors.is_empty() || error.path() != image.storage().path() {
            continue;
        }
        let text = format!(
            "{}; sectors that cannot be read: {} (--salvage takes what is damaged as it is stored, and zeroes for what is of form 2)",
            error.message(),
            listed(sectors.into_iter())
        );
        return Error::corrupt(text).at_opt(image.storage().path());
    }
    error
}

/// The error about sectors that cannot be read.
pub(super) fn unreadable(sectors: Vec<u64>) -> Error {
    Error::corrupt(format!(
        "sectors cannot be read, since their codes are wrong and do not tell what was there: {} \
         (--salvage takes them as they are stored)",
        listed(sectors.into_iter())
    ))
}

/// Addresses, in runs.
fn listed(sectors: impl Iterator<Item = u64>) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for lba in sectors {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == lba => *last = lba,
            _ => runs.push((lba, lba)),
        }
    }
    let mut text = String::new();
    for (n, (first, last)) in runs.iter().take(MAX_TOLD).enumerate() {
        text.push_str(if n == 0 { "" } else { ", " });
        let _ = match first == last {
            true => write!(text, "{first}"),
            false => write!(text, "{first}-{last}"),
        };
    }
    if runs.len() > MAX_TOLD {
        let _ = write!(text, " and {} runs more", runs.len() - MAX_TOLD);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_side_by_side_are_told_as_one_run() {
        assert_eq!(listed([5, 7, 8, 9, 11].into_iter()), "5, 7-9, 11");
        let many = listed((0..1000).map(|n| n * 2));
        assert!(many.ends_with("198 and 900 runs more"), "{many}");
    }
}
