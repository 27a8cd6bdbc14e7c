//! The ublk devices of this machine.

use std::io::{self, Write};

use serde_json::{Value, json};

use crate::output::{json as output_json, table};
use crate::server::ublk::{Found, Transfer};
use crate::util::size;

/// Writes a table; nothing where there are no devices.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, found: &[Found]) -> io::Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let mut lines = table::plain();
    lines.set_header([
        "DEVICE", "STATE", "PID", "SIZE", "QUEUES", "DEPTH", "TRANSFER", "IMAGE",
    ]);
    for device in found {
        lines.add_row([
            path(device),
            device.state.name().to_owned(),
            pid(device).map_or("-".to_owned(), |pid| pid.to_string()),
            size::human(device.size),
            device.queues.to_string(),
            device.depth.to_string(),
            Transfer::of(device.features).to_string(),
            device.image.as_deref().map_or("-".to_owned(), table::path),
        ]);
    }
    table::write(out, lines)
}

/// Writes the list as JSON.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, found: &[Found]) -> io::Result<()> {
    let values: Vec<Value> = found.iter().map(value).collect();
    output_json::write(out, &values)
}

fn value(device: &Found) -> Value {
    json!({
        "device": path(device),
        "id": device.id,
        "state": device.state.name(),
        "pid": pid(device),
        "virtual-size": device.size,
        "queues": device.queues,
        "depth": device.depth,
        "max-io": device.max_io,
        "transfer": Transfer::of(device.features).to_string(),
        "features": device.features.names().collect::<Vec<_>>(),
        "image": device.image.as_deref().map(output_json::path),
    })
}

fn path(device: &Found) -> String {
    format!("/dev/ublkb{}", device.id)
}

/// The process that serves it.
fn pid(device: &Found) -> Option<i32> {
    device.is_served().then_some(device.pid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::ublk::{Features, State};

    fn found() -> Found {
        Found {
            id: 3,
            state: State::Quiesced,
            pid: -1,
            size: 1 << 30,
            queues: 2,
            depth: 128,
            max_io: 512 << 10,
            features: Features::from_bits(0x98),
            image: Some("a.qcow2".into()),
        }
    }

    #[test]
    fn a_device_without_a_server_is_told_from_one_that_is_served() {
        let mut out = Vec::new();
        human(&mut out, &[found()]).expect("writes");
        let text = String::from_utf8(out).expect("is text");
        let words: Vec<&str> = text
            .lines()
            .nth(1)
            .expect("a row")
            .split_whitespace()
            .collect();
        assert_eq!(words[..3], ["/dev/ublkb3", "quiesced", "-"]);
        assert_eq!(words[words.len() - 3..], ["user", "copy", "a.qcow2"]);
        let mut out = Vec::new();
        json(&mut out, &[found()]).expect("writes");
        let value: Value = serde_json::from_slice(&out).expect("is JSON");
        assert_eq!(value[0]["pid"], Value::Null);
        assert_eq!(value[0]["features"][2], "user copy");
    }
}
