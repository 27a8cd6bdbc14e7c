//! What is made reads as what was asked for.

use super::*;
use crate::formats::ova::descriptor::{Capacity, Envelope};

fn made(options: &str, disks: &[u64]) -> Result<Box<dyn Assembly>> {
    let values = OptionValues::parse(OPTIONS, "ova", [options])?;
    plan(&Plan {
        disks,
        values: &values,
        stem: Some("my appliance"),
        description: None,
    })
}

fn stored(sizes: &[u64]) -> Vec<Stored> {
    let one = |len: &u64| Stored {
        len: *len,
        digest: Some("ab".repeat(32)),
    };
    sizes.iter().map(one).collect()
}

/// The descriptor in what comes before the disks.
fn descriptor(head: &[u8]) -> &[u8] {
    let size = std::str::from_utf8(&head[124..135]).expect("is text");
    &head[512..512 + usize::from_str_radix(size, 8).expect("is a size")]
}

#[test]
fn the_head_is_as_long_whatever_the_disks_come_to() {
    for options in [
        "",
        "manifest=none",
        "manifest=sha512,network=a & <b>,firmware=efi",
    ] {
        let package = made(options, &[10 << 20, 1 << 40]).expect("is right");
        for sizes in [[0, 1], [u64::MAX, 9_999_999], [65_536, 1 << 40]] {
            let head = package.head(&stored(&sizes)).expect("is right");
            assert_eq!(head.len() as u64, package.head_len(), "{options} {sizes:?}");
            let envelope = Envelope::parse(descriptor(&head)).expect("is a descriptor");
            let found: Vec<Option<u64>> = envelope.files.iter().map(|f| f.size).collect();
            assert_eq!(found, sizes.map(Some));
            assert_eq!(envelope.disks[1].capacity, Capacity::Bytes(1 << 40));
            assert_eq!(envelope.files[1].href, "my_appliance-disk2.vmdk");
        }
    }
}

#[test]
fn a_disk_hangs_on_a_unit_of_its_own_that_its_controller_has() {
    for (controller, most) in [("lsilogic", 60), ("ide", 4), ("sata", 120), ("nvme", 60)] {
        let options = format!("controller={controller}");
        let disks = vec![1 << 20; most];
        let package = made(&options, &disks).expect("has room");
        let head = package.head(&stored(&disks)).expect("is right");
        let text = std::str::from_utf8(descriptor(&head)).expect("is text");
        let document = roxmltree::Document::parse(text).expect("is XML");
        let items = document
            .descendants()
            .filter(|n| n.tag_name().name() == "Item");
        let (mut places, mut ids) = (Vec::new(), Vec::new());
        for item in items {
            let child = |name: &str| {
                let mut found = item.children().filter(|c| c.tag_name().name() == name);
                found.next().and_then(|c| c.text()).map(str::to_owned)
            };
            let names: Vec<&str> = item
                .children()
                .filter(roxmltree::Node::is_element)
                .map(|c| c.tag_name().name())
                .collect();
            assert!(names.is_sorted(), "{names:?}");
            let id: u32 = child("InstanceID")
                .expect("has one")
                .parse()
                .expect("a number");
            if child("ResourceType").as_deref() == Some("17") {
                let parent: u32 = child("Parent").expect("has one").parse().expect("a number");
                assert!(ids.contains(&parent), "what it hangs on comes first");
                places.push((parent, child("AddressOnParent")));
            }
            ids.push(id);
        }
        assert_eq!(places.len(), most);
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all);
        let seventh = Some("7".to_owned());
        assert!(controller != "lsilogic" || places.iter().all(|(_, unit)| *unit != seventh));
        places.sort();
        places.dedup();
        assert_eq!(places.len(), most, "{controller}");
        let more = vec![1 << 20; most + 1];
        made(&options, &more).expect_err("has no room");
    }
}

#[test]
fn options_that_make_no_machine_are_refused_by_name() {
    for (options, part) in [
        ("name=a b", "'name'"),
        ("name=../x", "'name'"),
        ("cpus=0", "'cpus'"),
        ("memory=1000", "'memory'"),
        ("memory=1M", "'memory'"),
        ("hwversion=3", "'hwversion'"),
        ("controller=nvme,hwversion=12", "hwversion"),
        ("controller=floppy", "'controller'"),
        ("os_type=a\nb", "'os_type'"),
    ] {
        let error = made(options, &[1 << 20]).expect_err(options).to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_descriptor_of_the_users_own_keeps_all_but_the_sizes() {
    let values = OptionValues::default();
    let disks = [1 << 20, 2 << 20];
    let head = made("", &disks)
        .expect("is right")
        .head(&stored(&[1, 2]))
        .expect("is right");
    let own = std::str::from_utf8(descriptor(&head)).expect("is text");
    let own = own
        .replace("my_appliance-disk1", "one")
        .replace("<Name>", "<Name>My ");
    let adopt = |text: &str, disks: &[u64]| {
        plan(&Plan {
            disks,
            values: &values,
            stem: Some("x"),
            description: Some(text.as_bytes()),
        })
    };
    let package = adopt(&own, &disks).expect("fits");
    let head = package.head(&stored(&[77, u64::MAX])).expect("is right");
    assert_eq!(head.len() as u64, package.head_len());
    let text = std::str::from_utf8(descriptor(&head)).expect("is text");
    let envelope = Envelope::parse(text.as_bytes()).expect("is a descriptor");
    assert_eq!(envelope.files[0].size, Some(77));
    assert_eq!(envelope.files[1].size, Some(u64::MAX));
    assert!(text.contains("<Name>My "), "{text}");
    assert_eq!(&package.before(0, 77).expect("is a name")[..8], b"one.vmdk");
    for (text, disks, part) in [
        (own.clone(), &disks[..1], "1 sources"),
        (own.clone(), &[1, 2], "capacity"),
        (own.replace("#streamOptimized", ""), &disks, "format"),
        (
            own.replace("fileRef=\"file2\"", "fileRef=\"file1\""),
            &disks,
            "another disk",
        ),
        (own.replace("ovf:size", "ovf:other"), &disks, "no size"),
        (own.replace("one.vmdk", "http://a/b"), &disks, "http"),
    ] {
        let error = adopt(&text, disks).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
}
