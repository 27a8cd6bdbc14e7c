//! The virtual machine of a new package.

use crate::container::tar::write::Flavour;
use crate::error::{Error, Result};
use crate::image::assemble::Plan;
use crate::image::options::{OptionKind, OptionSpec, OptionValues};
use crate::util::digest::Algorithm;
use crate::util::text::printable;

/// What `-o` takes.
pub(super) const OPTIONS: &[OptionSpec] = &[
    row(
        "name",
        OptionKind::Text,
        "",
        "of the appliance and of its files [default: the target's]",
    ),
    row("cpus", OptionKind::Number, "1", "processors"),
    row("memory", OptionKind::Size, "1G", "memory, whole MiB"),
    row(
        "firmware",
        OptionKind::Choice(&["bios", "efi"]),
        "bios",
        "what the machine starts by",
    ),
    row(
        "controller",
        OptionKind::Choice(Controller::WORDS),
        "lsilogic",
        "what the disks hang on",
    ),
    row(
        "network",
        OptionKind::Text,
        "",
        "name of a network; none: the machine has no adapter",
    ),
    row(
        "adapter",
        OptionKind::Choice(&["E1000", "E1000e", "VmxNet3"]),
        "E1000",
        "its adapter",
    ),
    row(
        "os_type",
        OptionKind::Text,
        "other3xLinux64Guest",
        "operating system, by VMware's word",
    ),
    row(
        "hwversion",
        OptionKind::Number,
        "13",
        "family of virtual hardware: 4 to 22 (vmx-NN)",
    ),
    row(
        "manifest",
        OptionKind::Choice(&["sha256", "sha1", "sha512", "none"]),
        "sha256",
        "digests of the files",
    ),
    row(
        "tar",
        OptionKind::Choice(&["gnu", "posix"]),
        "gnu",
        "how sizes of 8 GiB and more are kept",
    ),
];

const fn row(
    name: &'static str,
    kind: OptionKind,
    default: &'static str,
    help: &'static str,
) -> OptionSpec {
    OptionSpec {
        name,
        kind,
        default,
        help,
    }
}

/// Most bytes of a name, of which others are made.
const MAX_NAME: usize = 80;
/// Most bytes of other texts.
const MAX_TEXT: usize = 200;
const MIB: u64 = 1 << 20;

/// What disks hang on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Lsilogic,
    Lsisas,
    Pvscsi,
    Buslogic,
    Ide,
    Sata,
    Nvme,
}

impl Controller {
    const WORDS: &'static [&'static str] = &[
        "lsilogic",
        "lsisas1068",
        "pvscsi",
        "buslogic",
        "ide",
        "sata",
        "nvme",
    ];

    fn of(word: &str) -> Self {
        match word {
            "lsisas1068" => Self::Lsisas,
            "pvscsi" => Self::Pvscsi,
            "buslogic" => Self::Buslogic,
            "ide" => Self::Ide,
            "sata" => Self::Sata,
            "nvme" => Self::Nvme,
            _ => Self::Lsilogic,
        }
    }

    /// The adapter that the disk's own description names.
    pub(super) fn adapter(self) -> &'static str {
        match self {
            Self::Ide | Self::Sata => "ide",
            Self::Buslogic => "buslogic",
            Self::Lsilogic | Self::Lsisas | Self::Pvscsi | Self::Nvme => "lsilogic",
        }
    }

    /// CIM's number of its kind, and VMware's word for it.
    pub(super) fn kind(self) -> (u32, Option<&'static str>) {
        match self {
            Self::Lsilogic => (6, Some("lsilogic")),
            Self::Lsisas => (6, Some("lsilogicsas")),
            Self::Pvscsi => (6, Some("VirtualSCSI")),
            Self::Buslogic => (6, Some("buslogic")),
            Self::Ide => (5, None),
            Self::Sata => (20, Some("vmware.sata.ahci")),
            Self::Nvme => (20, Some("vmware.nvme.controller")),
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Lsilogic | Self::Lsisas | Self::Pvscsi | Self::Buslogic => "SCSI Controller",
            Self::Ide => "IDE Controller",
            Self::Sata => "SATA Controller",
            Self::Nvme => "NVMe Controller",
        }
    }

    /// Units of one controller that disks may have.
    fn units(self) -> &'static [u32] {
        match self {
            // The controller itself is the seventh.
            Self::Lsilogic | Self::Lsisas | Self::Pvscsi | Self::Buslogic => {
                &[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15]
            }
            Self::Ide => &[0, 1],
            Self::Sata => &[
                0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22,
                23, 24, 25, 26, 27, 28, 29,
            ],
            Self::Nvme => &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
        }
    }

    fn most_controllers(self) -> usize {
        match self {
            Self::Ide => 2,
            _ => 4,
        }
    }

    /// The controller and the unit of the disk with this number.
    pub(super) fn place(self, disk: usize) -> (usize, u32) {
        let units = self.units();
        let unit = units.get(disk % units.len()).copied();
        (disk / units.len(), unit.unwrap_or_default())
    }

    fn most_disks(self) -> usize {
        self.units().len() * self.most_controllers()
    }
}

