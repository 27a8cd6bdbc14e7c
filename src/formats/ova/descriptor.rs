//! The descriptor (OVF, DSP0243): which files there are, and which of them are disks.
//!
//! XML is matched by namespace and local name, of OVF 0.9, 1.x and 2.x.  Document types, and with
//! them entities of its own, are refused.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use roxmltree::{Document, Node, ParsingOptions};

use crate::error::{Error, ErrorKind, Result};
use crate::formats::ova::bounds;
use crate::util::text::printable;

/// Most bytes of a descriptor.
pub(super) const MAX_BYTES: u64 = 16 << 20;
/// Most elements and pieces of text.
pub(super) const MAX_NODES: u32 = 300_000;
/// Most files that it may refer to, and most disks.
const MAX_FILES: usize = 10_000;
/// Most bytes of a number.
const MAX_NUMBER: usize = 64;
/// What the namespaces of DMTF begin with; a version follows.
pub(super) const NAMESPACE: &str = "http://schemas.dmtf.org/ovf/envelope/";
/// The namespace of OVF 0.9.
pub(super) const NAMESPACE_OLD: &str = "http://www.vmware.com/schema/ovf/1/envelope";

/// A file that the descriptor refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) id: String,
    /// As it is written: a URI reference.
    pub(super) href: String,
    /// Bytes of the file, as the descriptor has it: often wrong.
    pub(super) size: Option<u64>,
    pub(super) compression: Option<String>,
    /// Bytes of each of the parts that the file is in.
    pub(super) chunk: Option<String>,
}

/// Size of a disk, as the descriptor has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Capacity {
    Bytes(u64),
    /// What is written there makes no size.
    Unknown(String),
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) id: String,
    pub(super) capacity: Capacity,
    /// Units of what is written for it.
    pub(super) units: Option<String>,
    /// Place in the list of files; `None`: the disk is empty.
    pub(super) file: Option<usize>,
    /// A URI that stands for the format; it decides nothing.
    pub(super) format: Option<String>,
    pub(super) parent: Option<String>,
    pub(super) populated: Option<u64>,
}

/// What a descriptor says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Envelope {
    pub(super) version: String,
    pub(super) files: Vec<File>,
    pub(super) disks: Vec<Disk>,
    /// Identities of the virtual machines.
    pub(super) systems: Vec<String>,
    /// Families of virtual hardware that they want.
    pub(super) hardware: Vec<String>,
}

impl Envelope {
    /// Reads a descriptor.
    ///
    /// # Errors
    /// `WrongFormat` where it is none; `Corrupt` for what contradicts itself; `OutOfRange` past the
    /// bounds above.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
            let text = "the descriptor is UTF-16 (allowed: UTF-8)";
            return Err(Error::unsupported(text));
        }
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let at = e.valid_up_to();
            Error::corrupt(format!("the descriptor is not UTF-8 at {at:#x}"))
        })?;
        bounds::check(text)?;
        let options = ParsingOptions {
            allow_dtd: false,
            nodes_limit: MAX_NODES,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(text, options).map_err(wrong_xml)?;
        Self::of(document.root_element())
    }

    fn of(root: Node<'_, '_>) -> Result<Self> {
        let namespace = root.tag_name().namespace().unwrap_or_default();
        let version = match namespace.strip_prefix(NAMESPACE) {
            Some(version) => version,
            None if namespace == NAMESPACE_OLD => "0.9",
            None => "",
        };
        if root.tag_name().name() != "Envelope" || version.is_empty() {
            let text = format!(
                "the descriptor is <{}> of namespace '{}' (allowed: Envelope of {NAMESPACE}1 or 2, \
                 or of {NAMESPACE_OLD})",
                printable(root.tag_name().name()),
                printable(namespace)
            );
            return Err(Error::new(ErrorKind::WrongFormat, text));
        }
        let files = files(root)?;
        let disks = disks(root, &files)?;
        let systems = named(root.descendants(), "VirtualSystem");
        let hardware = named(root.descendants(), "VirtualSystemType");
        Ok(Self {
            version: version.to_owned(),
            files,
            disks,
            systems: systems.filter_map(|s| attribute(s, "id")).collect(),
            hardware: hardware
                .filter_map(|h| h.text().map(|text| text.trim().to_owned()))
                .collect(),
        })
    }
}

