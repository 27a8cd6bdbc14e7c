//! A descriptor (OVF 1.0) with what importers need and nothing else.

use std::fmt::Write as _;

use crate::formats::ova::write::machine::Machine;

/// How a disk that is streamed is called: the whole of it, or ESXi refuses the disk.
pub(super) const STREAMED: &str =
    "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
/// Digits of the largest size there is.
pub(super) const DIGITS: usize = 20;

const OPEN: &str = concat!(
    "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n",
    "<Envelope xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\"",
    " xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\"",
    " xmlns:cim=\"http://schemas.dmtf.org/wbem/wscim/1/common\"",
    " xmlns:rasd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/",
    "CIM_ResourceAllocationSettingData\"",
    " xmlns:vssd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/",
    "CIM_VirtualSystemSettingData\"",
    " xmlns:vmw=\"http://www.vmware.com/schema/ovf\"",
    " xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\n",
);

/// The descriptor of a machine with disks of these virtual sizes, stored in so many bytes.  Its length
/// does not depend on the latter.
pub(super) fn descriptor(machine: &Machine, disks: &[u64], stored: &[u64]) -> String {
    let mut text = OPEN.to_owned();
    references(&mut text, machine, stored);
    disk_section(&mut text, disks);
    if let Some(network) = &machine.network {
        let network = escaped(network);
        text += "  <NetworkSection>\n    <Info>Networks</Info>\n";
        let _ = writeln!(
            text,
            "    <Network ovf:name=\"{network}\"/>\n  </NetworkSection>"
        );
    }
    system(&mut text, machine, disks.len());
    text += &" ".repeat(stored.iter().map(|size| DIGITS - digits(*size)).sum());
    text += "</Envelope>\n";
    text
}

pub(super) fn digits(size: u64) -> usize {
    size.checked_ilog10().map_or(1, |log| log as usize + 1)
}

fn references(text: &mut String, machine: &Machine, stored: &[u64]) {
    text.push_str("  <References>\n");
    for (number, size) in stored.iter().enumerate() {
        let _ = writeln!(
            text,
            "    <File ovf:href=\"{}\" ovf:id=\"file{}\" ovf:size=\"{size}\"/>",
            machine.disk_name(number),
            number + 1
        );
    }
    text.push_str("  </References>\n");
}

fn disk_section(text: &mut String, disks: &[u64]) {
    text.push_str("  <DiskSection>\n    <Info>Disks</Info>\n");
    for (number, size) in disks.iter().enumerate() {
        let number = number + 1;
        // VirtualBox takes the number for bytes, whatever the units are.
        let _ = writeln!(
            text,
            "    <Disk ovf:capacity=\"{size}\" ovf:capacityAllocationUnits=\"byte\" \
             ovf:diskId=\"vmdisk{number}\" ovf:fileRef=\"file{number}\" ovf:format=\"{STREAMED}\"/>"
        );
    }
    text.push_str("  </DiskSection>\n");
}

fn system(text: &mut String, machine: &Machine, disks: usize) {
    let os_type = escaped(&machine.os_type);
    // CIM: 36 and 100 are Linux of 32 and 64 bits, 1 is something else.
    let number = match (os_type.contains("Linux"), os_type.contains("64")) {
        (true, true) => 100,
        (true, false) => 36,
        (false, _) => 1,
    };
    let name = &machine.name;
    let _ = write!(
        text,
        "  <VirtualSystem ovf:id=\"{name}\">\n    <Info>A virtual machine</Info>\n    \
         <Name>{name}</Name>\n    <OperatingSystemSection ovf:id=\"{number}\" \
         vmw:osType=\"{os_type}\">\n      <Info>The operating system</Info>\n    \
         </OperatingSystemSection>\n    <VirtualHardwareSection>\n      \
         <Info>Virtual hardware</Info>\n      <System>\n        \
         <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>\n        \
         <vssd:InstanceID>0</vssd:InstanceID>\n        \
         <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>\n        \
         <vssd:VirtualSystemType>vmx-{:02}</vssd:VirtualSystemType>\n      </System>\n",
        machine.hardware
    );
    hardware(text, machine, disks);
    if machine.efi {
        text.push_str(
            "      <vmw:Config ovf:required=\"false\" vmw:key=\"firmware\" vmw:value=\"efi\"/>\n",
        );
    }
    text.push_str("    </VirtualHardwareSection>\n  </VirtualSystem>\n");
}

/// Items: their children are in the order of the alphabet, and what others hang on comes first.
fn hardware(text: &mut String, machine: &Machine, disks: usize) {
    let (cpus, memory, controller) = (machine.cpus, machine.memory, machine.controller);
    item(
        text,
        &[
            ("AllocationUnits", "hertz * 10^6".to_owned()),
            ("ElementName", format!("{cpus} virtual CPU(s)")),
            ("InstanceID", "1".to_owned()),
            ("ResourceType", "3".to_owned()),
            ("VirtualQuantity", cpus.to_string()),
        ],
    );
    item(
        text,
        &[
            ("AllocationUnits", "byte * 2^20".to_owned()),
            ("ElementName", format!("{memory}MB of memory")),
            ("InstanceID", "2".to_owned()),
            ("ResourceType", "4".to_owned()),
            ("VirtualQuantity", memory.to_string()),
        ],
    );
    let controllers = disks
        .checked_sub(1)
        .map_or(0, |last| controller.place(last).0 + 1);
    let (kind, word) = controller.kind();
    for number in 0..controllers {
        let mut children = vec![
            ("Address", number.to_string()),
            ("ElementName", format!("{} {number}", controller.title())),
            ("InstanceID", (number + 3).to_string()),
        ];
        children.extend(word.map(|word| ("ResourceSubType", word.to_owned())));
        children.push(("ResourceType", kind.to_string()));
        item(text, &children);
    }
    for disk in 0..disks {
        let (parent, unit) = controller.place(disk);
        item(
            text,
            &[
                ("AddressOnParent", unit.to_string()),
                ("ElementName", format!("Hard disk {}", disk + 1)),
                ("HostResource", format!("ovf:/disk/vmdisk{}", disk + 1)),
                ("InstanceID", (controllers + 3 + disk).to_string()),
                ("Parent", (parent + 3).to_string()),
                ("ResourceType", "17".to_owned()),
            ],
        );
    }
    if let Some(network) = &machine.network {
        item(
            text,
            &[
                ("AddressOnParent", "7".to_owned()),
                ("AutomaticAllocation", "true".to_owned()),
                ("Connection", escaped(network)),
                ("ElementName", "Ethernet 1".to_owned()),
                ("InstanceID", (controllers + 3 + disks).to_string()),
                ("ResourceSubType", machine.adapter.clone()),
                ("ResourceType", "10".to_owned()),
            ],
        );
    }
}

fn item(text: &mut String, children: &[(&str, String)]) {
    text.push_str("      <Item>\n");
    for (name, value) in children {
        let _ = writeln!(text, "        <rasd:{name}>{value}</rasd:{name}>");
    }
    text.push_str("      </Item>\n");
}

fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}
