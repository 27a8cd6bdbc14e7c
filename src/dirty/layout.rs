//! What the files of logs have in common: a head, and a bitmap of which bit 0 of byte 0 is region 0.

use uuid::Uuid;

use crate::dirty::regions::Geometry;

/// Whose format a log is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Our own.
    Own,
    /// That of device-mapper's disk log and of cmirrord, by its magic `MiRr`.
    Mirror,
    /// That of XenServer's changed block tracking.
    Cbt,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Own, Self::Mirror, Self::Cbt];

    /// The name that users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Own => "vdtool",
            Self::Mirror => "mirr",
            Self::Cbt => "cbt",
        }
    }
}

/// What a log says of its last writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// It closed the log, or no such thing is recorded.
    Closed,
    /// It did not, or has not yet: all that changed is marked, and perhaps more.
    Open,
    /// It did not, and what changed may not be marked: where marks were not made durable.
    Lost,
}

/// What a head says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) kind: Kind,
    pub(super) geometry: Geometry,
    /// Offset of the bitmap in the file.
    pub(super) bitmap: u64,
    /// Whether a set bit is a clean region.
    pub(super) inverted: bool,
    pub(super) usage: Usage,
    /// The disk it is of.
    pub(super) disk: Option<Uuid>,
    /// What was before it, and what comes after: of CBT.
    pub(super) links: Option<[Uuid; 2]>,
}