fn wrong_xml(error: roxmltree::Error) -> Error {
    match error {
        roxmltree::Error::DtdDetected => Error::corrupt(
            "the descriptor has a document type (allowed: none, so that nothing stands for \
             something else)",
        ),
        roxmltree::Error::NodesLimitReached => Error::new(
            ErrorKind::OutOfRange,
            format!("the descriptor has more than {MAX_NODES} elements and texts"),
        ),
        error => Error::corrupt(format!(
            "the descriptor is no well-formed XML: {}",
            printable(&error.to_string())
        )),
    }
}

/// The elements called `name`, in any namespace of its document's that is not another schema's.
fn named<'a, 'i: 'a>(
    nodes: impl Iterator<Item = Node<'a, 'i>>,
    name: &'static str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    nodes.filter(move |node| node.is_element() && node.tag_name().name() == name)
}

/// An attribute, in the namespace of OVF or in none.
fn attribute(node: Node<'_, '_>, name: &str) -> Option<String> {
    let of_ovf = |namespace: Option<&str>| {
        namespace.is_some_and(|n| n.starts_with(NAMESPACE) || n == NAMESPACE_OLD)
    };
    let mut found = node.attributes().filter(|a| a.name() == name);
    let own = found.clone().find(|a| of_ovf(a.namespace()));
    let own = own.or_else(|| found.find(|a| a.namespace().is_none()));
    own.map(|a| a.value().to_owned())
}

fn required(node: Node<'_, '_>, name: &str) -> Result<String> {
    let missing = || {
        let element = node.tag_name().name();
        Error::corrupt(format!("the descriptor has a {element} without {name}"))
    };
    attribute(node, name).ok_or_else(missing)
}

fn files(root: Node<'_, '_>) -> Result<Vec<File>> {
    let references = named(root.children(), "References");
    let elements = references.flat_map(|r| named(r.children(), "File"));
    let (mut files, mut ids) = (Vec::new(), HashSet::new());
    for element in elements {
        bounded(files.len(), "files")?;
        let file = File {
            id: required(element, "id")?,
            href: required(element, "href")?,
            size: attribute(element, "size").and_then(|size| size.trim().parse().ok()),
            compression: attribute(element, "compression"),
            chunk: attribute(element, "chunkSize"),
        };
        if !ids.insert(file.id.clone()) {
            return Err(twice("files", &file.id));
        }
        files.push(file);
    }
    Ok(files)
}

fn disks(root: Node<'_, '_>, files: &[File]) -> Result<Vec<Disk>> {
    let is_section = |node: &Node<'_, '_>| match node.tag_name().name() {
        "DiskSection" => true,
        // OVF 0.9 tells sections apart by their types.
        "Section" => node
            .attributes()
            .any(|a| a.name() == "type" && a.value().ends_with("DiskSection_Type")),
        _ => false,
    };
    let sections = root.children().filter(is_section);
    let elements = sections.flat_map(|section| named(section.children(), "Disk"));
    let places: HashMap<&str, usize> = files
        .iter()
        .enumerate()
        .map(|(place, file)| (&*file.id, place))
        .collect();
    let properties = properties(root);
    let (mut disks, mut ids) = (Vec::new(), HashSet::new());
    for element in elements {
        bounded(disks.len(), "disks")?;
        let id = required(element, "diskId")?;
        let file = match attribute(element, "fileRef") {
            None => None,
            Some(name) => Some(*places.get(&*name).ok_or_else(|| {
                Error::corrupt(format!(
                    "disk '{}' of the descriptor is in file '{}', which its References do not have",
                    printable(&id),
                    printable(&name)
                ))
            })?),
        };
        let units = attribute(element, "capacityAllocationUnits");
        let capacity = attribute(element, "capacity").unwrap_or_default();
        if !ids.insert(id.clone()) {
            return Err(twice("disks", &id));
        }
        disks.push(Disk {
            id,
            capacity: capacity_of(&capacity, units.as_deref(), &properties),
            units,
            file,
            format: attribute(element, "format"),
            parent: attribute(element, "parentRef"),
            populated: attribute(element, "populatedSize").and_then(|size| size.parse().ok()),
        });
    }
    Ok(disks)
}

fn bounded(count: usize, what: &str) -> Result<()> {
    match count < MAX_FILES {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::OutOfRange,
            format!("the descriptor has more than {MAX_FILES} {what}"),
        )),
    }
}

fn twice(what: &str, id: &str) -> Error {
    let id = printable(id);
    Error::corrupt(format!("the descriptor has two {what} '{id}'"))
}

