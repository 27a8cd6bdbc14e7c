//! Internal snapshots: lists for people, keys of qemu-img for programs.

use std::io::{self, Write};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value};

use crate::image::Snapshot;
use crate::output::{json as output_json, table};
use crate::util::size;
use crate::util::text::{printable, replaced};

/// Writes a list as qemu-img does, dates in local time; nothing where there are none.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, list: &[Snapshot]) -> io::Result<()> {
    if list.is_empty() {
        return Ok(());
    }
    writeln!(out, "Snapshot list:")?;
    writeln!(
        out,
        "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"
    )?;
    list.iter().try_for_each(|s| {
        writeln!(
            out,
            "{:<7} {:<16} {:>8} {:>19} {:>15} {:>10}",
            printable(&s.id),
            printable(&s.name),
            size::human(s.vm_state_size),
            date(s),
            clock(s),
            s.icount.map_or("--".to_owned(), |i| i.to_string())
        )
    })
}

/// Writes the list as JSON.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, list: &[Snapshot]) -> io::Result<()> {
    output_json::write(out, &values(list))
}

/// The list with the keys that qemu-img has.
pub(super) fn values(list: &[Snapshot]) -> Value {
    list.iter().map(value).collect()
}

/// One row for each snapshot, as `info` shows them.
pub(super) fn rows(list: &[Snapshot]) -> Vec<(String, String)> {
    let row = |s: &Snapshot| {
        let state = match s.vm_state_size {
            0 => String::new(),
            size => format!(", VM state of {}", table::bytes(size)),
        };
        (
            format!("snapshot {}:", printable(&s.id)),
            format!("{}, {}{state}", printable(&s.name), date(s)),
        )
    };
    list.iter().map(row).collect()
}

fn value(snapshot: &Snapshot) -> Value {
    const BILLION: u64 = 1_000_000_000;
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    if let Some(icount) = snapshot.icount {
        set("icount", icount.into());
    }
    set("vm-clock-nsec", (snapshot.vm_clock_nsec % BILLION).into());
    set("name", replaced(&snapshot.name).into());
    set("date-sec", snapshot.date_sec.into());
    set("date-nsec", snapshot.date_nsec.into());
    set("vm-clock-sec", (snapshot.vm_clock_nsec / BILLION).into());
    set("id", replaced(&snapshot.id).into());
    set("vm-state-size", snapshot.vm_state_size.into());
    Value::Object(object)
}

fn date(snapshot: &Snapshot) -> String {
    let seconds = i64::from(snapshot.date_sec);
    match Timestamp::from_second(seconds) {
        Ok(time) => {
            let local = time.to_zoned(TimeZone::system());
            local.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_) => seconds.to_string(),
    }
}

fn clock(snapshot: &Snapshot) -> String {
    let millis = snapshot.vm_clock_nsec / 1_000_000;
    let seconds = millis / 1000;
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        millis % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_the_columns_of_qemu_img() {
        let snapshot = Snapshot {
            id: "1".into(),
            name: "first\n".into(),
            vm_state_size: 1 << 20,
            date_sec: 0,
            date_nsec: 5,
            vm_clock_nsec: 3_723_004_000_000,
            icount: None,
            disk_size: 0,
        };
        let mut out = Vec::new();
        human(&mut out, std::slice::from_ref(&snapshot)).expect("memory has room");
        let text = String::from_utf8(out).expect("is text");
        let row = text.lines().nth(2).expect("a row");
        assert!(
            row.starts_with("1       first\\u{a}          1 MiB "),
            "{row}"
        );
        assert!(row.ends_with("  0001:02:03.004         --"), "{row}");
        let found = value(&snapshot);
        assert_eq!(found["vm-clock-sec"], 3723);
        assert_eq!(found["vm-clock-nsec"], 4_000_000);
        assert_eq!(found.get("icount"), None);
    }
}
