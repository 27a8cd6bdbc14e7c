//! What `info` shows of a file.

use serde_json::{Map, Value, json};

use super::header::Packing;
use super::image::AndroidCow;
use crate::image::info::Detail;

/// The header, how many operations of each kind there are, and how far a merge is.
pub(super) fn details(cow: &AndroidCow) -> Vec<Detail> {
    let (header, table) = (&cow.header, &cow.table);
    let mut details = vec![
        Detail::new("version", header.version),
        Detail::new("block-size", super::header::BLOCK),
        Detail::new("compression", compression(cow)),
        Detail::new("cluster-ops", header.cluster_ops),
        Detail::new("scratch-size", header.scratch),
        Detail::new("operations", table.ops),
    ];
    let names = [
        "copy", "replace", "zero", "xor", "label", "cluster", "sequence",
    ];
    let kinds: Map<String, Value> = names
        .into_iter()
        .zip(table.kinds)
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| (name.to_owned(), json!(count)))
        .collect();
    details.push(Detail::new("kinds", kinds));
    details.push(Detail::new("sequence-entries", table.listed));
    details.push(Detail::new("merged-operations", header.merged));
    let state = match (header.merged, cow.within) {
        (_, true) => "stopped within a window",
        (0, _) => "not begun",
        (merged, _) if merged == table.making => "done",
        _ => "in part",
    };
    details.push(Detail::new("merge", state));
    if let Some(tables) = &header.third {
        details.push(Detail::new("max-compression-size", tables.largest));
        details.push(Detail::new("resume-points", tables.resume));
    }
    details
}

fn compression(cow: &AndroidCow) -> &'static str {
    if let Some(tables) = &cow.header.third {
        return tables.packing.name();
    }
    cow.table.packing.unwrap_or(Packing::Plain).name()
}
