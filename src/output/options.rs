//! The options of a format, as `-o help` lists them.

use std::io::{self, Write};

use crate::image::Driver;
use crate::image::options::OptionSpec;
use crate::output::table;

/// Writes the options that `driver` takes, those of `instead` where it has no images of its own, and those that every new file takes: name, type, default
/// and meaning.
///
/// # Errors
/// The writer's.
pub fn table(
    out: &mut dyn Write,
    driver: &Driver,
    instead: Option<&[OptionSpec]>,
    files: &[OptionSpec],
) -> io::Result<()> {
    let creation = driver.creator.as_ref().map_or(&[][..], |c| c.options);
    let creation = instead.unwrap_or(creation);
    let compressing = driver.creator.as_ref().and_then(|c| c.compress);
    let compressing = compressing.unwrap_or_default();
    let opening: Vec<OptionSpec> = (driver.open_options.iter().copied())
        .filter(|o| compressing.iter().all(|c| c.name != o.name))
        .collect();
    if creation.is_empty() {
        writeln!(out, "Format '{}' has no options for -o.", driver.name)?;
    } else {
        writeln!(out, "Options of format '{}':", driver.name)?;
        table::write(out, rows(creation))?;
    }
    writeln!(out, "\nOf every new file:")?;
    table::write(out, rows(files))?;
    if !compressing.is_empty() {
        writeln!(
            out,
            "\nWhen data is compressed (-o of convert -c, --open-options of io):"
        )?;
        table::write(out, rows(compressing))?;
    }
    if !opening.is_empty() {
        writeln!(out, "\nWhen an image is opened (--open-options):")?;
        table::write(out, rows(&opening))?;
    }
    Ok(())
}

/// Writes options: name, type, default and meaning.
///
/// # Errors
/// The writer's.
pub fn specs(out: &mut dyn Write, specs: &[OptionSpec]) -> io::Result<()> {
    table::write(out, rows(specs))
}

fn rows(specs: &[OptionSpec]) -> comfy_table::Table {
    let mut rows = table::plain();
    rows.set_header(["OPTION", "TYPE", "DEFAULT", "MEANING"]);
    for spec in specs {
        let default = if spec.default.is_empty() {
            "-"
        } else {
            spec.default
        };
        rows.add_row([spec.name, &spec.kind.to_string(), default, spec.help]);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::raw;

    #[test]
    fn every_option_of_a_format_is_listed_with_type_default_and_meaning() {
        let mut out = Vec::new();
        table(&mut out, &raw::DRIVER, None, &[]).expect("memory has room");
        let text = String::from_utf8(out).expect("is text");
        let row = text.lines().find(|l| l.starts_with("preallocation"));
        let row = row.expect("raw has it");
        for part in ["off|falloc|full", " off ", "how much space"] {
            assert!(row.contains(part), "{row}");
        }
    }
}