/// Values of the properties that `${KEY}` stands for.
fn properties(root: Node<'_, '_>) -> HashMap<String, String> {
    let properties = named(root.descendants(), "Property");
    properties
        .filter_map(|p| Some((attribute(p, "key")?, attribute(p, "value")?)))
        .collect()
}

fn capacity_of(
    written: &str,
    units: Option<&str>,
    properties: &HashMap<String, String>,
) -> Capacity {
    let unknown = || {
        Capacity::Unknown(match units {
            Some(units) => format!("{written} {units}"),
            None => written.to_owned(),
        })
    };
    let key = written
        .trim()
        .strip_prefix("${")
        .and_then(|rest| rest.strip_suffix('}'));
    let number = match key {
        Some(key) => properties.get(key).map_or("", |value| &**value),
        None => written,
    };
    // A long one would be read once for each disk that goes by it.
    let number = Some(number).filter(|number| number.len() <= MAX_NUMBER);
    let bytes = number.and_then(|number| number.trim().parse::<u64>().ok());
    let bytes = bytes.and_then(|n| n.checked_mul(unit(units.unwrap_or("byte"))?));
    bytes.map_or_else(unknown, Capacity::Bytes)
}

/// Bytes of a programmatic unit (DSP0004), and of the words that are met.
fn unit(units: &str) -> Option<u64> {
    let word: String = units
        .chars()
        .filter(|c| !c.is_whitespace())
        .flat_map(char::to_lowercase)
        .collect();
    match &*word {
        "" | "byte" | "bytes" => Some(1),
        "kilobytes" | "kb" => Some(1 << 10),
        "megabytes" | "mb" => Some(1 << 20),
        "gigabytes" | "gb" => Some(1 << 30),
        word => {
            let power = word.strip_prefix("byte*2^")?.parse::<u32>().ok()?;
            1u64.checked_shl(power)
        }
    }
}

/// The name that a reference stands for: `%20` and the like are decoded once.
///
/// # Errors
/// `Denied` for what is elsewhere; `Corrupt` for what is no reference.
pub(super) fn name_of(href: &str) -> Result<OsString> {
    let shown = printable(href);
    // RFC 3986: a reference that is no URI has no colon in its first segment.
    let scheme = href.split(['/', '?', '#']).next().unwrap_or_default();
    if let Some((scheme, _)) = scheme.split_once(':') {
        let text = format!(
            "the descriptor refers to '{shown}' (allowed: a file beside it, and not one by \
             '{}:')",
            printable(scheme)
        );
        return Err(Error::new(ErrorKind::Denied, text));
    }
    let mut name = Vec::with_capacity(href.len());
    let mut bytes = href.bytes();
    while let Some(byte) = bytes.next() {
        let digit = |b: Option<u8>| char::from(b?).to_digit(16);
        let byte = match byte {
            b'%' => match (digit(bytes.next()), digit(bytes.next())) {
                (Some(high), Some(low)) => u8::try_from(high * 16 + low).unwrap_or_default(),
                _ => return Err(no_name(&shown)),
            },
            byte => byte,
        };
        if byte == 0 {
            return Err(no_name(&shown));
        }
        name.push(byte);
    }
    match name.is_empty() {
        true => Err(no_name(&shown)),
        false => Ok(OsString::from_vec(name)),
    }
}

