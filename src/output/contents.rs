//! `info` of a file that holds disks.

use std::io::{self, Write};

use serde_json::{Map, Value};

use crate::image::contents::{Contents, Held};
use crate::image::info::Detail;
use crate::output::info::spread;
use crate::output::json as output_json;
use crate::output::table::{self, bytes};
use crate::util::text::{printable, replaced};

/// Writes a table of the file, and one of each disk.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, contents: &Contents) -> io::Result<()> {
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |label: &str, value: String| rows.push((format!("{label}:"), value));
    if let Some(path) = &contents.path {
        row("image", table::path(path));
    }
    row("file format", contents.format.to_owned());
    if let Some(disk_size) = contents.host.disk_size {
        row("disk size", bytes(disk_size));
    }
    row("file length", bytes(contents.host.len));
    row("disks", contents.disks.len().to_string());
    for Detail { key, value } in &contents.details {
        spread(&mut rows, key, value);
    }
    write(out, rows)?;
    for (index, disk) in contents.disks.iter().enumerate() {
        writeln!(out)?;
        write(out, facts(index + 1, disk))?;
    }
    Ok(())
}

/// Writes one object, with a list of the disks.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, contents: &Contents) -> io::Result<()> {
    output_json::write(out, &value(contents))
}

fn write(out: &mut dyn Write, rows: Vec<(String, String)>) -> io::Result<()> {
    let mut table = table::plain();
    for (label, value) in rows {
        table.add_row([label, value]);
    }
    table::write(out, table)
}

fn facts(number: usize, disk: &Held) -> Vec<(String, String)> {
    let mut rows: Vec<(String, String)> = Vec::new();
    let mut row = |label: &str, value: String| rows.push((format!("{label}:"), value));
    row("disk", format!("{number} ({})", printable(&disk.name)));
    match &disk.file {
        Some(file) => row("file", printable(file)),
        None => row("file", "none: the disk is empty".to_owned()),
    }
    if let Some(format) = disk.format {
        row("file format", format.to_owned());
    }
    if let Some(size) = disk.virtual_size {
        row("virtual size", bytes(size));
    }
    if let Some(problem) = &disk.problem {
        row("problem", printable(problem));
    }
    for Detail { key, value } in &disk.details {
        spread(&mut rows, key, value);
    }
    rows
}

fn value(contents: &Contents) -> Value {
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    // As of an image, where there is one disk.
    if let [
        Held {
            virtual_size: Some(size),
            ..
        },
    ] = &*contents.disks
    {
        set("virtual-size", (*size).into());
    }
    if let Some(path) = &contents.path {
        set("filename", output_json::path(path).into());
    }
    set("format", contents.format.into());
    if let Some(disk_size) = contents.host.disk_size {
        set("actual-size", disk_size.into());
    }
    set("file-length", contents.host.len.into());
    for Detail { key, value } in &contents.details {
        set(key, value.clone());
    }
    let disks = contents.disks.iter().enumerate();
    let disks: Vec<Value> = disks.map(|(index, d)| disk(index + 1, d)).collect();
    set("disks", disks.into());
    Value::Object(object)
}

fn disk(number: usize, disk: &Held) -> Value {
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    set("member", number.into());
    set("name", disk.name.as_str().into());
    if let Some(file) = &disk.file {
        set("filename", replaced(file).into());
    }
    if let Some(format) = disk.format {
        set("format", format.into());
    }
    if let Some(size) = disk.virtual_size {
        set("virtual-size", size.into());
    }
    if let Some(problem) = &disk.problem {
        set("problem", problem.as_str().into());
    }
    for Detail { key, value } in &disk.details {
        set(key, value.clone());
    }
    Value::Object(object)
}
