//! Status and statistics as JSON.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Export;
use super::disk::Disk;
use super::run::Front;
use crate::backend::account::QueueStats;
use crate::backend::throttle::Key;
use crate::backend::{Kind, Limits, Totals};
use crate::output::json::path;

/// What one export is and how it does.
pub(super) fn status(disk: &Disk, address: Option<&String>, server: Vec<(&str, String)>) -> Value {
    let server: Map<String, Value> = server
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect();
    let backend = &disk.export.backend;
    let geometry = backend.geometry();
    let (file, format) = &*disk.image.lock();
    let under_way: u32 = backend.stats().iter().map(|q| q.depth).sum();
    json!({
        "name": disk.export.name,
        "description": disk.export.description,
        "address": address,
        "server": server,
        "image": path(file),
        "format": format.name,
        "snapshot": disk.opener.is_snapshot(),
        "virtual-size": geometry.virtual_size,
        "read-only": !geometry.writable,
        "state": backend.run_state().name(),
        "io-status": backend.io_status().name(),
        "requests": under_way,
        "highest-offset": backend.highest_offset(),
        "job": disk.merge.lock().as_ref().map(|merge| merge.status()),
        "limits": backend.limits().map(|m| limits(&m.group().limits())),
    })
}

/// Limits by the names that users type.
pub(super) fn limits(limits: &Limits) -> Value {
    let mut all = Map::new();
    for key in Key::ALL {
        let Some(rate) = limits.rate(key) else {
            continue;
        };
        all.insert(key.name().to_owned(), rate.average.into());
        if let Some(burst) = rate.burst {
            all.insert(format!("{}-burst", key.name()), burst.into());
            let length = format!("{}-burst-length", key.name());
            all.insert(length, rate.burst_seconds.into());
        }
    }
    if let Some(size) = limits.op_size() {
        all.insert("size".to_owned(), size.into());
    }
    all.into()
}

/// What one export has done, in all and by queue; queues that did nothing are left out.
pub(super) fn stats(front: &Front, index: usize, export: &Export) -> Value {
    let queues = export.backend.stats();
    let all = queues.iter().copied().reduce(QueueStats::plus);
    let used = queues.iter().enumerate().filter(|(_, q)| q.deepest > 0);
    let used: Vec<Value> = used
        .map(|(index, queue)| {
            let mut value = queue_stats(queue);
            value["queue"] = index.into();
            value
        })
        .collect();
    let mut total = queue_stats(&all.unwrap_or_default());
    for kind in Kind::ALL {
        // The client does that before its requests are spread over queues.
        total[kind.name()]["merged"] = front.server.merged(index, kind).into();
    }
    json!({
        "name": export.name,
        "total": total,
        "queues": used,
    })
}

fn queue_stats(queue: &QueueStats) -> Value {
    let mut value = Map::new();
    for kind in Kind::ALL {
        value.insert(kind.name().to_owned(), totals(queue.kind(kind)));
    }
    value.insert("depth".to_owned(), queue.depth.into());
    value.insert("max-depth".to_owned(), queue.deepest.into());
    value.insert("idle-ns".to_owned(), nanoseconds(queue.idle).into());
    value.into()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn totals(totals: &Totals) -> Value {
    let last = totals.classes.len() - 1;
    let classes = totals.classes.iter().enumerate();
    let histogram: Vec<Value> = classes
        .filter(|(_, count)| **count > 0)
        .map(|(n, count)| {
            let below = (n < last).then(|| 1000u64 << n);
            json!({ "below-ns": below, "count": count })
        })
        .collect();
    json!({
        "operations": totals.operations,
        "bytes": totals.bytes,
        "failed": totals.failed,
        "invalid": totals.invalid,
        "total-ns": nanoseconds(totals.time),
        "min-ns": nanoseconds(totals.least),
        "mean-ns": nanoseconds(totals.mean()),
        "max-ns": nanoseconds(totals.most),
        "histogram": histogram,
    })
}

/// Prints statistics of all exports as an event.
pub(super) fn print_stats(front: &Front) {
    for (index, disk) in front.disks.iter().enumerate() {
        let export = &disk.export;
        let mut text = match &*export.name {
            "" => "statistics:".to_owned(),
            name => format!("statistics of '{name}':"),
        };
        for kind in Kind::ALL {
            let totals = export.backend.totals(kind);
            text += &format!(
                " {} {} ({} bytes, {} failed, mean {:?})",
                kind.name(),
                totals.operations,
                totals.bytes,
                totals.failed,
                totals.mean()
            );
        }
        let mut machine = stats(front, index, export);
        machine["event"] = "stats".into();
        front.events.print(&text, &machine);
    }
}
