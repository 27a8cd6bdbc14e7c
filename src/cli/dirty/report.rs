//! What a log is printed as.

use std::ops::Range;

use serde_json::{Value, json};

use crate::cli::common::{OutputArgs, OutputFormat, print};
use crate::cli::dirty::LogArgs;
use crate::dirty::{DirtyLog, Regions, Usage};
use crate::output::table;

/// Prints what a log is.
pub(super) fn info(log: &DirtyLog, args: &LogArgs, output: OutputArgs) -> anyhow::Result<()> {
    let value = value(log, args);
    print(|out| {
        if output.output == OutputFormat::Json {
            return Ok(writeln!(out, "{value:#}")?);
        }
        let mut rows = table::plain();
        for (key, value) in value.as_object().into_iter().flatten() {
            let is_bytes = ["virtual-size", "granularity", "dirty-bytes"].contains(&&**key);
            let shown = match (value, value.as_u64()) {
                (_, Some(bytes)) if is_bytes => table::bytes(bytes),
                (Value::String(text), _) => text.clone(),
                (other, _) => other.to_string(),
            };
            rows.add_row([format!("{}:", key.replace('-', " ")), shown]);
        }
        Ok(table::write(out, rows)?)
    })
}

fn value(log: &DirtyLog, args: &LogArgs) -> Value {
    let regions = log.regions();
    let geometry = regions.geometry();
    let mut value = json!({
        "filename": args.file.to_string_lossy(),
        "format": log.kind().name(),
        "state": match log.usage() {
            Usage::Closed => "closed",
            Usage::Open => "in use",
            Usage::Lost => "unreliable",
        },
        "regions": geometry.regions(),
        "dirty-regions": regions.count(),
    });
    if args.knows_granularity(log) {
        value["virtual-size"] = geometry.size().into();
        value["granularity"] = geometry.granularity().into();
        value["dirty-bytes"] = regions.dirty_bytes().into();
    }
    if let Some(disk) = log.disk() {
        value["disk-identity"] = disk.to_string().into();
    }
    if let Some([parent, child]) = log.links() {
        value["cbt-parent"] = parent.to_string().into();
        value["cbt-child"] = child.to_string().into();
    }
    value
}

/// Prints the dirty ranges, one by one.
pub(super) fn dump(regions: &Regions, is_json: bool) -> anyhow::Result<()> {
    let geometry = regions.geometry();
    let len = |range: &Range<u64>| range.end - range.start;
    print(|out| {
        if !is_json {
            writeln!(out, "Start             Length")?;
            for range in regions.dirty(0) {
                writeln!(out, "{:<#16x}  {:#x}", range.start, len(&range))?;
            }
            return Ok(());
        }
        let (size, granularity) = (geometry.size(), geometry.granularity());
        write!(
            out,
            "{{\n  \"size\": {size},\n  \"granularity\": {granularity},\n  \"dirty\": ["
        )?;
        for (number, range) in regions.dirty(0).enumerate() {
            let comma = if number == 0 { "" } else { "," };
            let entry = json!({ "start": range.start, "length": len(&range) });
            write!(out, "{comma}\n    {entry}")?;
        }
        Ok(writeln!(out, "\n  ]\n}}")?)
    })
}
