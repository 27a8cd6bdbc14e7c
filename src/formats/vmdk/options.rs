//! The options of new disks.

use crate::error::{Error, Result};
use crate::formats::vmdk::header::SECTOR;
use crate::image::create::{CreateOptions, PREALLOCATION};
use crate::image::options::{OptionKind, OptionSpec};

/// What `-o` takes.
pub(super) const OPTIONS: &[OptionSpec] = &[
    SUBFORMAT,
    ADAPTER,
    HARDWARE,
    TOOLS,
    COMPAT6,
    GRAIN_SIZE,
    ZEROED_GRAIN,
    PREALLOCATION,
];

/// Effort of compression unless another is asked for: grains become shorter by it than by zlib's own
/// default, in less time than at 6.
pub(super) const LEVEL: u64 = 5;

/// What it takes beside them where data is compressed.
pub(super) const COMPRESSION: &[OptionSpec] = &[OptionSpec {
    name: "compression_level",
    kind: OptionKind::Number,
    default: "5",
    help: "effort of compression in a streamOptimized disk, 1 to 12",
}];

pub(super) const SUBFORMAT_NAMES: &[&str] = &[
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
];

pub(super) const SUBFORMAT: OptionSpec = OptionSpec {
    name: "subformat",
    kind: OptionKind::Choice(SUBFORMAT_NAMES),
    default: "monolithicSparse",
    help: "how the disk is kept: in grains or flat, in one file or in parts, compressed for transport, as on ESX",
};

const ADAPTER: OptionSpec = OptionSpec {
    name: "adapter_type",
    kind: OptionKind::Choice(&["ide", "lsilogic", "buslogic", "legacyESX"]),
    default: "",
    help: "the controller that the descriptor names [ide; lsilogic for vmfs and vmfsSparse]",
};

const HARDWARE: OptionSpec = OptionSpec {
    name: "hwversion",
    kind: OptionKind::Text,
    default: "4",
    help: "the version of virtual hardware that the descriptor names, 1 to 99",
};

const TOOLS: OptionSpec = OptionSpec {
    name: "toolsversion",
    kind: OptionKind::Number,
    default: "2147483647",
    help: "the version of VMware Tools that the descriptor names; 2147483647: not managed",
};

const COMPAT6: OptionSpec = OptionSpec {
    name: "compat6",
    kind: OptionKind::Bool,
    default: "off",
    help: "as qemu-img has it: on stands for hwversion=6",
};

const GRAIN_SIZE: OptionSpec = OptionSpec {
    name: "grain_size",
    kind: OptionKind::Size,
    default: "64k",
    help: "unit of allocation, a power of two from 4k to 64M, in a stream to 2M, in parts to 1M, in vmfsSparse from 512 [512] to 1M",
};

const ZEROED_GRAIN: OptionSpec = OptionSpec {
    name: "zeroed_grain",
    kind: OptionKind::Bool,
    default: "off",
    help: "entries that say that a grain is zero; VirtualBox does not read such disks",
};

/// Kinds of disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subformat {
    Sparse,
    Flat,
    SplitSparse,
    SplitFlat,
    Stream,
    Vmfs,
    VmfsSparse,
}

impl Subformat {
    const ALL: [Self; 7] = [
        Self::Sparse,
        Self::Flat,
        Self::SplitSparse,
        Self::SplitFlat,
        Self::Stream,
        Self::Vmfs,
        Self::VmfsSparse,
    ];

    pub(super) fn of(options: &CreateOptions) -> Result<Self> {
        let name = options.values.text("subformat");
        let name = name.unwrap_or(SUBFORMAT.default);
        let mut all = Self::ALL.iter().zip(SUBFORMAT_NAMES);
        let found = all.find(|(_, other)| **other == name);
        found.map(|(kind, _)| *kind).ok_or_else(|| {
            let allowed = SUBFORMAT_NAMES.join(", ");
            Error::invalid(format!("subformat is '{name}' (allowed: {allowed})"))
        })
    }

