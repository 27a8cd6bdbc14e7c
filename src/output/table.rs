//! Tables for people, and the words in them.

use std::io::{self, Write};
use std::path::Path;

use comfy_table::Table;
use comfy_table::presets::NOTHING;

use crate::util::size;
use crate::util::text::printable;

/// A table without lines: columns that `cut`, `grep` and `awk` can work with.
pub fn plain() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table
}

/// Writes a table, with two spaces between columns and none at the ends of lines.
///
/// # Errors
/// The writer's.
pub fn write(out: &mut dyn Write, mut table: Table) -> io::Result<()> {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    writeln!(out, "{}", table.trim_fmt())
}

/// A size as people read it, with the exact number beside it.
pub fn bytes(size: u64) -> String {
    format!("{} ({size} bytes)", size::human(size))
}

/// A path, safe for a terminal.
pub fn path(path: &Path) -> String {
    printable(path)
}
