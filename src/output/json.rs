//! JSON as qemu-img lays it out: four spaces, one value, a newline at the end.

use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::PrettyFormatter;

use crate::util::text::replaced;

/// Writes one value.
///
/// # Errors
/// The writer's.
pub fn write(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = Serializer::with_formatter(&mut *out, formatter);
    value.serialize(&mut serializer)?;
    writeln!(out)
}

/// A path as a JSON string; bytes that are not UTF-8 become replacement characters.
pub fn path(path: &Path) -> String {
    replaced(path)
}
