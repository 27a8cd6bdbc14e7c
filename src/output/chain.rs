//! `chain`: families of images, as trees and as data.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::chain::family::{Family, Fault, Member, Trouble};
use crate::error::Error;
use crate::output::json as output_json;
use crate::output::table;
use crate::util::size;
use crate::util::text::{printable, replaced, shell_word};

/// By image and trouble, the words of the command that mends it; none where nothing does.
pub type Commands = Vec<Vec<Vec<PathBuf>>>;

/// Writes the trees, and then what is wrong.
///
/// # Errors
/// The writer's.
pub fn human(out: &mut dyn Write, family: &Family, commands: &Commands) -> io::Result<()> {
    let mut rows = table::plain();
    rows.add_row(["image", "format", "virtual size", "disk size", "own", ""]);
    for (name, index) in drawn(family) {
        let member = &family.members[index];
        let faults: Vec<&str> = member.troubles.iter().map(|t| t.fault.name()).collect();
        let sizes = [member.info.host.disk_size, member.own];
        let [disk_size, own] = sizes.map(|s| s.map_or("-".to_owned(), size::human));
        rows.add_row([
            name,
            member.info.format.to_owned(),
            size::human(member.info.virtual_size),
            disk_size,
            own,
            faults.join(", "),
        ]);
    }
    if !family.members.is_empty() {
        table::write(out, rows)?;
    }
    for (member, commands) in family.members.iter().zip(commands) {
        for (trouble, words) in member.troubles.iter().zip(commands) {
            writeln!(out, "\n{}: {}", path(member), printable(&trouble.text))?;
            if !words.is_empty() {
                let words: Vec<String> = words.iter().map(shell_word).collect();
                writeln!(out, "  {}{}", condition(trouble), words.join(" "))?;
            }
        }
    }
    for error in &family.unread {
        writeln!(out, "\n{}", printable(&whole(error)))?;
    }
    if family.is_cut {
        writeln!(out, "\nThere are more files than are looked at.")?;
    }
    Ok(())
}

/// Writes one object: `images`, each after what lies below it, and `unreadable` files.
///
/// # Errors
/// The writer's.
pub fn json(out: &mut dyn Write, family: &Family, commands: &Commands) -> io::Result<()> {
    let children = family.children();
    let paths = |indexes: &[usize]| -> Vec<String> {
        let members = indexes.iter().map(|index| &family.members[*index]);
        members.map(plain_path).collect()
    };
    let images = family.in_order().into_iter().map(|(index, depth)| {
        let mut image = value(family, &family.members[index], &commands[index]);
        image.insert("depth".to_owned(), depth.into());
        image.insert("children".to_owned(), paths(&children[index]).into());
        Value::Object(image)
    });
    let unread = family.unread.iter().map(
        |error| json!({ "filename": error.path().map(output_json::path), "error": message(error) }),
    );
    let all = json!({
        "images": images.collect::<Vec<_>>(),
        "unreadable": unread.collect::<Vec<_>>(),
        "complete": !family.is_cut,
    });
    output_json::write(out, &all)
}

/// The images in order, with the lines of the trees before their names.
fn drawn(family: &Family) -> Vec<(String, usize)> {
    let order = family.in_order();
    // By depth, whether another one comes at that depth before a shallower one: read backwards.
    let mut more: Vec<bool> = Vec::new();
    let mut drawn: Vec<(String, usize)> = order
        .iter()
        .rev()
        .map(|&(index, depth)| {
            more.truncate(depth + 1);
            more.resize(depth + 1, false);
            let lines = (1..=depth).map(|at| match (at == depth, more[at]) {
                (true, true) => "├─ ",
                (true, false) => "└─ ",
                (false, true) => "│  ",
                (false, false) => "   ",
            });
            let name = lines.chain([&*path(&family.members[index])]).collect();
            more[depth] = true;
            (name, index)
        })
        .collect();
    drawn.reverse();
    drawn
}

fn value(family: &Family, member: &Member, commands: &[Vec<PathBuf>]) -> Map<String, Value> {
    let mut object = Map::new();
    let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
    set("filename", plain_path(member).into());
    set("format", member.info.format.into());
    set("virtual-size", member.info.virtual_size.into());
    set("actual-size", member.info.host.disk_size.into());
    set("own-size", member.own.into());
    set("identity", member.identity.map(|u| u.to_string()).into());
    set("state", member.state.map(|u| u.to_string()).into());
    let parent = member.parent.map(|parent| &family.members[parent]);
    let link = member.info.backing.as_ref().map(|backing| {
        json!({
            "filename": parent.map(plain_path),
            "format": backing.format,
            "identity": backing.identity.map(|u| u.to_string()),
            "state": backing.state.map(|u| u.to_string()),
            "names": names(family, member),
        })
    });
    set("parent", link.unwrap_or_default());
    let problems = member.troubles.iter().zip(commands);
    let problems = problems.map(|(trouble, words)| {
        let words: Vec<String> = words.iter().map(replaced).collect();
        json!({
            "kind": trouble.fault.name(),
            "wrong": trouble.fault.is_wrong(),
            "text": trouble.text,
            "command": (!words.is_empty()).then_some(words),
            "sure": trouble.remedy.is_some_and(|remedy| remedy.is_sure),
        })
    });
    set("problems", problems.collect());
    object
}

fn names(family: &Family, member: &Member) -> Vec<Value> {
    let names = member.names.iter().map(|name| {
        let led = name.leads_to.as_ref().ok();
        let led = led.and_then(|index| family.members.get(*index));
        json!({
            "name": replaced(&name.name.path),
            "origin": name.name.origin,
            "leads-to": led.map(plain_path),
            "error": name.leads_to.as_ref().err(),
        })
    });
    names.collect()
}

/// What only the user can know of the command that mends it.
fn condition(trouble: &Trouble) -> &'static str {
    match (trouble.fault, trouble.remedy) {
        (Fault::Changed, _) => "if it is to be read as it is now: ",
        (_, Some(remedy)) if !remedy.is_sure => "if that is the one: ",
        _ => "",
    }
}

fn path(member: &Member) -> String {
    member
        .info
        .path
        .as_deref()
        .map(table::path)
        .unwrap_or_default()
}

fn plain_path(member: &Member) -> String {
    let path = member.info.path.as_deref();
    path.map(output_json::path).unwrap_or_default()
}

fn message(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{}: {cause}", error.message()),
        None => error.message().to_owned(),
    }
}

/// With the name of the file.
fn whole(error: &Error) -> String {
    match error.path() {
        Some(path) => format!("{}: {}", printable(path), message(error)),
        None => message(error),
    }
}
