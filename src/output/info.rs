//! `info`: what an image is.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use crate::image::Backing;
use crate::image::info::{Detail, HostInfo, HostKind, ImageInfo};
use crate::output::json as output_json;
use crate::output::snapshot;
use crate::output::table::{self, bytes};
use crate::util::text::{printable, replaced};

/// Writes tables of two columns, one for each layer, top first.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, layers: &[ImageInfo]) -> io::Result<()> {
    for (depth, info) in layers.iter().enumerate() {
        if depth > 0 {
            writeln!(out)?;
        }
        let mut rows = table::plain();
        for (label, value) in facts(info) {
            rows.add_row([label, value]);
        }
        table::write(out, rows)?;
    }
    Ok(())
}

/// Writes one object with the keys that qemu-img has.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, info: &ImageInfo) -> io::Result<()> {
    output_json::write(out, &value(info))
}

/// Writes a list of such objects, top first.
///
/// # Errors
/// The writer's.
pub fn json_chain(out: &mut dyn Write, layers: &[ImageInfo]) -> io::Result<()> {
    let layers: Vec<Value> = layers.iter().map(value).collect();
    output_json::write(out, &layers)
}

fn facts(info: &ImageInfo) -> Vec<(String, String)> {
    let mut facts = Vec::new();
    let mut fact = |label: &str, value: String| facts.push((format!("{label}:"), value));
    if let Some(path) = &info.path {
        fact("image", table::path(path));
    }
    fact("file format", info.format.to_owned());
    fact("virtual size", bytes(info.virtual_size));
    if let Some(disk_size) = info.host.disk_size {
        fact("disk size", bytes(disk_size));
    }
    fact("file length", bytes(info.host.len));
    if let Some(cluster_size) = info.cluster_size {
        fact("cluster size", bytes(cluster_size));
    }
    if let Some(backing) = &info.backing {
        fact("backing file", backing_name(backing, info));
        if let Some(format) = &backing.format {
            fact("backing file format", printable(format));
        }
    }
    if info.encrypted {
        fact("encrypted", "yes".to_owned());
    }
    if info.dirty {
        fact("dirty", "true".to_owned());
    }
    facts.extend(snapshot::rows(&info.snapshots));
    for Detail { key, value } in &info.details {
        spread(&mut facts, key, value);
    }
    facts
}

fn backing_name(backing: &Backing, info: &ImageInfo) -> String {
    let shown = match backing.names.first() {
        Some(name) => printable(&name.path),
        None => "(no name is recorded)".to_owned(),
    };
    match info.backing_path.as_deref().map(table::path) {
        Some(actual) if actual != shown => format!("{shown} (actual path: {actual})"),
        _ => shown,
    }
}

/// One row for a plain value, one for each member of anything larger.
pub(super) fn spread(facts: &mut Vec<(String, String)>, label: &str, value: &Value) {
    match value {
        Value::Object(members) => {
            for (key, member) in members {
                spread(facts, &format!("{label} {}", printable(key)), member);
            }
        }
        Value::Array(members) if members.iter().all(|m| m.get("number").is_some()) => {
            for member in members {
                let number = member
                    .get("number")
                    .map_or(String::new(), |n| word(label, n));
                // "tracks" are listed as "track 1", "track 2".
                let label = format!("{} {number}", label.trim_end_matches('s'));
                facts.push((caption(&label), members_of(member)));
            }
        }
        Value::Array(members) if members.iter().any(|m| m.is_object() || m.is_array()) => {
            for (index, member) in members.iter().enumerate() {
                spread(facts, &format!("{label} {index}"), member);
            }
        }
        Value::Array(members) => {
            let words: Vec<String> = members.iter().map(|m| word(label, m)).collect();
            facts.push((caption(label), words.join(", ")));
        }
        plain => facts.push((caption(label), word(label, plain))),
    }
}

/// What there is to say about one of several that have numbers.
fn members_of(value: &Value) -> String {
    let members = value
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != "number");
    let words = members.map(|(key, value)| format!("{} {}", printable(key), word(key, value)));
    words.collect::<Vec<_>>().join(", ")
}

fn caption(label: &str) -> String {
    format!("{}:", label.replace('-', " "))
}

