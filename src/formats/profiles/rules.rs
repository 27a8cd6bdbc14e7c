//! What rules have in common.

use serde_json::Value;

use crate::formats::profiles::{Facts, Verdict};
use crate::image::contents::Held;
use crate::image::info::Detail;

/// Kept where `kept` is; else broken by what was found.
pub(super) fn keeps(kept: bool, found: impl FnOnce() -> String) -> Verdict {
    match kept {
        true => Verdict::Keeps,
        false => Verdict::Breaks(found()),
    }
}

/// The format is one of these.
pub(super) fn format(facts: &Facts<'_>, formats: &[&str]) -> Verdict {
    keeps(formats.contains(&facts.format), || facts.format.to_owned())
}

/// What only the format has.
pub(super) fn detail<'a>(details: &'a [Detail], key: &str) -> Option<&'a Value> {
    details.iter().find(|d| d.key == key).map(|d| &d.value)
}

/// The same, where it is a word.
pub(super) fn word<'a>(details: &'a [Detail], key: &str) -> &'a str {
    detail(details, key)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Of an image in one of `formats`, its detail `key` is one of `words`.
pub(super) fn is_word(facts: &Facts<'_>, formats: &[&str], key: &str, words: &[&str]) -> Verdict {
    if !formats.contains(&facts.format) {
        return Verdict::Silent;
    }
    let found = word(facts.details, key);
    keeps(words.contains(&found), || match found {
        "" => format!("no {key}"),
        found => found.to_owned(),
    })
}

/// Of an image in one of `formats`, its disk has at most so many bytes.
pub(super) fn at_most(facts: &Facts<'_>, formats: &[&str], most: u64) -> Verdict {
    match facts.virtual_size {
        Some(size) if formats.contains(&facts.format) => {
            keeps(size <= most, || format!("{size} bytes"))
        }
        _ => Verdict::Silent,
    }
}

/// The disk has whole units.
pub(super) fn whole(facts: &Facts<'_>, unit: u64) -> Verdict {
    match facts.virtual_size {
        Some(size) => keeps(size.is_multiple_of(unit), || format!("{size} bytes")),
        None => Verdict::Silent,
    }
}

/// Nothing lies below it.
pub(super) fn alone(facts: &Facts<'_>) -> Verdict {
    keeps(!facts.has_backing, || "it has an image below it".to_owned())
}

/// It was closed cleanly.
pub(super) fn closed(facts: &Facts<'_>) -> Verdict {
    keeps(!facts.is_dirty, || "it was not closed cleanly".to_owned())
}

/// Every disk in it can be read and keeps a rule; the first that does not is told.
pub(super) fn every(facts: &Facts<'_>, broken: impl Fn(&Held) -> Option<String>) -> Verdict {
    let Some(disks) = facts.disks else {
        return Verdict::Silent;
    };
    let first = disks.iter().find_map(|disk| {
        let why = match &disk.problem {
            Some(problem) => problem.clone(),
            None => broken(disk)?,
        };
        Some(format!("disk '{}': {why}", disk.name))
    });
    first.map_or(Verdict::Keeps, Verdict::Breaks)
}
