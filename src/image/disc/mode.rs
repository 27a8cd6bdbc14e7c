//! How the sectors of a track are stored.

use std::ops::Range;

use super::{Declared, Form, RAW, SUBCHANNEL};

/// How the sectors of a track are stored, in the words of CUE sheets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Sound.
    Audio,
    /// Sound, with the subchannels.
    Cdg,
    /// Mode 1: the data alone.
    Mode1Data,
    /// Mode 1: all of it.
    Mode1,
    /// Mode 2 form 1: the data alone.
    Mode2Form1,
    /// Mode 2 form 2: the data alone.
    Mode2Form2,
    /// Mode 2, from the subheader on.
    Mode2Data,
    /// Mode 2: all of it.
    Mode2,
    /// CD-i, from the subheader on.
    CdiData,
    /// CD-i: all of it.
    Cdi,
}

/// Every mode and its name.
const NAMES: [(&str, Mode); 10] = [
    ("AUDIO", Mode::Audio),
    ("CDG", Mode::Cdg),
    ("MODE1/2048", Mode::Mode1Data),
    ("MODE1/2352", Mode::Mode1),
    ("MODE2/2048", Mode::Mode2Form1),
    ("MODE2/2324", Mode::Mode2Form2),
    ("MODE2/2336", Mode::Mode2Data),
    ("MODE2/2352", Mode::Mode2),
    ("CDI/2336", Mode::CdiData),
    ("CDI/2352", Mode::Cdi),
];

impl Mode {
    /// By its name, whatever its case.
    pub fn named(name: &[u8]) -> Option<Self> {
        let mut names = NAMES.iter();
        let found = names.find(|(known, _)| known.as_bytes().eq_ignore_ascii_case(name));
        found.map(|(_, mode)| *mode)
    }

    /// The names there are.
    pub fn names() -> String {
        NAMES.map(|(name, _)| name).join(", ")
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        let mut names = NAMES.iter();
        names
            .find(|(_, mode)| *mode == self)
            .map_or("", |(name, _)| name)
    }

    /// Which bytes of a whole sector are stored.
    pub fn stored(self) -> Range<usize> {
        match self {
            Self::Audio | Self::Mode1 | Self::Mode2 | Self::Cdi => 0..RAW,
            Self::Cdg => 0..RAW + SUBCHANNEL,
            Self::Mode1Data => 16..2064,
            Self::Mode2Form1 => 24..2072,
            Self::Mode2Form2 => 24..2348,
            Self::Mode2Data | Self::CdiData => 16..RAW,
        }
    }

    /// Bytes that a sector is stored in.
    pub fn len(self) -> usize {
        self.stored().len()
    }

    /// Never.
    pub fn is_empty(self) -> bool {
        false
    }

    /// Whether it is sound.
    pub fn is_audio(self) -> bool {
        matches!(self, Self::Audio | Self::Cdg)
    }

    /// What the form of its sectors is; `None`: each says so itself.
    pub fn form(self) -> Option<Form> {
        match self {
            Self::Audio | Self::Cdg => Some(Form::Audio),
            Self::Mode1Data => Some(Form::Mode1),
            Self::Mode2Form1 => Some(Form::Form1),
            Self::Mode2Form2 => Some(Form::Form2),
            Self::Mode1 | Self::Mode2Data | Self::Mode2 | Self::CdiData | Self::Cdi => None,
        }
    }

    /// What it says of sectors that say themselves what they are.
    pub fn declared(self) -> Declared {
        match self {
            Self::Mode1 | Self::Mode1Data => Declared::Mode1,
            _ => Declared::Mode2,
        }
    }

    /// Whether sectors are stored with a header.
    pub fn has_header(self) -> bool {
        matches!(self, Self::Mode1 | Self::Mode2 | Self::Cdi)
    }
}