fn word(label: &str, value: &Value) -> String {
    match value {
        Value::String(text) => printable(text),
        Value::Number(number) => match number.as_u64() {
            Some(size) if label.ends_with("-size") => bytes(size),
            _ => number.to_string(),
        },
        Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn value(info: &ImageInfo) -> Value {
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    set("children", json!([{ "name": "file", "info": child(info) }]));
    if !info.snapshots.is_empty() {
        set("snapshots", snapshot::values(&info.snapshots));
    }
    set("virtual-size", info.virtual_size.into());
    if let Some(path) = &info.path {
        set("filename", output_json::path(path).into());
    }
    set("format", info.format.into());
    if let Some(disk_size) = info.host.disk_size {
        set("actual-size", disk_size.into());
    }
    if let Some(cluster_size) = info.cluster_size {
        set("cluster-size", cluster_size.into());
    }
    if let Some(backing) = &info.backing {
        if let Some(name) = backing.names.first() {
            set("backing-filename", replaced(&name.path).into());
        }
        if let Some(path) = &info.backing_path {
            set("full-backing-filename", output_json::path(path).into());
        }
        if let Some(format) = &backing.format {
            set("backing-filename-format", format.as_str().into());
        }
    }
    if !info.details.is_empty() {
        let data: Map<String, Value> = info
            .details
            .iter()
            .map(|d| (d.key.to_owned(), d.value.clone()))
            .collect();
        set(
            "format-specific",
            json!({ "type": info.format, "data": data }),
        );
    }
    if info.encrypted {
        set("encrypted", true.into());
    }
    set("dirty-flag", info.dirty.into());
    Value::Object(object)
}

/// The file under the image, as qemu-img shows its protocol layer.
fn child(info: &ImageInfo) -> Value {
    let HostInfo {
        kind,
        len,
        disk_size,
    } = &info.host;
    let format = match kind {
        HostKind::File => "file",
        HostKind::Device => "host_device",
        HostKind::Other => "other",
    };
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    set("children", json!([]));
    set("virtual-size", (*len).into());
    if let Some(path) = &info.path {
        set("filename", output_json::path(path).into());
    }
    set("format", format.into());
    if let Some(disk_size) = disk_size {
        set("actual-size", (*disk_size).into());
    }
    set("format-specific", json!({ "type": format, "data": {} }));
    set("dirty-flag", false.into());
    Value::Object(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::BackingName;

    fn sample() -> ImageInfo {
        ImageInfo {
            path: Some("/d/a.vhd".into()),
            format: "vhd",
            virtual_size: 10 << 20,
            cluster_size: Some(2 << 20),
            host: HostInfo {
                kind: HostKind::File,
                len: 2560,
                disk_size: Some(4096),
            },
            backing: Some(Backing {
                names: vec![BackingName {
                    path: "b\x1b[2J.vhd".into(),
                    origin: "W2ru".to_owned(),
                }],
                format: Some("vhd".to_owned()),
                identity: None,
                state: None,
            }),
            backing_path: Some("/d/b\x1b[2J.vhd".into()),
            snapshots: Vec::new(),
            encrypted: false,
            dirty: false,
            details: vec![
                Detail::new("creator", "\u{202e}evil"),
                Detail::new("current-size", 10 << 20),
                Detail::new("locators", json!([{ "code": "W2ru", "sectors": [1, 2] }])),
            ],
        }
    }

    #[test]
    fn text_from_the_image_cannot_move_the_cursor() {
        let mut out = Vec::new();
        human(&mut out, &[sample()]).expect("memory has room");
        let text = String::from_utf8(out).expect("is text");
        assert!(
            text.contains("b\\u{1b}[2J.vhd (actual path: /d/b\\u{1b}[2J.vhd)"),
            "{text}"
        );
        assert!(text.contains("\\u{202e}evil"), "{text}");
        assert!(!text.contains('\x1b'), "{text}");
    }

    #[test]
    fn nested_details_become_one_row_each() {
        let rows = facts(&sample());
        for (label, value) in [
            ("current size:", "10 MiB (10485760 bytes)"),
            ("locators 0 code:", "W2ru"),
            ("locators 0 sectors:", "1, 2"),
        ] {
            assert!(
                rows.contains(&(label.to_owned(), value.to_owned())),
                "{rows:?}"
            );
        }
    }

    #[test]
    fn json_has_the_keys_of_qemu_img() {
        let value = value(&sample());
        for (pointer, expected) in [
            ("/virtual-size", json!(10_485_760)),
            ("/actual-size", json!(4096)),
            ("/cluster-size", json!(2_097_152)),
            ("/filename", json!("/d/a.vhd")),
            ("/format", json!("vhd")),
            ("/backing-filename", json!("b\x1b[2J.vhd")),
            ("/full-backing-filename", json!("/d/b\x1b[2J.vhd")),
            ("/backing-filename-format", json!("vhd")),
            ("/dirty-flag", json!(false)),
            ("/format-specific/type", json!("vhd")),
            ("/format-specific/data/current-size", json!(10_485_760)),
            ("/children/0/info/virtual-size", json!(2560)),
        ] {
            assert_eq!(value.pointer(pointer), Some(&expected), "{pointer}");
        }
    }
}