    /// As the descriptor has it.
    pub(super) fn name(self) -> &'static str {
        let mut all = Self::ALL.iter().zip(SUBFORMAT_NAMES);
        all.find(|(kind, _)| **kind == self)
            .map_or("", |(_, name)| *name)
    }

    pub(super) fn is_flat(self) -> bool {
        matches!(self, Self::Flat | Self::SplitFlat | Self::Vmfs)
    }

    /// Whether the descriptor lies in the only file.
    pub(super) fn is_inside(self) -> bool {
        matches!(self, Self::Sparse | Self::Stream)
    }
}

/// Controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Adapter {
    Ide,
    Scsi(&'static str),
}

impl Adapter {
    pub(super) fn of(options: &CreateOptions, subformat: Subformat) -> Result<Self> {
        let default = match subformat {
            Subformat::Vmfs | Subformat::VmfsSparse => "lsilogic",
            _ => "ide",
        };
        match options.values.text("adapter_type").unwrap_or(default) {
            "ide" => Ok(Self::Ide),
            "lsilogic" => Ok(Self::Scsi("lsilogic")),
            "buslogic" => Ok(Self::Scsi("buslogic")),
            "legacyESX" => Ok(Self::Scsi("legacyESX")),
            other => Err(Error::invalid(format!("adapter_type is '{other}'"))),
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::Scsi(name) => name,
        }
    }

    /// Cylinders, heads and sectors of a disk of so many bytes.
    pub(super) fn geometry(self, size: u64) -> [u64; 3] {
        const GIB: u64 = 1 << 30;
        let sectors = size / SECTOR;
        let (heads, per_track, most) = match self {
            Self::Ide => (16, 63, 16_383),
            Self::Scsi(_) if size < GIB => (64, 32, u64::MAX),
            Self::Scsi(_) if size < 2 * GIB => (128, 32, u64::MAX),
            Self::Scsi(_) => (255, 63, u64::MAX),
        };
        [(sectors / (heads * per_track)).min(most), heads, per_track]
    }
}

/// The grain size that was asked for.
///
/// # Errors
/// `Invalid` for one that is not made.
pub(super) fn grain(options: &CreateOptions) -> Result<Option<u64>> {
    let Some(size) = options.values.number("grain_size") else {
        return Ok(None);
    };
    let allowed = match Subformat::of(options)? {
        Subformat::VmfsSparse => SECTOR..=1 << 20,
        Subformat::Stream => 4 << 10..=2 << 20,
        // Parts have 2047 MiB, which are to be whole grains.
        Subformat::SplitSparse => 4 << 10..=1 << 20,
        _ => 4 << 10..=64 << 20,
    };
    match size.is_power_of_two() && allowed.contains(&size) {
        true => Ok(Some(size)),
        false => Err(Error::invalid(format!(
            "grain_size is {size} (allowed: a power of two from {} to {})",
            allowed.start(),
            allowed.end()
        ))),
    }
}

/// The version of virtual hardware.
///
/// # Errors
/// `Invalid` for what is no version.
pub(super) fn hardware(options: &CreateOptions) -> Result<String> {
    let given = options.values.text("hwversion");
    let old = options.values.bool("compat6") == Some(true);
    let version = match (given, old) {
        (Some(given), true) if given != "6" => {
            return Err(Error::invalid(
                "compat6=on and hwversion contradict each other",
            ));
        }
        (_, true) => "6",
        // As qemu-img has it.
        (None | Some("undefined"), false) => "4",
        (Some(given), false) => given,
    };
    match version.parse::<u8>() {
        Ok(1..=99) => Ok(version.to_owned()),
        _ => Err(Error::invalid(format!(
            "hwversion is '{version}' (allowed: 1 to 99)"
        ))),
    }
}

/// The version of the tools.
pub(super) fn tools(options: &CreateOptions) -> String {
    let version = options.values.number("toolsversion");
    version.unwrap_or(2_147_483_647).to_string()
}
