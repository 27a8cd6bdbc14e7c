//! What `info` shows of a disc.

use serde_json::{Map, Value, json};

use super::image::Cue;
use crate::image::disc::{Disc, Track};
use crate::image::info::Detail;

/// The tracks, and what else there is to tell.
pub(super) fn details(cue: &Cue) -> Vec<Detail> {
    let sessions = cue.table.tracks.last().map_or(1, |track| track.session);
    let mut details = Vec::new();
    if let Some(catalog) = &cue.table.catalog {
        details.push(Detail::new("catalog", catalog.to_string_lossy()));
    }
    details.push(Detail::new("sessions", sessions));
    details.push(Detail::new("sectors", cue.table.end));
    if let Some(track) = cue.track() {
        details.push(Detail::new("disk-track", track.number));
    }
    let tracks: Vec<Value> = cue.table.tracks.iter().map(|t| track(cue, t)).collect();
    details.push(Detail::new("tracks", tracks));
    details
}

fn track(cue: &Cue, track: &Track) -> Value {
    let mut object = Map::new();
    let mut put = |key: &str, value: Value| drop(object.insert(key.to_owned(), value));
    put("number", json!(track.number));
    put("mode", json!(track.mode.name()));
    put("lba", json!(track.lba));
    put("msf", json!(track.msf().to_string()));
    put("sectors", json!(track.sectors()));
    put("session", json!(track.session));
    if track.lba > track.start {
        put("pregap", json!(track.lba - track.start));
    }
    if let Some(stored) = track.body().next().and_then(|run| run.stored) {
        let path = cue
            .files
            .get(stored.file)
            .and_then(|file| file.storage.path());
        if let Some(path) = path {
            put("filename", json!(path.to_string_lossy()));
        }
        put("offset", json!(stored.host));
    }
    if !track.flags.is_empty() {
        put("flags", json!(track.flags.join(" ")));
    }
    if let Some(isrc) = &track.isrc {
        put("isrc", json!(isrc.to_string_lossy()));
    }
    Value::Object(object)
}