fn no_name(shown: &str) -> Error {
    Error::corrupt(format!(
        "the descriptor refers to '{shown}', which is no name"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(body: &str) -> Result<Envelope> {
        let text = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ovf:Envelope xmlns:ovf=\"{NAMESPACE}1\" \
             xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">{body}</ovf:Envelope>"
        );
        Envelope::parse(text.as_bytes())
    }

    #[test]
    fn disks_are_found_whatever_the_prefix_and_the_version() {
        let bodies = [
            (NAMESPACE.to_owned() + "1", "ovf:", "DiskSection"),
            (NAMESPACE.to_owned() + "2", "", "DiskSection"),
            (
                NAMESPACE_OLD.to_owned(),
                "ovf:",
                "Section xsi:type=\"ovf:DiskSection_Type\"",
            ),
        ];
        for (namespace, prefix, section) in bodies {
            let end = section.split(' ').next().expect("a name");
            let text = format!(
                "\u{feff}<Envelope xmlns=\"{namespace}\" xmlns:ovf=\"{namespace}\" \
                 xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\
                 <References><File {prefix}id='f' {prefix}href='a%20b.vmdk' {prefix}size='7'/>\
                 </References><{section}><Info/>\
                 <Disk {prefix}diskId='d' {prefix}capacity='2' {prefix}fileRef='f' \
                 {prefix}capacityAllocationUnits='byte * 2^30'/></{end}>\
                 <VirtualSystem {prefix}id='vm'/></Envelope>"
            );
            let envelope = Envelope::parse(text.as_bytes()).expect("is right");
            assert_eq!(envelope.disks.len(), 1, "{text}");
            assert_eq!(envelope.disks[0].capacity, Capacity::Bytes(2 << 30));
            assert_eq!(envelope.disks[0].file, Some(0));
            assert_eq!(envelope.systems, ["vm"]);
            let name = name_of(&envelope.files[0].href).expect("is a name");
            assert_eq!(name, "a b.vmdk");
        }
    }

    #[test]
    fn capacities_that_are_no_sizes_are_shown_as_they_are() {
        let long = format!("{}3", "0".repeat(100));
        let properties = HashMap::from([
            ("size".to_owned(), "3".to_owned()),
            ("long".to_owned(), long),
        ]);
        for (written, units, bytes) in [
            ("10", None, Some(10)),
            ("10", Some("byte"), Some(10)),
            ("10", Some("MegaBytes"), Some(10 << 20)),
            ("10", Some("byte*2^10"), Some(10 << 10)),
            ("${size}", Some("byte * 2^30"), Some(3 << 30)),
            ("${other}", None, None),
            ("${long}", None, None),
            ("-1", None, None),
            ("1e99", None, None),
            ("99999999999", Some("byte * 2^40"), None),
            ("1", Some("byte * 2^64"), None),
            ("1", Some("parsec"), None),
        ] {
            let capacity = capacity_of(written, units, &properties);
            match bytes {
                Some(bytes) => assert_eq!(capacity, Capacity::Bytes(bytes), "{written} {units:?}"),
                None => assert!(
                    matches!(capacity, Capacity::Unknown(_)),
                    "{written} {units:?}"
                ),
            }
        }
    }

    #[test]
    fn references_to_elsewhere_are_refused() {
        for href in ["http://host/a.vmdk", "file:///etc/passwd", "nbd:x", "C:\\a"] {
            assert_eq!(name_of(href).expect_err(href).kind(), ErrorKind::Denied);
        }
        for href in ["", "a%2", "a%zz", "a%00b"] {
            assert_eq!(name_of(href).expect_err(href).kind(), ErrorKind::Corrupt);
        }
        assert_eq!(name_of("a%2520b").expect("is a name"), "a%20b");
        assert_eq!(name_of("dir/a:b").expect("is a name"), "dir/a:b");
    }

    #[test]
    fn bombs_and_entities_are_refused_and_depth_costs_no_stack() {
        let bomb = "<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;'>]><x>&b;</x>";
        let error = Envelope::parse(bomb.as_bytes()).expect_err("has a document type");
        assert!(error.to_string().contains("document type"), "{error}");
        let outside = "<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><x>&a;</x>";
        Envelope::parse(outside.as_bytes()).expect_err("has a document type");
        envelope("&unknown;").expect_err("is an entity of nobody");
        let deep = "<a>".repeat(250_000) + &"</a>".repeat(250_000);
        envelope(&deep).map(|_| ()).expect("is no more than deep");
        let wide = "<a/>".repeat(400_000);
        let error = envelope(&wide).expect_err("is too much");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        let file = "<References><File ovf:id='f' ovf:href='a'/><File ovf:id='f' ovf:href='b'/>\
                    </References>"
            .replace("<", "<ovf:")
            .replace("<ovf:/", "</ovf:");
        for (body, part) in [
            (&*file, "two files 'f'"),
            (
                "<ovf:DiskSection><ovf:Disk ovf:diskId='d' ovf:fileRef='g'/></ovf:DiskSection>",
                "'g'",
            ),
            (
                "<ovf:DiskSection><ovf:Disk/></ovf:DiskSection>",
                "without diskId",
            ),
        ] {
            let error = envelope(body).expect_err(part);
            assert!(error.to_string().contains(part), "{error}");
        }
        let other = Envelope::parse(b"<Envelope xmlns='urn:x'/>").expect_err("is another");
        assert_eq!(other.kind(), ErrorKind::WrongFormat);
        let wide = Envelope::parse(b"\xff\xfe<\0").expect_err("is UTF-16");
        assert_eq!(wide.kind(), ErrorKind::Unsupported);
    }
}