/// The `controller` option.
pub(super) fn controller(values: &OptionValues) -> Controller {
    Controller::of(values.text("controller").unwrap_or_default())
}

/// What is asked for.
#[derive(Debug, Clone)]
pub(super) struct Machine {
    pub(super) name: String,
    pub(super) cpus: u64,
    /// In MiB.
    pub(super) memory: u64,
    pub(super) efi: bool,
    pub(super) controller: Controller,
    pub(super) network: Option<String>,
    pub(super) adapter: String,
    pub(super) os_type: String,
    pub(super) hardware: u64,
    pub(super) manifest: Option<Algorithm>,
    pub(super) flavour: Flavour,
}

impl Machine {
    pub(super) fn of(plan: &Plan<'_>) -> Result<Self> {
        let values = plan.values;
        let text = |key: &str, default: &str| values.text(key).unwrap_or(default).to_owned();
        let machine = Self {
            name: name(plan)?,
            cpus: within("cpus", values.number("cpus").unwrap_or(1), 1..=1024)?,
            memory: memory(values.number("memory").unwrap_or(1 << 30))?,
            efi: values.text("firmware") == Some("efi"),
            controller: controller(values),
            network: values
                .text("network")
                .filter(|n| !n.is_empty())
                .map(str::to_owned),
            adapter: text("adapter", "E1000"),
            os_type: text("os_type", "other3xLinux64Guest"),
            hardware: within(
                "hwversion",
                values.number("hwversion").unwrap_or(13),
                4..=22,
            )?,
            manifest: Algorithm::of(values.text("manifest").unwrap_or("sha256")),
            flavour: match values.text("tar") {
                Some("posix") => Flavour::Pax,
                _ => Flavour::Gnu,
            },
        };
        for (key, text) in [
            ("os_type", Some(&machine.os_type)),
            ("network", machine.network.as_ref()),
        ] {
            if let Some(text) = text
                && (text.is_empty() || text.len() > MAX_TEXT || text.chars().any(char::is_control))
            {
                return Err(Error::invalid(format!(
                    "option '{key}' is '{}' (allowed: 1 to {MAX_TEXT} bytes of text)",
                    printable(text)
                )));
            }
        }
        let most = machine.controller.most_disks();
        if plan.description.is_none() && plan.disks.len() > most {
            return Err(Error::invalid(format!(
                "{} disks (allowed on this kind of controller: {most})",
                plan.disks.len()
            )));
        }
        if machine.controller == Controller::Nvme && machine.hardware < 13 {
            return Err(Error::invalid(format!(
                "controller=nvme goes with hwversion 13 and more (found: {})",
                machine.hardware
            )));
        }
        Ok(machine)
    }

    pub(super) fn disk_name(&self, number: usize) -> String {
        format!("{}-disk{}.vmdk", self.name, number + 1)
    }
}

/// Refuses options that describe a machine, where the user has a description.
pub(super) fn refuse_description(values: &OptionValues) -> Result<()> {
    let numbers = ["cpus", "memory", "hwversion"];
    let texts = ["firmware", "network", "adapter", "os_type"];
    let number = numbers.iter().find(|key| values.number(key).is_some());
    match number.or_else(|| texts.iter().find(|key| values.text(key).is_some())) {
        None => Ok(()),
        Some(key) => Err(Error::invalid(format!(
            "option '{key}' describes the machine, which a descriptor of one's own does (allowed \
             with it: name, controller, manifest, tar)"
        ))),
    }
}

fn within(key: &str, value: u64, allowed: std::ops::RangeInclusive<u64>) -> Result<u64> {
    match allowed.contains(&value) {
        true => Ok(value),
        false => Err(Error::invalid(format!(
            "option '{key}' is {value} (allowed: {} to {})",
            allowed.start(),
            allowed.end()
        ))),
    }
}

fn memory(bytes: u64) -> Result<u64> {
    match bytes.is_multiple_of(MIB) {
        true => within("memory", bytes / MIB, 4..=1 << 24),
        false => Err(Error::invalid(format!(
            "option 'memory' is {bytes} bytes (allowed: whole MiB)"
        ))),
    }
}

/// The name that was given, else that of the file, with what importers trip over left out.
fn name(plan: &Plan<'_>) -> Result<String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if let Some(name) = plan.values.text("name").filter(|name| !name.is_empty()) {
        if name.len() > MAX_NAME || name.starts_with(['.', '-']) || !name.chars().all(is_plain) {
            return Err(Error::invalid(format!(
                "option 'name' is '{}' (allowed: 1 to {MAX_NAME} of A-Z a-z 0-9 . _ -, the first \
                 no dot and no dash)",
                printable(name)
            )));
        }
        return Ok(name.to_owned());
    }
    let stem = plan.stem.unwrap_or_default().trim_start_matches(['.', '-']);
    let plain = |c: char| if is_plain(c) { c } else { '_' };
    let name: String = stem.chars().map(plain).take(MAX_NAME).collect();
    Ok(match name.is_empty() {
        true => "appliance".to_owned(),
        false => name,
    })
}
