//! What tests look at.

use std::path::Path;

/// The names in a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("is there");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("reads").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}
